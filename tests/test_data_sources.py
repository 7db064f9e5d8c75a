"""Data specs become sources of samples: which images, which labels, in which order, and what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import put
from torch import nn

from normsurgeon.data import demo_images
from normsurgeon.data.labels import class_names_for, class_numbers
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, UsageError

TENCH, GOLDFISH, TOILET_TISSUE = "n01440764", "n01443537", "n15075141"  # 0, 1 and 999 of ImageNet-1k
SMALL = DataConfig(input_size=(3, 8, 8), crop_pct=1.0)


def labels_of(source) -> list[int | None]:
    return [label for _, label in source]


# Folders


def test_class_folders_are_numbered_in_natural_order_and_images_come_sorted(tmp_path):
    for number, name in enumerate(["c10", "c2", "c1"]):
        put(tmp_path / name / "b.png", number)
        put(tmp_path / name / "a.png", number)
    source = open_source(tmp_path)
    assert source.class_names == ("c1", "c2", "c10")
    assert source.labelled
    assert labels_of(source) == [0, 0, 1, 1, 2, 2]
    assert [source.name_of(i) for i in range(2)] == ["c1/a.png", "c1/b.png"]
    assert np.asarray(source[4][0])[0, 0, 0] == 0  # c10 was written with the value 0


def test_an_empty_class_folder_keeps_its_number(tmp_path):
    put(tmp_path / "ape" / "1.png")
    (tmp_path / "bee").mkdir()
    put(tmp_path / "cat" / "1.png")
    assert labels_of(open_source(tmp_path)) == [0, 2]


def test_images_below_a_class_folder_belong_to_it(tmp_path):
    put(tmp_path / "ape" / "deep" / "er" / "1.png")
    put(tmp_path / "cat" / "1.jpg")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat", target_is_directory=True)
    assert labels_of(open_source(tmp_path)) == [0, 1]


def test_hidden_files_folders_and_other_endings_are_ignored(tmp_path):
    put(tmp_path / "ape" / "1.PNG")
    put(tmp_path / "ape" / "._1.png")
    put(tmp_path / ".cache" / "1.png")
    (tmp_path / "ape" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no image")
    source = open_source(str(tmp_path))
    assert [source.name_of(i) for i in range(len(source))] == ["ape/1.PNG"]


@pytest.mark.parametrize("ending", ["bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"])
def test_the_common_formats_are_read(tmp_path, ending):
    put(tmp_path / f"1.{ending}", 200, mode="L" if ending == "pgm" else "RGB")
    ((image, label),) = open_source(tmp_path)
    assert label is None
    assert abs(int(np.asarray(image.convert("L")).mean()) - 200) <= 2


def test_a_plain_folder_of_images_is_unlabelled(tmp_path):
    put(tmp_path / "10.png")
    put(tmp_path / "9.png")
    source = open_source(tmp_path)
    assert (source.labelled, source.class_names, len(source)) == (False, None, 2)
    assert [source.name_of(i) for i in range(2)] == ["9.png", "10.png"]


def test_a_split_is_a_folder_below(tmp_path):
    put(tmp_path / "val" / "ape" / "1.png")
    put(tmp_path / "train" / "ape" / "1.png")
    assert open_source(tmp_path, split="val").class_names == ("ape",)
    with pytest.raises(DataError, match=r"the folders of .* are splits, not classes; try .*/val"):
        open_source(tmp_path)
    with pytest.raises(UsageError, match=r"has no folder test; leave out split='test'"):
        open_source(tmp_path, split="test")


def test_an_image_that_cannot_be_decoded_is_skipped_and_named(tmp_path):
    put(tmp_path / "ape" / "good.png", size=(64, 64))
    whole = put(tmp_path / "ape" / "cut.jpg", size=(64, 64)).read_bytes()
    (tmp_path / "ape" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "ape" / "text.png").write_text("no image")
    (tmp_path / "ape" / "void.png").write_bytes(b"")
    source, skipped = open_source(tmp_path), []
    assert len(list(source.samples(skipped))) == 1
    assert skipped == ["ape/cut.jpg", "ape/text.png", "ape/void.png"]
    with pytest.raises(DataError, match=r"text\.png cannot be read \(not an image\); try opening it in a viewer$"):
        source[2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no images \(.*\.png.*\); a data set is a folder"),
        (["a.png", "ape/b.png"], r"holds both images \(a\.png\) and folders of images \(ape\); try moving"),
    ],
)
def test_a_folder_that_is_no_data_set_is_one_clear_line(tmp_path, files, message):
    for file in files:
        put(tmp_path / file)
    with pytest.raises(DataError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(DataError, match=r"none of the 1 images of .* can be read; the last one: .*1\.png"):
        list(open_source(tmp_path))


def test_a_spec_that_leads_nowhere_says_which_there_are(tmp_path):
    with pytest.raises(DataError, match=r"^there is no folder ''; a data set is a folder of class folders"):
        open_source("")
    with pytest.raises(DataError, match=r"there is no folder nowhere; a data set is a folder of class folders"):
        open_source("nowhere")
    with pytest.raises(DataError, match=r"1\.png is a file; try the folder that it is in"):
        open_source(put(tmp_path / "1.png"))


# Labels


def test_synset_folders_get_the_head_s_own_numbers(tmp_path):
    for synset in (TOILET_TISSUE, TENCH):
        put(tmp_path / synset / "1.png")
    assert labels_of(open_source(tmp_path, classes=1000)) == [0, 999]
    assert labels_of(open_source(tmp_path, classes=2)) == [0, 1]  # not ImageNet's head: the folders' order
    assert labels_of(open_source(tmp_path)) == [0, 1]


@pytest.mark.parametrize(
    ("classes", "file"),
    [
        (11821, "imagenet12k_synsets.txt"),
        (21841, "imagenet22k_synsets.txt"),
        (21843, "imagenet21k_goog_synsets.txt"),
    ],
)
def test_larger_imagenet_heads_have_numbers_of_their_own(classes, file):
    synsets = (Path(timm.__file__).parent / "data" / "_info" / file).read_text().split()
    assert len(synsets) == classes
    chosen = [synsets[7], synsets[classes - 1], synsets[classes // 2]]
    assert class_numbers(chosen, classes, "here") == [7, classes - 1, classes // 2]


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (
            [TENCH, "n99999999"],
            1000,
            r"^here mixes classes of the network \(n01440764\) with others \(n99999999\); try moving n99999999 "
            r"elsewhere, or labels='by-position' or 'none' \(--labels\)$",
        ),
        ([TENCH, "misc"], 1000, r"^here mixes classes of the network \(n01440764\) with others \(misc\); try moving"),
        (
            ["a", "b", "c"],
            2,
            r"^here has 3 classes and the network 2; try a data set of the network's classes, or a new head: "
            r"num_classes=3 \(finetune --num-classes 3\)$",
        ),
    ],
)
def test_folders_that_cannot_be_the_head_s_classes_are_refused(names, classes, message):
    with pytest.raises(DataError, match=message):
        class_numbers(names, classes, "here")


def test_class_names_are_imagenet_s_or_the_model_s_own():
    assert class_names_for(timm.create_model("test_resnet"))[1] == "goldfish, Carassius auratus"
    model = timm.create_model("test_resnet", num_classes=2)
    assert class_names_for(model) is None
    model.pretrained_cfg = {"label_names": ["x", "y"], "label_descriptions": {"y": "yak", "x": "xerus"}}
    assert class_names_for(model) == ["xerus", "yak"]
    assert class_names_for(nn.Linear(2, 2)) is None


# What ships in a dependency, and timm's names


def test_demo_is_colour_photographs_without_labels():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    source = open_source("demo")
    samples = list(source)
    assert len(samples) == len(source) >= 7
    assert all(image.mode == "RGB" and min(image.size) >= 300 and label is None for image, label in samples)
    assert {"chelsea.png", "china.jpg"} <= {source.name_of(i) for i in range(len(source))}


@pytest.mark.parametrize(("spec", "missing"), [("demo", "skimage"), ("demo", "sklearn")])
def test_demo_without_its_packages_says_what_to_install(monkeypatch, spec, missing):
    found = demo_images.find_spec
    monkeypatch.setattr(demo_images, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(DataError, match=r'which is not installed; try: pip install "normsurgeon\[demo\]"$'):
        open_source(spec)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'pip install "normsurgeon\[demo\]"$'):
        open_source("digits")


def test_digits_are_grey_images_with_labels_and_a_fixed_split():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    source = open_source("digits")
    image, label = source[5]
    assert (len(source), image.mode, image.size, label) == (1797, "L", (8, 8), original.target[5])
    assert np.abs(np.asarray(image) / 255 - original.images[5] / 16).max() < 1 / 255
    test, train = open_source("digits", split="test"), open_source("digits", split="train")
    assert (len(test), len(train)) == (360, 1437)
    assert labels_of(test) == original.target[::5].tolist()
    with pytest.raises(UsageError, match="digits has no split 'dev'"):
        open_source("digits", split="dev")


def test_a_timm_dataset_opens_by_its_name(tmp_path):
    for name in ("ape", "cat"):
        put(tmp_path / name / "1.png")
    source = open_source("torch/image_folder", root=tmp_path)
    assert (len(source), source.labelled, source.class_names) == (2, True, ("ape", "cat"))
    assert labels_of(source) == [0, 1]


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/unheard_of", "wds/nowhere"])
def test_a_timm_dataset_that_is_not_there_is_one_clear_line(tmp_path, capsys, name):
    with pytest.raises(DataError, match=rf"the data set {name} \(split validation\) could not be opened") as caught:
        open_source(name, root=tmp_path)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""  # standard output belongs to --json


def test_a_missing_library_behind_a_dataset_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(DataError, match=r"the data set hfds/x .* could not be opened .*; try: pip install datasets$"):
        open_source("hfds/x")
