"""``convert --calibrate`` and ``--reconstruct``: the converted file holds what images brought back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import normsurgeon as ns
from normsurgeon.models.checkpoint import origin_of
from tests.test_cli import run


@pytest.fixture
def digits_network(tmp_path: Path) -> Path:
    """A small network for grey digits, as a file that names its architecture."""
    network = ns.load("test_resnet", pretrained=False, num_classes=10, in_chans=1)
    return ns.save(network, tmp_path / "bn.safetensors")


@pytest.mark.long
def test_calibrate_and_reconstruct_are_done_and_reported(digits_network: Path, tmp_path: Path) -> None:
    output = tmp_path / "gn.safetensors"
    arguments = ["convert", str(digits_network), "--to", "gn", "-o", str(output), "--max-images", "64"]
    done = run(*arguments, "--calibrate", "digits", "--reconstruct", "digits", "--steps", "2", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert [event["event"] for event in document["history"]] == ["calibrate", "reconstruct"]
    assert document["history"][0]["images"] == 64
    assert document["history"][1]["images"] + document["history"][1]["held_out"] == 64
    assert origin_of(ns.load(output)).history[0]["event"] == "calibrate"
    result = run(*arguments, "--force", "--calibrate", "digits")
    assert "norms (" in result.stdout
    assert "on 64 images, 3 forward passes" in result.stdout


def test_data_that_is_not_there_is_one_line_and_no_file(digits_network: Path, tmp_path: Path) -> None:
    output = tmp_path / "gn.safetensors"
    done = run("convert", str(digits_network), "--to", "gn", "-o", str(output), "--calibrate", "nowhere")
    assert done.exit_code == 1
    assert "there is no folder nowhere" in done.stderr
    assert not output.exists()


def test_steps_without_reconstruct_are_refused(digits_network: Path) -> None:
    done = run("convert", str(digits_network), "--to", "gn", "--steps", "3")
    assert done.exit_code == 2
    assert "--steps 3 is of --reconstruct: add --reconstruct DATA, or leave it out" in done.stderr
