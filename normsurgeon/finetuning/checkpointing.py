"""What is kept of a run: validations, the best network, the state to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from normsurgeon.errors import CheckpointError, TrainingStopped
from normsurgeon.finetuning.blending import plain_state
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.finetuning.history import History, Window
from normsurgeon.finetuning.loop import Loop, Student
from normsurgeon.finetuning.runstate import RunFolder
from normsurgeon.finetuning.sharding import restore_, whole_state, whole_weights
from normsurgeon.finetuning.validator import Judge, better
from normsurgeon.finetuning.watching import Stop
from normsurgeon.inference.evaluate import Evaluation
from normsurgeon.models.checkpoint import attach_origin, origin_of
from normsurgeon.models.state_dict import read_file
from normsurgeon.surgery.convert import Conversion

SHOWN = 100
"""Rows of updates in the event that a checkpoint carries; the run's folder has all of them."""


class Keeper:
    """Looks after one run: ``begin`` it, be told ``after_update``, ``finish`` it.

    plain   the network without blends and drops, which takes the student's weights to be judged and saved
    asked   what the run was asked for, in plain types: compared when it goes on
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        plain: nn.Module,
        conversion: Conversion | None,
        folder: RunFolder | None,
        judge: Judge | None,
        stop: Stop,
        settings: FinetuneConfig,
        asked: dict[str, Any],
        on_message: Callable[[str], None],
    ) -> None:
        self.accelerator, self.student, self.plain, self.conversion = accelerator, student, plain, conversion
        self.folder, self.judge, self.stop, self.settings, self.on_message = folder, judge, stop, settings, on_message
        self.asked = {"settings": settings.to_dict(), **asked}
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.latest: Evaluation | None = None
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.path: Path | None = None
        self.earlier = 0.0
        self.began = self.saved = time.perf_counter()
        self.origin = origin_of(plain)
        self.written: int | None = None

    @property
    def seconds(self) -> float:
        """Spent on the run so far, over all the times that it was resumed."""
        return self.earlier + time.perf_counter() - self.began

    @property
    def kept(self) -> str:
        """What of a run that failed is kept: the end of a sentence."""
        if self.folder is None or self.written is None:
            return ""
        return f"; the state after update {self.written} is kept in {self.folder.path}"

    def begin(self, loop: Loop, resume: bool) -> None:
        """Judge the network as it came, or go on with the run in the folder."""
        self.loop = loop
        state = self._state_so_far(self.folder, resume) if self.folder is not None else None
        if state is not None:
            self._restore(state)
            return
        if resume and self.folder is not None:
            self.on_message(f"there is no run in {self.folder.path} to go on with yet: starting at the beginning")
        if self.judge is not None:
            self.before = self.judge(self.plain)
            self._row(self.before)
            self._if_best(self.before)  # a run that only makes it worse gives it back as it was

    def _state_so_far(self, folder: RunFolder, resume: bool) -> dict[str, Any] | None:
        """The state in the folder, read by the first process for all of them: they may not share a file system."""
        state = None
        if self.accelerator.is_main_process:
            folder.make()
            state = folder.state_for(resume, self.asked)
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

        :raises TrainingStopped: a signal asked for it, and the state is saved.
        """
        late = time.perf_counter() - self.saved >= 60 * self.settings.checkpoint_minutes
        stopping, saving = _agreed(self.accelerator, bool(self.stop), late and self.accelerator.is_main_process)
        if ends and self.judge is not None:
            self._judge(self.judge)
        if self.folder is not None and (saving or stopping or self.loop.step == self.loop.steps):
            self._save(self.folder)
        if stopping and self.loop.step < self.loop.steps:
            self._stopped()

    def _judge(self, judge: Judge) -> None:
        self._export()
        found = judge(self.plain)
        self._row(found)
        self._if_best(found)

    def _if_best(self, found: Evaluation) -> None:
        self.latest = found
        if self.settings.keep == "best" and better(found, self.best):
            self.best = {"step": self.loop.step, "epoch": self.loop.step / self.loop.feed.per_epoch, **found.to_dict()}
            self.best_weights = {key: value.detach().cpu().clone() for key, value in self.plain.state_dict().items()}
            if self.folder is not None and self.accelerator.is_main_process:
                self.folder.write_network(self.result(), self.folder.best)

    def _row(self, found: Evaluation) -> None:
        values = found.to_dict()
        measured = {
            k: values[k] for k in ("images", "top1", "top5", "loss", "agreement", "kl") if values[k] is not None
        }
        row = {"step": self.loop.step, "epoch": self.loop.step / self.loop.feed.per_epoch, **measured}
        self.loop.history.epochs.append(row)
        if self.accelerator.trackers:
            self.accelerator.log({f"val_{k}": v for k, v in measured.items()}, step=self.loop.step)
        if self.loop.on_progress is not None and self.accelerator.is_main_process:
            self.loop.on_progress({"steps": self.loop.steps, **row, "validation": True})

    def _export(self) -> None:
        """Put the student's weights, or their moving average, into the plain network."""
        student = self.student
        if self.accelerator.num_processes > 1:  # running statistics are each process's own between two updates
            for buffer in (student.ema.module if student.ema is not None else student.core).buffers():
                torch.distributed.broadcast(buffer, 0)
        if student.ema is not None:
            state = student.ema.module.state_dict()
        else:
            state = whole_weights(self.accelerator, student.core, student.model)
        self.plain.load_state_dict(plain_state(state, student.blends), strict=True)

    def event(self) -> dict[str, Any]:
        """What a checkpoint's history says of the run: plain types."""
        history = self.loop.history
        every = -(-len(history.steps) // SHOWN) or 1
        return {
            "event": "finetune",
            "steps": self.loop.step,
            "images": self.loop.step * self.loop.feed.batch_size,
            "seconds": self.seconds,
            "data": self.asked["data"]["name"],
            "settings": self.asked["settings"],
            "before": self.before.to_dict() if self.before else None,
            "best": self.best,
            "curves": History(history.steps[::every], history.epochs).to_dict(),
        }

    def conversion_of(self, model: nn.Module) -> Conversion | None:
        """The conversion that was handed in, with another model and the run in its history."""
        if self.conversion is None:
            return None
        return Conversion(
            model,
            self.conversion.plan,
            history=[*self.conversion.history, self.event()],
            original=self.conversion.original,
        )

    def result(self) -> Conversion | nn.Module:
        """What is saved: the conversion, or the model, with the run in its history."""
        conversion = self.conversion_of(self.plain)
        if conversion is None:
            attach_origin(self.plain, replace(self.origin, history=(*self.origin.history, self.event())))
        return conversion or self.plain

    def _save(self, folder: RunFolder) -> None:
        state = self._state()
        if self.accelerator.is_main_process:
            folder.write_state(state)
            folder.write_history(self.loop.history)
        self.saved, self.written = time.perf_counter(), self.loop.step
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        student, scaler = self.student, self.accelerator.scaler
        return {
            "asked": self.asked,
            "step": self.loop.step,
            "steps": self.loop.steps,
            **whole_state(self.accelerator, student.core, student.model, student.optimizer),
            "ema": student.ema.module.state_dict() if student.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "micro": self.loop.micro,
            "history": self.loop.history.to_dict(),
            "window": self.loop.window.sums,
            "skipped": sorted(self.loop.skipped),
            "before": self.before.to_dict() if self.before else None,
            "best": self.best,
            "seconds": self.seconds,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        student, loop = self.student, self.loop
        loop.step = state["step"]
        restore_(self.accelerator, student.core, student.model, student.optimizer, state)
        if student.ema is not None:
            student.ema.module.load_state_dict(state["ema"], strict=True)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        loop.micro = min(loop.micro, state["micro"])
        loop.history = History.from_dict(state["history"])
        loop.window = Window(state["window"])
        loop.skipped = set(state["skipped"])
        self.before = _evaluation(state["before"])
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
            raise TrainingStopped(f"{done}; nothing is saved without a folder: try output=FOLDER (-o FOLDER)")
        raise TrainingStopped(
            f"{done}; it is saved in {self.folder.path}: the same again with resume=True (--resume) goes on"
        )

    def finish(self) -> None:
        """Leave the result in the plain network, and in the folder."""
        main = self.accelerator.is_main_process
        self._export()
        if self.folder is not None:
            if main:
                self.folder.write_network(self.result(), self.folder.last)
            self.path = self.folder.last
        if self.settings.keep == "last":
            self.after = self.latest
        if self.best_weights is not None:
            self.plain.load_state_dict(self.best_weights, strict=True)
            self.after = _evaluation(self.best)
            if self.folder is not None:
                self.path = self.folder.best
                if main:
                    self.folder.write_network(self.result(), self.folder.best)
        self.result()
        self.accelerator.wait_for_everyone()


def _evaluation(values: dict[str, Any] | None) -> Evaluation | None:
    if values is None:
        return None
    names = {field.name for field in fields(Evaluation)}
    known = {key: value for key, value in values.items() if key in names}
    return Evaluation(**{**known, "skipped_files": tuple(known["skipped_files"])})


def network_shape(model: nn.Module) -> dict[str, Any]:
    """What tells two networks apart when a run goes on: how many numbers they hold."""
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _agreed(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Flags that are set where any process set them: all processes do the same after the same update."""
    if accelerator.num_processes == 1:
        return list(flags)
    numbers = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [value > 0 for value in accelerator.reduce(numbers, "sum").tolist()]
