"""Norms that are given one value a channel, of which torch makes an error: which norm it was, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from torch import nn

from normsurgeon.errors import TrainingError
from normsurgeon.finetuning.trainable import holds_statistics, own_parameters
from normsurgeon.norms.foreign import own_tensor

ONE_VALUE = "Expected more than 1 value per channel when training"
"""torch's error text; also that of a GroupNorm, and in eval mode of a batch norm without statistics."""


@contextmanager
def single_values_named(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """torch's error in the forward pass of a network, or of its teacher, becomes one line that names the norm.

    :raises TrainingError: instead of torch's error.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if ONE_VALUE not in str(error):
            raise
        raise TrainingError(one_value(error, model, teacher)) from error


def one_value(
    error: Exception,
    model: nn.Module,
    teacher: nn.Module | None,
    given: str = "",
    larger: str | None = None,
    run_again: Callable[[], object] | None = None,
) -> str:
    """The error text for a norm that was given one value a channel.

    given      how it came to be given so little
    larger     how to give it more, where that can be
    run_again  repeats the forward pass eagerly: the error of a compiled network does not show where it arose
    """
    named, norm = _innermost(error, model, teacher)
    if not _pools(norm) and run_again is not None:
        try:
            run_again()
        except (RuntimeError, ValueError) as again:
            if ONE_VALUE in str(again):
                named, norm = _innermost(again, model, teacher)
    if not _pools(norm):
        ways = _either(larger, "another norm")
        return f"a norm within {named} gets one value a channel{given}, which has no variance; try {ways}"
    if isinstance(norm, nn.GroupNorm):
        return f"{named} gets one value a group{given}, which has no variance; try {_either(larger, 'another norm')}"
    if own_tensor(norm, "running_mean") is None and own_tensor(norm, "running_var") is None:
        ways = _either(larger, "batch norms that keep some")
        return f"{named} keeps no running statistics and gets one value a channel{given}; try {ways}"
    freeze = "requires_grad_(False)" if own_parameters(norm) else "its eval(), in a network in training mode"
    ways = _either(larger, f"freezing it ({freeze})", "converting it (normsurgeon convert MODEL --to gn)")
    return f"{named} gets one value a channel{given}, which has no variance to train on; try {ways}"


def larger_batch(batch_size: int, world: int, parts: int, most: int | None) -> int | None:
    """The next even batch size, for each process, of which no micro-batch is a single image; None: there is none.

    parts  micro-batches that a process's share goes through in
    most   images that fit in memory at once, if it has run out; else None

    >>> larger_batch(1, 1, 1, None), larger_batch(7, 1, 3, None), larger_batch(2, 2, 1, None), larger_batch(9, 1, 1, 4)
    (2, 8, 4, 10)
    """
    if most == 1:
        return None
    share = batch_size // world
    fits = (
        size
        for size in count(share + 1 + (share + 1) % 2, 2)
        if (micro := min(-(-size // parts), most or size)) > 1 and size % micro != 1
    )
    return next(fits) * world


def _pools(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) or holds_statistics(module)


def _innermost(error: Exception, model: nn.Module, teacher: nn.Module | None) -> tuple[str, nn.Module]:
    """The module of either network in whose forward an error arose, and what to call it."""
    names = {id(module): (name, "") for name, module in model.named_modules()}
    if teacher is not None:
        names |= {id(module): (name, " of the teacher") for name, module in teacher.named_modules()}
    found, trace = (type(model).__name__, model), error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            name, whose = names[id(module)]
            kind = type(module).__name__
            found = f"{name} ({kind}){whose}" if name else f"{kind}{whose}", module
        trace = trace.tb_next
    return found


def _either(*ways: str | None) -> str:
    known = [way for way in ways if way is not None]
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])}{',' if len(known) > 2 else ''} or {known[-1]}"
