"""What the study's numbers are: against scipy, against formulas by hand, and under permutation and renaming."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations, product
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_study import IMAGES, full_study, null_study, run, study
from scipy import stats
from scipy.optimize import brentq

from normsurgeon._util import estimates
from normsurgeon.study.records import Results
from normsurgeon.study.statistics import (
    Comparison,
    arranged,
    best_rates,
    comparisons,
    crossing,
    norm_order,
    ranking,
    setting_axes,
    table,
)

several = st.lists(st.integers(0, IMAGES), min_size=3, max_size=8)
probabilities = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12)


def only(results: Results, scope: str = "overall") -> Comparison:
    (found,) = (c for c in comparisons(results) if c.scope == scope)
    return found


QUANTILES = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 6: 2.446912, 7: 2.364624}
"""t(0.975) by degrees of freedom, as printed in the tables of textbooks."""


def holm_by_closure(p: list[float]) -> list[float]:
    """Holm's adjusted values by their definition: the greatest p of Bonferroni's test over all sets of hypotheses that
    hold the one in question (the closed testing procedure of Marcus, Peritz & Gabriel, 1976)."""
    sets = [s for size in range(1, len(p) + 1) for s in combinations(range(len(p)), size)]
    return [max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets if k in s) for k in range(len(p))]


@given(several)
def test_the_interval_is_students(right: list[int]) -> None:
    values = [x / IMAGES for x in right]
    it = estimates.estimate(values)
    assert it.mean == pytest.approx(np.mean(values), abs=1e-12)
    if len(set(right)) == 1:
        assert (it.ci, it.sd) == (None, 0.0)
        return
    sd = np.std(values, ddof=1)
    half = QUANTILES[len(values) - 1] * sd / math.sqrt(len(values))
    assert it.ci == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=1e-6)
    assert it.sd == pytest.approx(sd, abs=1e-12)


@pytest.mark.parametrize(("n", "t"), [(3, 0.5), (4, 2.0), (6, 3.5), (9, 1.0)])
def test_p_is_the_area_under_students_density(n: int, t: float) -> None:
    """Integrated by hand: Γ((f + 1)/2) / (√(fπ) Γ(f/2)) · (1 + x²/f)^(−(f + 1)/2), f = n − 1, from −t to t."""
    f = n - 1
    noise = np.arange(n) - (n - 1) / 2
    differences = noise + t * noise.std(ddof=1) / math.sqrt(n)  # their t statistic is t
    x = np.linspace(-t, t, 20_001)
    scale = math.gamma((f + 1) / 2) / (math.sqrt(f * math.pi) * math.gamma(f / 2))
    inside = np.trapezoid(scale * (1 + x**2 / f) ** (-(f + 1) / 2), x)
    assert estimates.paired(differences.tolist()).p == pytest.approx(1 - inside, abs=1e-7)


@given(several, st.data())
def test_the_test_is_scipys_paired_t_test(first: list[int], data: st.DataObject) -> None:
    second = data.draw(st.lists(st.integers(0, IMAGES), min_size=len(first), max_size=len(first)))
    differences = {x - y for x, y in zip(first, second, strict=True)}
    made = only(study({"bn": first, "gn": second}))
    assert made.n == len(first)
    if len(differences) > 1:
        expected = stats.ttest_rel(np.array(first) / IMAGES, np.array(second) / IMAGES)
        assert made.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
        low, high = expected.confidence_interval(0.95)
        assert made.ci == pytest.approx((low, high), abs=1e-9)


def test_differences_that_are_all_alike_are_tested_by_flipping_signs() -> None:
    """The t test divides by nothing there; every sign may as well have been the other."""
    for n in (3, 5, 7):
        flips = [abs(sum(signs)) for signs in product((-1, 1), repeat=n)]
        made = only(study({"bn": [800] * n, "gn": [790] * n}))
        assert made.p == sum(total == n for total in flips) / len(flips)
        assert (made.ci, made.effect, made.sd) == (None, None, 0.0)
    same = only(study({"bn": [800, 810, 820], "gn": [800, 810, 820]}))
    assert (same.difference, same.p, same.p_holm, same.effect, same.better) == (0.0, 1.0, 1.0, 0.0, None)


def test_the_effect_size_is_hedges_g_of_the_differences() -> None:
    made = only(study({"bn": [900, 910, 905, 890, 900], "gn": [880, 900, 899, 881, 860]}))
    differences = [0.020, 0.010, 0.006, 0.009, 0.040]
    correction = math.gamma(4 / 2) / (math.sqrt(4 / 2) * math.gamma(3 / 2))
    assert made.effect == pytest.approx(correction * mean(differences) / stdev(differences), rel=1e-9)


@pytest.mark.parametrize("df", [2, 3, 9, 400])
def test_hedges_correction_makes_d_unbiased(df: int) -> None:
    """E[d] = delta / J for a noncentral t, by scipy's own mean."""
    n, delta = df + 1, 0.7
    biased = stats.nct(df, delta * math.sqrt(n)).mean() / math.sqrt(n)
    assert biased * estimates.hedges(df) == pytest.approx(delta, rel=1e-6)


