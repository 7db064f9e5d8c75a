"""A long run is looked after: killed, stopped or full, it goes on to the same result; two processes equal one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import normsurgeon as ns
from normsurgeon.errors import CheckpointError, TrainingStopped, UsageError, WriteError

HERE = Path(__file__)
FILES = ("last.safetensors", "best.safetensors")


def converted():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 24, 24)}
    return ns.convert(model, to="gn", balance=False, check=False, verdict=False)


def job(folder, resume=False, **changes):
    """A run with everything random that there is: order, crops, erasing, mixing, dropout, drop paths."""
    settings = {
        "steps": 24,
        "batch_size": 16,
        "mixup": 0.4,
        "drop": 0.3,
        "drop_path": 0.2,
        "reprob": 0.5,
        "ema": 0.9,
        "progressive": 0.5,
        "checkpoint_minutes": 0.0,
        **changes,
    }
    data = ns_digits(128)
    return ns.finetune(
        converted(),
        data,
        ns_digits(32),
        output=folder,
        resume=resume,
        device="cpu",
        on_message=lambda text: None,
        **settings,
    )


def ns_digits(count):
    """The first digits, as a source."""
    from normsurgeon.data.demo_images import digits
    from normsurgeon.data.readers import Arrays
    from normsurgeon.data.sources import ImageSource

    images, labels = digits("train")
    return ImageSource("digits", Arrays(images[:count], labels[:count]), True, tuple("0123456789"))


def network(path):
    from safetensors.torch import load_file

    return load_file(path)


def same(one, other):
    return all(
        network(one / name).keys() == network(other / name).keys()
        and all(torch.equal(value, network(other / name)[key]) for key, value in network(one / name).items())
        for name in FILES
    )


def forked(task):
    """Run a function in a child process; its process number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            task()
            code = 0
        finally:
            os._exit(code)
    return child


def kills(folder: Path, count: int) -> None:
    """Kill a run at random moments, let each go on to its end, and compare it with one that was left alone.

    The children are forked from a process that has imported everything and trained nothing.
    """
    torch.set_num_threads(1)
    assert ns.finetune
    assert ns.evaluate  # both import what they need when they are first looked up
    _, status = os.waitpid(forked(lambda: job(folder / "whole")), 0)
    assert status == 0
    moments, interrupted = random.Random(0), 0
    for number in range(count):
        place = folder / str(number)
        reader, writer = os.pipe()
        child = forked(lambda place=place, writer=writer: job(place, on_progress=lambda row: os.write(writer, b".")))
        os.close(writer)  # the child has its own
        os.read(reader, 1)  # the validation before the first update
        for _ in range(moments.randint(0, 20)):
            os.read(reader, 1)
        time.sleep(moments.uniform(0, 0.05))  # anywhere within an update, and the writing of its state
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        _, status = os.waitpid(child, 0)
        interrupted += status != 0
        if (place / "state.pt").exists():
            torch.load(place / "state.pt", weights_only=True)
        for path in place.glob("*.safetensors"):
            network(path)
        _, status = os.waitpid(forked(lambda place=place: job(place, resume=True)), 0)
        assert status == 0, f"run {number} did not go on"
        assert same(folder / "whole", place), f"run {number} ended elsewhere"
    print(f"{interrupted} of {count} runs were killed, and all ended alike")


