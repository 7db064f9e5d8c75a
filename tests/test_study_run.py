"""A study that runs: stored cell by cell, resumed, the same however it is run."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_study import GRID, TINY, without_time

from normsurgeon.data import datasets
from normsurgeon.data.datasets import open_data, prepare
from normsurgeon.errors import CheckpointError, DataError, EnvironmentProblem, LoadingError, UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.inference.evaluate import evaluate
from normsurgeon.study import run
from normsurgeon.study.cell import config_of, load_kept
from normsurgeon.study.engines import Work, processes
from normsurgeon.study.grid import Grid
from normsurgeon.study.records import Cell, Outcome
from normsurgeon.study.run import check, run_study
from normsurgeon.study.store import open_store, read_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """The tiny study, uninterrupted, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, without_time(run_study(GRID, folder, jobs=1).results.outcomes)


@pytest.mark.long
def test_every_cell_has_an_outcome_and_impossible_ones_their_reason(whole):
    _, outcomes = whole
    assert [outcome.status for outcome in outcomes] == 2 * [*4 * ["done"], *2 * ["skipped"]]
    assert {o.reason for o in outcomes if o.status == "skipped"} == {
        "3 groups do not divide the 16 channels of bn1; try a divisor of them"
    }
    for outcome in outcomes[:4]:
        assert outcome.images == 100
        assert outcome.accuracy == outcome.correct / 100
        assert outcome.steps == 128 // outcome.cell.batch_size
        assert outcome.curve[-1].accuracy == outcome.accuracy


@pytest.mark.long
def test_the_same_seeds_give_the_same_table_again(whole, tmp_path):
    _, outcomes = whole
    assert without_time(run_study(GRID, tmp_path, jobs=1).results.outcomes) == outcomes


@pytest.mark.system
def test_parallel_processes_give_the_table_of_one(whole, tmp_path):
    _, outcomes = whole
    assert without_time(run_study(GRID, tmp_path, jobs=2).results.outcomes) == outcomes


