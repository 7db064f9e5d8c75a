"""Where a cell starts: from random weights, or from a trained BatchNorm network that is converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_study import GRID, TINY, without_time

import normsurgeon as ns
from normsurgeon.data.datasets import open_data, prepare
from normsurgeon.errors import DataError, UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.inference.evaluate import evaluate
from normsurgeon.study import run
from normsurgeon.study.cell import config_of, load_kept, network_file, run_cell
from normsurgeon.study.engines import Work, serial
from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.records import Cell, Outcome
from normsurgeon.study.run import check, estimate_seconds, originals_folder, originals_of, run_study

STARTS = {
    **GRID,
    "norms": ["bn", "gn"],
    "start": ["scratch", "converted"],
    "batch_sizes": 16,
    "learning_rates": [0.01, 0.1],
    "pretraining": {"epochs": 3},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """The study of both starts, uninterrupted, in this process."""
    folder = tmp_path_factory.mktemp("starts")
    return folder, without_time(run_study(STARTS, folder, jobs=1).results.outcomes)


def originals(folder: Path) -> list[Path]:
    return sorted((folder / "originals").glob("*/*.safetensors"))


def test_cells_that_start_from_random_weights_are_those_of_older_studies():
    assert Cell("resnet8", "digits").key == "654e9022d58a06b6"  # as it was before there was a pretraining
    cells = Grid.from_dict({**GRID, "start": "random"}).cells()
    assert cells == Grid.from_dict(GRID).cells()
    both = Grid.from_dict({**STARTS, "start": ["random", "scratch", "converted"]})
    assert [cell.start for cell in both.cells()] == ["scratch"] * 8 + ["converted"] * 8


@pytest.mark.long
def test_one_network_is_trained_for_each_seed_and_every_norm_and_rate_begins_from_it(whole):
    folder, outcomes = whole
    assert len(originals(folder)) == 2
    begun = {o.cell: o.start_accuracy for o in outcomes if o.cell.start == "converted"}
    assert all((o.start_accuracy is None) == (o.cell.start == "scratch") for o in outcomes)
    for norm in ("bn", "gn"):
        for seed in (0, 1):
            assert len({value for cell, value in begun.items() if (cell.norm, cell.seed) == (norm, seed)}) == 1


@pytest.mark.long
def test_bn_begins_from_the_trained_network_itself_and_another_norm_from_its_conversion(whole):
    folder, outcomes = whole
    grid = Grid.from_dict(STARTS)
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for cell in originals_of(grid, grid.cells())[:1]:
        original = load_kept(network_file(originals_folder(folder, grid), cell), classes=10, channels=1)
        wanted = original(images)
        bn, gn, affine = (
            build_network(replace(cell, start="converted", norm=norm), 10, 1, original).eval()
            for norm in ("bn", "gn", "affine")
        )
        assert torch.equal(bn(images), wanted)
        torch.testing.assert_close(affine(images), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gn(images), ns.convert(original, to="gn").model(images))
        _, test = prepare(
            open_data("digits", 128, 100), config_of(original, 8), "standard", FinetuneConfig(augment=False)
        )
        known = {o.start_accuracy for o in outcomes if o.cell.norm == "bn" and o.cell.seed == cell.seed}
        assert known - {None} == {evaluate(original, test).top1}


@pytest.mark.system
def test_parallel_processes_give_the_table_of_one(whole, tmp_path):
    _, outcomes = whole
    assert without_time(run_study(STARTS, tmp_path, jobs=2).results.outcomes) == outcomes


@pytest.mark.long
def test_a_worker_that_shares_no_disk_trains_what_its_cell_begins_from_and_gives_the_same(whole):
    _, outcomes = whole
    grid = Grid.from_dict(STARTS)
    wanted = next(o for o in outcomes if o.cell.start == "converted" and o.cell.norm == "gn")
    assert without_time(serial(Work(grid), [wanted.cell], lambda cell, share: None)) == [wanted]


@pytest.mark.long
def test_a_finished_study_trains_nothing_again(whole, monkeypatch):
    folder, outcomes = whole
    monkeypatch.setattr(run, "serial", lambda *args: pytest.fail("a network was trained"))
    assert without_time(run_study(STARTS, folder, jobs=1).results.outcomes) == outcomes


@pytest.mark.long
def test_a_study_that_was_stopped_goes_on_with_the_networks_that_it_has(whole, tmp_path):
    _, outcomes = whole
    few = {**STARTS, "start": "converted", "norms": "gn", "learning_rates": 0.01}

    def stop(step) -> None:
        if step.stage == "pretraining" and step.details["outcome"] is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(few, tmp_path, jobs=1, on_progress=stop)
    assert len(originals(tmp_path)) == 1
    steps: list = []
    found = run_study(few, tmp_path, jobs=1, on_progress=steps.append)
    trained = [s.details["cell"].seed for s in steps if s.stage == "pretraining" and s.details["outcome"] is not None]
    assert trained == [1]
    assert without_time(found.results.outcomes) == [
        o for o in outcomes if (o.cell.start, o.cell.norm, o.cell.lr) == ("converted", "gn", outcomes[0].cell.lr)
    ]


@pytest.mark.long
def test_results_that_began_from_other_networks_are_not_mixed_in(whole):
    folder, _ = whole
    with pytest.raises(
        UsageError,
        match=r"^the converted networks in .* started from others: epochs \(3 → 4\); "
        r"try another --output, or the pretraining of before$",
    ):
        run_study({**STARTS, "pretraining": {"epochs": 4}}, folder)


@pytest.mark.long
def test_a_study_of_random_starts_can_be_given_converted_ones_later_and_keeps_its_results(whole, tmp_path):
    _, outcomes = whole
    few = {**STARTS, "seeds": 1, "learning_rates": 0.01}
    wanted = [o for o in outcomes if (o.cell.seed, o.cell.lr) == (0, outcomes[0].cell.lr)]
    alone = {**few, "start": "scratch", "pretraining": None}
    assert without_time(run_study(alone, tmp_path, jobs=1).results.outcomes) == wanted[:2]
    assert without_time(run_study(few, tmp_path, jobs=1).results.outcomes) == wanted
    assert without_time(run_study(alone, tmp_path, jobs=1).results.outcomes) == wanted[:2]


def test_a_network_that_diverges_fails_the_cells_that_begin_from_it_and_no_others(tmp_path):
    grid = {**STARTS, "seeds": 1, "learning_rates": 0.1, "pretraining": {"learning_rate": 1e30}}
    found = run_study(grid, tmp_path, jobs=1).results.outcomes
    assert [o.status for o in found] == ["done", "done", "failed", "failed"]
    for outcome in found[2:]:
        assert outcome.reason.startswith("the BatchNorm network that it starts from diverged: the loss is not finite")
        assert outcome.reason.endswith("; try a lower learning_rate under pretraining")
    alone = run_cell(Grid.from_dict(grid), found[3].cell)
    assert (alone.status, alone.reason) == ("failed", found[3].reason)


def test_a_pretraining_that_cannot_be_is_known_before_anything_runs():
    grid = Grid.from_dict({**STARTS, "pretraining": {"batch_size": 64, "train_images": 32}})
    reasons = check(grid)
    assert set(reasons) == {cell for cell in grid.cells() if cell.start == "converted"}
    assert set(reasons.values()) == {
        "pretraining: batch_size=64 is more than train_images=32; try a smaller batch",
    }
    with pytest.raises(DataError, match=r"^the study's data set nowhere cannot be used: there is no folder nowhere"):
        check(Grid.from_dict({**STARTS, "pretraining": {"dataset": "nowhere"}}))


@pytest.mark.long
def test_a_network_of_another_data_set_gets_a_new_head_and_a_kept_one_can_be_loaded(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for shade in range(40):
            Image.new("RGB", (8, 8), (100 * number + shade, 0, 50)).save(tmp_path / "animals" / name / f"{shade}.png")
    animals = str(tmp_path / "animals")
    grid = Grid.from_dict(
        {
            **STARTS, "start": "converted", "seeds": 1, "learning_rates": 0.1, "keep_checkpoints": True,
            "pretraining": {"dataset": animals, "train_images": None},
        }
    )  # fmt: skip
    outcomes = run_study(grid, tmp_path / "out", jobs=1).results.outcomes
    assert [o.status for o in outcomes] == ["done", "done"]
    assert load_kept(originals(tmp_path / "out")[0], classes=2, channels=3).fc.out_features == 2
    for outcome in outcomes:
        path = tmp_path / "out" / "networks" / f"{outcome.cell.key}.safetensors"
        model = load_kept(path, classes=10, channels=1)
        _, test = prepare(open_data("digits", 128, 100), config_of(model, 8), "standard", FinetuneConfig(augment=False))
        assert evaluate(model, test).top1 == outcome.accuracy
    (tmp_path / "animals" / "cat" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"animals \(pretraining\) held something else; try another --output$"):
        run_study(grid, tmp_path / "out", jobs=1)


def test_the_activation_is_that_of_the_cell_and_is_there_before_training():
    grid = Grid.from_dict({**STARTS, "activations": ["relu", "silu"]})
    found = {(cell.activation, grid.original(cell).activation) for cell in grid.cells() if cell.start == "converted"}
    assert found == {("relu", "relu"), ("silu", "silu")}
    assert {grid.original(cell) for cell in grid.cells() if cell.start == "scratch"} == {None}


def test_the_estimate_counts_the_networks_that_are_trained_first(monkeypatch):
    monkeypatch.setattr("normsurgeon.study.run._timed", lambda *args: (1.0, 0.0))
    grid = Grid.from_dict(
        {**STARTS, "training": {**TINY, "epochs": None, "steps": 100}, "pretraining": {"steps": 1000}}
    )
    cells = [cell for cell in grid.cells() if cell.start == "converted"]
    without = [replace(cell, start="scratch") for cell in cells]
    more = estimate_seconds(grid, cells, jobs=1) - estimate_seconds(grid, without, jobs=1)
    assert more == pytest.approx(2 * 1000, rel=0.01)
