"""What a study says in words: only what its numbers carry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
from sample_study import full_study, null_study, run, study
from scipy import stats

from normsurgeon.study.findings import CLAIMS, MAX_SENTENCES, StudyFinding, findings
from normsurgeon.study.records import Results
from normsurgeon.study.statistics import comparisons, ranking


def found_in(results: Results) -> tuple[StudyFinding, ...]:
    compared = comparisons(results)
    return findings(results, compared, ranking(results, compared))


def texts(results: Results, kind: str) -> list[str]:
    return [finding.text for finding in found_in(results) if finding.kind == kind]


@pytest.mark.long
@pytest.mark.parametrize(("seeds", "norms"), [(3, ("bn", "gn", "ln")), (5, ("bn", "gn", "ln", "in", "rms"))])
def test_no_sentence_claims_a_difference_on_noise(seeds: int, norms: tuple[str, ...]) -> None:
    """200 studies of nothing: those with any claim are 5 % at most, within the binomial's 99.9 %."""
    wrong = sum(
        any(finding.kind in CLAIMS for finding in found_in(null_study(i, norms, seeds=seeds))) for i in range(200)
    )
    assert wrong <= stats.binom.ppf(0.999, 200, 0.05)


def test_a_claim_has_its_number_in_every_sentence() -> None:
    found = [finding for finding in found_in(full_study()) if finding.kind in CLAIMS]
    assert {finding.kind for finding in found} == set(CLAIMS)
    for finding in found:
        assert finding.numbers["significant"] is True
        assert finding.numbers["p_holm"] < 0.05
        assert f"n = {finding.numbers['n']} seeds" in finding.text
        assert f"{abs(100 * finding.numbers['difference']):.1f} points" in finding.text


def test_the_headline_is_the_interaction_with_the_batch_size() -> None:
    first = found_in(full_study())[0]
    assert first.kind == "batch size"
    assert first.text.startswith(
        "The smaller the batch, the better gn does against bn: with each halving from 32 to 2, on average, bn loses "
        "4.9 points (95 % CI 4.6 to 5.2) and gn loses 0.1 points (95 % CI −0.01 to 0.13). The difference is 4.8 points "
        "a halving (95 % CI 4.5 to 5.2; g = 13.90, Holm p < 0.0001, n = 5 seeds)."
    )
    assert first.numbers["batch_sizes"] == [2, 8, 32]


def test_a_difference_is_stated_from_the_better_norms_side() -> None:
    results = study({"bn": [800, 806, 803, 795, 801], "gn": [900, 912, 905, 893, 900]})
    assert texts(results, "difference") == [
        "gn beats bn by 10.1 points (95 % CI 9.7 to 10.5; g = 25.48, Holm p < 0.0001, n = 5 seeds)."
    ]


def test_no_difference_is_a_sentence_that_says_what_is_not_ruled_out() -> None:
    results = study({"bn": [900, 912, 905, 893], "gn": [902, 909, 903, 899]})
    assert texts(results, "no difference") == [
        "No difference between bn and gn was shown: bn minus gn is −0.1 points (95 % CI −0.7 to 0.6; g = −0.13, "
        "Holm p = 0.74, n = 4 seeds). Up to 0.7 points are not ruled out."
    ]
    assert not texts(results, "difference")


def test_identical_results_have_a_sentence() -> None:
    results = study({"bn": [900, 912, 905], "affine": [900, 912, 905]})
    assert texts(results, "identical") == ["bn and affine came to the same accuracy with each of 3 seeds."]


@pytest.mark.parametrize(("seeds", "words"), [(1, "1 seed is too few"), (2, "2 seeds are too few")])
def test_too_few_seeds_are_a_sentence_and_nothing_is_claimed(seeds: int, words: str) -> None:
    results = study({"bn": [900, 990][:seeds], "gn": [100, 110][:seeds]})
    assert texts(results, "too few seeds") == [
        f"{words} to tell norms apart: a difference is tested from 3 seeds on, and 5 or more find smaller ones."
    ]
    assert not [finding for finding in found_in(results) if finding.kind in (*CLAIMS, "no difference")]


def test_one_norm_and_no_result_are_sentences() -> None:
    assert texts(study({"bn": [900, 910, 905]}), "one norm") == [
        "One norm only (bn): there is nothing to compare it with."
    ]
    assert texts(Results("s", (run(0, "failed", "oom"),)), "no results") == [
        "No run has a result: there is nothing to compare."
    ]


def test_norms_that_share_no_pair_cannot_be_compared() -> None:
    results = Results("s", (run(900, norm="bn", seed=0), run(890, norm="gn", seed=1)))
    assert texts(results, "no pairs") == [
        "No setting has a result for both bn and gn with the same seed: they cannot be compared."
    ]