def child(*arguments, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, str(HERE), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, timeout=300):
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.system
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_goes_on_to_the_result_of_an_uninterrupted_one(tmp_path, count):
    output = finished(child("kills", tmp_path, count))
    assert re.search(rf"^[1-9]\d* of {count} runs were killed, and all ended alike$", output, re.MULTILINE), output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_finishes_the_update_and_saves_and_says_how_to_go_on(tmp_path, name):
    def stop(row):
        if row.done == 7 and row.stage == "fine-tuning":
            os.kill(os.getpid(), getattr(signal, name))

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        TrainingStopped,
        match=rf"^stopped by {name} after update 7 of 24; it is saved in \S+: the same again with resume=True \(--resu",
    ) as caught:
        ns.finetune(
            converted(), ns_digits(64), output=tmp_path, steps=24, batch_size=16, on_progress=stop, device="cpu"
        )
    assert caught.value.exit_code == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    messages = []
    tuned = ns.finetune(
        converted(),
        ns_digits(64),
        output=tmp_path,
        resume=True,
        steps=24,
        batch_size=16,
        device="cpu",
        on_message=messages.append,
    )
    assert messages == [f"going on after update 7 of 24 in {tmp_path}"]
    whole = ns.finetune(converted(), ns_digits(64), steps=24, batch_size=16, device="cpu")
    assert all(torch.equal(p, q) for p, q in zip(tuned.model.parameters(), whole.model.parameters(), strict=True))
    rows = [[(row["step"], row["loss"]) for row in each.history[-1].curves.steps] for each in (tuned, whole)]
    assert rows[0] == rows[1]


def test_without_a_folder_a_stopped_run_says_that_nothing_is_saved(tmp_path):
    with pytest.raises(
        TrainingStopped,
        match=r"^stopped by SIGTERM after update 2 of 9; nothing is saved without a folder: try output=FOLDER \(-o FOL",
    ):
        ns.finetune(
            converted(),
            ns_digits(64),
            steps=9,
            batch_size=16,
            on_progress=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row.done == 2 else None,
            device="cpu",
        )


def test_a_finished_run_resumed_is_the_same_result(tmp_path):
    first = job(tmp_path, steps=4)
    again = job(tmp_path, resume=True, steps=4)
    assert again.history[-1].steps == 4
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert again.history[-1].curves == first.history[-1].curves
    assert (again.history[-1].after, again.history[-1].best) == (first.history[-1].after, first.history[-1].best)


def test_resume_before_anything_was_saved_starts_at_the_beginning(tmp_path):
    messages = []
    data = ns_digits(32)
    ns.finetune(
        converted(), data, output=tmp_path / "new", resume=True, steps=1, device="cpu", on_message=messages.append
    )
    assert messages == [f"there is no run in {tmp_path / 'new'} to go on with yet: starting at the beginning"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    job(tmp_path, steps=2)
    with pytest.raises(
        UsageError,
        match=r"^\S+ holds a run already \(2 of 2 updates done\); go on with resume=True \(--resume\), or choose anoth",
    ):
        job(tmp_path, steps=2)


def test_two_runs_in_one_folder_are_kept_apart(tmp_path):
    def second(row):
        with pytest.raises(
            UsageError, match=rf"^another run writes {tmp_path}; wait for it, or choose another folder$"
        ):
            job(tmp_path, steps=2, resume=True)

    job(tmp_path, steps=2, on_progress=second)
    assert "run.lock" not in {path.name for path in tmp_path.iterdir()}


def test_a_resumed_run_clears_what_a_killed_one_left_half_written(tmp_path):
    job(tmp_path, steps=2)
    (tmp_path / ".state.pt.0a1b.part").mkdir()
    (tmp_path / ".best.safetensors.xyz.part").write_bytes(b"half")
    job(tmp_path, steps=2, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "history.json", *FILES}


def test_a_resume_with_changed_settings_says_which(tmp_path):
    job(tmp_path, steps=2)
    with pytest.raises(
        UsageError,
        match=r"^the run in \S+ was started with other settings: steps \(2 → 3\), lr \(5e-05 → 0\.1\); go on with ",
    ):
        job(tmp_path, resume=True, steps=3, lr=0.1)
    with pytest.raises(UsageError, match=r"was started with other settings: images \(128 → 64\); "):
        ns.finetune(
            converted(),
            ns_digits(64),
            output=tmp_path,
            resume=True,
            device="cpu",
            steps=2,
            batch_size=16,
            mixup=0.4,
            drop=0.3,
            drop_path=0.2,
            reprob=0.5,
            ema=0.9,
            progressive=0.5,
        )
    job(tmp_path, resume=True, steps=2, checkpoint_minutes=5.0)


def test_a_damaged_state_is_one_line(tmp_path):
    job(tmp_path, steps=2)
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError, match=r"^\S+state\.pt cannot be read \(\w+\); try another folder, or move the file away and st"
    ):
        job(tmp_path, resume=True, steps=2)


