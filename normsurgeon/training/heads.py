"""A classifier for another number of classes."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from normsurgeon.checkpoints import origin_of, remember
from normsurgeon.errors import UsageError
from normsurgeon.inference import name_of


def reset_head_(model: nn.Module, classes: int) -> None:
    """Give a network a new classifier with random weights, in place, from the current random state.

    :raises UsageError: no such number, or a network that cannot tell which layer its classifier is.
    """
    if classes < 1:
        raise UsageError(f"num_classes={classes} must be at least 1")
    reset = getattr(model, "reset_classifier", None)
    if not callable(reset):
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UsageError(
                f"{name_of(model)} has no classifier to reset; try a network made with num_classes={classes}"
            )
        name, old = linear[-1]
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
        remember(model, replace(origin, source=replace(origin.source, kwargs=kwargs)))
