"""The sample of feature vectors behind the effective rank: uniform, and the same however the images arrive."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import stored_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

import normsurgeon as ns
from normsurgeon.analysis.sampling import VectorSample, ranks

STATISTICS = ["statistics"]


def test_ranks_equal_the_covariance_eigenvalues_of_the_sampled_vectors():
    rng = np.random.default_rng(0)
    for count, channels in ((40, 8), (8, 40)):
        x = rng.normal(size=(count, channels)) * np.logspace(0, -2, channels) + 5
        eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True)).clip(0)
        p = eigenvalues / eigenvalues.sum()
        p = p[p > 1e-14]
        effective, participation, samples = ranks(x)
        assert effective == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert participation == pytest.approx(1 / (p**2).sum(), rel=1e-6)
        assert samples == count
    assert ranks(np.ones((5, 3))) == (0.0, 0.0, 5)
    assert ranks(np.ones((1, 3))) == (None, None, 1)


def test_where_all_vectors_fit_the_effective_rank_is_that_of_the_full_covariance(convnet):
    images = torch.randn(2, 3, 8, 8)
    outputs = stored_outputs(convnet, images)
    for record in ns.analyze(convnet, images.split(1), only=STATISTICS, kinds=["convolution"]).statistics:
        x = outputs[record.layer]
        vectors = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
        assert record.rank_samples == len(vectors)
        assert record.effective_rank == pytest.approx(ranks(vectors)[0], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_sample_of_vectors_does_not_depend_on_the_batches(sizes):
    x = torch.randn(sum(sizes), 300, 70, generator=torch.Generator().manual_seed(1))
    whole, parts = VectorSample(300), VectorSample(300)
    whole.update(x, 0)
    first = 0
    for chunk in x.split(sizes):
        parts.update(chunk, first)
        first += len(chunk)
    a, b = np.argsort(whole.priorities), np.argsort(parts.priorities)
    np.testing.assert_array_equal(whole.vectors[a], parts.vectors[b])
    assert len(whole.vectors) == min(256, 64 * sum(sizes))


def test_the_sample_is_uniform_over_images_and_positions():
    counts = np.zeros((40, 10))
    for seed in range(400):
        x = torch.stack([torch.arange(400.0).view(40, 10)] * 256, 1)  # every vector says where it comes from
        sample = VectorSample(256, seed)
        sample.capacity = 50
        sample.update(x, 0)
        for value in sample.vectors[:, 0]:
            counts[divmod(int(value), 10)] += 1
    expected = counts.sum() / counts.size
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-4
    assert abs(counts / expected - 1).max() < 0.6