def test_a_pipe_in_the_place_of_a_state_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"^\S+state\.pt cannot be read \(OSError\); try another folder"):
        job(tmp_path, resume=True, steps=2)


def test_a_full_disk_stops_the_run_and_leaves_the_last_state(tmp_path, monkeypatch):
    written = []
    real = torch.save

    def full(obj, path, *args, **kwargs):
        if len(written) == 3:
            Path(path).write_bytes(b"half of a st")
            raise OSError(28, "No space left on device")
        written.append(obj["step"])
        return real(obj, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match=r"^cannot write \S+state\.pt: No space left on device; nothing was written$"):
        job(tmp_path, steps=6)
    monkeypatch.undo()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "history.json", "best.safetensors"}
    assert job(tmp_path, resume=True, steps=6).history[-1].steps == 6


def pair(folder: Path, **changes) -> None:
    """One run, on its own or as one of the processes of a launcher."""
    torch.set_num_threads(1)
    settings = {"steps": 6, "batch_size": 16, "reprob": 0.3, "features": 1.0, "opt": "momentum", "lr": 0.01, **changes}
    tuned = ns.finetune(
        converted(), ns_digits(64), ns_digits(33), output=folder, device="cpu", on_message=lambda text: None, **settings
    )
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(
            {
                "loss": [row["loss"] for row in tuned.history[-1].curves.steps],
                "after": tuned.history[-1].after.to_dict(),
            },
            folder / "report",
        )


def ddp(folder: Path) -> None:
    pair(folder, ema=0.9)


def shards(folder: Path) -> None:
    """FSDP2 on the CPU. Accelerate sets it up for GPUs only, so that its state is set here.

    The run is stopped half-way and goes on, so that the state is gathered and spread again.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from normsurgeon.finetuning import finetune as finetuning

    real = finetuning.launch

    def launch(*arguments):
        accelerator = real(*arguments)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
        assert accelerator.is_fsdp2
        return accelerator

    finetuning.launch = launch
    with pytest.raises(TrainingStopped, match=r"after update 3 of 6"):
        pair(folder, on_progress=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row.done == 3 else None)
    pair(folder, resume=True)


@pytest.mark.system
@pytest.mark.parametrize("how", ["ddp", pytest.param("shards", marks=pytest.mark.slow)])
def test_two_processes_equal_one_with_the_same_batch(tmp_path, how):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finished(child(how, tmp_path / "two", launcher=launcher))
    pair(tmp_path / "one", **({} if how == "shards" else {"ema": 0.9}))
    for name in FILES:
        one, two = (network(tmp_path / run / name) for run in ("one", "two"))
        for key, value in one.items():
            assert torch.allclose(value, two[key], rtol=1e-4, atol=1e-6), key
    reports = [torch.load(tmp_path / run / "report") for run in ("one", "two")]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-5)
    for name in ("images", "top1", "agreement", "loss", "kl"):
        assert reports[1]["after"][name] == pytest.approx(reports[0]["after"][name], rel=1e-4), name


def test_the_state_is_plain_types_and_no_part_of_a_file_is_left(tmp_path):
    job(tmp_path, steps=2)
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "history.json", *FILES}
    assert isinstance(torch.load(tmp_path / "state.pt", weights_only=True)["model"], dict)
    loaded = ns.load(tmp_path / "best.safetensors")
    assert isinstance(loaded, nn.Module)


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    {"kills": kills, "ddp": ddp, "shards": shards}[what](Path(where), *map(int, rest))
