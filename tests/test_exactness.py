"""What must be exact is: in eval mode, in float64, on one architecture of every timm family."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import timm
import torch
from conftest import few, randomise_
from families import SMALLEST, example_for
from torch import Tensor, nn

import normsurgeon as ns
from normsurgeon.graph.trace import trace
from normsurgeon.norms import batchnorm
from normsurgeon.surgery import whitening

TOLERANCE = 1e-9


def whitening_alone(model: nn.Module, sites: Sequence[ns.NormSite]) -> nn.Module:
    """Fold every whitening that can be folded; the batch norm stays, with the statistics of white input.

    With mean 0 and variance 1 - eps a batch norm is the identity followed by its gamma and beta: T = identity.
    """
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for site in sites:
        if site.foldable:
            norm = modules[site.name]
            whitening.fold_(modules[site.producer], batchnorm.read(norm).whitener)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
    return model


def realistic_statistics_(model: nn.Module, x: Tensor) -> None:
    """Statistics near those of the data, then disturbed: with wholly random ones a deep network's activations die
    out, and its logits would be the same whatever was done to it."""
    norms = [module for module in model.modules() if batchnorm.is_batch_norm(module)]
    for norm in norms:
        norm.train().momentum = 1.0
    model(x)
    generator = torch.Generator().manual_seed(2)
    for norm in norms:
        norm.eval()
        spread = norm.running_var.sqrt()
        norm.running_mean += (torch.rand(spread.shape, generator=generator) - 0.5) * spread
        norm.running_var *= 0.5 + torch.rand(spread.shape, generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", few(SMALLEST))
def test_affine_fold_and_whitening_reproduce_the_logits(family):
    torch.manual_seed(0)
    model = randomise_(timm.create_model(SMALLEST[family])).double().eval()
    x = example_for(model)
    with torch.no_grad():
        realistic_statistics_(model, x)
        expected = model(x)
        assert expected.isfinite().all()
        assert relative_error(expected[:1], expected[1:]) > 0.01, "the logits ignore the input"
        traced = trace(model, x)
        whitened = whitening_alone(model, ns.find_sites(traced))
        assert relative_error(whitened(x), expected) < TOLERANCE
        del whitened
        for target in ("affine", "fold"):
            plan = ns.plan(model, to=target, traced=traced)
            # The check of "fold" holds that of "affine", and must not take back what is exact.
            result = ns.convert(model, plan, check=target == "fold", verdict=False)
            assert result.counts["refused"] == result.counts["kept"] == 0
            assert not any(batchnorm.is_batch_norm(module) for module in result.model.modules())
            assert relative_error(result.model(x), expected) < TOLERANCE, target
