"""What the outputs of a classifier stand for: class names, and class folders matched to them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from normsurgeon.errors import DataError

_SYNSET = re.compile(r"n\d{8}")


def class_names_for(model: nn.Module, classes: int | None = None) -> list[str] | None:
    """What each output of a classifier is called, in its order; None where it is not known.

    classes  how many outputs the head has; default: what the model says of itself, which a replaced head belies

    The names in the model's own ``pretrained_cfg`` come first (``label_descriptions``, ``label_names``);
    otherwise a head with as many outputs as ImageNet-1k, -12k, -21k or -22k has classes is taken for theirs.

    >>> import timm
    >>> class_names_for(timm.create_model("test_resnet"))[0]
    'tench, Tinca tinca'
    """
    classes = classes or getattr(model, "num_classes", None)
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, dict) else {}
    own_names = config.get("label_names")
    own = config.get("label_descriptions") or own_names
    if isinstance(own, dict):  # description by label name: the order is that of the names
        own = [own.get(name, name) for name in own_names or own]
    if own and (classes is None or len(own) == classes):
        return [str(name) for name in own]
    subset = infer_imagenet_subset({"num_classes": classes or config.get("num_classes")})
    return list(_imagenet(subset).label_descriptions()) if subset else None


def check_labels(labels: Tensor, images: int, classes: int, otherwise: str = "") -> None:
    """Check that a batch's labels are class numbers of a head with ``classes`` outputs, one an image.

    otherwise  what else to try, for the message

    :raises DataError: if they are not.
    """
    if labels.shape != (images,) or labels.is_floating_point():
        raise DataError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for {images} images; "
            "give one class number an image"
        )
    wrong = labels[(labels < 0) | (labels >= classes)].tolist()
    if wrong:
        raise DataError(
            f"there is a label {wrong[0]}, and the network's {classes} classes are 0 to {classes - 1}; "
            f"try the data set that the network was made for{otherwise}"
        )


def labels_of_folders(names: Sequence[str], classes: int | None, where: str) -> list[int]:
    """The class number of each class folder, for a head with ``classes`` outputs (None: not known).

    Folders named by WordNet synset (``n01440764``) get the number that the synset has in the head, so that a
    part of ImageNet is scored correctly. Any other folders are numbered 0, 1, 2 … in the order of ``names``.

    :raises DataError: a synset that the head does not know, synsets mixed with other names, or more folders
        than the head has classes.
    """
    synsets = [name for name in names if _SYNSET.fullmatch(name)]
    subset = infer_imagenet_subset({"num_classes": classes}) if classes else None
    if subset and synsets:
        return _labels_of_synsets(names, synsets, subset, where)
    if classes is not None and len(names) > classes:
        raise DataError(
            f"{where} holds {len(names)} class folders and the network has {classes} classes; "
            f"try a folder of its own {classes} classes, or a network made with num_classes={len(names)}"
        )
    return list(range(len(names)))


def _labels_of_synsets(names: Sequence[str], synsets: list[str], subset: str, where: str) -> list[int]:
    if len(synsets) < len(names):
        odd = next(name for name in names if name not in synsets)
        raise DataError(
            f"{where} mixes synset folders ({synsets[0]}) with other names ({odd}), which have no class "
            f"number in {subset}; try moving {odd} elsewhere"
        )
    numbers = _numbers_of(subset)
    unknown = [name for name in names if name not in numbers]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"{where}: the synset {unknown[0]}{more} is not among the {len(numbers)} classes of {subset}, "
            "which the network was trained on; try moving it elsewhere, or a network with a larger head"
        )
    return [numbers[name] for name in names]


@lru_cache(maxsize=8)
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)


@lru_cache(maxsize=8)
def _numbers_of(subset: str) -> dict[str, int]:
    return {synset: number for number, synset in enumerate(_imagenet(subset).label_names())}
