"""The classifier of a network: found, and made for another number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from normsurgeon._util.checks import check_at_least
from normsurgeon.errors import UsageError
from normsurgeon.inference.run import name_of
from normsurgeon.models.checkpoint import attach_origin, origin_of


def last_linear(model: nn.Module) -> str | None:
    """The path of the last linear layer of the module tree, which in most networks is the classifier; or None.

    >>> last_linear(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Dropout()))
    '1'
    """
    names = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    return names[-1] if names else None


def classifier_of(model: nn.Module) -> nn.Linear | None:
    """The layer that gives the logits: timm's ``get_classifier()`` where there is one, else the last linear layer.

    None where that is no single linear layer.
    """
    getter = getattr(model, "get_classifier", None)
    name = last_linear(model)
    found = getter() if callable(getter) else model.get_submodule(name) if name else None
    return found if isinstance(found, nn.Linear) else None


def reset_head_(model: nn.Module, classes: int) -> None:
    """Give a network a new classifier with random weights, in place, from the current random state.

    :raises UsageError: no such number, or a network whose classifier is not known.
    """
    check_at_least(1, num_classes=classes)
    reset = getattr(model, "reset_classifier", None)
    if not callable(reset):
        name = last_linear(model)
        if name is None:
            raise UsageError(
                f"{name_of(model)} has no classifier to reset; try a network made with num_classes={classes}"
            )
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        parent = model.get_submodule(name.rpartition(".")[0])
        new = nn.Linear(old.in_features, classes, old.bias is not None, old.weight.device, old.weight.dtype)
        setattr(parent, name.rpartition(".")[2], new.train(old.training))
        if isinstance(getattr(model, "num_classes", None), int):
            model.num_classes = classes  # type: ignore[assignment]
    else:
        reset(classes)
    origin = origin_of(model)
    if origin.source is not None and origin.source.kind != "callable":
        kwargs = {**origin.source.kwargs, "num_classes": classes}
        attach_origin(model, replace(origin, source=replace(origin.source, kwargs=kwargs)))


def name_classes_(model: nn.Module, names: Sequence[str] | None) -> None:
    """Note what the outputs of a classifier stand for, in place, so that its checkpoint says it; None: not known.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> name_classes_(model, ["cat", "dog"])
    >>> model.pretrained_cfg["label_names"]
    ['cat', 'dog']
    """
    given = getattr(model, "pretrained_cfg", None) or {}
    given = given if isinstance(given, Mapping) else given.to_dict()
    config = {key: value for key, value in given.items() if key not in ("label_names", "label_descriptions")}
    if names is None and config == dict(given):
        return
    config |= {} if names is None else {"label_names": list(names)}
    model.pretrained_cfg = config  # type: ignore[assignment]
    plain = {key: value for key, value in config.items() if isinstance(value, (str, int, float, list, tuple))}
    attach_origin(model, replace(origin_of(model), data=plain))
