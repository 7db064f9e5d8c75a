"""Validations, the best network, and the state from which a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from normsurgeon._util.progress import Progress
from normsurgeon._util.stopping import Stop
from normsurgeon.errors import CheckpointError, TrainingStopped
from normsurgeon.finetuning.blending import plain_state
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.finetuning.loop import Loop, Student
from normsurgeon.finetuning.record import Curves, FinetuneRecord, Window, evaluation_of
from normsurgeon.finetuning.runstate import RunFolder
from normsurgeon.finetuning.validator import Validator, better
from normsurgeon.inference.evaluate import Evaluation
from normsurgeon.models.checkpoint import add_record_, attach_origin, origin_of
from normsurgeon.models.state_dict import read_file
from normsurgeon.models.state_dict import restore_ as restore_weights_
from normsurgeon.surgery.convert import Conversion


@dataclass(eq=False)
class CheckpointManager:
    """Validates and saves one run: call ``begin`` first, ``after_update`` after each update, and ``finish`` at the end.

    plain     the network without blends and drops, which takes the student's weights to be validated and saved
    given     the conversion that the run starts from
    identity  what the run is about, in plain types: compared, with the settings, when it is resumed
    """

    accelerator: Accelerator
    student: Student
    plain: nn.Module
    given: Conversion
    folder: RunFolder | None
    validator: Validator | None
    stop: Stop
    config: FinetuneConfig
    identity: dict[str, Any]
    on_message: Callable[[str], None]
    before: Evaluation | None = None
    after: Evaluation | None = None
    latest: Evaluation | None = None
    best: dict[str, Any] | None = None
    best_weights: dict[str, Tensor] | None = None
    earlier: float = 0.0
    written: int | None = None

    def __post_init__(self) -> None:
        self.identity = {"settings": self.config.to_dict(), **self.identity}
        self.began = self.saved = time.perf_counter()
        self.origin = origin_of(self.plain)

    @property
    def kept(self) -> str:
        """What of a run that failed is kept: the end of a sentence."""
        if self.folder is None or self.written is None:
            return ""
        return f"; the state after update {self.written} is kept in {self.folder.path}"

    def begin(self, loop: Loop, resume: bool) -> None:
        """Validate the network as it came, or go on with the run in the folder."""
        self.loop = loop
        state = self._state_so_far(self.folder, resume) if self.folder is not None else None
        if state is not None:
            self._restore(state)
            return
        if resume and self.folder is not None:
            self.on_message(f"there is no run in {self.folder.path} to go on with yet: starting at the beginning")
        if self.validator is not None:
            self.before = self._validate(self.validator)  # a run that only makes it worse gives it back as it was

    def _state_so_far(self, folder: RunFolder, resume: bool) -> dict[str, Any] | None:
        """The state in the folder, read by the first process for all of them: they may not share a file system."""
        state = None
        if self.accelerator.is_main_process:
            state = folder.state_for(resume, self.identity)
            if state is not None and state["best"] is not None:
                if not folder.best.exists():
                    raise CheckpointError(
                        f"{folder.best} is gone, and the run in {folder.path} cannot go on without it; "
                        "try another folder"
                    )
                state["best_weights"] = read_file(folder.best)[0]
        if self.accelerator.num_processes > 1:
            state = broadcast_object_list([state])[0]
        return state

    def after_update(self, ends: bool) -> None:
        """Validate, save and stop where it is time to.

        :raises TrainingStopped: if a signal asked for it; the state is saved.
        """
        late = time.perf_counter() - self.saved >= 60 * self.config.checkpoint_minutes
        stopping, saving = _agreed(self.accelerator, bool(self.stop), late and self.accelerator.is_main_process)
        if ends and self.validator is not None:
            self._export()
            self._validate(self.validator)
        if self.folder is not None and (saving or stopping or self.loop.step == self.loop.steps):
            self._save(self.folder)
        if stopping and self.loop.step < self.loop.steps:
            self._stopped()

    def _validate(self, validator: Validator) -> Evaluation:
        """Measure the plain network, and keep its weights if it is the best so far."""
        found = validator(self.plain)
        self._add_row(found)
        self.latest = found
        if self.config.keep == "best" and better(found, self.best):
            self.best = {"step": self.loop.step, "epoch": self.loop.step / self.loop.feed.per_epoch, **found.to_dict()}
            self.best_weights = {key: value.detach().cpu().clone() for key, value in self.plain.state_dict().items()}
            if self.folder is not None and self.accelerator.is_main_process:
                self.folder.write_network(self.result(), self.folder.best)
        return found

    def _add_row(self, found: Evaluation) -> None:
        values = found.to_dict()
        measured = {
            k: values[k] for k in ("images", "top1", "top5", "loss", "agreement", "kl") if values[k] is not None
        }
        row = {"step": self.loop.step, "epoch": self.loop.step / self.loop.feed.per_epoch, **measured}
        self.loop.curves.epochs.append(row)
        if self.accelerator.trackers:
            self.accelerator.log({f"val_{k}": v for k, v in measured.items()}, step=self.loop.step)
        if self.loop.on_progress is not None and self.accelerator.is_main_process:
            self.loop.on_progress(Progress("validating", self.loop.step, self.loop.steps, row))

    def _export(self) -> None:
        """Put the student's weights, or their moving average, into the plain network."""
        student = self.student
        if self.accelerator.num_processes > 1:  # running statistics are each process's own between two updates
            for buffer in (student.ema.module if student.ema is not None else student.core).buffers():
                torch.distributed.broadcast(buffer, 0)
        if student.ema is not None:
            state = student.ema.module.state_dict()
        else:
            state = _whole_weights(self.accelerator, student.core, student.model)
        restore_weights_(self.plain, plain_state(state, student.blends))

    def result(self, path: Path | None = None) -> Conversion:
        """The plain network as a conversion, with the run so far as the last record of its history."""
        loop = self.loop
        record = FinetuneRecord(
            steps=loop.step,
            images=loop.step * loop.feed.batch_size,
            seconds=self.earlier + time.perf_counter() - self.began,
            data=self.identity["data"]["name"],
            config=self.config,
            before=self.before,
            after=self.after,
            best=self.best,
            curves=loop.curves,
            skipped=tuple(sorted(loop.skipped)),
            path=path,
            stopped=self.stop.signal,
        )
        attach_origin(self.plain, self.origin)
        conversion = replace(self.given, model=self.plain, history=list(self.given.history), optimizer=None)
        return add_record_(conversion, record)

    def _save(self, folder: RunFolder) -> None:
        state = self._state()
        if self.accelerator.is_main_process:
            folder.write_state(state, self.loop.curves)
        self.saved, self.written = time.perf_counter(), self.loop.step
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        student, scaler = self.student, self.accelerator.scaler
        return {
            "asked": self.identity,
            "step": self.loop.step,
            "steps": self.loop.steps,
            **_whole_state(self.accelerator, student.core, student.model, student.optimizer),
            "ema": student.ema.module.state_dict() if student.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "micro": self.loop.micro,
            "history": self.loop.curves.to_dict(),
            "window": self.loop.window.sums,
            "skipped": sorted(self.loop.skipped),
            "before": self.before.to_dict() if self.before else None,
            "best": self.best,
            "seconds": self.earlier + time.perf_counter() - self.began,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        student, loop = self.student, self.loop
        loop.step = state["step"]
        _restore_(self.accelerator, student.core, student.model, student.optimizer, state)
        if student.ema is not None:
            student.ema.module.load_state_dict(state["ema"], strict=True)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        loop.micro = min(loop.micro, state["micro"])
        loop.curves = Curves.from_dict(state["history"])
        loop.window = Window(state["window"])
        loop.skipped = set(state["skipped"])
        self.before = evaluation_of(state["before"])
        self.best = state["best"]
        self.earlier = state["seconds"]
        self.written = loop.step
        self.best_weights = state.get("best_weights")
        self.on_message(
            f"going on after update {loop.step} of {loop.steps} in {self.folder.path if self.folder else ''}"
        )

    def _stopped(self) -> None:
        loop = self.loop
        done = f"stopped by {self.stop.signal or 'a signal'} after update {loop.step} of {loop.steps}"
        if self.folder is None:
            advice = "nothing is saved without a folder: try output=FOLDER (-o FOLDER)"
        else:
            advice = f"it is saved in {self.folder.path}: the same again with resume=True (--resume) goes on"
        raise TrainingStopped(f"{done}; {advice}", self.stop.signal)

    def finish(self) -> Conversion:
        """The network that the run gives, which is saved in the folder, too."""
        folder = self.folder
        path = None if folder is None else folder.last
        self._export()
        if folder is not None and self.accelerator.is_main_process:
            folder.write_network(self.result(), folder.last)
        if self.config.keep == "last":
            self.after = self.latest
        if self.best_weights is not None:
            restore_weights_(self.plain, self.best_weights)
            self.after = evaluation_of(self.best)
            if folder is not None:
                path = folder.best
                if self.accelerator.is_main_process:
                    folder.write_network(self.result(), folder.best)
        self.accelerator.wait_for_everyone()
        return self.result(path)


def _agreed(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Flags that are set where any process set them: all processes do the same after the same update."""
    if accelerator.num_processes == 1:
        return list(flags)
    numbers = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [value > 0 for value in accelerator.reduce(numbers, "sum").tolist()]


# Weights and optimizer of a network, whole, whether or not FSDP has spread them over processes.


def _sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP has spread the weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def _whole_weights(accelerator: Accelerator, core: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The network's state dict; under FSDP every process takes part and gets all of it."""
    if not _sharded(accelerator):
        return core.state_dict()
    options = StateDictOptions(full_state_dict=True)
    return get_state_dict(model, (), options=options)[0]  # type: ignore[return-value]


def _whole_state(accelerator: Accelerator, core: nn.Module, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The network's and the optimizer's state dicts, as ``model`` and ``optimizer``."""
    if not _sharded(accelerator):
        return {"model": core.state_dict(), "optimizer": optimizer.state_dict()}
    weights, moments = get_state_dict(model, optimizer.optimizer, options=StateDictOptions(full_state_dict=True))
    return {"model": weights, "optimizer": moments}


def _restore_(
    accelerator: Accelerator, core: nn.Module, model: nn.Module, optimizer: Any, state: dict[str, Any]
) -> None:
    """Put what ``_whole_state`` gave back, in place."""
    if not _sharded(accelerator):
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