@pytest.mark.system
def test_ray_gives_the_table_of_one_process(whole, tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra")
    _, outcomes = whole
    try:
        found = run_study(GRID, tmp_path, jobs=2, engine="ray")
    except EnvironmentProblem as problem:  # a machine without shared memory, or where no port may be opened
        pytest.skip(str(problem))
    assert without_time(found.results.outcomes) == outcomes


@pytest.mark.long
def test_a_finished_study_runs_nothing_again(whole, monkeypatch):
    folder, outcomes = whole
    monkeypatch.setattr(run, "serial", lambda *args: pytest.fail("a cell ran"))
    messages: list[str] = []
    assert without_time(run_study(GRID, folder, jobs=1, on_message=messages.append).results.outcomes) == outcomes
    assert messages == [f"12 of 12 cells have their results in {folder} already"]


@pytest.mark.long
def test_more_seeds_run_only_the_new_cells(whole, tmp_path):
    _, outcomes = whole
    run_study({**GRID, "seeds": 1}, tmp_path, jobs=1)
    ran: list[dict] = []
    result = run_study(GRID, tmp_path, jobs=1, on_progress=lambda step: ran.append(step.details))
    assert {details["cell"].seed for details in ran if details["outcome"]} == {1}
    assert without_time(result.results.outcomes) == outcomes


@pytest.mark.system
def test_a_study_that_was_killed_goes_on_to_the_same_results(whole, tmp_path):
    _, outcomes = whole
    program = (
        "import sys\nfrom normsurgeon.study.run import run_study\n"
        f"run_study({GRID!r}, {str(tmp_path)!r}, jobs=1, on_progress=lambda t: print(t.done, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = read_store(tmp_path)[1]
    assert 3 <= len(kept) < 12
    assert without_time(run_study(GRID, tmp_path, jobs=1).results.outcomes) == outcomes


@pytest.mark.system
def test_ctrl_c_keeps_what_is_done_and_ends_the_workers(tmp_path):
    grid = {**GRID, "norms": ["bn", "gn"], "training": {**TINY, "epochs": 40}}
    program = (
        "from normsurgeon.study.run import run_study\n"
        "if __name__ == '__main__':\n"
        f"    run_study({grid!r}, {str(tmp_path / 'out')!r}, jobs=2, on_progress=lambda t: print(t.done, flush=True))"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "1":
            break
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert 1 <= len(read_store(tmp_path / "out")[1]) < 8
    deadline = time.monotonic() + 30
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(process.pid)


@pytest.mark.system
def test_a_study_that_ends_at_once_says_nothing_afterwards(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom normsurgeon.study.run import run_study\n"
        "if __name__ == '__main__':\n"
        f"    run_study({GRID!r}, {str(tmp_path / 'out')!r}, jobs=2, on_progress=lambda t: t.done > 5 and os._exit(3))"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


def _alive(group: int) -> bool:
    """Whether any process of a session is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.system
def test_a_worker_that_dies_takes_only_its_own_cell_along(tmp_path):
    grid = Grid.from_dict({**GRID, "norms": "bn", "batch_sizes": 32, "seeds": 3})
    cells = grid.cells()
    found = {o.cell: o for o in processes(_Deadly(grid), cells, lambda cell, share: None, 1)}
    assert {cell.seed: found[cell].status for cell in cells} == {0: "done", 1: "failed", 2: "done"}
    assert found[cells[1]].reason == "its process was ended by SIGKILL; was memory short? try fewer --jobs"


@pytest.mark.system
def test_a_script_whose_workers_would_run_it_again_gets_an_error_that_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from normsurgeon.study.run import run_study\n"
        f"run_study({ {**GRID, 'norms': 'bn'}!r}, {str(tmp_path / 'out')!r}, jobs=2)"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("call run_study below if __name__ == '__main__':, or give jobs=1")
    assert read_store(tmp_path / "out")[1] == {}


class _Deadly(Work):
    def run(self, cell: Cell, on_share=None) -> Outcome:
        if cell.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(cell, on_share)


def test_failed_cells_are_tried_again_and_diverged_ones_are_not(tmp_path, monkeypatch):
    grid = {**GRID, "norms": "bn", "batch_sizes": 32, "seeds": 3}
    cells = Grid.from_dict(grid).cells()
    with open_store(tmp_path) as store:
        store.write(Outcome(cells[0], "failed", "no room"))
        store.write(Outcome(cells[1], "diverged", "the loss is not finite"))
    result = run_study(grid, tmp_path, jobs=1)
    assert [outcome.status for outcome in result.results.outcomes] == ["done", "diverged", "done"]


def test_a_device_that_is_not_there_runs_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"^there is no device 'abacus'; try cpu, cuda, cuda:1 or mps$"):
        run_study(GRID, tmp_path / "out", device="abacus")
    assert not (tmp_path / "out").exists()


def test_a_skipped_cell_that_seems_possible_is_tried_again(tmp_path):
    grid = {**GRID, "norms": ["gn", "gn:3"], "batch_sizes": 32, "seeds": 1}
    with open_store(tmp_path) as store:
        for cell in Grid.from_dict(grid).cells():
            store.write(Outcome(cell, "skipped", "precision=fp16 takes a GPU, and this runs on the CPU"))
    messages: list[str] = []
    result = run_study(grid, tmp_path, jobs=1, on_message=messages.append)
    assert [outcome.status for outcome in result.results.outcomes] == ["done", "skipped"]
    assert messages == [f"1 of 2 cells have their results in {tmp_path} already"]


def test_ctrl_c_in_one_process_is_an_interruption_of_the_study(tmp_path):
    def press(step) -> None:
        signal.raise_signal(signal.SIGINT)

    grid = {**GRID, "norms": "bn", "training": {**TINY, "epochs": 400}}
    with pytest.raises(KeyboardInterrupt):
        run_study(grid, tmp_path, jobs=1, on_progress=press)
    assert read_store(tmp_path)[1] == {}


@pytest.mark.long
def test_results_of_another_training_are_not_mixed_in(whole):
    folder, _ = whole
    with pytest.raises(
        UsageError,
        match=r"were made with another training: epochs \(1 → 2\); try another --output, or the settings of before$",
    ):
        run_study({**GRID, "training": {**TINY, "epochs": 2}}, folder)


def test_two_studies_do_not_write_one_file(tmp_path):
    with (
        open_store(tmp_path),
        pytest.raises(
            UsageError, match=r"^another process runs the study in .*; wait for it, or try another --output$"
        ),
        open_store(tmp_path),
    ):
        pass


def test_a_missing_data_set_or_network_stops_a_study_before_it_begins(tmp_path):
    with pytest.raises(DataError, match=r"^the study's data set nowhere cannot be used: there is no folder nowhere"):
        run_study({**GRID, "datasets": ["digits", "nowhere"]}, tmp_path)
    with pytest.raises(LoadingError, match=r"^the study's network resnot8 cannot be used: "):
        run_study({**GRID, "models": ["resnet8", "resnot8"]}, tmp_path)
    assert not (tmp_path / "results.sqlite").exists()


@pytest.mark.long
def test_pandas_opens_the_results(whole):
    pandas = pytest.importorskip("pandas")
    folder, outcomes = whole
    with sqlite3.connect(folder / "results.sqlite") as connection:
        cells = pandas.read_sql("select * from cells", connection)
        curves = pandas.read_sql("select * from curves", connection)
    done = cells[cells.status == "done"]
    assert len(cells) == 12
    assert len(done) == 8
    assert sorted(done.accuracy) == sorted(o.accuracy for o in outcomes if o.accuracy is not None)
    assert set(curves.cell) == set(done.key)


@pytest.mark.long
def test_outcomes_come_back_from_the_file_as_they_were(whole):
    folder, outcomes = whole
    facts, kept = read_store(folder)
    assert [replace(kept[o.cell.key], seconds=0.0) for o in outcomes] == outcomes
    assert facts["grid"]["norms"] == ["bn", "gn", "gn:3"]
    assert set(facts["versions"]) == {"torch", "timm", "numpy", "normsurgeon"}


def test_a_file_of_another_kind_is_not_written_into(tmp_path):
    with sqlite3.connect(tmp_path / "results.sqlite") as connection:
        connection.execute("create table something (x)")
    with pytest.raises(CheckpointError, match=r"holds no study of this version of normsurgeon; try another folder$"):
        run_study(GRID, tmp_path)
    (tmp_path / "results.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 20)
    with pytest.raises(CheckpointError, match=r"cannot be used \(file is not a database\)"):
        run_study(GRID, tmp_path)
    with pytest.raises(CheckpointError, match=r"^there is no study in nowhere"):
        read_store("nowhere")


def test_a_kept_network_gives_the_stored_accuracy_again(tmp_path):
    grid = Grid.from_dict({**GRID, "norms": "gn", "batch_sizes": 16, "seeds": 1, "keep_checkpoints": True})
    (outcome,) = run_study(grid, tmp_path, jobs=1).results.outcomes
    model = load_kept(tmp_path / "networks" / f"{outcome.cell.key}.safetensors", classes=10, channels=1)
    data = open_data("digits", 128, 100)
    _, test = prepare(data, config_of(model, 8), "standard", FinetuneConfig(augment=False))
    assert evaluate(model, test).top1 == outcome.accuracy


@pytest.mark.long
def test_an_analysed_cell_has_statistics_similarity_and_sensitivity(tmp_path):
    grid = {**GRID, "norms": "gn", "batch_sizes": 16, "seeds": 1, "analysis": True}
    (outcome,) = run_study(grid, tmp_path, jobs=1).results.outcomes
    assert outcome.analysis is not None
    names = [layer.layer for layer in outcome.analysis.layers]
    assert {"conv1", "bn1", "layer3.0.conv2", "fc"} <= set(names)
    by_name = {layer.layer: layer for layer in outcome.analysis.layers}
    assert by_name["conv1"].sensitivity > 0
    assert by_name["bn1"].group_fluctuation is not None
    assert len(outcome.analysis.cka) == len(outcome.analysis.cka_layers) > 0
    # A study without analysis that gets one later looks at what it has not looked at yet.
    without = tmp_path / "without"
    run_study({**grid, "analysis": False}, without, jobs=1)
    assert without_time(run_study(grid, without, jobs=1).results.outcomes) == without_time([outcome])


@pytest.mark.long
def test_cells_run_in_one_thread_and_the_callers_number_comes_back(whole, tmp_path, monkeypatch):
    seen: list[int] = []

    def note(self, cell, on_share=None):
        seen.append(torch.get_num_threads())
        return Outcome(cell, "failed", "not tried")

    monkeypatch.setattr(Work, "run", note)
    before = torch.get_num_threads()
    run_study({**GRID, "norms": "bn", "batch_sizes": 16, "seeds": 1}, tmp_path, jobs=1)
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_results_of_another_file_or_other_images_are_not_mixed_in(tmp_path):
    import normsurgeon as ns

    path = tmp_path / "start.safetensors"

    def saved(seed: int) -> None:
        torch.manual_seed(seed)
        ns.save(ns.load("test_resnet", pretrained=False, num_classes=10, in_chans=1), path)

    grid = {**GRID, "models": str(path), "start": "converted", "norms": "bn", "batch_sizes": 32, "seeds": 1}
    grid["training"] = {**TINY, "image_size": 32}
    saved(0)
    run_study(grid, tmp_path / "out", jobs=1)
    saved(1)
    with pytest.raises(UsageError, match=r"start\.safetensors held something else; try another --output$"):
        run_study(grid, tmp_path / "out", jobs=1)


@pytest.mark.long
def test_other_versions_are_mentioned(whole):
    folder, _ = whole
    with sqlite3.connect(folder / "results.sqlite") as connection:
        (text,) = connection.execute("select value from study where key = 'versions'").fetchone()
        old = text.replace('"torch": "', '"torch": "0.')
        connection.execute("update study set value = ? where key = 'versions'", (old,))
    messages: list[str] = []
    run_study(GRID, folder, jobs=1, on_message=messages.append)
    assert any("were made with other versions (torch 0." in line for line in messages)


def test_networks_that_are_asked_for_later_are_kept(tmp_path):
    grid = {**GRID, "norms": "gn", "batch_sizes": 32, "seeds": 1}
    (first,) = run_study(grid, tmp_path, jobs=1).results.outcomes
    (second,) = run_study({**grid, "keep_checkpoints": True}, tmp_path, jobs=1).results.outcomes
    assert without_time([first]) == without_time([second])
    assert [path.name for path in (tmp_path / "networks").iterdir()] == [f"{first.cell.key}.safetensors"]


def test_what_a_network_or_a_preprocessing_cannot_take_is_known_before_anything_runs(tmp_path):
    grid = {**GRID, "norms": "bn", "batch_sizes": 32, "seeds": 1, "preprocessing": ["standard", "zca"]}
    grid["training"] = {**TINY, "image_size": 64}
    reasons = check(Grid.from_dict(grid))
    assert list(reasons.values()) == [
        "zca takes images of at most 3072 values, and 1×64×64 has 4096; try image_size: 55, or linear-prediction"
    ]
    small = {**GRID, "models": "test_vit3", "norms": "bn", "seeds": 1, "training": {**TINY, "image_size": 32}}
    (reason,) = set(check(Grid.from_dict(small)).values())
    assert reason.startswith(
        "test_vit3 takes no images of 1 × 32 × 32 (AssertionError: Input height (32) doesn't match"
    )


def test_images_are_let_go_after_a_study_and_folders_read_again(tmp_path):

    run_study({**GRID, "norms": "bn", "batch_sizes": 32, "seeds": 1}, tmp_path, jobs=1)
    assert datasets._held.cache_info().currsize == 0
    assert datasets.open_data.cache_info().currsize == 0
