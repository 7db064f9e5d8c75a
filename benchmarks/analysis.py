"""What looking inside a network costs, as ratios to plain forward passes in the same process.

    python benchmarks/analysis.py [--repeats 7] [--batches 16] [--only statistics,cka,memory,stream]

statistics  all statistics of all default layers of ResNet-50 (batch 8, 224 pixels), closing included, over a plain
            forward pass; beside it six plain torch reductions of every leaf by naive hooks
memory      peak of the process (resident) during that, over the peak of plain forward passes
cka         CKA of the 20 convolutions of two ResNet-18s over one forward pass of one of them (two are the floor);
            then of all 60-odd modules of each; beside it torch-cka, where it is installed
stream      peak memory of a whole analysis (statistics and similarity) of 50 images and of 50,000: it must not grow

Passes alternate, and the median of each is taken: machines are noisy. OMP_WAIT_POLICY is PASSIVE unless it is set, as
in ``normsurgeon analyze`` (normsurgeon/inference/fused.py); OMP_WAIT_POLICY=ACTIVE shows what spinning threads cost.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normsurgeon as ns
from normsurgeon.analysis.capture import captured
from normsurgeon.analysis.layers import choose_layers
from normsurgeon.analysis.similarity import Kernels, SimilarityCollector
from normsurgeon.analysis.statistics import StatisticsCollector


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternating(repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
    """The median time of each, taken in turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(found) for name, found in times.items()}


def naive(model: nn.Module, images: torch.Tensor) -> list[list[float]]:
    """Six plain reductions of the output of every leaf."""
    found: list[list[float]] = []

    def hook(module: nn.Module, inputs: object, y: torch.Tensor) -> None:
        found.append([f(y).item() for f in (torch.mean, torch.std, torch.amin, torch.amax, torch.norm)])
        found[-1].append((y == 0).float().mean().item())

    handles = [m.register_forward_hook(hook) for m in model.modules() if not list(m.children())]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure_statistics(repeats: int, batches: int) -> None:
    model = timm.create_model("resnet50").eval()
    images = torch.randn(8, 3, 224, 224)
    layers = choose_layers(model)
    collector = StatisticsCollector(layers)

    def watched() -> None:
        collector.begin(8)
        with captured(layers, collector.on_output, collector.on_input):
            model(images)

    with torch.no_grad():
        plain, others, ours = [], [], []
        for step in range(batches + 1):
            times = seconds(lambda: model(images)), seconds(watched)
            if step:  # the first pays for compilation and allocation
                plain.append(times[0])
                ours.append(times[1])
            if 0 < step <= repeats:
                others.append(seconds(lambda: naive(model, images)))
        closing = seconds(collector.results)
    forward, with_all = statistics.median(plain), statistics.median(ours)
    print(f"ResNet-50, batch 8, {len(layers)} layers, {batches} batches, {torch.get_num_threads()} threads")
    print(f"  forward pass                      {forward:7.3f} s")
    print(f"  with all statistics               {with_all:7.3f} s   ratio {with_all / forward:.2f}")
    whole = (batches * with_all + closing) / (batches * forward)
    print(f"  closing (eigenvalues), once       {closing:7.3f} s   ratio with it {whole:.2f} (target 1.3)")
    print(f"  six naive reductions of leaves    {statistics.median(others):7.3f} s   "
          f"ratio {statistics.median(others) / forward:.2f}")  # fmt: skip


def peak_of(what: str, batches: int, queue: multiprocessing.Queue) -> None:
    """In a process of its own: the peak resident size in MiB."""
    model = timm.create_model("resnet50").eval()
    images = torch.randn(8, 3, 224, 224)
    layers = choose_layers(model)
    collector = StatisticsCollector(layers)
    with torch.no_grad():
        for _ in range(batches):
            if what == "plain":
                model(images)
                continue
            collector.begin(8)
            with captured(layers, collector.on_output, collector.on_input):
                model(images)
        if what != "plain":
            collector.results()
    queue.put(high_water())


def high_water() -> float:
    """The peak resident size of this process in MiB.

    Not ``ru_maxrss``: that begins at the size of the process that started this one.
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))


def in_a_process(function: Callable[..., None], *arguments: object) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def measure_memory() -> None:
    plain, watched = in_a_process(peak_of, "plain", 8), in_a_process(peak_of, "watched", 8)
    print(f"peak memory: forward {plain:.0f} MiB, with all statistics {watched:.0f} MiB, "
          f"ratio {watched / plain:.2f} (target 1.2)")  # fmt: skip


def peak_of_stream(images: int, queue: multiprocessing.Queue) -> None:
    """In a process of its own: the peak of a whole analysis of so many images."""
    model = timm.create_model("resnet18").eval()
    batches = (torch.randn(50, 3, 32, 32) for _ in range(images // 50))
    ns.analyze(model, batches, only=["statistics", "similarity"])
    queue.put(high_water())


def measure_stream() -> None:
    few, many = in_a_process(peak_of_stream, 50), in_a_process(peak_of_stream, 50_000)
    print(f"peak memory of ns.analyze, ResNet-18, 32 pixels: 50 images {few:.0f} MiB, 50,000 images {many:.0f} MiB, "
          f"ratio {many / few:.3f}")  # fmt: skip


def measure_cka(repeats: int) -> None:
    torch.manual_seed(0)
    model, other = (timm.create_model("resnet18").eval() for _ in range(2))
    images = torch.randn(16, 3, 224, 224)

    def compared(patterns: tuple[str, ...], kinds: tuple[str, ...]) -> Callable[[], object]:
        mine, theirs = choose_layers(model, patterns, kinds), choose_layers(other, patterns, kinds)
        first, second = Kernels(), Kernels()

        def run() -> object:
            similarity = SimilarityCollector()
            for network, layers, kernels in ((model, mine, first), (other, theirs, second)):
                kernels.begin(len(images))
                with captured(layers, kernels.on_output):
                    network(images)
            similarity.add(first, second)
            return similarity.matrices()

        return run

    functions: dict[str, Callable[[], object]] = {
        "forward": lambda: model(images),
        "20 convolutions": compared((), ("convolution",)),
        "all modules": compared(("*",), ()),
    }
    try:
        import torch_cka
    except ImportError:
        print("(torch-cka is not installed: no peer)")
    else:
        names = [layer.name for layer in choose_layers(model, kinds=["convolution"])]
        loader = DataLoader(TensorDataset(images, torch.zeros(16)), batch_size=16)

        def peer() -> None:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                warnings.simplefilter("ignore")
                judge = torch_cka.CKA(model, other, model1_layers=names, model2_layers=names)
                # Its float32 sums can give nan on networks without training, which it refuses once all is computed.
                with contextlib.suppress(AssertionError):
                    judge.compare(loader)
            for network in (model, other):
                for module in network.modules():
                    module._forward_hooks.clear()  # it leaves its own behind

        functions["torch-cka, 20 convolutions"] = peer
    with torch.no_grad():
        times = alternating(repeats, **functions)
    print("two ResNet-18s, batch 16; the floor is 2.00")
    for name, spent in times.items():
        print(f"  {name:34}{spent:7.3f} s   ratio {spent / times['forward']:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--only", default="statistics,memory,cka,stream")
    options = parser.parse_args()
    ns.load  # noqa: B018  the public door's imports are paid here
    for part in options.only.split(","):
        {
            "statistics": lambda: measure_statistics(options.repeats, options.batches),
            "memory": measure_memory,
            "cka": lambda: measure_cka(options.repeats),
            "stream": measure_stream,
        }[part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
