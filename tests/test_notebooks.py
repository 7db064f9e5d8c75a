"""The notebooks are documentation that runs: executed from top to bottom, committed small and with their output."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 600_000
SECONDS_A_CELL = 300

# A home, work or temporary directory of some machine, on any system; not the path of a web address.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|workspace|mnt|tmp|opt|usr|var)/[\w.]|\b[A-Z]:\\\\+\w")


class ThisInterpreter(KernelSpecManager):
    """Whatever kernels are registered on the machine, the one that runs is the interpreter of the tests."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def named(notebooks: list[Path]) -> list:
    return [pytest.param(path, id=path.stem) for path in notebooks]


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def complaints(outputs: list) -> list:
    """Errors, and anything on standard error: a warning has no place in a document."""
    return [o for o in outputs if o.output_type == "error" or (o.output_type == "stream" and o.name == "stderr")]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.system
@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    expected = [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    kernel = AsyncKernelManager(kernel_spec_manager=ThisInterpreter(), kernel_name="python3")
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=SECONDS_A_CELL, resources=resources)
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # with other tests running, more threads are slower
    assert complaints(outputs_of(notebook)) == []
    assert [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"] == expected
    assert list(tmp_path.iterdir()) == [], "a notebook leaves no files behind"


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_a_committed_notebook_holds_its_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in order, in one go"
    assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook))
    assert complaints(outputs_of(notebook)) == []


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_a_committed_notebook_is_small(path):
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("path", named(NOTEBOOKS))
def test_a_committed_notebook_says_nothing_of_the_machine_that_made_it(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells]
    for output in outputs_of(notebook):
        texts += [output.get("text", ""), *output.get("data", {}).values()]
    pictures_left_out = [text for text in texts if isinstance(text, str) and not re.fullmatch(r"[\w+/=\s]{999,}", text)]
    assert [found for text in pictures_left_out for found in MACHINE_PATH.findall(text)] == []
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("text", ["/home/ann/x.py", "File /" + "work/a.py", "(/root/.cache", r"C:\\Users\\ann"])
def test_a_path_of_a_machine_is_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/x", "W/s", "data/usr/x", "a /work b"])
def test_other_text_is_not_taken_for_a_path(text):
    assert not MACHINE_PATH.search(text)
