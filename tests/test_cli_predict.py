"""normsurgeon predict: what it prints, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import class_tree
from normsurgeon_cli.app import app
from typer.testing import CliRunner


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_table_has_a_row_a_class_and_every_row_names_its_image(run, photos):
    result = run("predict", "test_resnet", photos / "2.png", photos / "10.png", "--random-init", "--top", 3)
    assert result.exit_code == 0, result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["image", "class", "name", "probability"]
    assert [row.split()[0] for row in rows] == [str(photos / "2.png")] * 3 + [str(photos / "10.png")] * 3
    assert all(row.endswith(" %") for row in rows)
    assert result.stderr == ""


def test_json_is_one_document_with_the_contracts_keys(run, photos):
    (photos / "5.jpg").write_bytes(b"no image")
    result = run("predict", "test_resnet", photos, "--random-init", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document) >= {"model", "images", "skipped"}
    assert document["model"] == "test_resnet"
    assert [len(image["predictions"]) for image in document["images"]] == [5, 5, 5]
    reason = "cannot be read (not an image); try opening it in a viewer"
    assert document["skipped"] == [{"file": str(photos / "5.jpg"), "reason": reason}]


def test_what_was_skipped_is_counted_and_named_on_standard_error(run, photos):
    (photos / "5.jpg").write_bytes(b"no image")
    result = run("predict", "test_resnet", photos, "--random-init")
    assert result.exit_code == 0
    assert "5.jpg" not in result.stdout
    assert result.stderr.splitlines() == [
        "1 of 4 images skipped:",
        f"  {photos / '5.jpg'} cannot be read (not an image); try opening it in a viewer",
    ]


def test_nothing_readable_and_nothing_there_are_one_line_and_exit_1(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for given, text in (
        ("broken.jpg", "cannot be read (not an image); try opening it in a viewer"),
        ("nowhere.png", "; give image files, or folders of images"),
    ):
        result = run("predict", "test_resnet", tmp_path / given, "--random-init")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.endswith(text + "\n")
        assert result.stderr.count("\n") == 1
        assert str(tmp_path / given) in result.stderr


def test_a_missing_image_is_an_error_before_the_model_is_fetched(run, tmp_path):
    result = run("predict", "no_such_network", tmp_path / "nowhere.png")
    assert result.exit_code == 1
    assert "nowhere.png" in result.stderr
    assert "no_such_network" not in result.stderr


@pytest.mark.parametrize("arguments", [(), ("--top", 0), ("--batch-size", 0)], ids=["no image", "top", "batch size"])
def test_wrong_usage_is_exit_2(run, photos, arguments):
    images = (photos,) if arguments else ()
    assert run("predict", "test_resnet", *images, *arguments, "--random-init").exit_code == 2


def test_class_folders_that_are_not_needed_are_mentioned(run, photos, tmp_path):
    folder = class_tree(tmp_path, ["a", "b"])
    result = run("predict", "test_resnet", photos, "--classes", folder, "--random-init")
    assert result.exit_code == 0
    assert result.stderr == f"--classes {folder} was not needed: the network's classes are known by name\n"


def test_at_a_terminal_names_in_brackets_stay_and_only_an_images_first_row_names_it(run, photos, monkeypatch):
    (photos / "2.png").rename(photos / "[red]2.png")
    monkeypatch.chdir(photos)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    result = run("predict", "test_resnet", "[red]2.png", "--random-init", "--top", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("[red]2.png") == 1
    assert result.stdout.count(" %") == 3
    assert "\x1b[3" not in result.stdout  # no colour


@pytest.mark.skipif(find_spec("skimage") is None, reason="needs normsurgeon[demo]")
def test_a_real_network_knows_a_cat_and_a_cup_of_espresso(run):
    from normsurgeon.data.demo_images import photographs

    files = [file for file in photographs() if file.stem in ("chelsea", "coffee")]
    document = json.loads(run("predict", "demo", *files, "--top", 1, "--json").stdout)
    best = [image["predictions"][0]["name"] for image in document["images"]]
    assert best == ["tiger cat", "espresso"]


@pytest.mark.system
def test_its_help_does_not_import_torch():
    code = "import sys; from normsurgeon_cli.app import app; app(['predict', '--help'], standalone_mode=False)"
    check = "print([name for name in ('torch', 'timm', 'PIL') if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
