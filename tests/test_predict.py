"""predict(): the probabilities are the model's own, the names are right, and what cannot be read says so."""

from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import class_tree, randomise_
from PIL import Image
from torch import nn

import normsurgeon as ns
from normsurgeon._util.progress import Progress
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.predict import predict

SIDE, CROP, MEAN, STD = 32, 0.8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def classifier(classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=classes)).eval()
    data = {"input_size": (3, SIDE, SIDE), "crop_pct": CROP, "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    model.pretrained_cfg = {**model.pretrained_cfg, **data}
    return model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return classifier()


def probabilities_of(model: nn.Module, file: Path) -> np.ndarray:
    """The oracle: Pillow's resize, a crop by hand, NumPy's normalisation and softmax."""
    with Image.open(file) as opened:
        width, height = opened.size
        shorter = math.floor(SIDE / CROP)
        size = [int(shorter * edge / min(width, height)) for edge in (width, height)]
        resized = opened.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = (round((edge - SIDE) / 2) for edge in size)
    pixels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    x_CHW = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    with torch.no_grad():
        logits = model(torch.from_numpy(x_CHW[None]).float())[0].double().numpy()
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_probabilities_are_the_softmax_on_the_models_own_preprocessing(small, photos, batch_size):
    found = predict(small, photos, top=7, batch_size=batch_size)
    files = [photos / "2.png", photos / "10.png", photos / "more" / "a.png"]
    assert [image.file for image in found] == [str(file) for file in files]
    for image, file in zip(found, files, strict=True):
        expected = probabilities_of(small, file)
        assert list(image.classes) == list(np.argsort(-expected))
        assert image.probabilities == pytest.approx(np.sort(expected)[::-1], abs=1e-6)
        assert sum(image.probabilities) == pytest.approx(1.0, abs=1e-12)


def test_files_and_folders_mix_in_the_order_given_and_one_path_alone_will_do(small, photos):
    given = [photos / "more" / "a.png", str(photos / "more"), photos / "2.png"]
    assert [image.file for image in predict(small, given)] == [
        str(photos / n) for n in ("more/a.png",) * 2 + ("2.png",)
    ]
    assert predict(small, photos / "2.png")[0] == predict(small, [str(photos / "2.png")])[0]


def test_a_file_that_is_asked_for_is_read_whatever_its_ending(small, photos):
    (photos / "2.png").rename(photos / "2.upload")
    assert len(predict(small, photos / "2.upload")) == 1
    assert len(predict(small, photos)) == 2  # of a folder, only what is called an image


@pytest.mark.parametrize(("top", "expected"), [(1, 1), (5, 5), (7, 7), (100, 7)])
def test_top_is_clamped_to_the_number_of_classes(small, photos, top, expected):
    image = predict(small, photos / "2.png", top=top)[0]
    assert len(image.classes) == len(image.names) == len(image.probabilities) == expected
    assert list(image.probabilities) == sorted(image.probabilities, reverse=True)


def test_a_head_with_imagenets_classes_gets_imagenets_names(photos):
    found = predict(timm.create_model("test_resnet"), photos / "2.png", top=1000)
    names = dict(zip(found[0].classes, found[0].names, strict=True))
    assert (names[0], names[282], names[999]) == (
        "tench, Tinca tinca",
        "tiger cat",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert found.named_by == "model"


def test_a_head_of_imagenets_width_is_named_also_where_the_model_does_not_say_its_width(photos):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))
    assert predict(model, photos / "2.png").named_by == "model"


def test_a_replaced_head_does_not_get_the_names_of_the_old_one(photos):
    model = timm.create_model("test_resnet")
    model.fc = nn.Linear(model.fc.in_features, 4)  # num_classes still says 1000
    found = predict(model, photos / "2.png")
    assert found.named_by == "numbers"
    assert sorted(found[0].names) == ["0", "1", "2", "3"]


def test_other_heads_get_the_class_folders_names_in_the_order_that_evaluate_numbers_them(small, photos, tmp_path):
    names = ["c1", "c2", "c3", "c10", "c11", "c20", "z"]  # natural order
    folder = class_tree(tmp_path, names[::-1])
    found = predict(small, photos, classes=folder, top=7)
    assert found.named_by == "folders"
    assert all(image.names == tuple(names[number] for number in image.classes) for image in found)


def test_the_models_own_names_come_before_the_folders(photos, tmp_path):
    model = timm.create_model("test_resnet")
    assert predict(model, photos, classes=class_tree(tmp_path, ["a", "b"])).named_by == "model"


def test_without_names_the_numbers_are_the_names(small, photos):
    image = predict(small, photos / "2.png")[0]
    assert image.names == tuple(str(number) for number in image.classes)


def test_an_unreadable_image_is_left_out_and_listed(small, photos):
    (photos / "5.jpg").write_bytes(b"no image")
    (photos / "6.png").write_bytes((photos / "2.png").read_bytes()[:3000])
    found = predict(small, photos, batch_size=2)
    assert [Path(image.file).name for image in found] == ["2.png", "10.png", "a.png"]
    assert [Path(image.file).name for image in found.skipped] == ["5.jpg", "6.png"]
    assert found.skipped[0].reason == "cannot be read (not an image); try opening it in a viewer"
    assert found.skipped[1].reason.startswith("cannot be read (OSError: image file is truncated")
    expected = probabilities_of(small, photos / "10.png")  # those left keep their own answers
    assert found[1].probabilities == pytest.approx(np.sort(expected)[::-1][:5], abs=1e-6)