@given(probabilities)
def test_holm_is_at_least_raw_and_keeps_the_order(p: list[float | None]) -> None:
    adjusted = estimates.holm(p)
    known = [(x, y) for x, y in zip(p, adjusted, strict=True) if x is not None and y is not None]
    assert [x is None for x in p] == [y is None for y in adjusted]
    assert all(x <= y <= 1 for x, y in known)
    assert [y for _, y in sorted(known)] == sorted(y for _, y in known)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closure_of_bonferronis_test(p: list[float]) -> None:
    assert estimates.holm(p) == pytest.approx(holm_by_closure(p), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10, unique=True), st.floats(0.01, 0.99))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], level: float) -> None:
    """The procedure as Holm states it: compare p_(k) with level / (m − k + 1) until the first that is greater."""
    rejected = set()
    for k, value in enumerate(sorted(p)):
        bound = level / (len(p) - k)
        if abs(value - bound) < 1e-9:
            return  # rounding decides
        if value > bound:
            break
        rejected.add(value)
    assert {x for x, y in zip(p, estimates.holm(p), strict=True) if y is not None and y <= level} == rejected


@given(st.permutations(range(60)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_cells_does_not_matter(order: list[int]) -> None:
    outcomes = full_study().outcomes[:60]
    results = Results("s", outcomes)
    mixed = Results("s", tuple(outcomes[i] for i in order))
    assert comparisons(mixed) == comparisons(results)
    assert ranking(mixed) == ranking(results)
    assert [row.to_dict() for row in table(mixed)] == [row.to_dict() for row in table(results)]
    assert crossing(mixed, "batch_size") == crossing(results, "batch_size")


@given(st.integers(0, 10**6))
@example(411690)
@settings(max_examples=25, deadline=None)
def test_swapping_two_norms_flips_the_sign(number: int) -> None:
    results = null_study(number, norms=("bn", "gn"))
    other = {"bn": "gn", "gn": "bn"}
    swapped = replace(results, outcomes=tuple(
        replace(o, cell=replace(o.cell, norm=other[o.cell.norm])) for o in results.outcomes
    ))  # fmt: skip
    for one, two in zip(comparisons(results), comparisons(swapped), strict=True):
        assert (one.difference, one.p) == pytest.approx((-(two.difference or 0.0), two.p), abs=1e-9)
        if one.ci is None:  # the same difference in every seed
            assert (one.sd, two.sd, two.ci) == (0, 0, None)
            continue
        assert two.ci is not None
        assert one.ci == pytest.approx((-two.ci[1], -two.ci[0]), abs=1e-9)


def test_seeds_are_the_replicates_and_batch_sizes_are_not() -> None:
    results = null_study(3, norms=("bn", "gn"), sizes=(2, 4, 8, 16), seeds=4)
    made = only(results)
    by = {(o.cell.norm, o.cell.batch_size, o.cell.seed): o.accuracy or 0.0 for o in results.outcomes}
    means = [mean(by["bn", size, seed] - by["gn", size, seed] for size in (2, 4, 8, 16)) for seed in range(4)]
    assert (made.n, made.settings, made.pairs) == (4, 4, 16)
    assert made.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-9)


def test_the_interaction_is_the_difference_of_least_squares_slopes() -> None:
    results = null_study(5, norms=("bn", "gn"), sizes=(2, 8, 16), seeds=4)
    made = only(results, "batch size")
    by = {(o.cell.norm, o.cell.batch_size, o.cell.seed): o.accuracy or 0.0 for o in results.outcomes}
    slopes = {
        norm: [np.polyfit([1, 3, 4], [by[norm, size, seed] for size in (2, 8, 16)], 1)[0] for seed in range(4)]
        for norm in ("bn", "gn")
    }
    assert made.mean_a == pytest.approx(np.mean(slopes["bn"]))
    assert made.mean_b == pytest.approx(np.mean(slopes["gn"]))
    assert made.p == pytest.approx(stats.ttest_rel(slopes["bn"], slopes["gn"]).pvalue, rel=1e-6)
    assert made.better is None


def test_a_rate_that_is_scaled_by_the_batch_size_is_no_axis_of_its_own() -> None:
    results = null_study(5, norms=("bn", "gn"))
    scaled = replace(results, outcomes=tuple(
        replace(o, cell=replace(o.cell, lr=0.1 * o.cell.batch_size / 32)) for o in results.outcomes
    ))  # fmt: skip
    assert setting_axes(scaled) == ("batch_size",)
    assert best_rates(scaled) == {}
    assert only(scaled, "batch size").p == only(results, "batch size").p


def test_scaled_rates_that_are_tried_are_matched_between_batch_sizes_by_their_place() -> None:
    noise = random.Random(1)
    outcomes = [
        run(800 + 20 * math.log2(size) + noise.gauss(0, 5), norm=norm, batch_size=size, lr=base * size, seed=seed)
        for norm in ("bn", "gn") for size in (2, 8) for base in (0.01, 0.1) for seed in range(3)
    ]  # fmt: skip
    made = only(Results("s", tuple(outcomes)), "batch size")
    by = {(o.cell.norm, o.cell.batch_size, o.cell.lr, o.cell.seed): o.accuracy or 0.0 for o in outcomes}
    slopes = [
        mean((by["bn", 8, b * 8, s] - by["bn", 2, b * 2, s] - by["gn", 8, b * 8, s] + by["gn", 2, b * 2, s]) / 2
             for b in (0.01, 0.1))
        for s in range(3)
    ]  # fmt: skip
    assert made.difference == pytest.approx(mean(slopes))


def test_settings_are_compared_each_by_itself_and_form_a_family() -> None:
    results = null_study(11)
    found = [c for c in comparisons(results) if c.scope == "setting"]
    assert [dict(c.setting)["batch_size"] for c in found] == [2] * 3 + [8] * 3 + [32] * 3
    order = sorted(found, key=lambda c: c.p or 0.0)
    steps = [(len(order) - i) * (c.p or 0.0) for i, c in enumerate(order)]
    assert [c.p_holm for c in order] == pytest.approx([min(1, max(steps[: i + 1])) for i in range(len(order))])
    few = null_study(11, norms=("bn", "gn"))  # its family: one overall, one slope
    main = [c for c in comparisons(few) if c.scope in ("overall", "batch size")]
    assert len(main) == 2
    assert [c.p_holm for c in main] == pytest.approx(holm_by_closure([c.p or 0.0 for c in main]))


def test_two_seeds_are_estimated_and_not_tested() -> None:
    made = only(study({"bn": [900, 920], "gn": [500, 510]}))
    assert (made.n, made.p, made.p_holm, made.effect, made.better) == (2, None, None, None, None)
    assert made.ci is not None
    assert {rank.rank for rank in ranking(study({"bn": [900, 920], "gn": [500, 510]}))} == {None}


def wilson(values: list[float]) -> tuple[float, float]:
    """The shares p whose distance from the mean is t standard errors of ν trials at p: Wilson's definition, solved."""
    mean, t = sum(values) / len(values), QUANTILES[len(values) - 1]
    trials = mean * (1 - mean) * len(values) / stdev(values) ** 2

    def off(p: float) -> float:
        return (mean - p) ** 2 - t**2 * p * (1 - p) / trials

    return brentq(off, 0, mean), brentq(off, mean, 1)


@pytest.mark.parametrize("values", [[0.99, 0.994, 0.997], [0.001, 0.002, 0.02], [0.5, 0.52, 0.51], [0.0, 0.9, 0.9]])
def test_an_accuracys_interval_is_wilsons_and_stays_within_0_and_1(values: list[float]) -> None:
    low, high = estimates.estimate_share(values).ci or (math.nan, math.nan)
    assert (low, high) == pytest.approx(wilson(values), abs=1e-6)
    assert 0 <= low < sum(values) / 3 < high <= 1


def test_a_narrow_interval_of_an_accuracy_is_students() -> None:
    values = [0.5001, 0.5, 0.4999]
    assert estimates.estimate_share(values).ci == pytest.approx(estimates.estimate(values).ci, abs=1e-7)


def test_one_row_for_each_cell_with_the_seeds_pooled() -> None:
    rows = table(study({"bn": [900, 910, 950], "gn": [800]}))
    assert [(row.cell.norm, row.estimate.n) for row in rows] == [("bn", 3), ("gn", 1)]
    assert rows[0].estimate.mean == pytest.approx(0.92)
    assert rows[0].estimate.ci == pytest.approx(wilson([0.9, 0.91, 0.95]), abs=1e-6)
    assert rows[1].estimate == estimates.Estimate(0.8, None, None, 1)
    assert "seed" not in rows[0].to_dict()


def test_the_table_shows_what_finished_and_counts_the_rest() -> None:
    results = replace(study({"bn": [900, 910]}), outcomes=(
        *study({"bn": [900, 910]}).outcomes, run(0, "diverged", "nan", norm="bn", seed=2),
        run(0, "failed", "oom", norm="bn", seed=3), run(0, "skipped", "no", norm="gn:7", seed=0),
    ))  # fmt: skip
    first, second = table(results)
    assert (first.estimate.mean, first.estimate.n) == (pytest.approx(0.905), 2)
    assert first.lost == {"diverged": 1, "failed": 1, "skipped": 0}
    assert (second.estimate, second.lost["skipped"]) == (estimates.Estimate(None, None, None, 0), 1)


def with_diverged(norm: str, seeds: set[int]) -> Results:
    """gn is a point better than bn where it finishes."""
    noise = random.Random(2)
    outcomes = []
    for name, at in (("bn", 880), ("gn", 890)):
        for seed in range(5):
            lost = name == norm and seed in seeds
            right = at + noise.gauss(0, 1)
            outcomes.append(run(right, "diverged" if lost else "done", "nan" if lost else None, norm=name, seed=seed))
    return Results("s", tuple(outcomes))


def test_a_norm_gains_nothing_by_its_diverged_runs() -> None:
    assert only(with_diverged("gn", set())).better == "gn"
    some = only(with_diverged("gn", {1, 3}))
    assert some.better is None
    assert (some.diverged_a, some.diverged_b, some.pairs, some.lost) == (0, 2, 5, 0)
    assert some.finished is not None
    assert (some.finished["n"], some.finished["difference"]) == (3, pytest.approx(-0.01, abs=0.002))
    every = only(with_diverged("gn", {0, 1, 2, 3, 4}))
    assert every.better == "bn"
    assert every.mean_b == 0


def test_failed_and_skipped_runs_take_their_pairs_along() -> None:
    results = full_study()
    made = next(c for c in comparisons(results) if (c.scope, c.a, c.b) == ("overall", "bn", "gn"))
    # gn failed with seed 4 in two of the twelve settings: ten settings stay, with all five seeds.
    assert (made.n, made.settings, made.pairs, made.lost) == (5, 10, 50, 10)
    assert {norm for c in comparisons(results) for norm in (c.a, c.b)} == {"bn", "gn", "ln"}


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20))
@settings(max_examples=60, deadline=None)
def test_what_is_averaged_has_no_gaps(gaps: set[tuple[int, int]]) -> None:
    outcomes = [
        run(8, "failed" if norm == "gn" and (size, seed) in gaps else "done", norm=norm, batch_size=2**size, seed=seed)
        for norm in ("bn", "gn") for size in range(4) for seed in range(5)
    ]  # fmt: skip
    it = arranged(Results("s", tuple(outcomes)))
    block = it.complete([0, 1])
    assert not np.isnan(it.score_SAK[np.ix_(block.settings, range(len(it.arms)), block.seeds)]).any()
    assert len(block.settings) * len(block.seeds) + block.lost == 20
    if not gaps:
        assert block.lost == 0


