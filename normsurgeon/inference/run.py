"""Running a model that is somebody else's: put in eval mode and on a device for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.one_line import one_line
from normsurgeon.calls import on, outputs_of
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import UsageError
from normsurgeon.models.checkpoint import origin_of
from normsurgeon.models.registry import DEMO


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits for ``images``, also where it returns a tuple, a list or a dict around them.

    Of a dict the entry ``logits`` or ``out`` is taken, of anything else the first tensor.

    :raises UsageError: a model that returns no tensor.
    """
    output = outputs_of(model, images)
    found = first_tensor(output)
    if found is None:
        raise UsageError(
            f"{name_of(model)} returns {type(output).__name__} without a tensor in it; try a model that returns logits"
        )
    return found


def classifier_logits(model: nn.Module, images: Tensor) -> Tensor:
    """``logits_of``, for a model whose logits are (images, classes).

    :raises UsageError: logits of another shape.
    """
    logits = logits_of(model, images)
    if logits.ndim != 2 or len(logits) != len(images):
        raise UsageError(
            f"{name_of(model)} gives {tuple(logits.shape)} for {len(images)} images; "
            "try a classifier, which gives (images, classes)"
        )
    return logits


def fetched_logits(model: nn.Module, images: Tensor) -> Tensor:
    """``classifier_logits`` in float64 on the CPU, of images that are first put where the model is, in its precision.

    Fetching waits for an accelerator, so that a clock may be read afterwards.
    """
    return classifier_logits(model, on(images, *home_of(model))).cpu().double()


def head_classes(model: nn.Module, config: DataConfig | None = None) -> int:
    """How many classes the model has: its ``num_classes``, or else the width of its logits.

    config  how large the image is that they are measured with; default: what the model carries

    :raises UsageError: a model without a classifier.
    """
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        if classes < 1:
            raise UsageError(f"{name_of(model)} has no classifier (num_classes={classes}); try num_classes=1000")
        return classes
    device, dtype = home_of(model)
    image = torch.zeros(1, *(config or DataConfig.of(model)).input_size, device=device, dtype=dtype)
    with eval_mode(model), torch.inference_mode():
        return classifier_logits(model, image).shape[1]


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode, and every module's own ``training`` flag back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training  # one by one: train(mode) would level frozen parts


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that matters in what a module returned: itself, ``logits`` or ``out`` of a dict, or the first inside.

    >>> first_tensor((None, [torch.ones(2)])).tolist()
    [1.0, 1.0]
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        parts = [output[key] for key in ("logits", "out") if key in output] + list(output.values())
    else:
        parts = list(output) if isinstance(output, (tuple, list)) else []
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def name_of(model: nn.Module) -> str:
    """What to call a model: the name it was loaded by, or its class."""
    source = origin_of(model).source
    if source is None:
        return type(model).__name__
    return "demo" if source.name == DEMO else source.name


def home_of(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where a model is and what it computes in: its first floating-point parameter or buffer (or None)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), None


def device_called(device: str | torch.device) -> torch.device:
    """The device of a name.

    :raises UsageError: a name of none, or the meta device, on which nothing is computed.

    >>> device_called("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"there is no device {device!r}; try cpu, cuda, cuda:1 or mps") from error
    if found.type == "meta":
        raise UsageError("nothing can be computed on the meta device; try cpu, cuda, cuda:1 or mps")
    return found


@contextmanager
def placed(model: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """A model on another device for a while."""
    device = None if device is None else device_called(device)
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(home.type == "meta" for home in homes):
        raise UsageError(f"{name_of(model)} has no weights (it is on the meta device); try loading some")
    if device is None or homes <= {device}:
        yield
        return
    if len(homes) > 1:
        raise UsageError(f"{name_of(model)} is spread over {len(homes)} devices; leave out device={device}")
    try:
        try:
            model.to(device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(
                f"{name_of(model)} cannot be put on {device} ({one_line(error, kind=False)}); try device='cpu'"
            ) from error
        yield
    finally:
        model.to(homes.pop())
