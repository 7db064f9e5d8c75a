"""The command line on good and on bad input: one JSON document or one clear line, and the right exit code."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from normsurgeon_cli import app as application
from normsurgeon_cli import boundary, console
from normsurgeon_cli.console import program
from rich.console import Console
from typer.testing import CliRunner, Result

import normsurgeon as ns
from normsurgeon.render.document import Column, Table

ANSI = re.compile(r"\x1b\[")


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(application.app, [str(a) for a in arguments], env=environment)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    result = run("convert", "test_resnet", "--random-init", "--to", "gn", "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


# Good input


def test_convert_writes_a_file_that_inspect_and_load_read(converted: Path) -> None:
    assert ns.inspect(ns.load(converted)).summary() == "0 BatchNorm, 15 GroupNorm"
    result = run("inspect", converted)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (
        0,
        f"{converted}: 0 BatchNorm, 15 GroupNorm",
    )


def test_inspect_json_is_one_document_of_the_contract() -> None:
    result = run("inspect", "test_resnet", "--json")
    document = json.loads(result.stdout)
    assert {"model", "traced_by", "sites", "counts"} <= document.keys()
    assert document["counts"] == {"BatchNorm2d": 15}
    assert {"name", "class", "channels", "producer", "foldable"} <= document["sites"][0].keys()


def test_convert_json_is_one_document_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    result = run("convert", "test_resnet", "--random-init", "--to", "gn", "--keep", "bn1", "-o", path, "--json")
    document = json.loads(result.stdout)
    assert (document["model"], document["target"], document["output"]) == ("test_resnet", "gn", str(path))
    assert document["counts"] == {"converted": 14, "kept": 1, "refused": 0}
    for site in document["sites"]:
        assert {"name", "status", "from", "to", "groups", "whitening", "reason"} <= site.keys()


def test_a_dry_run_writes_nothing_and_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail("the network was asked"))
    result = run("convert", "test_resnet", "--to", "ln", "--dry-run", "-o", tmp_path / "net.pt")
    assert result.exit_code == 0
    assert "test_resnet → ln: 15 converted, 0 kept, 0 refused" in result.stdout
    assert "dry run: nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_goes_together_with_weights(converted: Path) -> None:
    result = run("convert", "test_resnet", "--weights", converted, "--to", "ln", "--dry-run")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: test_resnet has no BatchNorm layer: there is nothing to convert\n",
    )


# Bad input


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("resnet5o", "--to", "gn"), 1, r"unknown timm model 'resnet5o'; did you mean resnet"),
        (("test_resnet", "--to", "xx"), 2, r"unknown target norm 'xx'; choose one of: gn, ln, ln2d, in, rms"),
        (("test_resnet", "--to", "gn", "--groups", "7"), 2, r"7 groups do not divide the 16"),
        (("test_resnet", "--to", "gn", "--groups", "x"), 2, r"--groups takes a number or auto, not 'x'"),
        (("test_vit", "--to", "gn"), 1, r"test_vit has no BatchNorm layer: there is nothing to convert"),
        (("test_resnet", "--to", "gn", "--keep", "stem*"), 2, r"'stem\*' matches no norm layer; there"),
        (("test_resnet", "--to", "gn", "--set", "foo"), 2, r"--set takes GLOB=TARGET, as in --set 'layer4"),
        (("test_resnet", "--to", "gn", "--set", "bn1=xx"), 2, r"unknown target norm 'xx'"),
        (("test_resnet", "--to", "gn", "--weights", "a.pt"), 2, r"--weights and --random-init exclude"),
        (("no/such.pt", "--to", "gn"), 1, r"there is no file no/such.pt"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_writes_nothing(tmp_path, arguments, code: int, line: str) -> None:
    result = run("convert", *arguments, "--random-init", "-o", tmp_path / "net.pt")
    assert result.exit_code == code
    assert result.stdout == ""
    assert re.match(f"error: .*{line}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "code", "line"),
    [
        ("net.bin", 2, "net.bin: the ending says the format, and must be .safetensors, .pt or .pth\n"),
        ("nowhere/net.pt", 1, "nowhere/net.pt: there is no folder nowhere\n"),
        ("folder.pt", 1, "folder.pt: it is a folder\n"),
    ],
)
def test_an_output_that_cannot_be_written_is_an_error_before_any_work(
    tmp_path, monkeypatch, output, code, line
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt").mkdir()
    result = run("convert", "test_resnet", "--to", "gn", "-o", output)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.endswith(line)


def test_an_unforeseen_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns, "inspect", lambda *a, **k: 1 / 0)
    result = run("inspect", "test_resnet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: division by zero; --debug shows where (please report it)\n"
    )


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(boundary._state, "debug", False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["normsurgeon", "inspect", "--debug", "resnet5o"])
    with pytest.raises(ns.NormSurgeonError, match="unknown timm model 'resnet5o'"):
        application.main()


# The terminal


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_a_pipe_gets_no_colours(environment: dict[str, str]) -> None:
    for arguments in (("inspect", "test_resnet"), ("inspect", "resnet5o")):
        result = run(*arguments, **environment)
        assert not ANSI.search(result.output)


def test_a_narrow_terminal_loses_nothing() -> None:
    result = run("inspect", "test_resnet", COLUMNS="40")
    assert result.exit_code == 0
    assert "layer3.0.downsample.2" in result.stdout


@pytest.mark.parametrize(("width", "whole"), [(44, True), (200, True), (80, False)])
def test_at_a_terminal_names_stay_whole_or_are_folded_in_columns_of_eight_characters(monkeypatch, width, whole) -> None:
    file = io.StringIO()
    monkeypatch.setattr(console, "out", lambda: Console(file=file, force_terminal=True, width=width, color_system=None))
    titles = ("layer", "class", "channels", "input", "producer", "foldable", "why not")
    row = (
        "layer3.0.downsample.2",
        "BatchNorm2d",
        48,
        "48×20×20",
        "layer3.0.conv2",
        "no",
        "its input has another reader",
    )
    console.print_table(Table(tuple(map(Column, titles)), (row,)))
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert all(str(value) in shown for value in row[:6]) == whole
    assert "BatchNor" in shown


@pytest.mark.system
def test_a_pipe_whose_reader_has_gone_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "normsurgeon_cli", "inspect", "test_resnet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert [line for line in process.stderr.read().splitlines() if not line.endswith(" so far)")] == []
    assert process.wait() == 0


@pytest.mark.system
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"what stood there")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "normsurgeon_cli",
            "convert",
            "test_resnet",
            "--random-init",
            "--to",
            "gn",
            "--force",
            "-o",
            path,
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: cannot write {path}: File too large; nothing was written"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what stood there"


@pytest.mark.parametrize(("on_path", "called"), [(True, "normsurgeon"), (False, "bin/normsurgeon")])
def test_what_to_type_next_is_something_that_the_shell_finds(on_path, called, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "normsurgeon").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin") if on_path else str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(tmp_path / "bin" / "normsurgeon"), "demo"])
    assert program() == called


def test_inspect_takes_random_init_which_is_what_it_does_anyway():
    assert run("inspect", "test_resnet", "--random-init").stdout == run("inspect", "test_resnet").stdout
