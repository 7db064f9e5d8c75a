"""Starting up: cheap where it can be, and one clear line where the installation cannot work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from normsurgeon._util.imports import explained_imports
from normsurgeon.errors import EnvironmentProblem

HEAVY = "('torch', 'torchvision', 'timm', 'numpy', 'PIL')"


@pytest.mark.system
@pytest.mark.parametrize(
    "code",
    [
        "import normsurgeon; dir(normsurgeon); normsurgeon.__version__",
        "from normsurgeon_cli.app import app; app(['--help'], standalone_mode=False)",
        "from normsurgeon_cli.app import app; app(['convert', '--help'], standalone_mode=False)",
    ],
    ids=["import", "--help", "convert --help"],
)
def test_starting_does_not_import_torch(code: str) -> None:
    check = f"import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
    ],
)
def test_torch_and_torchvision_of_different_builds_are_one_line_with_the_command_that_mends_it(error) -> None:
    line = (
        "torch and torchvision here come from different builds, and timm cannot be imported "
        f"({error}); try: pip install --force-reinstall torch torchvision timm"
    )
    with pytest.raises(EnvironmentProblem) as caught, explained_imports():
        raise error
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), ImportError("no libcudart"), AttributeError("x"), ValueError("y")]
)
def test_other_errors_of_an_import_pass_through(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as caught, explained_imports():
        raise error
    assert caught.value is error


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    import normsurgeon

    with pytest.raises(AttributeError, match="module 'normsurgeon' has no attribute 'transmogrify'"):
        _ = normsurgeon.transmogrify
