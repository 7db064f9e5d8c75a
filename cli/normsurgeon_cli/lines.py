"""How far something has come, as plain lines where there is no terminal to draw a bar on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from normsurgeon.render.formatting import duration

QUIET = 5.0
"""Seconds without a line: at first, and at least between two."""
RARER = 0.05
"""And at least this share of what has passed: a day of work is not to fill a log."""


class Lines:
    """Says every now and then how far it has come, from the sixth second on; a context manager.

    stage    what is being done, until ``update`` is called
    show     called with each line
    """

    def __init__(self, stage: str, show: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.show = now, show
        self.began = now()
        self.stage, self.done, self.figures = stage, 0.0, ""
        self.total: float | None = None
        self.first: dict[str, tuple[float, float]] = {}  # of each stage: when it was first heard of, and how far it was
        self._last = self.began
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def update(self, stage: str, done: float, total: float | None, figures: str = "") -> None:
        """Take in how far a stage has come; ``figures`` is what else to show."""
        self._last = self.now()
        self.stage, self.done, self.total, self.figures = stage, done, total, figures
        self.first.setdefault(stage, (self._last, done))

    def line(self) -> str:
        """What there is to say now.

        >>> clock = iter([0, 10, 20, 20])
        >>> lines = Lines("loading", print, lambda: next(clock))
        >>> lines.update("evaluating", 100, 400), lines.update("evaluating", 200, 400)
        (None, None)
        >>> lines.line()
        'evaluating: 200 of 400, about 20 s left'
        """
        now, stage = self.now(), self.stage
        passed = f"{duration(now - self.began)} so far"
        if stage not in self.first:
            return f"{stage.removesuffix(' …')} … ({passed})"
        since, before = self.first[stage]
        said = f"{stage}: {int(self.done):,}" + (f" of {int(self.total):,}" if self.total is not None else "")
        left = f" ({passed})"
        if self.total is not None and self.done > before:
            each = (self._last - since) / (self.done - before)
            left = f", about {duration(max(0.0, (self.total - self.done) * each - (now - self._last)))} left"
        return f"{said}{left}{self.figures and ', '}{self.figures}"

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(max(QUIET, RARER * (self.now() - self.began))):
            self.show(self.line())
