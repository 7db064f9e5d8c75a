"""Data specs become sources of samples: which images, which labels, in which order, and what goes wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from normsurgeon.data import demo
from normsurgeon.data.batches import Batches
from normsurgeon.data.labels import class_names_for, labels_of_folders
from normsurgeon.data.preprocessing import DataConfig
from normsurgeon.data.sources import open_source
from normsurgeon.errors import DataError, UsageError

TENCH, GOLDFISH, TOILET_TISSUE = "n01440764", "n01443537", "n15075141"  # 0, 1 and 999 of ImageNet-1k
SMALL = DataConfig(input_size=(3, 8, 8), crop_pct=1.0)


def put(path: Path, value: int = 128, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)
    return path


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
    assert labels_of_folders(chosen, classes, "here") == [7, classes - 1, classes // 2]


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (
            [TENCH, "n99999999"],
            1000,
            r"^here: the synset n99999999 is not among the 1000 classes of imagenet-1k",
        ),
        ([TENCH, "misc"], 1000, r"^here mixes synset folders \(n01440764\) with other names \(misc\)"),
        (
            ["a", "b", "c"],
            2,
            r"^here holds 3 class folders and the network tells 2 classes apart; .*num_classes=3$",
        ),
    ],
)
def test_folders_that_cannot_be_the_head_s_classes_are_refused(names, classes, message):
    with pytest.raises(DataError, match=message):
        labels_of_folders(names, classes, "here")


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
    found = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else found(name))
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


# Pre-processing


def test_a_configuration_survives_json():
    config = DataConfig((1, 28, 20), (0.1,), (0.3,), "bilinear", 0.9, "squash")
    assert DataConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_size": (3, 8)}, r"input_size=\(3, 8\) must be channels, height and width"),
        ({"mean": (0.5,)}, r"mean has 1 and std 3 numbers, and the input has 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, r"std=\(0\.2, 0\.0, 0\.2\) finite and above 0"),
        ({"mean": None}, r"mean=None must be a sequence of numbers"),
        ({"interpolation": "cubist"}, r"interpolation='cubist' is unknown"),
        ({"crop_pct": 0}, r"crop_pct=0 must be above 0"),
        ({"crop_mode": "tight"}, r"crop_mode='tight' is unknown; it is one of center, squash, border"),
        ({"size": 8}, r"a data configuration has no 'size'; it has input_size, mean"),
    ],
)
def test_a_wrong_configuration_is_refused_when_made(values, message):
    with pytest.raises(UsageError, match=message):
        DataConfig.from_dict(values)


def test_a_configuration_is_read_off_the_model():
    model = timm.create_model("test_resnet")
    assert DataConfig.of(model) == DataConfig((3, 160, 160), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.95, "center")
    assert DataConfig.of(nn.Sequential(nn.Conv2d(3, 4, 3))) == DataConfig()  # timm's ImageNet defaults
    own = nn.Sequential(nn.Conv2d(3, 4, 3))
    own.pretrained_cfg = {"input_size": [3, 32, 48], "mean": [0.5, 0.4, 0.3], "crop_pct": 1.0}
    assert DataConfig.of(own) == DataConfig((3, 32, 48), (0.5, 0.4, 0.3), crop_pct=1.0)
    own.pretrained_cfg = None
    assert DataConfig.of(own) == DataConfig()


def test_a_grey_network_gets_grey_images_of_its_own_normalisation():
    assert DataConfig.of(nn.Conv2d(1, 4, 3)).input_size == (1, 224, 224)
    model = timm.create_model("test_resnet", in_chans=1)
    config = DataConfig.of(model)
    assert (config.input_size, config.mean, config.std) == ((1, 160, 160), (0.5,), (0.5,))
    tensor = config.transform()(Image.new("RGB", (200, 180), (255, 255, 255)))
    assert tensor.shape == (1, 160, 160)
    assert torch.allclose(tensor, torch.ones(()))  # (1 - 0.5) / 0.5
    with pytest.raises(UsageError, match="the network reads 5 channels, and images have 1 or 3"):
        DataConfig.of(timm.create_model("test_resnet", in_chans=5)).transform()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_are_taken(mode, channels):
    grey = Image.fromarray(np.full((16, 16), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 200 * 256 + 7, np.uint16))
    elif mode == "I":
        image = Image.fromarray(np.full((16, 16), 200 * 256, np.int32))
    else:
        image = grey.quantize() if mode == "P" else grey.convert("RGB").convert(mode)
    assert image.mode == mode
    config = DataConfig((channels, 8, 8), (0.0,) * channels, (1.0,) * channels)
    tensor = config.transform()(image)
    assert tensor.shape == (channels, 8, 8)
    assert tensor.mul(255).sub(200).abs().max() <= 1


def test_normalisation_is_the_formula():
    config = DataConfig((3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    found = config.transform()(Image.new("RGB", (9, 7), (10, 20, 30)))
    expected = (np.array([10, 20, 30]) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(found[:, 2, 1].numpy(), expected, rtol=1e-5)


# Batches


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ten")
    for number in range(10):
        put(folder / f"c{number}" / "1.png", 20 * number)
    return folder


@given(size=st.integers(1, 12), limit=st.none() | st.integers(1, 12))
def test_batches_hold_every_image_once_whatever_their_size(ten, size, limit):
    batches = Batches(open_source(ten), SMALL, batch_size=size, max_images=limit)
    labels = [number for images, labels in batches for number in labels.tolist()]
    take = min(10, limit or 10)
    assert labels == [number * 10 // take for number in range(take)]  # spread evenly over the classes
    assert batches.total == take


def test_batches_leave_out_what_cannot_be_read(tmp_path):
    put(tmp_path / "ape" / "1.png", 100)
    (tmp_path / "ape" / "2.png").write_text("no image")
    put(tmp_path / "bee" / "1.png", 200)
    batches = Batches(open_source(tmp_path), SMALL, batch_size=2)
    for _ in range(2):  # again: the list is of the last iteration
        assert [(len(images), labels.tolist()) for images, labels in batches] == [(1, [0]), (1, [1])]
        assert batches.skipped == ["ape/2.png"]


def test_worker_processes_give_the_same_batches(ten):
    (ten / "c3" / "2.png").write_text("no image")
    alone, helped = (Batches(open_source(ten), SMALL, batch_size=4, workers=n) for n in (0, 2))
    for (ours, our_labels), (theirs, their_labels) in zip(alone, helped, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(our_labels, their_labels)
    assert alone.skipped == helped.skipped == ["c3/2.png"]
    (ten / "c3" / "2.png").unlink()


def test_batches_do_not_touch_the_caller_s_random_state(ten):
    before = torch.get_rng_state()
    list(Batches(open_source(ten), SMALL))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"max_images": 0}, "max_images=0 must be at least 1, or None"),
    ],
)
def test_wrong_batch_options_are_refused(ten, options, message):
    with pytest.raises(UsageError, match=message):
        Batches(open_source(ten), SMALL, **options)


def test_a_missing_library_behind_a_dataset_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(DataError, match=r"the data set hfds/x .* could not be opened .*; try: pip install datasets$"):
        open_source("hfds/x")
