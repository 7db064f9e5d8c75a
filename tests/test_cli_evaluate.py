"""The command line's evaluate and demo: what they print, and what they leave with."""

from __future__ import annotations

import json

import pytest
from normsurgeon_cli.app import app
from PIL import Image
from typer.testing import CliRunner

KEYS = {"model", "images", "skipped", "top1", "top5", "loss", "images_per_second", "agreement", "kl"}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str):
        return CliRunner().invoke(app, list(arguments))

    return invoke


@pytest.fixture
def folder(tmp_path):
    """Two class folders named as ImageNet synsets, three images, and one file that is no image."""
    for synset, count in (("n01440764", 2), ("n01484850", 1)):
        (tmp_path / synset).mkdir()
        for number in range(count):
            Image.new("RGB", (64, 64), (40 * number, 90, 120)).save(tmp_path / synset / f"{number}.png")
    (tmp_path / "n01484850" / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def test_json_is_one_document_with_the_contracts_keys(run, folder):
    result = run("evaluate", "test_resnet", "--random-init", "--data", str(folder), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document) >= KEYS
    assert (document["images"], document["skipped"], document["model"]) == (3, 1, "test_resnet")
    assert document["agreement"] is None


def test_a_baseline_adds_agreement_and_kl(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "fold.safetensors"
    assert run("convert", "test_resnet", "--random-init", "--to", "fold", "-o", str(out)).exit_code == 0
    result = run("evaluate", str(out), "--data", str(folder), "--baseline", str(out), "--json")
    document = json.loads(result.stdout)
    assert document["agreement"] == 1.0
    assert document["kl"] == pytest.approx(0.0, abs=1e-9)


def test_the_table_says_what_was_skipped_on_standard_error(run, folder):
    result = run("evaluate", "test_resnet", "--random-init", "--data", str(folder))
    assert result.exit_code == 0
    assert "top-1" in result.stdout
    assert "1 image" in result.stderr
    assert "skipped" in result.stderr


def test_labels_that_cannot_fit_are_one_line_with_the_ways_out(run):
    digits = ("evaluate", "test_resnet", "--random-init", "--data", "digits", "--max-images", "2", "--json")
    refused = run(*digits)
    assert refused.exit_code == 1
    assert refused.stderr.strip().splitlines() == [
        "error: digits has 10 classes and the network 1000, and the names do not say which of these they are; try a "
        "data set of the network's classes, a new head (finetune --num-classes 10), or labels='by-position' or 'none' "
        "(--labels)"
    ]
    assert json.loads(run(*digits, "--labels", "by-position").stdout)["top1"] is not None
    assert json.loads(run(*digits, "--labels", "none").stdout)["top1"] is None
    wrong = run(*digits, "--labels", "by-luck")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "labels='by-luck' is unknown; it is one of by-name, by-position, none" in wrong.stderr


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda path: path / "nowhere", "nowhere"),
        (lambda path: (path / "empty").mkdir() or path / "empty", "empty"),
    ],
    ids=["no folder", "empty folder"],
)
def test_data_that_cannot_be_used_is_one_line_and_exit_1(run, tmp_path, prepare, text):
    result = run("evaluate", "test_resnet", "--random-init", "--data", str(prepare(tmp_path)))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_a_folder_in_which_nothing_can_be_read_is_an_error(run, tmp_path):
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "n01440764" / "broken.jpg").write_bytes(b"no image")
    result = run("evaluate", "test_resnet", "--random-init", "--data", str(tmp_path))
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.system
def test_the_demo_shows_the_plain_swap_failing_and_the_conversion_holding(run, tmp_path):
    out = tmp_path / "ln.safetensors"
    result = run("demo", "-o", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    rows = {row["network"]: row for row in document["rows"]}
    assert rows["fold"]["agreement"] == 1.0
    assert rows["plain swap to ln"]["agreement"] < 0.1
    assert rows["ln"]["kl"] < 0.25 * rows["plain swap to ln"]["kl"]
    assert out.stat().st_size > 1e6
    assert json.loads(run("inspect", str(out), "--json").stdout)["families"] == {"BatchNorm": 0, "GroupNorm": 49}


def test_the_demo_fails_before_the_work_when_it_cannot_write(run, tmp_path):
    result = run("demo", "-o", str(tmp_path / "missing" / "ln.safetensors"))
    assert result.exit_code == 1
    assert "there is no folder" in result.stderr
