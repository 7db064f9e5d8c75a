"""One cell of a study: its images, its training, and what comes of it."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from PIL import Image
from tiny_study import GRID, TINY, without_time

from normsurgeon.data import datasets
from normsurgeon.data.datasets import DataSet, open_data
from normsurgeon.data.feeding import TensorSamples
from normsurgeon.data.transforms import DataConfig
from normsurgeon.errors import DataError, UsageError
from normsurgeon.study.cell import run_cell
from normsurgeon.study.grid import Grid
from normsurgeon.study.networks import build_network
from normsurgeon.study.records import Cell, Epoch, Outcome, finite
from normsurgeon.study.store import open_store


def test_a_cell_that_diverges_is_an_outcome():
    grid = Grid.from_dict({**GRID, "norms": "bn", "learning_rates": 1e30, "batch_sizes": 32, "seeds": 1})
    outcome = run_cell(grid, grid.cells()[0])
    assert outcome.status == "diverged"
    assert outcome.accuracy is None
    assert outcome.reason.startswith("the loss is not finite at update ")


def test_numbers_that_are_not_finite_are_stored_as_none(tmp_path):
    made = Outcome(Cell("m", "d"), "done", correct=1, images=2, curve=(Epoch(1.0, 1, float("inf"), 0.5, 2.0),))
    outcome = Outcome.from_dict(finite(made.to_dict()))
    assert outcome.curve == (Epoch(1.0, 1, None, 0.5, 2.0),)
    with open_store(tmp_path) as store:
        store.write(outcome)
        assert store.outcomes() == {outcome.cell.key: outcome}


def test_a_file_is_no_network_with_random_weights(tmp_path):
    path = tmp_path / "start.safetensors"
    path.touch()
    with pytest.raises(UsageError, match=r"is a file, whose weights are not random; try start: converted$"):
        build_network(Cell(str(path), "digits"), 10, 1)


def test_a_cell_that_fails_says_what_happened(monkeypatch):
    grid = Grid.from_dict({**GRID, "norms": "bn", "seeds": 1})

    def broken(*args, **kwargs):
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr("normsurgeon.study.cell.finetune", broken)
    outcome = run_cell(grid, grid.cells()[0])
    assert (outcome.status, outcome.reason) == ("failed", "RuntimeError: the disk is on fire")


@pytest.mark.long
@pytest.mark.parametrize("by_epoch", [False, True])
def test_the_last_network_is_judged_and_none_is_picked(by_epoch, tmp_path):
    grid = Grid.from_dict(
        {**GRID, "norms": "bn", "seeds": 1, "training": {**TINY, "epochs": 3, "judge": "epoch" if by_epoch else "last"}}
    )
    outcome = run_cell(grid, grid.cells()[0])
    known = [point.accuracy for point in outcome.curve]
    assert [value is not None for value in known] == [by_epoch, by_epoch, True]
    assert known[-1] == outcome.accuracy
    again = Grid.from_dict({**grid.to_dict(), "training": {**grid.training.to_dict(), "judge": "last"}})
    assert run_cell(again, again.cells()[0]).accuracy == outcome.accuracy


def test_training_images_are_the_same_for_every_cell_and_none_is_tested_on():
    first, second = open_data("digits", 100, 50), open_data("digits", 100, 50)
    assert len(first.train), len(first.test) == (100, 50)
    assert [first.train.name_of(i) for i in range(100)] == [second.train.name_of(i) for i in range(100)]


def test_a_folder_without_splits_holds_a_fifth_out(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test), data.classes, data.channels) == (16, 4, 2, 3)
    train = {data.train.name_of(i) for i in range(16)}
    assert not train & {data.test.name_of(i) for i in range(4)}


def test_training_and_test_folders_have_the_same_classes(tmp_path):
    for place in ("train/cat", "train/dog", "val/dog"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "0.png")
    with pytest.raises(DataError, match=r"has other classes to train on than to test on \(cat in one of them alone\)"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("judge", ["last", "epoch"])
def test_images_that_do_not_fit_into_memory_are_read_again_and_give_the_same(judge, monkeypatch):
    grid = Grid.from_dict({**GRID, "norms": "gn", "batch_sizes": 64, "seeds": 1, "training": {**TINY, "judge": judge}})
    held = run_cell(grid, grid.cells()[0])
    monkeypatch.setattr(datasets, "MAX_BYTES", 0)
    monkeypatch.setattr(TensorSamples, "__init__", lambda *_: pytest.fail("the images were held"))
    again = run_cell(grid, grid.cells()[0])
    assert again.correct == held.correct
    assert again.loss == pytest.approx(held.loss, rel=1e-5)  # summed up in other batches


def test_preprocessing_is_fitted_to_images_from_all_over_the_split(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_IMAGES", 10)
    seen: list[int] = []

    class Source(list):
        __hash__ = object.__hash__

        def __getitem__(self, index):
            seen.append(index)
            return Image.new("L", (8, 8), index), 0

    config = DataConfig.of(build_network(Cell("resnet8", "digits"), 10, 1))
    datasets._fitted(DataSet("d", Source(range(19)), (), 10, 1), config, None, "standard")
    assert seen == list(range(0, 19, 2))


def test_images_without_labels_cannot_be_studied(tmp_path):
    with pytest.raises(
        DataError, match=r"^the images of demo have no labels, and a study compares accuracies; try class folders$"
    ):
        open_data("demo")


def test_augmented_images_differ_from_epoch_to_epoch_and_come_again_with_the_seed():
    grid = Grid.from_dict({**GRID, "norms": "gn", "seeds": 1, "training": {**TINY, "augment": True}})
    first, second = (run_cell(grid, grid.cells()[0]) for _ in range(2))
    plain = Grid.from_dict({**GRID, "norms": "gn", "seeds": 1})
    assert without_time([first]) == without_time([second])
    assert first.loss != run_cell(plain, plain.cells()[0]).loss


@pytest.mark.long
@pytest.mark.parametrize(
    "regularization",
    [
        {"weight_decay": 5e-4},
        {"drop": 0.2},
        {"drop_path": 0.1},
        {"smoothing": 0.1},
        {"mixup": 0.2},
        {"cutmix": 1.0},
        {"distance": 0.1},
    ],
    ids=lambda values: next(iter(values)),
)
def test_every_regularization_trains_and_makes_a_difference(regularization):
    grid = Grid.from_dict({**GRID, "norms": "gn", "seeds": 1, "batch_sizes": 16, "regularization": regularization})
    outcome = run_cell(grid, grid.cells()[0])
    plain = run_cell(grid, replace(grid.cells()[0], regularization=()))
    assert outcome.status == "done", outcome.reason
    assert outcome.loss != plain.loss


@pytest.mark.long
@pytest.mark.parametrize(
    "preprocessing", ["none", "min-max", "standard-per-image", "linear-prediction", "zca", "model"]
)
def test_every_kind_of_preprocessing_trains(preprocessing):
    grid = Grid.from_dict({**GRID, "norms": "gn", "seeds": 1, "batch_sizes": 32, "preprocessing": preprocessing})
    outcome = run_cell(grid, grid.cells()[0])
    assert outcome.status == "done", outcome.reason


@pytest.mark.long
def test_a_converted_start_is_judged_before_it_is_trained(tmp_path):
    import normsurgeon as ns

    start = run_cell(Grid.from_dict({**GRID, "models": "test_resnet"}), Cell("test_resnet", "digits"))
    assert start.start_accuracy is None
    path = tmp_path / "start.safetensors"
    ns.save(ns.load("test_resnet", pretrained=False, num_classes=10, in_chans=1), path)
    for judge in ("last", "epoch"):
        grid = Grid.from_dict(
            {
                **GRID,
                "models": str(path),
                "start": "converted",
                "norms": "gn",
                "seeds": 1,
                "batch_sizes": 16,
                "preprocessing": "model",
                "training": {**TINY, "image_size": 32, "judge": judge},
            }
        )
        outcome = run_cell(grid, grid.cells()[0])
        assert outcome.status == "done", outcome.reason
        assert 0 <= outcome.start_accuracy <= 1


def test_a_batch_larger_than_the_data_is_skipped():
    grid = Grid.from_dict({**GRID, "norms": "gn", "batch_sizes": 4096, "seeds": 1, "training": {"epochs": 1}})
    outcome = run_cell(grid, grid.cells()[0])
    assert (outcome.status, outcome.reason) == (
        "skipped",
        "batch_size=4096 is more than the 1437 training images of digits; try a smaller batch",
    )


def test_a_stop_in_the_last_update_of_a_cell_is_not_lost():
    grid = Grid.from_dict({**GRID, "norms": "gn", "batch_sizes": 32, "seeds": 1})

    def press(share) -> None:
        if share == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run_cell(grid, grid.cells()[0], on_share=press)
