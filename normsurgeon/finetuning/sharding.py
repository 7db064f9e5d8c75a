"""Weights and optimizer of a network, whole, whether or not FSDP has spread them over processes."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


def sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP has spread the weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole_weights(accelerator: Accelerator, core: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The network's state dict; under FSDP every process takes part and gets all of it."""
    if not sharded(accelerator):
        return core.state_dict()
    options = StateDictOptions(full_state_dict=True)
    return get_state_dict(model, (), options=options)[0]  # type: ignore[return-value]


def whole_state(accelerator: Accelerator, core: nn.Module, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The network's and the optimizer's state dicts, as ``model`` and ``optimizer``."""
    if not sharded(accelerator):
        return {"model": core.state_dict(), "optimizer": optimizer.state_dict()}
    weights, moments = get_state_dict(model, optimizer.optimizer, options=StateDictOptions(full_state_dict=True))
    return {"model": weights, "optimizer": moments}


def restore_(
    accelerator: Accelerator, core: nn.Module, model: nn.Module, optimizer: Any, state: dict[str, Any]
) -> None:
    """Put what ``whole_state`` gave back, in place."""
    if not sharded(accelerator):
        core.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        return
    set_state_dict(
        model,
        optimizer.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
