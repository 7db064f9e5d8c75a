"""normsurgeon compare, convert --budget and analyze --only swap, at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise_
from normsurgeon_cli.app import app
from typer.testing import CliRunner

import normsurgeon as ns


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=10, in_chans=1)).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 32, 32), "crop_pct": 1.0}
    return ns.save(model, tmp_path_factory.mktemp("network") / "net.safetensors")


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.long
def test_compare_is_one_json_document_and_a_page(network: Path, tmp_path: Path) -> None:
    page = tmp_path / "norms.html"
    options = ("--data", "digits", "--labels", "none", "--max-images", 64, "--to", "ln,gn", "--groups", "auto,2")
    found = json.loads(run("compare", network, *options, "--html", page, "--json").stdout)
    assert {each["target"] for each in found["conversions"]} == {"ln", "gn", "gn:2"}
    assert found["images"] == 64
    assert found["recommendation"].startswith(f"take {found['conversions'][0]['target']}")
    assert "Norms for" in page.read_text()


def test_compare_says_what_to_do_next(network: Path) -> None:
    result = run("compare", network, "--to", "ln", "--input-shape", "2,1,32,32")
    assert "function" in result.stdout
    assert "convert" in result.stderr
    assert "--to ln -o FILE.safetensors" in result.stderr


@pytest.mark.long
def test_a_budget_is_kept_and_the_plan_travels_with_the_file(network: Path, tmp_path: Path) -> None:
    output = tmp_path / "net-gn.safetensors"
    options = ("--to", "gn", "--budget", "kl=0.05", "--data", "digits", "--max-images", 96, "-o", output)
    found = json.loads(run("convert", network, *options, "--json").stdout)
    targets = [site["to"] for site in found["sites"]]
    assert 0 < targets.count("gn") < len(targets)
    assert found["trade_off"]["sites"] == len(targets)
    assert found["verdict"]["synthetic"] is False
    again = json.loads(run("inspect", output, "--json").stdout)
    assert again["counts"].get("GroupNorm", 0) == targets.count("gn")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--budget", "1%"), "--budget 1% has to be kept on images: add --data DATA"),
        (("--data", "digits"), "--data and --among are of --budget: add --budget 1%, or leave them out"),
        (("--budget", "1%", "--data", "digits", "--dry-run"), "leave out --dry-run and --no-balance"),
        (("--budget", "much", "--data", "digits"), "a budget is a share of top-1 as in 1%, or kl=0.05"),
        (("--budget", "kl=1", "--data", "digits", "--among", "bn"), "bn"),
        (("--budget", "kl=1", "--data", "digits", "--max-images", "1"), "are too few"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(network: Path, options: tuple[str, ...], line: str) -> None:
    result = CliRunner().invoke(app, ["convert", str(network), "--to", "gn", *options])
    assert result.exit_code in (1, 2)
    assert line in result.stderr.replace("\n", " ")
    assert result.stderr.strip().count("\n") == 0


def test_swap_is_a_part_of_an_analysis(network: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "swap.html", tmp_path / "swap.json"
    run(
        "analyze", network, "--data", "digits", "--labels", "none", "--max-images", 16, "--only", "swap",
        "--swap-to", "ln", "--html", page, "--json", data,
    )  # fmt: skip
    swap = json.loads(data.read_text())["swap"]
    assert len(swap["sites"]) == 15
    assert set(swap["rank_correlation"]) == {"elements", "norm_error", "taylor"}
    assert "Swap sensitivity" in page.read_text()
