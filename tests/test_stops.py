"""Stopped at any moment, a command leaves whole files, one line and no process; the next run clears up and goes on."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_study import without_time

from normsurgeon.study.store import read_store

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
PATIENCE = 120.0
"""Seconds in which a stopped process has to be gone on a busy machine."""

GRID = """\
name: tiny
models: resnet8
norms: [bn, gn]
datasets: digits
batch_sizes: [16, 32]
seeds: 1
keep_checkpoints: true
training: {epochs: 1, train_images: 64, test_images: 50, image_size: 8}
"""


def networks(folder: Path) -> object:
    return {
        file.relative_to(folder): {key: value.tolist() for key, value in load_file(file).items()}
        for file in sorted(folder.rglob("*.safetensors"))
    }


def report(folder: Path) -> object:
    found = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in found.items() if key != "provenance"}


def fine_tuned(folder: Path) -> object:
    state = torch.load(folder / "run" / "state.pt", weights_only=True)
    curves = json.loads((folder / "run" / "history.json").read_text())
    losses = [(row["step"], row["loss"]) for row in curves["steps"]]
    return networks(folder), state["step"], losses, [row["top1"] for row in curves["epochs"]]


def studied(folder: Path) -> object:
    return sorted(map(str, without_time(read_store(folder / "study")[1].values()))), networks(folder)


@dataclass(frozen=True)
class Job:
    """A command, and what of its files must not depend on whether it was stopped on the way."""

    arguments: str
    result: Callable[[Path], object] = networks


JOBS = {
    "inspect": Job("inspect test_resnet"),
    "evaluate": Job("evaluate test_resnet --random-init --data images --labels none"),
    "predict": Job("predict test_resnet images --random-init"),
    "convert": Job("convert given.safetensors --to gn -o net.safetensors --force"),
    "convert-pt": Job("convert given.safetensors --to ln -o net.pt --force", lambda folder: None),
    "calibrate": Job("convert given.safetensors --to gn --calibrate digits --max-images 64 -o net.safetensors --force"),
    "reconstruct": Job(
        "convert given.safetensors --to gn --reconstruct digits --max-images 16 --steps 2 -o net.safetensors --force"
    ),
    "sensitivity": Job(
        "analyze given.safetensors --data digits --labels none --batch-size 4 --max-images 12 --sensitivity-images 4 "
        "--force --csv layers.csv --html report.html --json-file report.json", report
    ),
    "sweep": Job(
        "analyze given.safetensors --data digits --labels none --batch-size 4 --max-images 8 --sensitivity-images 2 "
        "--only sensitivity --methods taylor,noise --sweep --force --html report.html --json-file report.json", report
    ),
    "finetune": Job(
        "finetune given.safetensors --to gn --num-classes 2 --data images --val images --steps 20 --batch-size 4 "
        "--checkpoint-minutes 0 --mixup 0.4 --drop 0.3 --ema 0.9 -o run --resume", fine_tuned
    ),
    "study": Job("study tiny.yaml -o study --jobs 2", studied),
    "study-serial": Job("study tiny.yaml -o study --jobs 1", studied),
    "demo": Job("demo -o demo.safetensors --force"),
}  # fmt: skip


def prepared(folder: Path) -> Path:
    """A folder with what the commands read."""
    (folder / "tmp").mkdir(parents=True)
    (folder / "tiny.yaml").write_text(GRID)
    for number in range(8):
        place = folder / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (200, 30 * number, 30)).save(place / f"{number}.png")
    given = folder.parent / "given.safetensors"
    if not given.exists():
        import normsurgeon as ns

        torch.manual_seed(0)
        ns.save(ns.load("test_resnet", pretrained=False, num_classes=10), given)
    shutil.copy(given, folder / given.name)
    return folder


def started(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    for left in (folder / "tmp").iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    with open(folder / "tmp" / "stdout", "wb") as out, open(folder / "tmp" / "stderr", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "normsurgeon_cli", *job.arguments.split()],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )


def is_ready(process: subprocess.Popen[bytes]) -> bool:
    """Whether the program catches SIGTERM, which Python by itself does not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """As a terminal does it, which sends Ctrl-C to all processes of a command; the others come from ``kill``."""
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)


def check_all_gone(process: subprocess.Popen[bytes]) -> None:
    """No process of the command's is left."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process is left over")


def files_in(folder: Path) -> set[str]:
    """What is there but folders and the processes' own temporary files; all of it whole."""
    found = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("tmp/") or ".part/" in name:
            continue
        found.add(name)
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix in (".pt", ".pth"):
            assert torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".sqlite":
            assert sqlite3.connect(path).execute("pragma integrity_check").fetchone() == ("ok",)
    return found


def parts_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.part")]


