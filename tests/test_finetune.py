"""``finetune``: what it promises of the network, the caller's things, and the numbers of a run."""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import normsurgeon as ns
from normsurgeon.data.sources import ImageSource
from normsurgeon.errors import DataError, TrainingError, UsageError
from normsurgeon.finetuning.watching import FirstUpdates

STEADY = {"sched": "constant", "warmup_epochs": 0.0, "device": "cpu"}


def converted(model, to):
    return ns.convert(model, to=to, example_inputs=torch.zeros(1, 3, 32, 32, dtype=next(model.parameters()).dtype))


def images(count=16, size=12, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count=16, classes=10):
    return torch.arange(count) % classes


def weights_of(model):
    return {key: value for key, value in model.state_dict().items() if value.is_floating_point()}


def differ_at_most(one, other):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(one.values(), other.values(), strict=True))


def test_a_conversion_is_recovered_without_labels_and_the_callers_things_stay_as_they_are(convnet, tmp_path):
    convnet.bn1.requires_grad_(False)
    result = converted(convnet, "gn")
    given = result.model
    before = copy.deepcopy((given.state_dict(), convnet.state_dict()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    tuned = ns.finetune(result, [(images(), None)], [(images(seed=1), None)], steps=30, lr=3e-3, device="cpu")
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    for now, then in zip((given, convnet), before, strict=True):
        assert all(torch.equal(value, then[key]) for key, value in now.state_dict().items())
    assert isinstance(tuned, ns.Conversion)
    assert result.history == []
    assert tuned.model is not result.model
    assert tuned.history[-1].after.kl < 0.7 * tuned.history[-1].before.kl
    assert not any(m._forward_hooks for net in (convnet, tuned.model) for m in net.modules())
    assert [p.requires_grad for p in tuned.model.parameters()] == [p.requires_grad for p in given.parameters()]
    assert torch.equal(tuned.model.bn1.weight, given.bn1.weight)
    assert tuned.original is convnet
    event = tuned.history[-1].to_dict()
    assert (event["event"], event["steps"], event["settings"]["lr"]) == ("finetune", 30, 3e-3)
    assert json.loads(json.dumps(event)) == event
    path = ns.save(tuned, tmp_path / "gn.safetensors", on_message=lambda text: None)
    loaded = ns.load(path, model=convnet)
    assert torch.equal(loaded(images()), tuned.model.eval()(images()))


def test_one_update_of_sgd_is_the_formula(convnet):
    net = converted(convnet, "ln").model.double().train()
    x, y = images(dtype=torch.float64), labels()
    by_hand = copy.deepcopy(net)
    nn.functional.cross_entropy(by_hand(x), y).backward()
    plain = {"opt": "momentum", "momentum": 0.0, "weight_decay": 0, "clip_grad": None}
    tuned = ns.finetune(net, [(x, y)], steps=1, lr=0.1, **plain, **STEADY)
    for (name, p), q in zip(by_hand.named_parameters(), tuned.model.parameters(), strict=True):
        assert torch.allclose(p - 0.1 * p.grad, q, atol=1e-12), name
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm().item()
    assert tuned.history[-1].curves.steps[0]["grad_norm"] == pytest.approx(norm)


def test_micro_batches_add_up_to_the_batch(convnet):
    result = converted(convnet.double(), "gn")
    batches = [(images(dtype=torch.float64), labels())]
    runs = [
        ns.finetune(replace(result), batches, steps=3, grad_accum=parts, features=1.0, opt="sgd", **STEADY)
        for parts in (1, 3, 16)
    ]
    for other in runs[1:]:
        assert differ_at_most(weights_of(runs[0].model), weights_of(other.model)) < 1e-12
        assert other.history[-1].curves.steps[-1]["loss"] == pytest.approx(runs[0].history[-1].curves.steps[-1]["loss"])


class Small(nn.Module):
    """A device that holds no more than so many images."""

    def __init__(self, net, most):
        super().__init__()
        self.net, self.most, self.num_classes = net, most, 10

    def forward(self, x):
        if len(x) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
        return self.net(x)


@pytest.mark.long
def test_when_memory_runs_out_the_micro_batch_is_halved_and_the_effective_batch_kept(convnet):
    net = converted(convnet.double(), "gn").model
    batches, said = [(images(dtype=torch.float64), labels())], []
    held = ns.finetune(Small(net, 5), batches, steps=3, opt="sgd", on_message=said.append, **STEADY)
    whole = ns.finetune(Small(net, 99), batches, steps=3, opt="sgd", **STEADY)
    assert said == [
        "out of memory with 16 images at once: going on with 8, and the same 16 an update",
        "out of memory with 8 images at once: going on with 4, and the same 16 an update",
    ]
    assert differ_at_most(weights_of(held.model), weights_of(whole.model)) < 1e-12
    with pytest.raises(TrainingError, match=r"^out of memory with one image at once on cpu; try a smaller "):
        ns.finetune(Small(net, 0), batches, steps=3, on_message=said.append, device="cpu", ce=1)


def test_when_memory_runs_out_in_a_validation_smaller_micro_batches_are_not_tried(convnet):
    class Evaluated(Small):
        def forward(self, x):
            self.most = 99 if self.training or len(x) == 1 or self.calls < 1 else 3
            self.calls += not self.training
            return super().forward(x)

    net = Evaluated(converted(convnet, "gn").model, 99)
    net.calls = 0
    batches = [(images(), labels())]
    with pytest.raises(TrainingError, match=r"^out of memory while validating; try batch_size below 16$"):
        ns.finetune(net, batches, batches, steps=3, batch_size=16, device="cpu")


def test_the_moving_average_is_timms(convnet):
    net = converted(convnet.double(), "ln").model
    batches = [(images(dtype=torch.float64), labels())]
    raw = [weights_of(ns.finetune(net, batches, steps=n, lr=1e-2, **STEADY).model) for n in (1, 2, 3)]
    kept = weights_of(ns.finetune(net, batches, steps=3, lr=1e-2, ema=0.5, **STEADY).model)
    decays = [0.0, min(0.5, 1 - 2 ** (-2 / 3)), min(0.5, 1 - 3 ** (-2 / 3))]  # ModelEmaV3 with warm-up
    for key, value in kept.items():
        average = raw[0][key]
        for weights, decay in zip(raw, decays, strict=True):
            average = decay * average + (1 - decay) * weights[key]
        assert torch.allclose(value, average, atol=1e-12)


def test_the_best_network_on_the_validation_images_is_the_one_that_comes_back(convnet):
    net = converted(convnet, "ln").model
    data = [(images(), labels())]
    tuned = ns.finetune(net, data, data, epochs=12, batch_size=16, lr=0.02, **STEADY)
    rows = tuned.history[-1].curves.epochs
    assert [row["step"] for row in rows] == list(range(13))
    best = max(rows, key=lambda row: (row["top1"], -row["loss"]))
    assert tuned.history[-1].best["step"] == best["step"]
    again = ns.evaluate(tuned.model, data)
    assert (again.top1, again.loss) == (pytest.approx(best["top1"]), pytest.approx(best["loss"]))
    assert (tuned.history[-1].after.top1, tuned.history[-1].after.loss) == (best["top1"], best["loss"])
    assert tuned.history[-1].before.loss == pytest.approx(ns.evaluate(net, data).loss)


def test_a_run_that_only_makes_it_worse_gives_the_network_back_as_it_was(convnet):
    result = converted(convnet, "ln")
    given = result.model
    data = [(images(), None)]
    tuned = ns.finetune(result, data, data, steps=2, lr=10.0, **STEADY)
    assert tuned.history[-1].best["step"] == 0
    assert tuned.history[-1].after.kl == tuned.history[-1].before.kl < tuned.history[-1].curves.epochs[-1]["kl"]
    assert all(torch.equal(p, q) for p, q in zip(tuned.model.parameters(), given.parameters(), strict=True))


def test_only_what_was_asked_for_trains(convnet):
    net = converted(convnet, "gn").model
    tuned = ns.finetune(net, [(images(), labels())], steps=2, train_what="norms", device="cpu").model
    moved = {n for (n, p), q in zip(net.named_parameters(), tuned.parameters(), strict=True) if not torch.equal(p, q)}
    assert moved == {f"bn{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}


def test_a_new_head_learns_other_classes_and_the_network_loads(tmp_path):
    torch.manual_seed(0)
    result = ns.convert(
        timm.create_model("test_resnet"),
        to="gn",
        balance=False,
        example_inputs=torch.zeros(2, 3, 32, 32),
        verdict=False,
    )
    x = torch.randn(8, 3, 32, 32)
    tuned = ns.finetune(result, [(x, labels(8, 3))], num_classes=3, steps=2, device="cpu")
    assert tuned.model(x).shape == (8, 3)
    assert "kl" not in tuned.history[-1].curves.steps[0]
    loaded = ns.load(ns.save(tuned, tmp_path / "three.safetensors"))
    assert torch.equal(loaded(x), tuned.model.eval()(x))


def test_every_regulariser_runs_and_is_in_the_history(convnet):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    result = ns.convert(model, to="gn", balance=False, example_inputs=torch.zeros(2, 3, 32, 32), verdict=False)
    x = torch.randn(8, 3, 32, 32)
    given = result.model
    tuned = ns.finetune(
        result,
        [(x, labels(8))],
        steps=2,
        mixup=0.5,
        cutmix=0.5,
        smoothing=0.1,
        drop=0.2,
        drop_path=0.1,
        distance=0.1,
        distance_layers="layer?.0",
        features=0.5,
        temperature=2.0,
        layer_decay=0.8,
        precision="bf16",
        channels_last=True,
        device="cpu",
    )
    row = tuned.history[-1].curves.steps[0]
    parts = 1.0 * row["ce"] + 1.0 * row["kl"] + 0.5 * row["features"] + 0.1 * row["distance"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert 0 < row["distance"] <= 1
    assert tuned.model.drop_rate == given.drop_rate
    assert [type(m) for m in tuned.model.modules()] == [type(m) for m in given.modules()]


def test_the_distance_term_moves_the_features_of_layers_apart(convnet):
    net = converted(convnet, "gn").model
    data = [(images().abs(), labels())]
    similarity = [
        ns.finetune(net, data, steps=30, lr=3e-3, distance=weight, distance_layers="bn[13]", **STEADY)
        .history[-1]
        .curves.steps[-1]
        .get("distance")
        for weight in (1e-9, 20.0)
    ]
    assert similarity[1] < similarity[0] - 0.02


def test_an_image_that_cannot_be_read_is_named_and_another_stands_in(convnet, tmp_path):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    result = converted(convnet, "gn")
    tuned = ns.finetune(result, str(tmp_path), steps=2, batch_size=4, device="cpu")
    assert tuned.history[-1].skipped == ("2.png",)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^none of the 4 images of \S+ can be read; the last one: "):
        ns.finetune(result, str(tmp_path), steps=2, device="cpu")


def test_a_loss_that_is_not_finite_stops_the_run_where_it_began_and_keeps_the_last_state(convnet, tmp_path):
    net = converted(convnet, "gn").model
    net.bn1.weight.data[0] = float("nan")
    with pytest.raises(
        TrainingError,
        match=r"^the loss is not finite at update 1 of 5; it began in the output of bn1 \(GroupNorm\); try a lear",
    ):
        ns.finetune(net, [(images(), labels())], steps=5, device="cpu")
    net.bn1.weight.data[0] = 1.0
    broken = images()
    broken[3, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match=r"^image 3 of the batches \(counted from 0\) holds values that are not finite"):
        ns.finetune(net, [(broken, labels())], steps=5, device="cpu")
    folder = tmp_path / "run"
    with pytest.raises(
        TrainingError,
        match=r"^the loss is not finite at update \d of 5; it began in .*; the state after update \d is kept",
    ) as caught:
        ns.finetune(
            net,
            [(images(), labels())],
            steps=5,
            opt="sgd",
            lr=1e20,
            clip_grad=None,
            output=folder,
            checkpoint_minutes=0,
            device="cpu",
            warmup_epochs=0,
        )
    state = torch.load(folder / "state.pt", weights_only=True)
    assert f"after update {state['step']} is kept" in str(caught.value)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_no_hook_is_left_behind_after_an_error(convnet):
    result = converted(convnet, "gn")
    training = [m.training for m in convnet.modules()]
    result.model.bn1.weight.data[0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        ns.finetune(result, [(images(), labels())], steps=2, features=1.0, device="cpu")
    assert not any(m._forward_hooks for net in (convnet, result.model) for m in net.modules())
    assert [m.training for m in convnet.modules()] == training


def test_tensorboard_gets_the_curves(convnet, tmp_path):
    pytest.importorskip("tensorboard")
    net = converted(convnet, "gn").model
    data = [(images(), labels())]
    ns.finetune(net, data, data, steps=2, trackers=("tensorboard",), output=tmp_path, device="cpu")
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_source_and_batches_are_both_data(convnet):
    from normsurgeon.data.sources import open_source

    source = open_source("digits", split="test")
    assert isinstance(source, ImageSource)
    convnet.pretrained_cfg = {"input_size": (3, 12, 12), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    tuned = ns.finetune(convnet, source, "digits", steps=2, device="cpu")
    assert tuned.history[-1].after.images == 360


def test_the_last_network_is_given_where_none_is_to_be_picked(convnet, tmp_path):
    train = [(images(), labels())]
    with torch.no_grad():
        val = [(images(), convnet(images()).argmax(1))]  # right at the start
    ruined = {"steps": 20, "lr": 0.05, "opt": "sgd", **STEADY}
    best = ns.finetune(convnet, train, val, **ruined)
    last = ns.finetune(convnet, train, val, keep="last", output=tmp_path, **ruined)
    assert best.history[-1].best["step"] == 0
    assert last.history[-1].best is None
    assert last.history[-1].after.loss > best.history[-1].after.loss
    assert last.history[-1].after.loss == pytest.approx(ns.evaluate(last.model, val).loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "last.safetensors", "state.pt"]


class Noisy(torch.utils.data.Dataset):
    """Somebody's data set, with an augmentation of its own."""

    def __init__(self, count=16):
        self.images, self.targets = images(count), labels(count).tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(3, 12, 12), self.targets[index]


def test_a_torch_dataset_trains_and_its_randomness_is_the_runs(convnet):
    settings = {"steps": 4, "batch_size": 8, "lr": 1e-3, "device": "cpu"}
    torch.manual_seed(1)
    first = ns.finetune(convnet, Noisy(), Noisy(), **settings)
    torch.manual_seed(2)
    second = ns.finetune(convnet, Noisy(), **settings)
    assert first.history[-1].curves.column("loss") == second.history[-1].curves.column("loss")
    assert first.history[-1].after.images == 16
    plain = ns.finetune(convnet, [(Noisy().images, labels())], **settings)
    assert plain.history[-1].curves.column("loss") != first.history[-1].curves.column("loss")


def test_a_dataset_is_checked_before_it_trains(convnet):
    wrong = Noisy()
    wrong.targets[3] = 10
    with pytest.raises(DataError, match="label 10"):
        ns.finetune(convnet, wrong, steps=1, device="cpu")
    with pytest.raises(DataError, match=r"^the data set Noisy is empty; try another split$"):
        ns.finetune(convnet, Noisy(0), steps=1, device="cpu")
    raw = Noisy()
    raw.images = [str(number) for number in range(16)]
    raw.__class__ = type("Raw", (Noisy,), {"__getitem__": lambda self, index: (self.images[index], 0)})
    with pytest.raises(
        UsageError, match=r"^the data set gives a str as image \d+; give it a transform that makes tensors$"
    ):
        ns.finetune(convnet, raw, steps=1, device="cpu")


def test_first_updates_that_raise_the_loss_many_times_over_name_a_rate_to_try(convnet):
    net, said = converted(convnet, "gn").model, []
    with torch.no_grad():
        net.head.weight.mul_(20)
        x = images()
        data = [(x, net.eval()(x).argmax(1))]  # its own answers: the loss is small at first
    ns.finetune(net, data, steps=25, lr=0.1, opt="momentum", clip_grad=None, on_message=said.append, **STEADY)
    warnings = [line for line in said if "the loss rose" in line]
    assert len(warnings) == 1
    assert re.fullmatch(
        r"the loss rose from 0\.\d+ to \S+ in the first 9 updates: the learning rate is too high for this network; "
        r"try lr=0\.03 \(--lr 0\.03\), or a longer warm-up",
        warnings[0],
    )


@pytest.mark.parametrize(
    ("losses", "risen"),
    [
        ([1.0] * 8 + [4.0] * 8, True),
        ([1.0] * 8 + [2.5] * 40, False),
        ([0.001] * 8 + [0.4] * 40, False),  # still small
        ([1.0, 9.0] * 30, False),  # single batches vary
        ([9.0] * 8 + [2.3] * 30, False),
        ([1.0] * 200 + [9.0] * 20, False),  # no longer the first
    ],
)
def test_only_a_rise_of_the_mean_loss_in_the_first_updates_counts(losses, risen):
    updates = FirstUpdates(2)
    found = [rise for step, loss in enumerate(losses, 1) if (rise := updates.add(step, loss)) is not None]
    assert len(found) == risen
