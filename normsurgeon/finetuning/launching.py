"""Accelerate, set up for one run: device, precision, processes, trackers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import FinetuneConfig


def launch(config: FinetuneConfig, device: torch.device | None, output: Path | None) -> Accelerator:
    """An Accelerator for a run. Under ``accelerate launch`` or ``torchrun`` one of many processes'.

    :raises UsageError: a precision or a tracker that is not to be had here.
    """
    for name in config.trackers:
        known = sorted(str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers())
        if name not in known:
            raise UsageError(f"there is no tracker {name!r} here; installed are: {', '.join(known) or 'none'}")
    if config.trackers and output is None:
        raise UsageError(f"the tracker {config.trackers[0]} writes into the run's folder; give output=FOLDER")
    _forget_earlier_run(device)
    choice: dict[str, Any] = {"mixed_precision": config.precision if config.precision != "no" else None}
    try:
        accelerator = Accelerator(
            cpu=device is not None and device.type == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=str(output) if config.trackers else None,
            dynamo_backend="inductor" if config.compile else None,
            **choice,
        )
    except ValueError as error:
        raise UsageError(
            f"precision={config.precision} cannot be had here ({' '.join(str(error).split())[:140]}); try no or bf16"
        ) from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("precision=fp16 takes a GPU, and this runs on the CPU; try bf16 or no")
    if accelerator.distributed_type not in _KNOWN:
        raise UsageError(f"{accelerator.distributed_type.value} is not supported; try one process, DDP or FSDP")
    if config.ema is not None and accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("no moving average is kept of weights that FSDP has spread; leave out ema, or use DDP")
    return accelerator


_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.FSDP,
}


def on_device(device: torch.device | None) -> Any:
    """A context in which a numbered GPU is the current one, which is the one that Accelerate takes."""
    if device is not None and device.type == "cuda" and device.index is not None:
        return torch.cuda.device(device)
    return nullcontext()


def _forget_earlier_run(device: torch.device | None) -> None:
    """Accelerate keeps device and precision for a process's life; a run of its own settings starts without them."""
    distributed = PartialState._shared_state.get("num_processes", 1) > 1
    AcceleratorState._reset_state(reset_partial_state=not distributed)
