"""MODEL and its options, what may be written over, and the help: for every command alike."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import timm
import torch
import typer
from normsurgeon_cli import app as application
from normsurgeon_cli import network, options
from typer.testing import CliRunner, Result

import normsurgeon as ns
from normsurgeon.errors import UsageError, WriteError

GROUP = typer.main.get_command(application.app)
COMMANDS = sorted(GROUP.commands)
OF_A_MODEL = ("analyze", "convert", "evaluate", "finetune", "inspect", "predict")
NETWORK_OPTIONS = ("--weights", "--weights-prefix", "--num-classes", "--in-chans", "--model-args")


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(application.app, [str(a) for a in arguments], env=environment)


def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns, "load", lambda *a, **k: pytest.fail("a network was loaded"))


# MODEL


@pytest.mark.parametrize("command", OF_A_MODEL)
def test_every_command_that_takes_a_model_says_how_it_is_made(command: str) -> None:
    known = {name for parameter in GROUP.commands[command].params for name in parameter.opts}
    assert known.issuperset(NETWORK_OPTIONS)


def test_classes_channels_and_arguments_go_to_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def load(model: str, **arguments: object) -> torch.nn.Module:
        seen.update(arguments, model=model)
        return timm.create_model("test_resnet")

    monkeypatch.setattr(ns, "load", load)
    arguments = ("--num-classes", "7", "--in-chans", "1", "--model-args", "drop_rate=0.1", "--model-args", "x=silu")
    assert run("inspect", "test_resnet", *arguments, "--weights-prefix", "net").exit_code == 0
    given = {key: seen[key] for key in ("model", "num_classes", "in_chans", "drop_rate", "x", "weights_prefix")}
    assert given == {
        "model": "test_resnet",
        "num_classes": 7,
        "in_chans": 1,
        "drop_rate": 0.1,
        "x": "silu",
        "weights_prefix": "net",
    }


def test_a_network_of_ones_own_is_converted_with_its_own_weights_and_loads_again(tmp_path, monkeypatch) -> None:
    """The classes come from the weights, the width from the command line, and the file holds both."""
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def build(num_classes=4, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_nets

    torch.save({"net": own_nets.build(6, 16).state_dict(), "epoch": 3}, tmp_path / "w.pt")
    output = tmp_path / "gn.safetensors"
    how = ("own_nets:build", "--model-args", "width=16")
    shape = ("--input-shape", "2,3,32,32", "--no-balance")
    done = run("convert", *how, "--weights", tmp_path / "w.pt", "--to", "gn", *shape, "-o", output)
    assert done.exit_code == 0, done.stderr
    shown = run("inspect", *how, "--num-classes", "6", "--weights", output, *shape[:2])
    assert shown.stdout.splitlines()[-1] == "own_nets:build: 0 BatchNorm, 1 GroupNorm"


def test_of_several_networks_in_a_file_one_is_chosen(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    torch.save({"student": state, "teacher": {k: v * 2 for k, v in state.items()}}, tmp_path / "w.pt")
    asked = run("inspect", "test_resnet", "--weights", tmp_path / "w.pt")
    assert asked.exit_code == 1
    assert "holds 2 networks that fit: student, teacher; say which: --weights-prefix student" in asked.stderr
    chosen = run("inspect", "test_resnet", "--weights", tmp_path / "w.pt", "--weights-prefix", "teacher")
    assert chosen.exit_code == 0
    assert "took the tensors of teacher; left out student" in chosen.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", 0.1),
        ("8", 8),
        ("true", True),
        ("False", False),
        ("none", None),
        ("(1, 2)", (1, 2)),
        ("silu", "silu"),
        ("a=b", "a=b"),
        ("", ""),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_the_value_of_an_argument_is_read_as_python_writes_it(text: str, value: object) -> None:
    assert network._arguments([f"key={text}"]) == {"key": value}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--model-args", "drop_rate"),
            "--model-args takes KEY=VALUE, as in --model-args drop_rate=0.1, not 'drop_rate'",
        ),
        (("--model-args", "a=1", "--model-args", "a=2"), r"--model-args a is given twice: leave one out"),
        (
            ("--model-args", "in_chans=1", "--in-chans", "1"),
            "in_chans is given twice: leave out --model-args in_chans=1",
        ),
        (("--weights-prefix", "net"), r"weights_prefix='net' is of a file of weights, and none is given"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = run("inspect", "test_resnet", *arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


# What may be written over


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (("convert", "test_resnet", "--to", "gn"), "-o", "net.pt"),
        (("analyze", "test_resnet"), "--html", "report.html"),
        (("analyze", "test_resnet"), "--csv", "layers.csv"),
        (("analyze", "test_resnet"), "--json", "report.json"),
        (("demo",), "-o", "net.pt"),
        (("study", "quick.yaml", "-o", "results"), "--html", "report.html"),
    ],
)
def test_a_file_that_is_there_is_not_replaced_without_force(tmp_path, monkeypatch, command, option, name) -> None:
    nothing_is_loaded(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("what stood there")
    done = run(*command, option, name)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: {name} is there already: give another name, or --force to replace it\n"
    assert Path(name).read_text() == "what stood there"


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("role", ["MODEL", "--weights"])
def test_an_output_that_is_an_input_is_refused_even_by_another_path(tmp_path, monkeypatch, role, force) -> None:
    nothing_is_loaded(monkeypatch)
    (tmp_path / "net.pt").write_text("weights")
    (tmp_path / "link.pt").symlink_to(tmp_path / "net.pt")
    model = (tmp_path / "net.pt",) if role == "MODEL" else ("test_resnet", "--weights", tmp_path / "net.pt")
    done = run("convert", *model, "--to", "gn", "-o", tmp_path / "link.pt", *force)
    assert done.exit_code == 2
    assert done.stderr == (
        f"error: {tmp_path / 'link.pt'} is what this command reads: give another name to what it writes\n"
    )
    assert (tmp_path / "net.pt").read_text() == "weights"


def test_force_replaces_a_file_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    options.check_output(tmp_path / "net.pt", force=True)
    options.check_output(tmp_path / "other.pt", force=False)
    with pytest.raises(UsageError, match=r"net.pt is there already: give another name, or --force to replace it$"):
        options.check_output(tmp_path / "net.pt", force=False)
    (tmp_path / "link.pt").symlink_to(tmp_path / "a disk that is away" / "net.pt")
    with pytest.raises(UsageError, match=r"link.pt is there already: give another name, or --force to replace it$"):
        options.check_output(tmp_path / "link.pt", force=False, inputs=[tmp_path / "net.pt"])
    with pytest.raises(WriteError, match=r"it is a folder$"):
        options.check_output(tmp_path / "folder.pt", force=True)


def test_a_network_in_a_folder_without_a_run_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_loaded(monkeypatch)
    (tmp_path / "best.safetensors").touch()
    done = run("finetune", "test_resnet", "--data", "digits", "-o", tmp_path)
    assert done.exit_code == 2
    assert "best.safetensors is there already: give another name, or --force to replace it" in done.stderr


@pytest.mark.parametrize("option", ["--calibrate", "--reconstruct"])
def test_work_that_would_be_lost_is_not_begun(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    nothing_is_loaded(monkeypatch)
    done = run("convert", "test_resnet", "--to", "gn", option, "digits")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: {option} digits would be lost: add -o FILE, or --dry-run to see the plan alone\n"


# Help


def shown(*arguments: str, columns: int = 80) -> str:
    done = run(*arguments, COLUMNS=str(columns), TERM="dumb", NO_COLOR="1")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("columns", [80, 60, 40])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_eighty_columns_and_has_every_word_whole_in_fewer_too(command: str, columns: int) -> None:
    text = shown(command, "-h", columns=columns)
    assert text == shown(command, "--help", columns=columns)
    assert max(map(len, text.splitlines())) <= 80
    words = set(text.replace("│", " ").split())
    words |= {word.strip(",;") for word in words}
    for parameter in GROUP.commands[command].params:
        if not getattr(parameter, "hidden", False):
            assert words.issuperset(name for name in parameter.opts if name.startswith("--")), parameter.opts
            said = (parameter.help or "").split()
            assert words.issuperset(said) or "".join(said) in "".join(text.split()), (
                parameter.opts
            )  # broken at a hyphen
    assert words.issuperset(("--debug", "-h"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_two_examples_that_the_command_understands(command: str) -> None:
    module = next(module for module in application.COMMANDS if module.__name__.endswith(f".{command}"))
    assert len(module.EXAMPLES) == 2
    text = " ".join(shown(command, "-h").split())
    for example in module.EXAMPLES:
        assert example in text
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("normsurgeon", command)
        with GROUP.commands[command].make_context(command, arguments) as context:
            assert not context.args


def test_the_help_of_the_program_shows_two_examples_too() -> None:
    text = " ".join(shown("-h").split())
    assert len(application.EXAMPLES) == 2
    assert all(example in text for example in application.EXAMPLES)
    assert "--debug" in text
