"""One block of a converted network fitted to the original's block: the step that reconstruction repeats."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon.errors import TrainingError
from normsurgeon.inference.objectives import feature_matching
from normsurgeon.inference.run import first_tensor, home_of
from normsurgeon.recovery.config import ReconstructionConfig

CHUNK = 32
"""Images that go through a network at once where nothing is learned."""


class _SeenEnoughError(Exception):
    """Leaves a forward pass behind the block; never seen outside this file."""


@dataclass(frozen=True)
class Seen:
    """What a block was given and gave, over all images: its only tensor argument (N, …), and its output (N, …)."""

    inputs: Tensor
    outputs: Tensor


def fit_block(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    images: Tensor,
    held_out: tuple[Tensor, Tensor],
    recipe: ReconstructionConfig,
    seed: int = 0,
) -> int:
    """Fit one block, in place, and keep its weights of least error on the held-out images; returns the updates made.

    The error is ``feature_matching`` of the block's output, for what the converted network hands to the block. None
    are made for a block that takes other than one tensor or is frozen. Of several calls in a pass the first counts.

    :raises TrainingError: a loss that is not finite.
    """
    theirs, ours = see_block(reference, name, images), see_block(model, name, images)
    judged_by = see_block(reference, name, held_out[1]), see_block(model, name, held_out[0])
    if theirs is None or ours is None or judged_by[0] is None or judged_by[1] is None:
        return 0
    block = model.get_submodule(name)
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    if not parameters:
        return 0
    optimizer = torch.optim.Adam(parameters, lr=recipe.local_lr)
    generator = torch.Generator().manual_seed(seed)
    best, kept = error_of(block, judged_by[1].inputs, judged_by[0].outputs), copy.deepcopy(block.state_dict())
    stale, step = 0, 0
    for step in range(1, recipe.local_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.local_lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / recipe.local_steps))
        chosen = torch.randperm(len(images), generator=generator)[: recipe.batch_size]
        share = torch.rand(len(chosen), *[1] * (ours.inputs.ndim - 1), generator=generator).to(ours.inputs)
        share = share.clamp(min=0.5)  # mostly what the converted prefix gives, since that is what it will get
        x = share * ours.inputs[chosen] + (1 - share) * theirs.inputs[chosen]
        loss = feature_matching([_called(block, x)], [theirs.outputs[chosen]])
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is not finite at update {step} of block {name}, nothing was changed; try a lower local_lr"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % recipe.check_every == 0 or step == recipe.local_steps:
            error = error_of(block, judged_by[1].inputs, judged_by[0].outputs)
            if error < best:
                best, kept, stale = error, copy.deepcopy(block.state_dict()), 0
            else:
                stale += 1
            if stale >= recipe.patience:
                break
    block.load_state_dict(kept)
    return step


@torch.no_grad()
def see_block(model: nn.Module, name: str, images: Tensor) -> Seen | None:
    """Run images up to and through one block; None where it takes other than one tensor, or is not reached.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    >>> seen = see_block(net, "1", torch.ones(5, 1, 2, 2))
    >>> tuple(seen.inputs.shape), tuple(seen.outputs.shape)
    ((5, 4), (5, 3))
    """
    device, dtype = home_of(model)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    odd = False

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal odd
        if len(arguments) == 1 and isinstance(arguments[0], Tensor) and not named:
            inputs.append(arguments[0].clone())  # an in-place activation may overwrite it
        else:
            odd = True

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found = first_tensor(output)
        if found is not None:
            outputs.append(found.clone())
        raise _SeenEnoughError

    block = model.get_submodule(name)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        for part in images.split(CHUNK):
            try:
                model(part.to(device, dtype))
            except _SeenEnoughError:
                continue
            return None  # never called
    finally:
        for handle in handles:
            handle.remove()
    if odd or len(inputs) != len(outputs):
        return None
    return Seen(torch.cat(inputs), torch.cat(outputs))


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
