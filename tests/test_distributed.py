"""Two processes that share the images come to the answer of one: evaluate, calibrate, analyze, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from normsurgeon_cli.boundary import guarded
from PIL import Image
from torch import Tensor, nn

import normsurgeon as ns
from normsurgeon._util.progress import Progress
from normsurgeon.data.sources import ImageSource
from normsurgeon.distributed import Shard, alone, gather, own_device, own_shard, together
from normsurgeon.errors import DataError, ProcessError
from normsurgeon.inference import fused
from tests.conftest import ConvNet, randomise_

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def networks() -> tuple[nn.Module, nn.Module]:
    """A network with running statistics of its own, and another to compare it with; the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tuple(randomise_(timm.create_model("test_resnet", num_classes=10)).eval() for _ in range(2))


def batches(*sizes: int, labels: bool = True) -> list[tuple[Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (size,), generator=generator) if labels else None,
        )
        for size in sizes
    ]


class Flow:
    """A reader of images that come one after the other and have no numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for number in range(self.count):
            yield Image.new("RGB", (32, 32), (number * 20, 90, 120)), number % 10


def evaluations() -> dict[str, Any]:
    model, baseline = networks()
    return {
        "uneven batches": ns.evaluate(model, batches(5, 1, 7), baseline=baseline),
        "fewer than processes": ns.evaluate(model, batches(1)),
        "digits": ns.evaluate(model, "digits", batch_size=8, max_images=37),
        "one image": ns.evaluate(model, "digits", max_images=1),
        "a stream": ns.evaluate(model, ImageSource("flow", Flow(11), labelled=True), batch_size=3),
        "some of a stream": ns.evaluate(model, ImageSource("flow", Flow(11), True), batch_size=3, max_images=8),
        "limited batches": ns.evaluate(model, batches(5, 6, 7, labels=False), baseline=baseline, max_images=9),
    }


def calibrations() -> dict[str, Any]:
    found = {}
    for name, data, options in (
        ("uneven batches", [smooth(41), smooth(7, seed=2)], {}),
        ("one batch", [smooth(40)], {"matched_images": 11}),
        ("one image", [smooth(1)], {}),
        ("digits", "digits", {"batch_size": 8, "max_images": 45}),
    ):
        result = ns.convert(networks()[0], to="gn")
        done = ns.calibrate_(result, data, **options).history[-1]
        found[name] = {**done.to_dict(), "weights": result.model.state_dict()}
    result = ns.convert(randomise_(seeded(ConvNet)).eval(), to="gn")  # more images than the means of which are kept
    done = ns.calibrate_(
        result, [smooth(700, side=6), smooth(401, seed=2, side=6)], max_images=1100, matched_images=9
    ).history[-1]
    found["thinned"] = {**done.to_dict(), "weights": result.model.state_dict()}
    return found


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def smooth(count: int, seed: int = 1, side: int = 32) -> Tensor:
    """Images that differ in brightness and contrast, as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    x = nn.functional.avg_pool2d(torch.randn(count, 3, side + 4, side + 4, generator=generator), 5, 1)
    return x * (1 + 3 * torch.rand(count, 1, 1, 1, generator=generator)) + torch.randn(
        count, 3, 1, 1, generator=generator
    )


def reports() -> dict[str, Any]:
    model, baseline = networks()
    found = {
        "uneven batches": ns.analyze(
            model, batches(6, 5, 7, 4, 1), only=["statistics", "similarity"], baseline=baseline
        ),
        "digits": ns.analyze(model, "digits", only=["statistics"], kinds=["block"], batch_size=4, max_images=9),
        "one image": ns.analyze(model, batches(1), only=["statistics"], kinds=["norm"]),
        "sensitivity": ns.analyze(
            model, batches(4, 3, 5), layers=["layer1.*"], methods=["taylor"], sensitivity_images=9
        ),
        "sensitivity alone": ns.analyze(
            model, batches(4, 3, 5), only=["sensitivity"], methods=["taylor"], sensitivity_images=9
        ),
    }
    return {name: report.to_dict() for name, report in found.items()}


class Torn:
    """A reader of images of which all but some are torn."""

    def __init__(self, count: int, whole: tuple[int, ...]) -> None:
        self.count, self.whole = count, whole

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        if number not in self.whole:
            raise DataError(f"torn[{number}] cannot be read")
        return Image.new("RGB", (32, 32), (number * 20, 90, 120)), number % 10


