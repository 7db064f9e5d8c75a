"""What the outputs of a classifier stand for: class names, and class folders matched to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from normsurgeon.data.label_ways import Labels, check_way
from normsurgeon.errors import DataError


@dataclass(frozen=True)
class Head:
    """What a classifier's outputs are.

    classes  how many
    numbers  the output of each name that a class is known by (synset, description, part of one), as it is and as
             ``_key`` writes it; empty where the classes have no names
    """

    classes: int
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, classes: int, model: nn.Module | None = None) -> Head:
        """A head of so many outputs, with the model's own names, or ImageNet's where it has as many outputs.

        >>> head = Head.of(1000)
        >>> head.numbers["n01440764"], head.numbers["great white shark"], Head.of(10).numbers
        (0, 2, {})
        """
        own = _own_names(model)
        if own and all(len(names) == classes for names in own):
            return cls(classes, _by_name(*own))
        subset = infer_imagenet_subset({"num_classes": classes})
        return cls(classes, _imagenet_numbers(subset) if subset else {})

    def taught(self, names: Sequence[str], numbers: Sequence[int] | None) -> Head:
        """This head with the names of the classes that it is trained on, where it has none; their outputs: numbers."""
        if self.numbers:
            return self
        found = _by_name(names)
        return Head(self.classes, {name: place if numbers is None else numbers[place] for name, place in found.items()})


def names_by_output(names: Sequence[str], numbers: Sequence[int] | None, classes: int) -> list[str] | None:
    """The class names of a data set in the order of a head's outputs; None unless each output has one.

    numbers  the output of each name; None: its place

    >>> names_by_output(["cat", "dog"], [1, 0], classes=2), names_by_output(["cat", "dog"], None, classes=3)
    (['dog', 'cat'], None)
    """
    places = {place: name for name, place in zip(names, numbers or range(len(names)), strict=True)}
    found = [places[place] for place in range(classes) if place in places]
    # A folder's name need not be UTF-8, and what is written into a checkpoint must be.
    whole = all(name.encode("utf-8", "replace").decode() == name for name in found)
    return found if len(found) == classes and whole else None


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
    own = _own_names(model)
    if own and (classes is None or len(own[0]) == classes):
        return own[0]
    config = _config_of(model)
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


def class_numbers(
    names: Sequence[str], head: Head | int | None, where: str, labels: Labels = "by-name", own_order: bool = False
) -> list[int]:
    """The output of a head that each class of a data set stands for.

    names      what the data set calls its classes, in its order
    head       the network's outputs, or their number; None: not known, and the classes are numbered 0, 1, 2 …
    where      the data set, for messages
    labels     ``by-name``: classes get the numbers that their names have in the head (a part of ImageNet is then scored
               correctly); where the head has no names, those of their order, if they are as many as the head has.
               ``by-position``: always those of their order
    own_order  whether the order is that of a published data set, and not only that of folders: it then counts if it is
               as long as the head, whatever the names

    :raises DataError: classes that are not the head's.

    >>> class_numbers(["great_white_shark", "tench"], 1000, "here")
    [2, 0]
    """
    check_way(labels)
    in_order = list(range(len(names)))
    if head is None:
        return in_order
    head = Head.of(head) if isinstance(head, int) else head
    found = [head.numbers.get(name, head.numbers.get(_key(name))) for name in names]
    known = [number for number in found if number is not None]
    if labels == "by-name" and len(known) == len(names) == len(set(known)):
        return known
    if len(names) > head.classes:
        raise DataError(
            f"{where} has {len(names)} classes and the network {head.classes}; try a data set of the network's "
            f"classes, or a new head: num_classes={len(names)} (finetune --num-classes {len(names)})"
        )
    as_many = len(names) == head.classes and (own_order or not head.numbers or _are_numbers(names))
    if labels == "by-position" or as_many:
        return in_order
    if known and not own_order:
        raise DataError(f"{where} {_what_is_mixed(names, found)}, or labels='by-position' or 'none' (--labels)")
    raise DataError(
        f"{where} has {len(names)} classes and the network {head.classes}, and the names do not say which of these "
        f"they are; try a data set of the network's classes, a new head (finetune --num-classes {len(names)}), "
        "or labels='by-position' or 'none' (--labels)"
    )


def _what_is_mixed(names: Sequence[str], found: Sequence[int | None]) -> str:
    """Class folders of which some, or two of one class, are the network's."""
    pairs = list(zip(names, found, strict=True))
    unknown = [name for name, number in pairs if number is None]
    known = [name for name, number in pairs if number is not None]
    if unknown:
        return (
            f"mixes classes of the network ({known[0]}) with others ({unknown[0]}); try moving {unknown[0]} elsewhere"
        )
    one, other = next([a, b] for a, number in pairs for b, same in pairs if a != b and number == same)
    return f"has two folders for one class of the network ({one}, {other}); try joining them"


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2 …, with or without leading zeros."""
    return all(name.isdecimal() and int(name) == place for place, name in enumerate(names))


def _key(name: str) -> str:
    """A class name as it is compared: in small letters, with single spaces.

    >>> _key("Great_white-shark")
    'great white shark'
    """
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _by_name(*columns: Sequence[str]) -> dict[str, int]:
    """Name → place: of whole names and of their parts between commas. A name of several classes names none."""
    places: dict[str, set[int]] = {}
    for names in columns:
        for place, name in enumerate(names):
            for part in {name, *map(_key, (name, *name.split(",")))}:
                places.setdefault(part, set()).add(place)
    return {name: next(iter(found)) for name, found in places.items() if len(found) == 1}


def _config_of(model: nn.Module | None) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _own_names(model: nn.Module | None) -> list[list[str]]:
    """What a model itself calls its classes: descriptions, or else names; then the names, where it has both."""
    config = _config_of(model)
    names: Any = config.get("label_names")
    own: Any = config.get("label_descriptions") or names
    if isinstance(own, dict):  # description by label name: the order is that of the names
        names = list(names or own)
        own = [own.get(name, name) for name in names]
    return [[str(name) for name in column] for column in (own, names) if column]


@lru_cache(maxsize=8)
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)


@lru_cache(maxsize=8)
def _imagenet_numbers(subset: str) -> dict[str, int]:
    return _by_name(_imagenet(subset).label_names(), list(_imagenet(subset).label_descriptions()))
