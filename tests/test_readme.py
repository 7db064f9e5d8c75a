"""The README's promises: its Python runs, its commands exist with those options, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from normsurgeon_cli.app import app

import normsurgeon as ns

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def fenced(language: str, text: str = README) -> list[str]:
    """The fenced blocks of that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of a shell block, its comment cut off."""
    lines = [line for block in fenced("sh") for line in block.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if shlex.split(line, comments=True)]


def of(program: str) -> list[str]:
    return [command for command in commands() if command.split()[0] == program]


@pytest.mark.system
@pytest.mark.skipif(find_spec("skimage") is None, reason="needs normsurgeon[demo]")
def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = fenced("python")
    assert blocks
    names: dict = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)


def test_the_two_commands_come_first_and_exist():
    first, second = of("make")[:2]
    assert (first, second) == ("make demo", "make test")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {command.split()[1] for command in of("make")} <= targets
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", of("normsurgeon"))
def test_a_command_line_is_one_that_the_program_takes(command):
    _, name, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    assert name in group.commands
    group.commands[name].make_context(name, arguments)  # raises on an unknown option or a missing argument


def test_every_command_of_the_program_is_shown():
    assert {command.split()[1] for command in of("normsurgeon")} == set(typer.main.get_command(app).commands)


def test_every_target_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == set(ns.TARGETS)


def test_what_is_not_built_yet_is_not_there():
    section = README.partition("## Not yet")[2].partition("\n## ")[0]
    promised = re.findall(r"`ns\.(\w+)`", section)
    assert not set(promised) & set(dir(ns)), "built meanwhile: it belongs in another section now"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_headings(page):
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_picture_needs_no_network():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert "docs/demo.svg" in pictures
    svg = (ROOT / "docs" / "demo.svg").read_text(encoding="utf-8")
    assert not re.search(r"@font-face|@import|<image|url\(\s*[\"']?http", svg)
