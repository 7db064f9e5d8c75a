"""The command line's study: what it prints, what it writes, and what it leaves with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from normsurgeon_cli.app import app
from typer.testing import CliRunner

from normsurgeon.study.grid import find_config, read_grid, shipped_configs

TINY = """\
name: tiny
models: resnet8
norms: [bn, gn, "gn:3"]
datasets: digits
batch_sizes: 32
seeds: 1
training: {epochs: 1, train_images: 64, test_images: 50, image_size: 8}
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_json_is_one_document_with_the_documented_table(run, config):
    done = run("study", config, "--jobs", "1", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["counts"] == {"done": 2, "diverged": 0, "failed": 0, "skipped": 1}
    row = document["table"][0]
    assert set(row) >= {"model", "dataset", "norm", "batch_size", "mean", "ci", "n"}
    assert 0 <= row["mean"] <= 1
    assert json.loads(Path("study-tiny/answer.json").read_text()) == document
    assert "</html>" in Path("study-tiny/report.html").read_text()
    assert Path("study-tiny/results.sqlite").is_file()


def test_the_answer_is_text_in_a_pipe_and_progress_goes_to_standard_error(run, config):
    done = run("study", config, "--jobs", "1", "--output", "out", "--html", "page.html")
    assert done.exit_code == 0, done.stderr
    assert "What this study shows" in done.stdout
    assert "\x1b" not in done.stdout
    assert "3/3  norm gn: " in done.stderr
    assert "1/3  norm gn:3: skipped: 3 groups do not divide the 16 channels of bn1" in done.stderr
    assert "wrote page.html" in done.stderr
    again = run("study", config, "--jobs", "1", "--output", "out", "--html", "page.html")
    assert "3 of 3 cells have their results in out already" in again.stderr
    assert again.stdout == done.stdout


def test_a_dry_run_prints_the_cells_and_the_time_and_writes_nothing(run, config, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = run("study", config, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "3 cells, 1 of them impossible; all: model resnet8, dataset digits" in done.stdout
    assert "3 groups do not divide the 16 channels of bn1" in done.stdout
    assert "about 1 minute in " in done.stdout
    listed = json.loads(run("study", config, "--dry-run", "--jobs", "1", "--json").stdout)
    assert [cell["norm"] for cell in listed["cells"]] == ["bn", "gn", "gn:3"]
    assert [cell["impossible"] is None for cell in listed["cells"]] == [True, True, False]
    assert (listed["jobs"], listed["seconds"] > 0) == (1, True)
    assert sorted(tmp_path.iterdir()) == before


def test_networks_that_cells_begin_from_have_lines_of_their_own_and_are_no_cells(run, tmp_path):
    config = tmp_path / "starts.yaml"
    config.write_text(TINY.replace(', "gn:3"', "") + "start: converted\npretraining: {epochs: 2}\n")
    dry = run("study", config, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "2 cells; all: " in dry.stdout
    done = run("study", config, "--jobs", "1", "--json")
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "norm " in line]
    assert lines[0].startswith("0/2  pretraining: norm bn: ")
    assert [line.split(": ")[0] for line in lines[1:]] == ["1/2  norm bn", "2/2  norm gn"]
    document = json.loads(done.stdout)
    assert document["counts"]["done"] == len(document["cells"]) == 2
    assert document["training"]["pretraining"]["epochs"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("nowhere.yaml",),
            2,
            "there is no file nowhere.yaml; give the YAML file of a study, or one of a",
        ),
        (("quik.yaml",), 2, "there is no file quik.yaml; did you mean quick?"),
        (("nothing.yaml",), 2, "there is no file nothing.yaml; give the YAML file of a study, or one of "),
        (
            ("hub.yaml",),
            1,
            "the published weights of the study's network resnet18 are out of reach; "
            "try a file of weights as the model, or start: scratch",
        ),
        (("tiny.yaml", "--engine", "spark"), 2, "there is no engine 'spark'; it is local or ray"),
        (("tiny.yaml", "--ray-address", "auto"), 2, "--ray-address goes with --engine ray"),
        (("tiny.yaml", "--html", "page.txt"), 2, "page.txt: the report is a page, and its name must end in .html"),
        (("bad.yaml",), 2, "bad.yaml, line 2: unknown norm 'gm'; did you mean gn?"),
        (
            ("missing.yaml",),
            1,
            "the study's data set nowhere cannot be used: there is no folder nowhere; a data set is a folder of class",
        ),
    ],
)
def test_bad_input_is_one_line(run, config, monkeypatch, arguments, code, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("hub.yaml").write_text("models: resnet18\nnorms: [bn, gn]\ndatasets: digits\nstart: converted\n")
    Path("missing.yaml").write_text(TINY.replace("digits", "nowhere"))
    Path("bad.yaml").write_text("models: resnet8\nnorms: [bn, gm]\ndatasets: digits\n")
    done = run("study", *arguments)
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_every_shipped_study_is_valid_and_found_by_its_name(run, tmp_path):
    for name in shipped_configs():
        assert read_grid(find_config(name)).name == Path(name).stem
        assert find_config(Path(name).stem) == find_config(name)
    (tmp_path / "quick.yaml").write_text(TINY)
    assert find_config("quick.yaml") == Path("quick.yaml")  # one's own file comes first


@pytest.mark.system
def test_validating_a_study_imports_no_torch(config):
    code = (
        "import sys; from normsurgeon.study.grid import find_config, read_grid; "
        f"read_grid(find_config({str(config)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_study_without_any_result_is_a_failure(run, config):
    config.write_text(TINY.replace('[bn, gn, "gn:3"]', '"gn:3"'))
    done = run("study", config, "--jobs", "1")
    assert done.exit_code == 1
    assert "error: no cell of tiny has a result; the reasons are above and in study-tiny/report.html" in done.stderr
