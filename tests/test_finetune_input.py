"""Bad input: one clear line each, before anything is trained or written."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import put

import normsurgeon as ns
from normsurgeon.data.sources import ImageSource, open_source
from normsurgeon.errors import DataError, PatternError, UsageError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


def batch(count=4, labels=(0, 1, 2, 3)):
    return [(torch.randn(count, 3, 32, 32), None if labels is None else torch.tensor(labels))]


def tune(net, data, **settings):
    return ns.finetune(net, data, **{"steps": 1, "device": "cpu", **settings})


@pytest.mark.parametrize("label", [10, 77])
def test_a_label_outside_the_heads_classes(net, label):
    with pytest.raises(
        DataError,
        match=rf"^there is a label {label}, and the network's 10 classes are 0 to 9; num_classes={label + 1} "
        rf"\(--num-classes {label + 1}\) resets the head$",
    ):
        tune(net, batch(labels=(0, 1, 2, label)))
    with pytest.raises(DataError, match=r"^there is a label -2, and the network's 10 classes are 0 to 9$"):
        tune(net, batch(labels=(0, 1, 2, -2)))


def test_a_label_that_only_reading_shows(net):
    class Reader:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return open_source("digits")[0][0], 12

    with pytest.raises(
        DataError, match=r"^there is a label 12, and the network's 10 classes are 0 to 9; num_classes=13 "
    ):
        tune(net, ImageSource("odd", Reader(), True))


def test_data_of_another_number_of_classes_offers_to_reset_the_head(tmp_path):
    wide = timm.create_model("test_resnet")
    text = (
        r"^digits has 10 classes and the network 1000, and the names do not .* a new head \(finetune --num-classes 10\)"
    )
    with pytest.raises(DataError, match=text):
        tune(wide, "digits")
    for name in ("cat", "dog", "eel"):
        put(tmp_path / name / "1.png")
    narrow = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(DataError, match=r"^\S+ has 3 classes and the network 2; .*num_classes=3 \(finetune --num-"):
        tune(narrow, str(tmp_path))
    assert tune(narrow, str(tmp_path), num_classes=3).model.num_classes == 3


def test_held_out_images_get_the_numbers_of_the_training_images_classes(tmp_path):
    for number, name in enumerate(("cat", "dog", "eel")):
        put(tmp_path / "train" / name / "1.png", 100 * number)
    put(tmp_path / "val" / "eel" / "1.png", 200)
    net = timm.create_model("test_resnet", num_classes=3)
    with torch.no_grad():
        net.get_classifier().weight.zero_()
        net.get_classifier().bias.copy_(torch.tensor([0.0, 0.0, 9.0]))  # always an eel
    tuned = ns.finetune(net, str(tmp_path), str(tmp_path), steps=1, lr=1e-9, device="cpu")
    assert tuned.history[-1].before.top1 == 1.0
    put(tmp_path / "val" / "fox" / "1.png")
    with pytest.raises(DataError, match=r"mixes classes of the network \(eel\) with others \(fox\); try moving fox"):
        ns.finetune(net, str(tmp_path), str(tmp_path), steps=1, device="cpu")


def test_an_image_of_a_dataset_that_is_not_finite_is_named(net):
    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.full((3, 32, 32), float("nan") if index == 2 else 0.0), 0

    with pytest.raises(DataError, match=r"^image 2 of the batches \(counted from 0\) holds values that are not finite"):
        tune(net, Items(), batch_size=4)


def test_synset_folders_are_part_of_imagenet_and_no_mismatch(tmp_path):
    for name in ("n01440764", "n01484850"):
        put(tmp_path / name / "1.png")
    assert tune(timm.create_model("test_resnet"), str(tmp_path)).history[-1].steps == 1


def test_an_empty_split(net, tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"^\S+ holds no images \("):
        tune(net, str(tmp_path))
    with pytest.raises(
        DataError, match=r"^there are no images to train on; the batches are empty \(was an iterator used"
    ):
        tune(net, [])
    with pytest.raises(DataError, match=r"^there are no images to evaluate on; the batches are empty"):
        ns.finetune(net, batch(), [], steps=1, device="cpu")


def test_a_folder_in_splits_gives_its_training_and_its_held_out_part(net, tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in range(10):
            for number in range(count):
                put(tmp_path / split / str(name) / f"{number}.png")
    tuned = ns.finetune(net, str(tmp_path), str(tmp_path), steps=1, batch_size=30, device="cpu")
    assert (tuned.history[-1].images, tuned.history[-1].after.images) == (30, 20)


def test_a_stream_has_no_order_to_shuffle(net):
    class Stream:
        def __iter__(self):
            yield from ()

    with pytest.raises(
        DataError, match=r"^wds/x is a stream: its images have no numbers to shuffle; try a folder or a "
    ):
        tune(net, ImageSource("wds/x", Stream(), True))


def test_a_teacher_of_another_architecture_or_with_other_classes(net):
    other = timm.create_model("test_efficientnet", num_classes=10)
    with pytest.raises(
        UsageError,
        match=r"^the teacher test_efficientnet is of another architecture: blocks\.0\.0\.conv\.weight is 16×24×3×3 "
        r"there and missing in the network; try the batch norm original$",
    ):
        tune(net, batch(), teacher=other)
    with pytest.raises(
        UsageError,
        match=r"^the teacher test_resnet has 7 classes and the network 10; try a teacher with the same head, o",
    ):
        tune(net, batch(), teacher=timm.create_model("test_resnet", num_classes=7))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(net):
    with pytest.raises(
        UsageError, match=r"^there is no device cuda on this machine; try --device cpu, or leave it out$"
    ):
        tune(net, batch(), device="cuda")
    with pytest.raises(UsageError, match=r"^there is no device 'abacus'; try cpu, cuda, cuda:1 or mps$"):
        tune(net, batch(), device="abacus")
    with pytest.raises(UsageError, match=r"^precision=fp16 takes a GPU, and this runs on the CPU; try bf16 or no$"):
        tune(net, batch(), precision="fp16")


def test_objectives_without_what_they_take(net):
    with pytest.raises(
        UsageError,
        match=r"^there is nothing to learn from: the batches has no labels and there is no teacher; give one, as in te",
    ):
        tune(net, batch(labels=None))
    with pytest.raises(UsageError, match=r"^ce=1 takes labels, and the batches has none; try ce=0 with a teacher$"):
        tune(net, batch(labels=None), ce=1.0, teacher=net)
    with pytest.raises(
        UsageError, match=r"^kl=2 takes a teacher, and there is none; give one, as in teacher=the batch n"
    ):
        tune(net, batch(), kl=2.0)
    with pytest.raises(
        UsageError, match=r"^progressive conversion starts from the batch norm original: give it what conver"
    ):
        tune(net, batch(), progressive=0.5)


def test_globs_that_match_nothing_or_too_little(net):
    with pytest.raises(PatternError, match=r"^the pattern 'stem\*' matches no parameter; there are: conv1"):
        tune(net, batch(), train_what="stem*")
    with pytest.raises(PatternError, match=r"^the pattern 'stage\?' matches no layer; there are: conv1"):
        tune(net, batch(), distance=1.0, distance_layers="stage?")
    with pytest.raises(UsageError, match=r"^the pattern 'fc' matches fc alone, and a distance takes two layers$"):
        tune(net, batch(), distance=1.0, distance_layers="fc")


def test_unknown_names(net, tmp_path):
    with pytest.raises(UsageError, match=r"^timm has no optimizer 'adamx'; did you mean adamax\?$"):
        tune(net, batch(), opt="adamx")
    with pytest.raises(UsageError, match=r"^sched='cosinus' is unknown; did you mean cosine\?$"):
        tune(net, batch(), sched="cosinus")
    with pytest.raises(UsageError, match=r"^there is no tracker 'abacus' here; installed are: "):
        tune(net, batch(), trackers=("abacus",), output=tmp_path)
    with pytest.raises(UsageError, match=r"^the tracker tensorboard writes into the run's folder; give output=FOLDER$"):
        tune(net, batch(), trackers="tensorboard")
    with pytest.raises(UsageError, match=r"^resume=True goes on with the run in a folder; give output=FOLDER$"):
        tune(net, batch(), resume=True)
    with pytest.raises(UsageError, match=r"^mixup and cutmix mix pairs: batch_size=3 must be even in every process$"):
        tune(net, batch(3, (0, 1, 2)), mixup=0.5)


@pytest.mark.parametrize("inputs", [{"x": torch.zeros(2, 3, 8, 8)}, (torch.zeros(2, 3, 8, 8),)], ids=["dict", "tuple"])
def test_batches_of_a_models_arguments_judge_and_do_not_train(net, inputs):
    labels = torch.tensor([0, 1])
    with pytest.raises(
        UsageError,
        match=r"^the batches hold dicts or tuples of a model's arguments, and training takes images; give batches of ",
    ):
        tune(net, [(inputs, labels)])
    data = batch()
    records = [
        ns.finetune(net, data, [(each, labels)], teacher=net, steps=2, device="cpu").history[-1].after
        for each in (inputs, torch.zeros(2, 3, 8, 8))
    ]
    assert (records[0].kl, records[0].loss) == (records[1].kl, records[1].loss)


def test_batches_that_are_none(net):
    with pytest.raises(
        UsageError, match=r"^a batch is tuple of list and Tensor; give batches of tensors \(images \(N, C, H"
    ):
        tune(net, [([1, 2], torch.tensor([1, 2]))])
    with pytest.raises(
        UsageError, match=r"^the batches hold images of several sizes; training mixes them, and takes one s"
    ):
        tune(net, [(torch.zeros(2, 3, 8, 8), None), (torch.zeros(2, 3, 9, 9), None)])
    with pytest.raises(DataError, match=r"^some batches have labels and others have none; try one data set at a time$"):
        tune(net, [(torch.zeros(2, 3, 8, 8), None), (torch.zeros(2, 3, 8, 8), torch.tensor([1, 1]))])
