"""Off a terminal, how far something has come is said in plain lines: not at once, not often, and with the time left."""

from __future__ import annotations

import threading

from normsurgeon_cli import console, lines
from normsurgeon_cli.lines import Lines

from normsurgeon._util.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_what_the_rate_since_the_stage_began_gives():
    clock = Clock()
    it = Lines("starting", print, clock)
    clock.now = 7.0
    assert it.line() == "starting … (7 s so far)"
    it.update("training", 1000, 5000)  # resumed: the first thousand took no time here
    assert it.line() == "training: 1,000 of 5,000 (7 s so far)"
    clock.now = 17.0
    it.update("training", 1100, 5000, "loss 0.5")
    assert it.line() == "training: 1,100 of 5,000, about 6 minutes left, loss 0.5"  # 3900 at 10 a second: 390 s
    clock.now = 317.0  # nothing was heard since
    assert it.line() == "training: 1,100 of 5,000, about 2 minutes left, loss 0.5"


def test_each_stage_has_a_rate_of_its_own():
    clock = Clock()
    it = Lines("starting", print, clock)
    it.update("reading", 0, 10)
    clock.now = 100.0
    it.update("reading", 10, 10)
    it.update("sensitivity", 0, 10)
    clock.now = 110.0
    it.update("sensitivity", 5, 10)
    assert it.line() == "sensitivity: 5 of 10, about 10 s left"


def test_without_a_total_the_time_so_far_is_said():
    clock = Clock()
    it = Lines("starting", print, clock)
    it.update("reading", 32, None)
    clock.now = 100.0
    assert it.line() == "reading: 32 (2 minutes so far)"


def test_what_is_soon_over_says_nothing(capsys):
    with console.progress("evaluating") as on_progress:
        on_progress(Progress("evaluating", 1, 2))
    with console.status("loading …"):
        pass
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_says_so_on_standard_error_also_between_two_steps(capsys, monkeypatch):
    monkeypatch.setattr(lines, "QUIET", 0.01)
    said = threading.Event()
    real = Lines.line
    monkeypatch.setattr(Lines, "line", lambda self: (said.set(), real(self))[1])
    with console.progress("evaluating") as on_progress:
        on_progress(Progress("evaluating", 3, 7))
        said.clear()
        assert said.wait(30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "evaluating: 3 of 7 (0 s so far)"
