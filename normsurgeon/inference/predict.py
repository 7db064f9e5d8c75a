"""What a classifier sees on images: the most probable classes of each, by name: ``predict``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normsurgeon._util.checks import check_at_least
from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.data.folders import images_below
from normsurgeon.data.images import read_image
from normsurgeon.data.labels import class_names_for
from normsurgeon.data.sources import class_folders
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, UsageError
from normsurgeon.inference.run import eval_mode, fetched_logits, name_of, placed

FilePath = str | os.PathLike[str]
NamedBy = Literal["model", "folders", "numbers"]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the most probable first.

    file           the image, as it was given; below a folder that was given, with that folder in front
    classes        the classes' numbers
    names          what they are called
    probabilities  the softmax of the logits, over all classes of the head
    """

    file: str
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON, one entry a class."""
        rows = zip(self.classes, self.names, self.probabilities, strict=True)
        return {"file": self.file, "predictions": [{"class": c, "name": n, "probability": p} for c, n, p in rows]}


@dataclass(frozen=True)
class Skipped:
    """An image without a prediction, and why; file and reason make a sentence."""

    file: str
    reason: str


@dataclass(frozen=True)
class Predictions:
    """What ``predict`` found: goes through its images' predictions like a list.

    model     what the model is called
    images    a Prediction for each image, in the order in which they were given
    skipped   the images that have none
    named_by  where the names are from: ``model`` (its own, or ImageNet's), ``folders``, or the ``numbers`` alone
    """

    model: str
    images: tuple[Prediction, ...]
    skipped: tuple[Skipped, ...]
    named_by: NamedBy

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Prediction:
        return self.images[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "model": self.model,
            "images": [image.to_dict() for image in self.images],
            "skipped": [{"file": each.file, "reason": each.reason} for each in self.skipped],
            "named_by": self.named_by,
        }


def predict(
    model: nn.Module,
    images: FilePath | Iterable[FilePath],
    *,
    top: int = 5,
    classes: FilePath | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> Predictions:
    """The ``top`` most probable classes of each image, which gets the pre-processing that the model carries.

    images       image files, and folders, which stand for all images in them and in the folders within
    top          how many classes; all of them, where the head has fewer
    classes      a folder of class folders, whose names are taken where the model does not say what its classes
                 are called and the head is not one of ImageNet's; without it, the names are the numbers
    device       where to run; the model is put back afterwards. Default: where it is
    on_progress  called with a Progress after each batch

    Images are turned upright by what a camera noted in them (EXIF). One that cannot be read is left out and listed in
    ``skipped``. The model is in eval mode meanwhile; every module's ``training`` flag is put back, also after an error.

    :raises DataError: a path that is not there, a folder without images, nothing that can be read, or another
        number of class folders than the head has classes.
    :raises UsageError: a model that is not a classifier, ``top`` or ``batch_size`` below 1.

    >>> import timm
    >>> from normsurgeon.data.demo_images import photographs
    >>> found = predict(timm.create_model("test_resnet"), photographs()[:2], top=3)
    >>> len(found), len(found[0].names), found.named_by
    (2, 3, 'model')
    """
    check_at_least(1, top=top, batch_size=batch_size)
    files = image_files(images)
    folders = class_folders(classes) if classes is not None else None
    transform = DataConfig.of(model).transform()
    found: list[Prediction] = []
    skipped: list[Skipped] = []
    names: list[str] = []
    named_by: NamedBy = "numbers"
    with ExitStack() as stack:
        stack.enter_context(placed(model, device))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            read, inputs = _read(part, transform, skipped)
            if read:
                logits = fetched_logits(model, torch.stack(inputs))
                if not names:  # only now is it known how wide the head is
                    names, named_by = _names(model, logits.shape[1], folders, classes)
                found += _best(read, logits, names, top, skipped)
            if on_progress is not None:
                on_progress(Progress("predicting", start + len(part), len(files)))
    if not found:
        last = f"{skipped[-1].file} {skipped[-1].reason}"
        raise DataError(
            last if len(files) == 1 else f"none of the {len(files)} images has a prediction; the last: {last}"
        )
    return Predictions(name_of(model), tuple(found), tuple(skipped), named_by)


def image_files(images: FilePath | Iterable[FilePath]) -> list[str]:
    """The files that paths stand for, in their order; a folder stands for all images in it.

    :raises DataError: a path that is not there, a folder without images, or no paths at all.
    """
    files: list[str] = []
    for path in [images] if isinstance(images, (str, os.PathLike)) else images:
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"an image is given as {type(path).__name__}; try the path of its file")
        text = os.fspath(path)
        if os.path.isdir(text):
            inside = images_below(text)
            if not inside:
                raise DataError(f"the folder {text} holds no images; give image files, or folders of images")
            files += inside
        elif os.path.lexists(text):  # a link to nothing is found to be one when it is read, as others of a folder are
            files.append(text)  # whatever its ending: it was asked for
        else:
            raise DataError(f"there is no file or folder {text}; give image files, or folders of images")
    if not files:
        raise DataError("there are no images to look at; give image files, or folders of images")
    return files


def _read(
    files: list[str], transform: Callable[[Any], Tensor], skipped: list[Skipped]
) -> tuple[list[str], list[Tensor]]:
    """The files that can be read, and what they are to the network; the others are added to ``skipped``."""
    read, inputs = [], []
    for file in files:
        try:
            inputs.append(transform(read_image(file)))
        except DataError as error:
            skipped.append(Skipped(file, str(error).removeprefix(file).strip()))
        else:
            read.append(file)
    return read, inputs


def _names(
    model: nn.Module, classes: int, folders: list[str] | None, where: FilePath | None
) -> tuple[list[str], NamedBy]:
    """A name for each of the head's classes, and where the names are from."""
    names = class_names_for(model, classes)
    if names is not None:
        return names, "model"
    if folders is None:
        return [str(number) for number in range(classes)], "numbers"
    if len(folders) != classes:  # with one missing, all that come after it would be called wrong
        raise DataError(
            f"{where} holds {len(folders)} class folders and the network has {classes} classes; "
            "try the folder that it was trained on"
        )
    return folders, "folders"


def _best(
    files: list[str], logits_NK: Tensor, names: list[str], top: int, skipped: list[Skipped]
) -> Iterator[Prediction]:
    best = logits_NK.softmax(dim=1).topk(min(top, logits_NK.shape[1]), dim=1)
    rows = zip(
        files, logits_NK.isfinite().all(dim=1).tolist(), best.indices.tolist(), best.values.tolist(), strict=True
    )
    for file, finite, numbers, probabilities in rows:
        if finite:
            yield Prediction(file, tuple(numbers), tuple(names[number] for number in numbers), tuple(probabilities))
        else:
            skipped.append(Skipped(file, "gives logits that are not finite; try the network in float32"))