def test_a_photograph_is_turned_upright_by_its_exif_orientation(small, photos):
    with Image.open(photos / "2.png") as image:
        turned, noted = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    noted[0x0112] = 6  # "turn me by 270 degrees": what a phone held upright writes
    turned.save(photos / "2.turned.png", exif=noted)
    upright, again = predict(small, [photos / "2.png", photos / "2.turned.png"], top=7)
    assert again.probabilities == pytest.approx(upright.probabilities, abs=1e-9)
    turned.save(photos / "2.turned.png")
    assert predict(small, photos / "2.turned.png", top=7)[0].probabilities != pytest.approx(
        upright.probabilities, abs=1e-6
    )


def test_logits_that_are_not_finite_are_no_prediction(photos):
    class Overflows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = x.mean((2, 3))
            logits[0, 0] = math.nan
            return logits

    found = predict(Overflows(), photos)
    assert [Path(image.file).name for image in found] == ["10.png", "a.png"]
    assert found.skipped[0].reason == "gives logits that are not finite; try the network in float32"
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_model_comes_back_as_it_was_also_after_an_error(photos):
    model = classifier().train()
    model.layer1.eval()
    before = [module.training for module in model.modules()]
    mean = model.bn1.running_mean.clone()
    predict(model, photos)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.bn1.running_mean, mean)
    with pytest.raises(RuntimeError, match="stop"):
        predict(model, photos, on_progress=lambda progress: (_ for _ in ()).throw(RuntimeError("stop")))
    assert [module.training for module in model.modules()] == before


def test_progress_counts_every_image_the_unreadable_ones_too(small, photos):
    (photos / "5.jpg").write_bytes(b"no image")
    seen: list[Progress] = []
    predict(small, photos, batch_size=3, on_progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(3, 4), (4, 4)]


def test_a_network_in_another_precision_is_given_images_in_it(photos):
    found = predict(classifier().double(), photos / "2.png", top=7)
    assert found[0].probabilities == pytest.approx(np.sort(probabilities_of(classifier(), photos / "2.png"))[::-1])


def test_records_are_frozen_and_become_plain_json(small, photos):
    found = predict(small, [photos / "2.png"], top=2)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'file'"):
        found[0].file = "other"
    first, second = found[0].classes
    document = json.loads(json.dumps(found.to_dict()))
    assert document["model"] == "test_resnet"
    assert document["images"][0]["file"] == str(photos / "2.png")
    assert [set(entry) for entry in document["images"][0]["predictions"]] == [{"class", "name", "probability"}] * 2
    assert [entry["class"] for entry in document["images"][0]["predictions"]] == [first, second]
    assert document["skipped"] == []


def test_it_is_public():
    assert ns.predict is predict
    assert {"Prediction", "Predictions", "predict"} <= set(ns.__all__)


def test_what_cannot_be_looked_at_is_an_error_that_names_it(small, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    forms = "give image files, or folders of images"
    for given, text in (
        (tmp_path / "nowhere.png", f"there is no file or folder {tmp_path / 'nowhere.png'}; {forms}"),
        (tmp_path / "empty", f"the folder {tmp_path / 'empty'} holds no images; {forms}"),
        ([], f"there are no images to look at; {forms}"),
        (tmp_path / "broken.jpg", f"{tmp_path / 'broken.jpg'} cannot be read (not an image); "),
        ([tmp_path / "broken.jpg"] * 2, f"none of the 2 images has a prediction; the last: {tmp_path / 'broken.jpg'}"),
    ):
        with pytest.raises(DataError, match="^" + re.escape(text)):
            predict(small, given)
    with pytest.raises(UsageError, match="an image is given as ndarray; try the path of its file"):
        predict(small, [np.zeros((4, 4, 3))])


def test_class_folders_that_cannot_name_the_head_are_an_error(small, photos, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; give the folder that holds a folder for each"):
        predict(small, photos, classes=tmp_path / "nowhere")
    with pytest.raises(DataError, match="more holds no folders; give the folder that holds a folder for each class"):
        predict(small, photos, classes=photos / "more")
    three = class_tree(tmp_path, ["a", "b", "c"])
    with pytest.raises(DataError, match="holds 3 class folders and the network has 7 classes; try the folder"):
        predict(small, photos, classes=three)
    splits = class_tree(tmp_path / "set", ["train", "val"])
    with pytest.raises(DataError, match=r"are splits, not classes; try .*train"):
        predict(classifier(2), photos, classes=splits)


def test_wrong_usage_says_so(small, photos):
    with pytest.raises(UsageError, match="top=0 must be at least 1"):
        predict(small, photos, top=0)
    with pytest.raises(UsageError, match="batch_size=0 must be at least 1"):
        predict(small, photos, batch_size=0)
    with pytest.raises(UsageError, match="there is no device 'abacus'"):
        predict(small, photos, device="abacus")
    with pytest.raises(UsageError, match="try a classifier, which gives"):
        predict(nn.Conv2d(3, 4, 1), photos)