def test_runs_that_are_lost_are_listed_with_their_reasons() -> None:
    results = full_study()
    assert texts(results, "diverged") == [
        "2 runs of ln diverged (the loss stopped being finite); comparisons count them as 0 right: the loss was nan at "
        "update 41."
    ]
    assert texts(results, "failed") == ["2 runs of gn failed; comparisons leave their pairs out: out of memory."]
    assert texts(results, "skipped") == [
        "60 runs of gn:64 were skipped as impossible; comparisons leave their pairs out: 64 groups do not divide 32 "
        "channels."
    ]


def test_a_comparison_with_diverged_runs_says_so_and_what_holds_without_them() -> None:
    (text,) = [text for text in texts(full_study(), "no difference") if "bn and ln" in text]
    assert text.endswith(
        " Diverged, and counted as 0 right: 2 of 60 runs of ln; where both finished, bn minus ln is −0.5 points (95 % "
        "CI −0.9 to −0.2, n = 5)."
    )


def test_a_setting_has_a_sentence_only_if_the_norms_differ_in_the_whole() -> None:
    found = found_in(full_study())
    pairs = {(f.numbers["a"], f.numbers["b"]) for f in found if f.kind in ("difference", "batch size")}
    assert {(f.numbers["a"], f.numbers["b"]) for f in found if f.kind == "setting"} <= pairs


def test_at_most_six_sentences_of_a_kind() -> None:
    noise = [0, 3, -2, 1, 4]
    results = study({f"gn:{i}": [900 - 40 * i + (x * (i + 1)) % 7 for x in noise] for i in range(6)})
    found = texts(results, "difference")
    assert len(found) == MAX_SENTENCES + 1
    assert found[-1].endswith("more sentences like these: the table of comparisons has the numbers.")


def test_the_best_learning_rate_has_a_sentence_with_its_limits() -> None:
    right = {0.01: 850, 0.1: 900, 1.0: 700}
    results = Results("s", tuple(
        run(at + 5 * seed + (norm == "gn") * (60 * (lr == 1.0) + 200 * (lr == 1.0)), norm=norm, lr=lr, seed=seed)
        for norm in ("bn", "gn") for lr, at in right.items() for seed in range(3)
    ))  # fmt: skip
    assert texts(results, "learning rate") == [
        "The learning rate that did best: bn 0.1; gn 1. It was chosen on the same held-out images, so accuracies at it "
        "are a little too good. For gn it lies at the edge of those tried: a better one may lie beyond."
    ]


def test_what_converted_networks_began_with_has_a_sentence() -> None:
    results = study({"bn": [900, 910, 905], "gn": [890, 900, 899]})
    began = replace(results, outcomes=tuple(
        replace(o, start_accuracy=0.9 if o.cell.norm == "bn" else 0.4) for o in results.outcomes
    ))  # fmt: skip
    assert texts(began, "start") == [
        "Converted networks began with an accuracy of, on average: bn 90.0 % and gn 40.0 %."
    ]


def test_findings_are_plain_json() -> None:
    document = [asdict(finding) for finding in found_in(full_study())]
    assert json.loads(json.dumps(document, allow_nan=False))[0].keys() == {"kind", "severity", "text", "numbers"}
    assert {entry["severity"] for entry in document} <= {"good", "notice", "warning", "problem"}


def at_chance(right: dict[str, Sequence[float]], chance: float = 0.1) -> Results:
    results = study(right)
    return replace(results, outcomes=tuple(replace(outcome, chance=chance) for outcome in results.outcomes))


def test_networks_at_chance_carry_no_claim_about_norms() -> None:
    guessed = {"bn": (100, 101, 99, 100), "gn": (110, 112, 109, 111)}
    assert "difference" in {finding.kind for finding in found_in(study(guessed))}  # where chance is not known
    found = found_in(at_chance(guessed))
    assert [finding.kind for finding in found] == ["chance"]
    assert found[0].text == (
        "Nothing was learned: with bn and gn, accuracies are those of guessing (the commonest class is 10.0 %). They "
        "carry no claim about norms."
    )
    assert not any(comparison.significant for comparison in comparisons(at_chance(guessed)))
    assert {rank.rank for rank in ranking(at_chance(guessed))} == {1}


def test_a_norm_that_learned_beats_one_that_did_not() -> None:
    found = found_in(at_chance({"bn": (100, 101, 99, 100), "gn": (510, 513, 508, 511)}))
    assert [finding.kind for finding in found] == ["chance", "difference"]
    assert found[0].text.startswith("Some networks learned nothing: with bn, accuracies")


@pytest.mark.parametrize(("right", "learned"), [(118, False), (120, True)])
def test_guessing_may_be_right_by_two_standard_errors_of_chance(right: int, learned: bool) -> None:
    """0.1 + 2 √(0.1 · 0.9 / 1000) = 0.119."""
    (comparison,) = (c for c in comparisons(at_chance({"bn": (right,) * 3, "gn": (90,) * 3})) if c.scope == "overall")
    assert comparison.learned == learned
