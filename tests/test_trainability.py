"""The benchmark of starts for training: what its table says, what resumes, and what each part does to a network."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_
from torch import nn

from normsurgeon.norms.families import family_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import trainability
from training import adaptation, cifar, domains, federated, private, starts
from training.cells import Cell, far_behind, product, read, table, write

opacus = pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="Opacus is not installed")
sample = pytest.mark.skipif(not cifar.available(), reason="the CIFAR sample is not here")


@pytest.fixture
def original(monkeypatch) -> nn.Module:
    """A CIFAR ResNet of 8 layers with random numbers, and random images where conversions see some."""
    torch.manual_seed(0)
    monkeypatch.setattr(domains, "source_images", lambda network="resnet20": torch.randn(16, 3, 32, 32))
    return randomise_(cifar.CifarResNet(1)).eval()


# Records and the table


@pytest.mark.parametrize("half", ['{"cell": {"part": "rates", "netw', '{"cell": {"part": "rates"}'])
def test_a_part_goes_on_where_it_was_and_runs_a_half_written_line_again(half, monkeypatch, tmp_path, capsys):
    wanted = product("rates", "resnet20", ["grey"], ["sgd 2"], [0.1, 1.0], ["bn", "gn"], seeds=1)
    ran = []
    monkeypatch.setattr(trainability, "cells", lambda part, network, seeds: wanted)
    monkeypatch.setitem(trainability.RUN, "rates", lambda cell: ran.append(cell) or 0.5)
    monkeypatch.setattr(cifar, "available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["trainability.py", "rates", "--results", str(tmp_path)])
    file = tmp_path / "rates-resnet20.jsonl"
    write(file, wanted[2], 0.25, 1.0)
    with file.open("a") as stream:
        stream.write(half)
    assert trainability.main() == 0
    assert ran == [wanted[0], wanted[1], wanted[3]]
    assert read(file) == {cell: 0.25 if cell is wanted[2] else 0.5 for cell in wanted}
    ran.clear()
    assert trainability.main() == 0
    assert ran == []
    assert "| gn | 0.1 | 50.0 |" in capsys.readouterr().out


def test_the_table_compares_best_rates_over_pairs_of_seeds():
    numbers = {
        ("bn", 0.1): [0.5, 0.6, 0.7],
        ("bn", 1.0): [0.4, 0.4, 0.4],
        ("gn", 0.1): [0.73, 0.73, 0.73],
        ("gn", 1.0): [0.6, 0.8, 0.85],
    }
    done = {
        Cell("rates", "resnet20", "grey", "sgd 2", lr, start, seed): top1
        for (start, lr), values in numbers.items()
        for seed, top1 in enumerate(values)
    }
    t = 4.302652729911275  # of Student's distribution with 2 degrees of freedom, at 0.975
    half = [100 * t * float(np.std(values, ddof=1)) / math.sqrt(3) for values in ([0.5, 0.6, 0.7], [0.6, 0.8, 0.85])]
    difference = 100 * t * 0.05 / math.sqrt(3)  # of 0.1, 0.2, 0.15
    lines = table(done, "bn").splitlines()
    assert lines[1] == "**rates, resnet20, grey, sgd 2**"
    assert lines[5] == f"| bn | 0.1 | 60.0 ± {half[0]:.1f} |  | 0.1 | 60.0 | 40.0 |"
    assert lines[6] == f"| gn | 1 | 75.0 ± {half[1]:.1f} | +15.0 ± {difference:.1f} | 0.1 1 | 73.0 | 75.0 |"


@pytest.mark.parametrize(("lr", "behind"), [(1e-3, False), (1e-2, False), (1e-1, True), (1.0, False)])
def test_other_seeds_skip_rates_that_the_first_seed_found_far_behind_the_best(lr, behind):
    first = {0.1: 0.4, 1e-2: 0.61, 1e-3: 0.65}
    done = {Cell("rates", "resnet20", "grey", "sgd 2", rate, "gn", 0): top1 for rate, top1 in first.items()}
    done[Cell("rates", "resnet20", "grey", "sgd 2", 1e-3, "bn", 0)] = 1.0  # another start
    cell = Cell("rates", "resnet20", "grey", "sgd 2", lr, "gn", 1)
    assert far_behind(cell, done, 0.05) == behind
    assert not far_behind(replace(cell, seed=0), done, 0.05)


@pytest.mark.parametrize("part", sorted(trainability.RUN))
def test_a_part_runs_no_cell_twice_and_one_seed_after_the_other(part):
    cells = trainability.cells(part, "resnet20", 2)
    assert len(set(cells)) == len(cells)
    assert trainability.REFERENCE.get(part, "bn") in {cell.start for cell in cells}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


# Differential privacy


@opacus
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("start", [private.FIX, "swap", "affine", "gn", "ln", "rms", "rms calibrated"])
def test_opacus_gives_each_image_the_gradient_that_it_has_alone(original, start):
    from opacus.grad_sample import GradSampleModule

    model = private.network(original, start, torch.randn(16, 3, 32, 32)).double()
    alone = copy.deepcopy(model)
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 0, 7])
    F.cross_entropy(GradSampleModule(model)(x), y).backward()
    for index in range(len(x)):
        alone.zero_grad()
        F.cross_entropy(alone(x[index : index + 1]), y[index : index + 1]).backward()
        for (name, got), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(got.grad_sample[index], wanted.grad, rtol=1e-8, atol=1e-8, msg=name)


@opacus
@pytest.mark.parametrize("start", ["bn", "bn frozen"])
def test_opacus_refuses_batch_norms_frozen_ones_too(original, start):
    from opacus.grad_sample import GradSampleModule

    model = starts.training_mode(starts.start(original, start, torch.randn(2, 3, 32, 32)), start)
    with pytest.raises(NotImplementedError, match="trainable layer with buffers"):
        GradSampleModule(model)


@opacus
def test_private_training_depends_on_its_seed_alone(original, monkeypatch):
    monkeypatch.setattr(private, "BATCH_SIZE", 4)
    monkeypatch.setattr(private, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(private, "EPOCHS", 1)
    data = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    ends = []
    for seed in (0, 0, 1):
        model = private.network(original, "gn", torch.randn(16, 3, 32, 32))
        assert private.fit(model, data, epsilon=1.0, clip=1.0, lr=0.1, seed=seed)
        ends.append(model.linear.weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_out_of_place_networks_leave_their_inputs_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(inplace=True))
    private.out_of_place_(model)
    x = -torch.ones(4)
    model(x)
    assert torch.equal(x, -torch.ones(4))


# Federated averaging


def test_the_federated_average_of_two_clients_is_the_weighted_mean():
    clients = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    for client in clients:
        client(torch.randn(8, 4))
    clients[1](torch.randn(8, 4))
    states = [client.state_dict() for client in clients]
    average = federated.average(states, [30, 10])
    for name in ("weight", "bias", "running_mean", "running_var"):
        wanted = 0.75 * states[0][name].double().numpy() + 0.25 * states[1][name].double().numpy()
        np.testing.assert_allclose(average[name].numpy(), wanted, atol=1e-7)
    assert average["num_batches_tracked"] == 1


def test_every_image_is_with_one_client_and_a_small_alpha_gives_clients_few_labels():
    y = torch.arange(2000) % 10
    shares = {}
    for alpha in (0.1, 100.0):
        parts = federated.split(y, 8, alpha, seed=3)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(2000))
        shares[alpha] = np.mean([y[part].bincount(minlength=10).max() / len(part) for part in parts])
    assert shares[0.1] > 0.35
    assert shares[100.0] < 0.15


# Adaptation


def adapted(model: nn.Module, method: str, lr: float, batch_statistics: bool = False) -> tuple[set[str], float]:
    """The names of what in the state has changed, and the accuracy."""
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6)
    top1 = adaptation.adapt_(model, x, y, method, 2, lr, batch_statistics)
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}, top1


@pytest.mark.parametrize("start", ["bn", "bn frozen", "affine", "gn", "ln", "rms"])
@pytest.mark.parametrize("method", ["tent", "sar"])
def test_adaptation_changes_weights_and_biases_of_norms_and_nothing_else(original, start, method, monkeypatch):
    monkeypatch.setattr(adaptation, "RELIABLE", 1.0)  # an answer of random weights is far from sure
    model = starts.start(original, start, domains.source_images())
    norms = {name for name, module in model.named_modules() if family_of(module) is not None}
    changed, _ = adapted(model, method, lr=1e-3, batch_statistics=start == "bn")
    assert changed == {f"{norm}.{what}" for norm in norms for what in ("weight", "bias")}


def test_sar_learns_nothing_from_answers_of_high_entropy(original):
    nn.init.zeros_(original.linear.weight)
    nn.init.zeros_(original.linear.bias)
    model = starts.start(original, "gn", domains.source_images())
    assert adapted(model, "sar", lr=1.0)[0] == set()


def test_a_batch_is_answered_before_it_is_learned_from(original):
    model = starts.start(original, "gn", domains.source_images())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmax(1)
    assert adaptation.adapt_(model, x, y, "tent", batch_size=4, lr=100.0, batch_statistics=False) == 1.0


def test_entropy_is_that_of_the_softmax():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -100.0, -100.0]])
    wanted = [math.log(4), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    np.testing.assert_allclose(adaptation.entropy(logits).numpy(), wanted, rtol=1e-6)


# Real weights and images


@sample
@pytest.mark.parametrize(
    ("part", "setting"), [(federated, "alpha 0.5"), (adaptation, "tent 4")], ids=["federated", "adaptation"]
)
def test_a_run_repeats_itself(part, setting, monkeypatch):
    for name, value in (("TRAIN_IMAGES", 40), ("TEST_IMAGES", 40), ("CLIENTS", 2), ("ROUNDS", 1)):
        if hasattr(part, name):
            monkeypatch.setattr(part, name, value)
    cell = Cell(part.__name__, "resnet20", "grey", setting, 1e-3, "gn", 1)
    assert part.run(cell) == part.run(cell)