def torn(count: int, *whole: int) -> ImageSource:
    return ImageSource("torn", Torn(count, whole), labelled=True)


def skipping() -> dict[str, Any]:
    model, _ = networks()
    one_rank_reads_nothing = ns.evaluate(model, torn(8, 0, 1, 5), batch_size=2)
    report = ns.analyze(model, torn(8, 0, 5, 7), only=["statistics"], kinds=["norm"], batch_size=2)
    return {"evaluation": one_rank_reads_nothing, "layers": [vars(layer) for layer in report.statistics]}


def failures() -> dict[str, str]:
    """What each of several mistakes is answered with; those of one process only are in the second one's images."""
    model, _ = networks()
    wrong_label, second_only = batches(1), batches(2)
    wrong_label[0][1][0] = 99
    second_only[0][1][1] = 99
    converted = ns.convert(model, to="gn")
    before = {key: value.clone() for key, value in converted.model.state_dict().items()}

    def stumble(progress: Progress) -> None:
        if progress.stage == "matching" and progress.done == 20 and own_shard().rank == own_shard().world - 1:
            raise RuntimeError("out of memory\nhere")

    found = {}
    for name, job in (
        ("no image", lambda: ns.evaluate(model, [])),
        ("nothing readable", lambda: ns.evaluate(model, torn(8), batch_size=2)),
        ("a wrong label", lambda: ns.evaluate(model, wrong_label)),
        ("a wrong label in the second process", lambda: ns.evaluate(model, second_only)),
        ("labels in one batch only", lambda: ns.evaluate(model, [*batches(2), *batches(2, labels=False)])),
        ("nothing to analyze", lambda: ns.analyze(model, [torch.full((3, 3, 32, 32), torch.nan)], only=["statistics"])),
        ("nothing to calibrate on", lambda: ns.calibrate_(converted, torn(8))),
        ("an error between two norms", lambda: ns.calibrate_(converted, [smooth(40)], on_progress=stumble)),
    ):
        try:
            job()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    found["weights"] = str(all(torch.equal(value, before[key]) for key, value in converted.model.state_dict().items()))
    return found


JOBS: dict[str, Callable[[], Any]] = {
    "evaluations": evaluations,
    "calibrations": calibrations,
    "reports": reports,
    "skipping": skipping,
    "failures": failures,
}


