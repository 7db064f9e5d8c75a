"""The objectives against NumPy in float64, and what they promise of micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normsurgeon.inference import objectives


@pytest.fixture
def random():
    return np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula(random, smoothing):
    logits, labels = random.normal(size=(6, 5)), random.integers(0, 5, 6)
    target = np.full((6, 5), smoothing / 5)
    target[range(6), labels] += 1 - smoothing
    expected = -(target * log_softmax(logits)).sum(1).mean()
    found = objectives.cross_entropy(torch.tensor(logits), torch.tensor(labels), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    mixed = objectives.cross_entropy(torch.tensor(logits), torch.tensor(target))
    assert mixed.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_formula(random, temperature):
    student, teacher = random.normal(size=(6, 5)), random.normal(size=(6, 5))
    p = np.exp(log_softmax(teacher / temperature))
    kl = (p * (log_softmax(teacher / temperature) - log_softmax(student / temperature))).sum(1).mean()
    found = objectives.distillation(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(temperature**2 * kl, rel=1e-6)


def test_feature_matching_is_the_formula(random):
    shapes = [(6, 4, 3, 3), (6, 8)]
    ours, theirs = ([random.normal(size=shape) for shape in shapes] for _ in range(2))
    parts = [
        (np.square(s - t).reshape(6, -1).sum(1) / np.square(t).reshape(6, -1).sum(1)).mean()
        for s, t in zip(ours, theirs, strict=True)
    ]
    found = objectives.feature_matching([torch.tensor(s) for s in ours], [torch.tensor(t) for t in theirs])
    assert found.item() == pytest.approx(np.mean(parts), rel=1e-6)


def test_layer_similarity_is_the_formula_and_has_the_gradient_of_finite_differences(random):
    features = [random.normal(size=(5, 4)), random.normal(size=(5, 2, 3)), random.normal(size=(5, 7))]

    def by_hand(features):
        grams = [x.reshape(5, -1) @ x.reshape(5, -1).T for x in features]
        pairs = [(0, 1), (0, 2), (1, 2)]
        return np.mean(
            [(grams[i] * grams[j]).sum() / np.linalg.norm(grams[i]) / np.linalg.norm(grams[j]) for i, j in pairs]
        )

    tensors = [torch.tensor(x, requires_grad=True) for x in features]
    found = objectives.layer_similarity(tensors)
    assert found.item() == pytest.approx(by_hand(features), rel=1e-9)
    found.backward()
    moved = [x.copy() for x in features]
    moved[1][2, 1, 0] += 1e-6
    assert tensors[1].grad[2, 1, 0].item() == pytest.approx((by_hand(moved) - by_hand(features)) / 1e-6, rel=1e-4)


def test_objectives_of_micro_batches_average_to_that_of_the_batch(random):
    student, teacher = torch.tensor(random.normal(size=(8, 5))), torch.tensor(random.normal(size=(8, 5)))
    labels = torch.tensor(random.integers(0, 5, 8))
    for objective, goals in (
        (objectives.cross_entropy, labels),
        (objectives.distillation, teacher),
        (lambda s, t: objectives.feature_matching([s], [t]), teacher),
    ):
        whole = objective(student, goals)
        parts = [objective(s, g) for s, g in zip(student.split(2), goals.split(2), strict=True)]
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-9)


def test_half_precision_is_computed_in_single():
    logits = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert torch.isfinite(objectives.distillation(logits, logits))
    assert objectives.distillation(logits, logits).dtype == torch.float32
