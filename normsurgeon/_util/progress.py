"""How far a long run has come: the one record that every ``on_progress`` is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Progress:
    """One step of a run.

    stage    what is being done, in a few words ("matching norms")
    done     steps (images, updates, cells) that are done in this stage
    total    how many there are; None if that is not known
    details  what else is known after this step, in plain types (the loss, the learning rate)
    """

    stage: str
    done: int
    total: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


OnProgress: TypeAlias = Callable[[Progress], None]


def counter(stage: str, total: int | None, on_progress: OnProgress | None) -> Callable[[int], None]:
    """A function that is called with how many more steps are done, and reports the sum.

    >>> count = counter("matching", 3, lambda progress: print(progress.done, progress.total))
    >>> count(2), count(1)
    2 3
    3 3
    (None, None)
    """
    done = 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        if on_progress is not None:
            on_progress(Progress(stage, done, total))

    return count
