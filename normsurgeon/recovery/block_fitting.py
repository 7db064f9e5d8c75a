"""One block of a converted network fitted to the original's block: the step that reconstruction repeats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.inference.hooks import hooked
from normsurgeon.inference.objectives import feature_matching
from normsurgeon.inference.run import first_tensor, home_of
from normsurgeon.recovery.config import ReconstructionConfig
from normsurgeon.recovery.updates import fit_

CHUNK = 32
"""Images that go through a network at once where nothing is learned."""


class _BlockDoneError(Exception):
    """Leaves a forward pass after the block; never seen outside this file."""


def fit_block(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    images: Tensor,
    held_out: tuple[Tensor, Tensor],
    config: ReconstructionConfig,
    seed: int = 0,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Fit one block, in place, and keep its weights of least error on the held-out images; returns the updates made.

    The error is ``feature_matching`` of the block's output, for what the converted network hands to the block. None
    are made for a block that takes other than one tensor or is frozen. Of several calls in a pass the first counts.

    :raises TrainingError: if a loss is not finite.
    """
    theirs, ours = read_block(reference, name, images), read_block(model, name, images)
    wanted, given = read_block(reference, name, held_out[1]), read_block(model, name, held_out[0])
    block = model.get_submodule(name)
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    if theirs is None or ours is None or wanted is None or given is None or not parameters:
        return 0
    (inputs, _), (their_inputs, outputs) = ours, theirs
    generator = torch.Generator().manual_seed(seed)
    best, kept = error_of(block, given[0], wanted[1]), copy.deepcopy(block.state_dict())

    def loss_of(update: int) -> Tensor:
        chosen = torch.randperm(len(images), generator=generator)[: config.batch_size]
        share = torch.rand(len(chosen), *[1] * (inputs.ndim - 1), generator=generator).to(inputs)
        share = share.clamp(min=0.5)  # mostly what the converted prefix gives, since that is what it will get
        x = share * inputs[chosen] + (1 - share) * their_inputs[chosen]
        return feature_matching([_called(block, x)], [outputs[chosen]])

    def improved(updates: int) -> bool:
        nonlocal best, kept
        error = error_of(block, given[0], wanted[1])
        if error >= best:
            return False
        best, kept = error, copy.deepcopy(block.state_dict())
        return True

    steps = fit_(
        torch.optim.Adam(parameters, lr=config.local_lr),
        loss_of,
        improved,
        steps=config.local_steps,
        check_every=config.check_every,
        patience=config.patience,
        part=f"block {name}",
        setting="local_lr",
        is_over=is_over,
    )
    block.load_state_dict(kept)
    return steps


@torch.no_grad()
def read_block(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """A block's inputs, its only tensor argument (N, …), and its outputs (N, …), over all images.

    None for a block that takes other than one tensor, or is not reached.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    >>> [tuple(each.shape) for each in read_block(net, "1", torch.ones(5, 1, 2, 2))]
    [(5, 4), (5, 3)]
    """
    device, dtype = home_of(model)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
            inputs.append(args[0].clone())  # an in-place activation may overwrite it

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = first_tensor(output)
        if found is not None:
            outputs.append(found.clone())
        raise _BlockDoneError

    block = model.get_submodule(name)
    parts = images.split(CHUNK)
    with hooked([(block, "input", before), (block, "output", after)]):
        for part in parts:
            try:
                model(part.to(device, dtype))
            except _BlockDoneError:
                continue
            return None  # never called
    if not len(inputs) == len(outputs) == len(parts):
        return None
    return torch.cat(inputs), torch.cat(outputs)


@torch.no_grad()
def error_of(block: nn.Module, inputs: Tensor, wanted: Tensor) -> float:
    """``feature_matching`` of a block's outputs with the wanted ones, over all images."""
    parts = [
        float(feature_matching([_called(block, x)], [y])) * len(x)
        for x, y in zip(inputs.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    return sum(parts) / len(inputs)


def _called(block: nn.Module, x: Tensor) -> Tensor:
    output = first_tensor(block(x.clone()))  # a block may write into its input
    assert output is not None
    return output