@functools.cache
def baseline(name: str, folder: Path) -> tuple[set[str], object, float]:
    """What a job comes to where nobody stops it."""
    return finished(JOBS[name], prepared(folder / "whole"))


def finished(job: Job, folder: Path) -> tuple[set[str], object, float]:
    """The files of a run that is left alone, what they say, and how long it took."""
    began = time.monotonic()
    process = started(job, folder)
    code = process.wait()
    assert code == 0, (folder / "tmp" / "stderr").read_text()
    assert parts_in(folder) == []
    return files_in(folder), job.result(folder), time.monotonic() - began


def stopped(job: Job, folder: Path, number: signal.Signals, delay: float) -> str:
    """Send a job the signal ``delay`` seconds after it can be caught, and check what is left; what came of it."""
    process = started(job, folder)
    while process.poll() is None and not is_ready(process):
        time.sleep(0.001)
    time.sleep(delay)
    return interrupted(process, folder, number)


def interrupted(process: subprocess.Popen[bytes], folder: Path, number: signal.Signals) -> str:
    """Send the signal, and check what is left; what came of it."""
    ended = process.poll() is not None
    if not ended:
        send(process, number)
    process.wait(PATIENCE)
    check_all_gone(process)
    errors = (folder / "tmp" / "stderr").read_text()
    assert "Traceback" not in errors, errors
    assert "Exception ignored" not in errors, errors
    files_in(folder)
    if process.returncode == 0:
        return "came after the end" if ended else "came when all was done"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL, errors
        return "killed"
    assert process.returncode == STOPPED[number], (process.returncode, errors)
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:], errors
    left = {path.name for path in (folder / "tmp").iterdir()} - {"stdout", "stderr"}
    assert not left, left
    return "stopped"


def storm(folder: Path, name: str, signals: list[signal.Signals], moments: random.Random) -> Counter[str]:
    """Stop a job again and again, let it go on to its end, and compare with one that was left alone."""
    job, counts = JOBS[name], Counter[str]()
    files, result, seconds = baseline(name, folder.parent)
    place = prepared(folder / "stopped")
    for left, number in zip(range(len(signals) - 1, -1, -1), signals, strict=True):
        before = parts_in(place)
        outcome = stopped(job, place, number, seconds * moments.random() ** 1.5)
        counts[f"{number.name} {outcome}"] += 1
        if number != signal.SIGKILL:
            assert set(parts_in(place)) <= set(before), "a part of a file is left"
        if outcome.startswith("came") and left:
            shutil.rmtree(place)
            prepared(place)
    found, again, _ = finished(job, place)
    assert found == files
    assert again == result
    return counts


@pytest.mark.system
@pytest.mark.parametrize("name", ["convert", "sensitivity", "finetune", "study"])
def test_a_command_that_is_stopped_leaves_nothing_half_and_goes_on(tmp_path, name):
    counts = storm(tmp_path / name, name, NUMBERS, random.Random(name))
    assert counts.total() == 3


@pytest.mark.system
@pytest.mark.parametrize("number", STOPPED)
def test_a_study_on_ray_that_is_stopped_ends_ray_and_goes_on(tmp_path, monkeypatch, number):
    pytest.importorskip("ray", reason="Ray is an extra")
    files, result, _ = finished(JOBS["study-serial"], prepared(tmp_path / "whole"))
    place = prepared(tmp_path / "stopped")
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 characters
        monkeypatch.setenv("RAY_TMPDIR", short)
        process = started(Job("study tiny.yaml -o study --jobs 1 --engine ray"), place)
        errors = place / "tmp" / "stderr"
        while process.poll() is None and "1/4" not in errors.read_text():
            time.sleep(0.01)
        if "Ray cannot start" in errors.read_text():  # a machine without shared memory, or where no port may be opened
            pytest.skip(errors.read_text())
        assert interrupted(process, place, number) == "stopped"
    assert 1 <= len(read_store(place / "study")[1]) < 4
    found, again, _ = finished(JOBS["study-serial"], place)
    assert found == files
    assert again == result


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_hundred_signals_at_random_moments_over_all_commands(tmp_path, name):
    moments = random.Random(name)
    count = 8 if name == "demo" else 16
    assert storm(tmp_path / name, name, moments.choices(NUMBERS, k=count), moments).total() == count


if __name__ == "__main__":  # counts instead of dots
    where, rounds, *names = sys.argv[1:]
    generator = random.Random(rounds)
    for number in range(int(rounds)):
        for each in names or JOBS:
            drawn = generator.choices(NUMBERS, k=8)
            try:
                print(each, dict(storm(Path(where) / each / str(number), each, drawn, generator)), flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                print(each, [signal.name for signal in drawn], "FAILED", error, flush=True)
