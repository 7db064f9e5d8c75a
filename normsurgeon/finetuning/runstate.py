"""The folder of a run: its state, from which it can go on, and what it has to show. Every file is written atomically.

state.pt            all that going on takes: weights, optimizer, moving average, update, settings, history
best.safetensors    the best network so far, by the validation images
last.safetensors    the network at the end (or where the run was stopped)
history.json        the curves
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from normsurgeon._util.files import write_atomically, write_text
from normsurgeon._util.parts import lock, remove_stale_parts, unlock
from normsurgeon.errors import CheckpointError, UsageError
from normsurgeon.finetuning.config import differences
from normsurgeon.finetuning.record import Curves
from normsurgeon.models.checkpoint import save
from normsurgeon.surgery.convert import Conversion

FORMAT = 1


class RunFolder:
    """Reads and writes a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state.pt"
        self.best, self.last = path / "best.safetensors", path / "last.safetensors"

    def make(self) -> None:
        """Make the folder, if it is not there, and remove what a killed run has left half-written.

        :raises CheckpointError: when it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.path}: {error.strerror or error}") from error
        remove_stale_parts(self.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the folder from other runs; it is made if it is not there.

        :raises UsageError: if another run has it.
        :raises CheckpointError: when it cannot be written.
        """
        self.make()
        path = self.path / "run.lock"
        try:
            handle = lock(path)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error.strerror or error}; try another") from error
        if handle is None:
            raise UsageError(f"another run writes {self.path}; wait for it, or choose another folder")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            unlock(handle)

    def write_state(self, state: dict[str, Any], curves: Curves) -> None:
        """Write the state and the curves; what stood there remains until the new file is complete.

        :raises CheckpointError: when it cannot be written.
        """
        write_atomically(self.state, lambda temporary: torch.save({**state, "format": FORMAT}, temporary))
        write_text(self.path / "history.json", curves.to_json())

    def write_network(self, result: Conversion, path: Path) -> None:
        """Write a network as ``normsurgeon.save`` does, without its messages."""
        save(result, path, on_message=lambda text: None)

    def state_for(self, resume: bool, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The state to go on from, or None to begin.

        wanted  ``settings``, ``data`` and ``network`` of this run, each of plain types

        :raises UsageError: if there is a run already and ``resume`` is not set, or its settings have changed.
        :raises CheckpointError: a file that cannot be read.
        """
        if not self.state.exists():
            return None
        try:
            if not self.state.is_file():
                raise OSError("no regular file")
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive raises nearly anything
            raise CheckpointError(
                f"{self.state} cannot be read ({type(error).__name__}); try another folder, or move the file away "
                "and start again"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"{self.state} is no state of a run that this version of normsurgeon reads")
        if not resume:
            raise UsageError(
                f"{self.path} holds a run already ({state['step']} of {state['steps']} updates done); "
                "go on with resume=True (--resume), or choose another folder"
            )
        parts = ("settings", "data", "network")
        changed = [text for part in parts for text in differences(state["asked"][part], wanted[part])]
        if changed:
            raise UsageError(
                f"the run in {self.path} was started with other settings: {', '.join(changed)}; "
                "go on with those, or choose another folder"
            )
        return state
