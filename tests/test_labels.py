"""Labels that cannot fit are refused, never guessed: by name, by position where that is certain, or by request."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from conftest import put
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import normsurgeon as ns
from normsurgeon.data.labels import Head, class_names_for, class_numbers, names_by_output
from normsurgeon.data.sources import open_source, with_labels
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.evaluate import evaluate

TENCH, SHARK = "n01440764", "n01484850"
DO_NOT_SAY = (
    r"^{} has {} classes and the network {}, and the names do not say which of these they are; try a data set of the "
    r"network's classes, a new head \(finetune --num-classes {}\), or labels='by-position' or 'none' \(--labels\)$"
)


class Given(nn.Module):
    """Logits that put class ``best`` first, for any image."""

    def __init__(self, classes: int, best: int, **config) -> None:
        super().__init__()
        self.num_classes, self.best = classes, best
        self.pretrained_cfg = {"input_size": (3, 8, 8), **config}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(self.num_classes)[self.best].expand(len(x), -1)


def folders(root, *names, images=1):
    for name in names:
        for number in range(images):
            put(root / name / f"{number}.png")
    return root


# Refused


def test_a_folder_one_level_too_high_is_refused(tmp_path):
    folders(tmp_path / "photos", TENCH, SHARK)
    folders(tmp_path / "more", SHARK)
    with pytest.raises(DataError, match=DO_NOT_SAY.format(r"\S+", 2, 1000, 2)):
        evaluate(Given(1000, 0), tmp_path)
    assert evaluate(Given(1000, 0), tmp_path / "photos").top1 == 0.5


@pytest.mark.parametrize("run", [evaluate, ns.analyze], ids=["evaluate", "analyze"])
def test_digits_are_no_classes_of_imagenet(run):
    net = timm.create_model("test_resnet")
    with pytest.raises(DataError, match=DO_NOT_SAY.format("digits", 10, 1000, 10)):
        run(net, "digits", max_images=2)
    with pytest.raises(DataError, match=DO_NOT_SAY.format("digits", 10, 1000, 10)):
        run(net, open_source("digits"), max_images=2)  # opened by the caller, who knows no head


def test_labels_by_position_and_none_say_otherwise():
    net = Given(1000, 0)
    by_position = evaluate(net, "digits", labels="by-position")
    assert by_position.top1 == pytest.approx(np.mean([label == 0 for _, label in open_source("digits")]))
    assert evaluate(net, "digits", labels="none", max_images=4).top1 is None
    assert evaluate(net, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))], labels="none").top1 is None
    with pytest.raises(UsageError, match=r"^labels='position' is unknown; it is one of by-name, by-position, none$"):
        evaluate(net, "digits", labels="position")


def test_labels_that_are_not_used_are_not_checked(tmp_path):
    result = ns.convert(timm.create_model("test_resnet").eval(), to="gn", balance=False, verdict=False, check=False)
    source = folders(tmp_path, "ape", "bee", images=2)
    assert ns.calibrate(result, str(source), balance=False).history[-1].matched_images == 4


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (["a", "b"], 3, DO_NOT_SAY.format("here", 2, 3, 2)),
        ([f"c{n}" for n in range(1000)], 1000, DO_NOT_SAY.format("here", 1000, 1000, 1000)),
        (
            ["n01440764", "tench"],
            1000,
            r"^here has two folders for one class of the network \(n01440764, tench\); try joining them, or ",
        ),
        (["crane"], 1000, DO_NOT_SAY.format("here", 1, 1000, 1)),  # a bird or a machine: two classes have the name
    ],
)
def test_names_that_do_not_say_are_refused(names, classes, message):
    with pytest.raises(DataError, match=message):
        class_numbers(names, classes, "here")
    if len(names) <= classes:
        assert class_numbers(names, classes, "here", "by-position") == list(range(len(names)))


# Understood


def test_folders_with_english_names_are_imagenet_s_classes(tmp_path):
    folders(tmp_path, "great_white_shark", "Tench")
    source = open_source(tmp_path, classes=1000)
    assert dict(zip(source.class_names, source.numbers, strict=True)) == {"great_white_shark": 2, "Tench": 0}
    assert source.known_labels == [label for _, label in source]


def test_the_model_s_own_names_number_the_folders(tmp_path):
    folders(tmp_path, "bee")
    net = Given(3, 2, label_names=["dog", "ape", "bee"])
    assert evaluate(net, tmp_path).top1 == 1.0
    folders(tmp_path, "dog", "ape")
    assert evaluate(net, tmp_path).top1 == pytest.approx(1 / 3)


def test_as_many_folders_as_a_nameless_head_has_classes_are_taken_in_their_order(tmp_path):
    assert evaluate(Given(2, 1), folders(tmp_path, "ape", "bee")).top1 == 0.5
    assert class_numbers([f"{n:04d}" for n in range(1000)], 1000, "here") == list(range(1000))


def test_a_source_is_numbered_once_and_again_for_another_head(tmp_path):
    source = with_labels(open_source(folders(tmp_path, TENCH, SHARK)), 1000, "by-name")
    assert source.known_labels == [0, 2]
    assert with_labels(source, 1000, "by-name") is source
    assert with_labels(source, 2, "by-name").known_labels == [0, 1]
    assert with_labels(source, 1000, "none").known_labels is None
    assert [label for _, label in with_labels(source, 1000, "none")] == [None, None]


def test_a_trained_network_s_file_names_its_classes_and_a_part_of_them_is_scored_by_name(tmp_path):
    data = folders(tmp_path / "data", "ape", "bee", "cat")
    net = timm.create_model("test_resnet", num_classes=2)
    net.pretrained_cfg["label_names"] = ["yes", "no"]  # of the head that is replaced
    ns.finetune(net, data, num_classes=3, steps=1, batch_size=2, device="cpu", output=tmp_path / "run")
    loaded = ns.load(tmp_path / "run" / "last.safetensors")
    loaded.get_classifier().bias.data[:] = torch.tensor([0.0, 100.0, 200.0])  # class 2 first, then 1, then 0
    part = folders(tmp_path / "part", "bee", "cat")
    result = evaluate(loaded, part)
    assert (result.top1, class_names_for(loaded)) == (0.5, ["ape", "bee", "cat"])
    assert net.pretrained_cfg["label_names"] == ["yes", "no"]
    with pytest.raises(DataError, match=r"mixes classes of the network \(bee\) with others \(dog\)"):
        evaluate(loaded, folders(tmp_path / "part", "dog"))


def test_names_are_kept_in_the_order_of_the_outputs_where_each_has_one_that_can_be_written():
    assert names_by_output(["ape", "bee"], (1, 0), 2) == ["bee", "ape"]
    assert names_by_output(["ape", "bee"], (0, 2), 3) is None
    assert names_by_output(["ape", "b\udcff"], None, 2) is None


def test_names_of_a_head_that_is_replaced_are_not_kept_for_data_that_has_none(tmp_path):
    net = timm.create_model("test_resnet", num_classes=2)
    net.pretrained_cfg["label_descriptions"] = ["yes", "no"]
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    tuned = ns.finetune(net, batches, num_classes=2, steps=1, device="cpu")
    assert class_names_for(tuned.model) is None


NAMES = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8, unique=True)


@given(NAMES, st.data())
def test_any_part_of_a_head_s_own_names_gets_its_own_numbers(names, data):
    head = Head(len(names), {}).taught(names, None)
    clear = [name for name in names if head.numbers.get(name) == names.index(name)]
    part = data.draw(st.permutations(clear))[: data.draw(st.integers(0, len(clear)))] if clear else []
    if part:
        assert class_numbers(part, head, "here") == [names.index(name) for name in part]


@given(st.lists(st.text(max_size=6), min_size=1, max_size=12, unique=True), st.integers(1, 12))
def test_numbers_are_among_the_head_s_and_no_two_alike_or_it_is_refused(names, classes):
    for way in ("by-name", "by-position"):
        try:
            numbers = class_numbers(names, classes, "here", way)
        except DataError:
            assert len(names) > classes or way == "by-name"
        else:
            assert len(set(numbers)) == len(names)
            assert all(0 <= number < classes for number in numbers)
