"""The report as a file: endings, the JSON, the layer table, and writing whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import sample_report as samples

from normsurgeon.errors import NormSurgeonError, UsageError
from normsurgeon.render.html import to_page

REPORTS = {
    "small": samples.small_report(),
    "bare": samples.bare_report(),
    "hollow": samples.hollow_report(),
}


def table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(REPORTS[name].csv())))


@pytest.mark.parametrize("name", REPORTS)
def test_the_json_is_the_dictionary_and_strict(name: str, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = REPORTS[name].save(tmp_path / "report.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=refuse)
    assert document == json.loads(json.dumps(REPORTS[name].to_dict()))
    assert (document["format"], document["version"]) == ("normsurgeon-report", 1)


def test_the_json_has_the_documented_keys() -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")

    def walk(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value) | set().union(*map(walk, value.values()))
        return set().union(*map(walk, value)) if isinstance(value, list) else set()

    document = REPORTS["small"].to_dict()
    for entry in document["sensitivity"]:
        entry["details"] = {}
    document["history"], document["provenance"]["versions"] = [], {}
    assert {key for key in walk(document) if f"`{key}`" not in text} == set()


def test_the_table_has_one_row_a_layer_and_full_numbers() -> None:
    report, rows = REPORTS["small"], table("small")
    assert report.statistics is not None
    assert [row["layer"] for row in rows] == [entry.layer for entry in report.statistics]
    first = report.statistics[0]
    assert float(rows[0]["mean"]) == first.mean
    assert float(rows[0]["std"]) == first.std
    assert rows[0]["shape"] == "16x32x32"
    assert report.baseline_statistics is not None
    assert float(rows[0]["baseline_abs_mean"]) == report.baseline_statistics[0].abs_mean
    assert rows[1]["cosine"] == ""
    assert float(rows[2]["sensitivity_hessian_trace_labels_stderr"]) > 0


def test_the_header_of_the_table_is_stable() -> None:
    header = REPORTS["small"].csv().split("\n")[0]
    assert header == (
        "layer,kind,class_name,shape,channels,calls,values,mean,var,min,max,abs_mean,zero_fraction,skewness,kurtosis,"
        "squared_mean,channel_var,between_var,within_var,dead_channels,dormant_channels,effective_rank,"
        "participation_ratio,rank_samples,nan,inf,first_nonfinite,group_fluctuation,mean_fluctuation,groups,std,"
        "baseline_calls,baseline_values,baseline_mean,baseline_var,baseline_min,baseline_max,baseline_abs_mean,"
        "baseline_zero_fraction,baseline_skewness,baseline_kurtosis,baseline_squared_mean,baseline_channel_var,"
        "baseline_between_var,baseline_within_var,baseline_dead_channels,baseline_dormant_channels,"
        "baseline_effective_rank,baseline_participation_ratio,baseline_rank_samples,baseline_nan,baseline_inf,"
        "baseline_first_nonfinite,baseline_group_fluctuation,baseline_mean_fluctuation,baseline_std,baseline_layer,"
        "cka,gram_cosine,cosine,relative_error,channel_cosine,worst_channel,worst_channel_cosine,mean_shift,std_ratio,"
        "rewritten,"
        "sensitivity_taylor_labels,sensitivity_taylor_labels_stderr,sensitivity_fisher_prediction,"
        "sensitivity_fisher_prediction_stderr,sensitivity_hessian_trace_labels,"
        "sensitivity_hessian_trace_labels_stderr,sensitivity_noise_prediction,sensitivity_noise_prediction_stderr"
    )
    assert REPORTS["bare"].csv() == "layer\n"


def test_the_table_knows_no_nan() -> None:
    report = REPORTS["small"]
    assert report.statistics is not None
    broken = replace(
        report, statistics=tuple(replace(s, mean=float("nan"), max=float("inf")) for s in report.statistics)
    )
    (row, *_) = csv.DictReader(io.StringIO(broken.csv()))
    assert (row["mean"], row["max"]) == ("", "")
    assert "NaN" not in json.dumps(broken.to_dict())


def test_the_frame_is_the_table_with_numbers() -> None:
    report, rows = REPORTS["small"], table("small")
    frame = report.frame
    assert list(frame.columns) == list(rows[0])
    assert list(frame["layer"]) == [row["layer"] for row in rows]
    assert report.statistics is not None
    assert list(frame["std"]) == [entry.std for entry in report.statistics]
    assert frame["std"].dtype == "float64"
    assert frame["cosine"].isna().tolist() == [i == 1 for i in range(len(rows))]
    assert (list(REPORTS["bare"].frame.columns), len(REPORTS["bare"].frame)) == (["layer"], 0)


@pytest.mark.parametrize("ending", [".html", ".json", ".csv", ".HTML"])
def test_the_ending_chooses_and_the_path_comes_back(tmp_path: Path, ending: str) -> None:
    path = REPORTS["small"].save(str(tmp_path / f"report{ending}"))
    assert path == tmp_path / f"report{ending}"
    assert path.stat().st_size > 1000
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["report", "report.txt", "html"])
def test_another_ending_is_wrong_usage(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"its name ends in \.html \(a page\), \.json or \.csv \(the layer table\)$"):
        REPORTS["bare"].save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_folder_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(NormSurgeonError, match=r"^cannot write .*x\.json: there is no folder .*nowhere$"):
        REPORTS["bare"].save(tmp_path / "nowhere" / "x.json")
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(NormSurgeonError, match=r"^cannot write .*taken\.csv: it is a folder$"):
        REPORTS["bare"].save(tmp_path / "taken.csv")


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NormSurgeonError, match=r"^cannot write .*: No space left on device; nothing was written$"):
        REPORTS["bare"].save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_that_may_not_be_written_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(NormSurgeonError, match=r"^cannot write .*report\.html: permission denied$"):
        REPORTS["bare"].save(tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_the_page_is_the_same_for_the_same_report() -> None:
    assert to_page(samples.small_report().document()) == to_page(samples.small_report().document())
