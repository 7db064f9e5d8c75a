"""The zoo's own check, on one architecture a family: every BN accounted for, output shapes as before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import few
from families import SMALLEST

from normsurgeon.surgery.convert import Conversion

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import zoo


@pytest.mark.parametrize("family", few(SMALLEST))
def test_every_family_converts_with_every_batch_norm_accounted_for(family):
    outcome = zoo.examine(SMALLEST[family], "gn")
    assert outcome.failure is None
    assert outcome.batch_norms > 0
    assert outcome.counts == {"converted": outcome.batch_norms, "kept": 0, "refused": 0}
    assert outcome.traced_by == "fx"


@pytest.mark.parametrize("target", ["ln", "ln2d", "in", "rms", "rms2d", "affine", "fold"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "levit_128s", "test_coatnet"])
def test_every_target_runs_on_convolutions_and_tokens(name, target):
    outcome = zoo.examine(name, target)
    assert outcome.failure is None
    assert outcome.counts["converted"] == outcome.batch_norms


def test_a_failure_is_reported_and_not_swallowed(monkeypatch):
    monkeypatch.setattr("normsurgeon.surgery.convert.convert", lambda model, plan, **rest: Conversion(model, plan))
    assert zoo.examine("test_resnet", "gn").failure == "15 batch norms left, 0 expected"


def test_an_architecture_without_batch_norm_is_no_part_of_the_zoo():
    outcome = zoo.examine("test_vit", "gn")
    assert (outcome.batch_norms, outcome.failure) == (0, None)