def test_ranks_are_one_more_than_the_norms_that_are_significantly_better() -> None:
    results = study({
        "bn": [900, 912, 905, 893, 900], "gn": [902, 909, 903, 899, 898], "ln": [700, 712, 708, 690, 700],
        "in": [500, 520, 505, 490, 505],
    })  # fmt: skip
    assert [(r.norm, r.rank, set(r.worse_than)) for r in ranking(results)] == [
        ("gn", 1, set()), ("bn", 1, set()), ("ln", 3, {"bn", "gn"}), ("in", 4, {"bn", "gn", "ln"}),
    ]  # fmt: skip


def test_a_norm_without_a_result_has_no_rank() -> None:
    last = ranking(full_study())[-1]
    assert (last.norm, last.rank, last.estimate.mean, last.estimate.n) == ("gn:64", None, None, 0)
    assert last.lost["skipped"] == 60


def test_a_crossed_table_averages_the_same_settings_for_every_norm() -> None:
    results = full_study()
    made = crossing(results, "activation")
    kept = [o for o in results.outcomes if o.cell.seed != 4]  # gn failed with seed 4 at both
    for (level, norm), (it, diverged) in made.cells.items():
        runs = [o for o in kept if (o.cell.activation, o.cell.norm) == (level, norm)]
        if norm == "gn:64":
            assert (it.mean, it.n) == (None, 0)
            continue
        assert it.mean == pytest.approx(mean(o.accuracy or 0.0 for o in runs))
        assert it.n == 4
        assert diverged == sum(o.status == "diverged" for o in runs)