def run_jobs(folder: Path) -> None:
    found = {name: job() for name, job in JOBS.items()}
    torch.save(found, folder / f"{own_shard().rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, *LAUNCHER, __file__, str(folder)],
        env={
            **os.environ,
            "NORMSURGEON_NUMBA": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
    """As in each of the two processes: another number of threads rounds differently, and compiled sums are float32."""
    monkeypatch.setattr(fused, "available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def near(two: float | None, one: float | None, relative: float) -> bool:
    return two is one is None or two == pytest.approx(one, rel=relative)


@pytest.mark.system
def test_two_processes_score_what_one_scores(both):
    for name, one in evaluations().items():
        for found in both:
            two = found["evaluations"][name]
            for exact in ("images", "top1", "top5", "agreement", "nonfinite", "skipped", "top1_stderr"):
                assert getattr(two, exact) == getattr(one, exact), (name, exact)
            for mean in ("loss", "kl"):
                assert near(getattr(two, mean), getattr(one, mean), 1e-6), (name, mean)


@pytest.mark.system
def test_two_processes_calibrate_to_the_weights_of_one(both):
    for name, one in calibrations().items():
        first, second = (found["calibrations"][name] for found in both)
        for count in ("images", "matched_images", "sites", "balanced", "forward_passes", "worst_site"):
            assert first[count] == second[count] == one[count], (name, count)
        assert near(first["worst_error"], one["worst_error"], 1e-4), name
        for key, value in one["weights"].items():
            # Between the processes nothing differs. From one process, float32 convolutions of other batches do, and the
            # error is handed on from norm to norm: 4e-6 of the largest weight after 15 of them.
            assert torch.equal(first["weights"][key], second["weights"][key]), (name, key)
            scale = value.abs().max().clamp_min(1)
            assert (first["weights"][key] - value).abs().max() <= 2e-5 * scale, (name, key)


@pytest.mark.system
def test_two_processes_see_in_the_layers_what_one_sees(both):
    for name, one in reports().items():
        first, second = (found["reports"][name] for found in both)
        assert first == second, name
        for key in ("created", "seconds"):
            one["provenance"][key] = first["provenance"][key]
        differences = list(compared(first, one, name))
        assert not differences, differences[:20]


def compared(two: Any, one: Any, place: str) -> Iterator[str]:
    """Where two documents differ: in more than the rounding of sums in another order."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from compared(two[key], one[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        for number, parts in enumerate(zip(two, one, strict=True)):
            yield from compared(*parts, f"{place}[{number}]")
    elif isinstance(one, float) and isinstance(two, float):
        if two != pytest.approx(one, rel=1e-9, abs=1e-12):
            yield f"{place}: {two} and {one}"
    elif two != one:
        yield f"{place}: {two} and {one}"


@pytest.mark.system
def test_images_that_cannot_be_read_are_skipped_alike(both):
    one = skipping()
    for found in both:
        two = found["skipping"]
        assert (two["evaluation"].images, two["evaluation"].skipped) == (3, 5)
        assert sorted(two["evaluation"].skipped_files) == sorted(one["evaluation"].skipped_files)
        assert two["evaluation"].top1 == one["evaluation"].top1
        assert not list(compared(two["layers"], one["layers"], "layers"))


@pytest.mark.system
def test_an_error_in_one_process_is_raised_in_all_of_them(both):
    one, (first, second) = failures(), (found["failures"] for found in both)
    for name in ("no image", "a wrong label", "labels in one batch only", "nothing to analyze"):
        assert first[name] == second[name] == one[name], name
    for name in ("nothing readable", "nothing to calibrate on"):
        assert first[name] == second[name], name
        assert first[name].startswith("DataError: none of the 8 images of torn can be read; the last one: torn["), name
    label = "a wrong label in the second process"
    assert first[label] == second[label]
    assert first[label].startswith("DataError: there is a label 99, and the network's 10 classes are 0 to 9; ")
    stumble = "RuntimeError: out of memory here"
    assert first["an error between two norms"] == f"ProcessError: process 1 of 2 failed: {stumble}"
    assert second["an error between two norms"] == stumble
    assert first["weights"] == second["weights"] == "True"


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert own_shard() == Shard(0, 1)
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over from something else: nobody to talk to
    assert own_shard() == Shard(0, 1)
    with together():
        assert gather("mine") == ["mine"]


def test_a_launcher_says_which_share_and_which_gpu_are_a_processs_own(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert own_shard() == Shard(5, 8)
    assert (own_device("cuda"), own_device("cuda:0"), own_device("cpu"), own_device(None)) == (
        "cuda:1",
        "cuda:0",
        "cpu",
        None,
    )
    with alone():
        assert own_shard() == Shard(0, 1)
        assert own_device("cuda") == "cuda"
        assert gather("mine") == ["mine"]


def test_a_process_that_is_gone_is_an_error(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)

    def gone() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("normsurgeon.distributed._group", gone)
    with (
        pytest.raises(
            ProcessError,
            match=r"^the processes cannot reach one another \(Connection closed by peer\); if one has ended",
        ),
        together(),
    ):
        gather("mine")


@pytest.mark.system
def test_at_the_command_line_the_first_process_speaks(tmp_path):
    path = tmp_path / "net.safetensors"
    ns.save(networks()[0], path)
    arguments = ["-m", "normsurgeon_cli", "evaluate", str(path), "--data", "digits", "--max-images", "37", "--json"]
    one, two = (
        subprocess.run(
            [sys.executable, *launcher, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        for launcher in ((), LAUNCHER)
    )
    assert two.returncode == 0, two.stderr
    expected, found = (json.loads(done.stdout) for done in (one, two))
    for key in ("images", "skipped", "top1", "top5"):
        assert found[key] == expected[key], key
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_at_the_command_line_an_error_of_all_is_printed_by_the_first(monkeypatch, capsys):
    def failing() -> None:
        error = DataError("there is no image")
        error._shared = shared
        raise error

    for rank, shared, printed in (("0", True, True), ("1", True, False), ("1", False, True)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
            monkeypatch.setenv(name, value)
        with pytest.raises(typer.Exit):
            guarded(failing)()
        assert ("there is no image" in capsys.readouterr().err) is printed, (rank, shared)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_jobs(Path(sys.argv[1]))
