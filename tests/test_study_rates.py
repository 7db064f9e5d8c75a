"""How much the learning rate matters: a curve of accuracy for each start and norm, and the rates that are as good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_study import BY_RATE, RATES, rates_study, run
from test_study_statistics import wilson

from normsurgeon.study.records import Results
from normsurgeon.study.report import study_report
from normsurgeon.study.statistics import Point, RateCurve, rate_curves, unscaled


def curve(means: list[float], settings: int = 1) -> RateCurve:
    points = tuple(Point(10.0**k, mean, None, 3, 0) for k, mean in enumerate(means))
    return RateCurve("scratch", "bn", settings, points)


def test_every_start_and_norm_has_a_curve_of_means_and_intervals_over_the_seeds() -> None:
    found = rate_curves(rates_study())
    assert [(each.start, each.norm, each.settings) for each in found] == [(*key, 1) for key in BY_RATE]
    for each in found:
        assert [point.x for point in each.points] == list(RATES)
        for point, right in zip(each.points[:3], BY_RATE[each.start, each.norm], strict=False):
            values = np.array([right + 1, right + 3, right + 5]) / 1000
            assert (point.mean, point.n) == (pytest.approx(values.mean()), 3)
            assert point.ci == pytest.approx(wilson(values.tolist()), abs=1e-6)


def test_a_diverged_run_counts_as_nothing_right() -> None:
    last = rate_curves(rates_study())[-1].points[-1]
    assert (last.mean, last.diverged) == (pytest.approx((0.031 + 0.033 + 0) / 3), 1)


def test_one_rate_or_a_rate_that_follows_from_the_batch_size_is_no_curve() -> None:
    few = [outcome for outcome in rates_study((32, 64)).outcomes if outcome.cell.lr == outcome.cell.batch_size / 320]
    assert len(few) == 24
    assert rate_curves(Results("s", tuple(few))) == ()


def test_the_range_of_good_rates_is_unbroken_and_holds_the_best_one() -> None:
    assert curve([0.5, 0.88, 0.9, 0.89, 0.4, 0.9]).close == (10.0, 1000.0)
    assert curve([0.9, 0.1]).close == (1.0, 1.0)
    assert curve([0.9, 0.88, 0.86]).close == (1.0, 10.0)  # 2 points exactly is within them


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8))
def test_the_best_rate_is_the_lowest_of_the_best_ones(right: list[int]) -> None:
    it = curve([x / 1000 for x in right])
    assert it.best.x == 10.0 ** right.index(max(right))
    low, high = it.close
    assert low <= it.best.x <= high
    assert all(p.mean >= max(right) / 1000 - 0.02 - 1e-9 for p in it.points if low <= p.x <= high)


def test_rates_that_the_batch_size_scaled_are_compared_as_the_grid_gives_them() -> None:
    results, size = unscaled(rates_study((8, 32, 64)))
    assert size == 32
    assert {outcome.cell.lr for outcome in results.outcomes} == set(RATES)
    found = rate_curves(results)
    assert {each.settings for each in found} == {3}
    assert found[0].points[0].mean == pytest.approx(0.303)  # 0.302 at 8, 0.303 at 32, 0.304 at 64
    alone = rates_study((64,))
    assert unscaled(alone) == (alone, None)
    free = replace(alone, training={"lr_batch_size": None})
    assert unscaled(free) == (free, None)


def sentences(results: Results) -> list[str]:
    return [finding.text for finding in study_report(results).findings if finding.kind == "sensitivity"]


def test_each_start_has_a_sentence_with_the_best_rate_and_those_that_are_as_good() -> None:
    assert sentences(rates_study()) == [
        "From random weights, the best learning rate and the range within 2 points of it: bn 0.1 (90.3 %), 0.1 to 1; "
        "gn 0.1 (80.3 %), 0.1 alone.",
        "From converted networks, the best learning rate and the range within 2 points of it: bn 0.1 (95.8 %), 0.001 "
        "to 0.1; gn 0.001 (94.8 %), 0.001 to 0.01.",
    ]
    assert sentences(rates_study((8, 64)))[1] == (
        "From converted networks, the best learning rate for batches of 32 and the range within 2 points of it, on "
        "average over 2 settings: bn 0.1 (95.8 %), 0.001 to 0.1; gn 0.001 (94.8 %), 0.001 to 0.01."
    )


def test_a_sentence_has_its_numbers() -> None:
    finding = next(f for f in study_report(rates_study()).findings if f.kind == "sensitivity")
    numbers = finding.numbers
    assert (numbers["start"], numbers["lr_batch_size"]) == ("scratch", None)
    assert {key: numbers["norms"]["bn"][key] for key in ("best", "mean", "low", "high")} == {
        "best": 0.1, "mean": pytest.approx(0.903), "low": 0.1, "high": 1.0
    }  # fmt: skip
    assert [point["rate"] for point in numbers["norms"]["gn"]["rates"]] == list(RATES)


def test_a_norm_without_results_has_no_curve_and_hides_no_other() -> None:
    results = rates_study()
    skipped = [run(0, "skipped", "no", norm="gn:64", start=start, lr=rate, seed=seed)
               for start in ("scratch", "converted") for rate in RATES for seed in range(3)]  # fmt: skip
    assert rate_curves(replace(results, outcomes=(*results.outcomes, *skipped))) == rate_curves(results)