def test_the_best_rate_is_each_norms_own() -> None:
    right = {("bn", 0.1): 900, ("bn", 1.0): 700, ("gn", 0.1): 800, ("gn", 1.0): 880}
    outcomes = [
        run(at + (3 * seed if norm == "bn" else 2 * seed), norm=norm, lr=lr, seed=seed)
        for (norm, lr), at in right.items() for seed in range(3)
    ]  # fmt: skip
    results = Results("s", tuple(outcomes))
    assert best_rates(results) == {((), "bn"): 0.1, ((), "gn"): 1.0}
    made = only(results, "best lr")
    assert made.difference == pytest.approx(0.021)
    assert (made.n, made.settings) == (3, 1)


def test_norms_are_listed_in_the_catalogues_order() -> None:
    assert sorted(["zz", "rms", "gn:2", "in", "gn:16", "bn", "gn"], key=norm_order) == [
        "bn", "gn", "gn:2", "gn:16", "in", "rms", "zz",
    ]  # fmt: skip


@pytest.mark.parametrize("outcomes", [(), (run(0, "failed", "x"),), (run(900),)])
def test_nearly_empty_results_have_numbers_too(outcomes: Any) -> None:
    results = Results("s", outcomes)
    assert comparisons(results) == ()
    assert len(table(results)) == len(ranking(results)) == len(outcomes)
