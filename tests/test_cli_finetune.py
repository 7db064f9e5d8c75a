"""The command line's finetune: what it prints, what it writes, and what it leaves with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from normsurgeon_cli.app import app
from normsurgeon_cli.finetune import Figures
from typer.testing import CliRunner

from normsurgeon._util.progress import Progress
from normsurgeon.finetuning.config import FinetuneConfig

BASE = ("finetune", "test_resnet", "--random-init", "--num-classes", "10", "--data", "digits", "--device", "cpu")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.long
def test_json_is_one_document_and_the_best_network_can_be_evaluated(run, tmp_path):
    done = run(*BASE, "--val", "digits", "--steps", "2", "-o", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) >= {"model", "before", "after", "best", "steps", "images", "seconds", "output", "history"}
    assert (document["model"], document["steps"], document["images"]) == ("test_resnet", 2, 128)
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == document["history"]
    scored = run("evaluate", document["output"], "--data", "digits", "--max-images", "10", "--json")
    assert json.loads(scored.stdout)["images"] == 10


@pytest.mark.long
def test_to_converts_first_and_the_original_teaches(run, tmp_path):
    done = run(
        "finetune", "test_resnet", "--random-init", "--to", "gn", "--data", "digits", "--ce", "0", "--steps", "2",
        "--device", "cpu", "--progressive", "0.5", "-o", tmp_path, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout)["history"]["steps"][0]
    assert row["blend"] == 0
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert "ce" not in row
    families = json.loads(run("inspect", tmp_path / "last.safetensors", "--json").stdout)["families"]
    assert families["BatchNorm"] == 0


def test_resume_goes_on_and_a_second_start_is_refused(run, tmp_path):
    assert run(*BASE, "--steps", "2", "-o", tmp_path).exit_code == 0
    again = run(*BASE, "--steps", "2", "-o", tmp_path)
    assert again.exit_code == 2
    assert "holds a run already (2 of 2 updates done); go on with resume=True (--resume)" in again.stderr
    assert "Traceback" not in again.stderr
    resumed = run(*BASE, "--steps", "2", "-o", tmp_path, "--resume")
    assert resumed.exit_code == 0
    assert "going on after update 2 of 2" in resumed.stderr
    changed = run(*BASE, "--steps", "2", "-o", tmp_path, "--resume", "--lr", "0.1", "--seed", "3")
    assert changed.exit_code == 2
    assert "was started with other settings: lr (5e-05 → 0.1), seed (0 → 3)" in changed.stderr


@pytest.mark.long
def test_without_a_folder_it_says_that_nothing_was_written(run):
    done = run(*BASE, "--val", "digits", "--steps", "1")
    assert done.exit_code == 0
    assert "top-1" in done.stdout
    assert "before" in done.stdout
    assert "nothing was written: -o DIR" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--opt", "adamx"), "timm has no optimizer 'adamx'; did you mean adamax?"),
        (("--lr", "-1"), "lr=-1.0 must be a number above 0"),
        (("--groups", "8"), "--groups belongs to --to, which is not there"),
        (("--to", "gnn"), "gnn"),
        (("--train", "nothing*"), "the pattern 'nothing*' matches no parameter"),
        (("--device", "abacus"), "there is no device 'abacus'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run, arguments, text):
    done = run(*BASE, "--steps", "1", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.system
def test_help_imports_no_torch():
    code = "from normsurgeon_cli.app import app; app(['finetune', '--help'], standalone_mode=False)"
    check = (
        "import sys; print([n for n in ('torch', 'timm', 'accelerate', 'numpy') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


def test_the_live_line_says_loss_accuracy_and_speed():
    figures = Figures()
    assert figures(Progress("validating", 0, 9, {"top1": 0.5, "loss": 1.0})) == "top-1 50.0 %"
    assert figures(Progress("fine-tuning", 1, 9, {"loss": 2.0, "images": 64})) == "loss 2.0000  top-1 50.0 %"
    shown = figures(Progress("fine-tuning", 2, 9, {"loss": 1.0, "images": 64}))
    assert shown.startswith("loss 1.9000  top-1 50.0 %  ")
    assert shown.endswith(" images/s")


def test_every_setting_is_an_option_with_its_default_and_description(run):
    shown = " ".join(run("finetune", "--help").stdout.replace("│", " ").split())
    for name, field in FinetuneConfig.model_fields.items():
        option = {"train_what": "train", "trackers": "tracker"}.get(name, name)
        assert f"--{option.replace('_', '-')}" in shown
        assert " ".join(field.description.split()[:3]) in shown


def test_a_flag_a_pair_and_a_repeated_option_reach_the_run(run):
    given = ("--no-augment", "--scale", "0.5", "--ratio", "0.9", "1.1", "--channels-last", "--train", "norms")
    done = run(*BASE, "--steps", "1", *given, "--json")
    assert done.exit_code == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert (settings["augment"], settings["scale"], settings["ratio"]) == (False, [0.5, 1.0], [0.9, 1.1])
    assert (settings["channels_last"], settings["train_what"], settings["trackers"]) == (True, "norms", [])


@pytest.mark.system
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normsurgeon_cli"),
        pytest.param(
            ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "normsurgeon_cli"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_under_a_launcher_the_first_process_prints_and_writes(tmp_path, launcher):
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *BASE, "--steps", "2", "-o", str(tmp_path / "run"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 128
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"state.pt", "last.safetensors", "history.json"}
