"""What looking inside a network costs, as ratios to plain forward passes in the same process.

    python benchmarks/analysis.py [--repeats 7] [--batches 16] [--only statistics,cka,memory,stream]

statistics  all statistics of all default layers of ResNet-50 (batch 8, 224 pixels), closing included, over a plain
            forward pass; next to it six plain torch reductions of every leaf by naive hooks
memory      peak of the process (resident) during that, over the peak of plain forward passes
cka         CKA of the 20 convolutions of two ResNet-18s over one forward pass of one of them (two are the floor);
            then of all 60-odd modules of each; next to it torch-cka, if it is installed
stream      peak memory of a whole analysis (statistics and similarity) of 50 images and of 50,000: it must not grow

Passes alternate, and the median of each is taken: machines are noisy. OMP_WAIT_POLICY is PASSIVE unless it is set, as
in ``normsurgeon analyze`` (normsurgeon/inference/fused.py); OMP_WAIT_POLICY=ACTIVE shows what spinning threads cost.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import timm
import torch
from measuring import in_a_process, medians, parser, peak_mib, seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normsurgeon as ns
from normsurgeon.analysis.choosing import choose_layers
from normsurgeon.analysis.similarity import Kernels, SimilarityCollector
from normsurgeon.analysis.statistics import StatisticsCollector
from normsurgeon.analysis.streaming import captured
from normsurgeon.inference.hooks import listening


class Watched:
    """ResNet-50 and a batch of 8 images, with the statistics of its default layers."""

    def __init__(self) -> None:
        self.model = timm.create_model("resnet50").eval()
        self.images = torch.randn(8, 3, 224, 224)
        self.layers = choose_layers(self.model)
        self.collector = StatisticsCollector(self.layers)

    def plain(self) -> None:
        self.model(self.images)

    def watched(self) -> None:
        self.collector.begin(8)
        with captured(self.layers, self.collector.on_output, self.collector.on_input):
            self.model(self.images)

    def naive(self) -> None:
        """Six plain reductions of the output of every leaf."""
        found: list[list[float]] = []

        def reduce(y: Tensor) -> None:
            found.append([f(y).item() for f in (torch.mean, torch.std, torch.amin, torch.amax, torch.norm)])
            found[-1].append((y == 0).float().mean().item())

        with listening([(m, "output", reduce) for m in self.model.modules() if not list(m.children())]):
            self.model(self.images)


@torch.no_grad()
def measure_statistics(repeats: int, batches: int) -> None:
    it = Watched()
    plain, ours, others = [], [], []
    for step in range(batches + 1):
        times = seconds(it.plain), seconds(it.watched)
        if step:  # the first pays for compilation and allocation
            plain.append(times[0])
            ours.append(times[1])
        if 0 < step <= repeats:
            others.append(seconds(it.naive))
    closing = seconds(it.collector.compute)
    forward, with_all, naive = map(statistics.median, (plain, ours, others))
    whole = (batches * with_all + closing) / (batches * forward)
    print(f"ResNet-50, batch 8, {len(it.layers)} layers, {batches} batches, {torch.get_num_threads()} threads")
    print(f"  forward pass                      {forward:7.3f} s")
    print(f"  with all statistics               {with_all:7.3f} s   ratio {with_all / forward:.2f}")
    print(f"  closing (eigenvalues), once       {closing:7.3f} s   ratio with it {whole:.2f} (target 1.3)")
    print(f"  six naive reductions of leaves    {naive:7.3f} s   ratio {naive / forward:.2f}")


@torch.no_grad()
def peak_of_pass(how: str, batches: int) -> float:
    """The peak resident size in MiB of a process that makes these passes."""
    it = Watched()
    for _ in range(batches):
        getattr(it, how)()
    if how == "watched":
        it.collector.compute()
    return peak_mib()


def measure_memory() -> None:
    plain, watched = (in_a_process(peak_of_pass, how, 8) for how in ("plain", "watched"))
    ratio = watched / plain
    print(
        f"peak memory: forward {plain:.0f} MiB, with all statistics {watched:.0f} MiB, ratio {ratio:.2f} (target 1.2)"
    )


def peak_of_stream(images: int) -> float:
    """The peak resident size in MiB of a process that analyses that many images."""
    model = timm.create_model("resnet18").eval()
    batches = (torch.randn(50, 3, 32, 32) for _ in range(images // 50))
    ns.analyze(model, batches, only=["statistics", "similarity"])
    return peak_mib()


def measure_stream() -> None:
    few, many = in_a_process(peak_of_stream, 50), in_a_process(peak_of_stream, 50_000)
    print(
        f"peak memory of ns.analyze, ResNet-18, 32 pixels: 50 images {few:.0f} MiB, 50,000 images {many:.0f} MiB, "
        f"ratio {many / few:.3f}"
    )


def compared(
    networks: list[nn.Module], images: Tensor, patterns: tuple[str, ...], kinds: tuple[str, ...]
) -> Callable[[], object]:
    """CKA between the layers of two networks, both forward passes included."""
    layers = [choose_layers(network, patterns, kinds) for network in networks]
    kernels = [Kernels(), Kernels()]

    def run() -> object:
        similarity = SimilarityCollector()
        for network, chosen, kept in zip(networks, layers, kernels, strict=True):
            kept.begin(len(images))
            with captured(chosen, kept.on_output):
                network(images)
        similarity.update(*kernels)
        return similarity.compute()

    return run


def compared_by_torch_cka(networks: list[nn.Module], images: Tensor, names: list[str]) -> None:
    import torch_cka

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        warnings.simplefilter("ignore")
        peer = torch_cka.CKA(*networks, model1_layers=names, model2_layers=names)
        # Its float32 sums can give nan on networks without training, which it refuses once all is computed.
        with contextlib.suppress(AssertionError):
            peer.compare(DataLoader(TensorDataset(images, torch.zeros(16)), batch_size=16))
    for network in networks:
        for module in network.modules():
            module._forward_hooks.clear()  # it leaves its own behind


@torch.no_grad()
def measure_cka(repeats: int) -> None:
    torch.manual_seed(0)
    networks = [timm.create_model("resnet18").eval() for _ in range(2)]
    images = torch.randn(16, 3, 224, 224)
    functions: dict[str, Callable[[], object]] = {
        "forward": partial(networks[0], images),
        "20 convolutions": compared(networks, images, (), ("convolution",)),
        "all modules": compared(networks, images, ("*",), ()),
    }
    try:
        import torch_cka  # noqa: F401
    except ImportError:
        print("(torch-cka is not installed: no peer)")
    else:
        names = [layer.name for layer in choose_layers(networks[0], kinds=["convolution"])]
        functions["torch-cka, 20 convolutions"] = partial(compared_by_torch_cka, networks, images, names)
    times = medians(repeats, functions)
    print("two ResNet-18s, batch 16; the floor is 2.00")
    for name, spent in times.items():
        print(f"  {name:34}{spent:7.3f} s   ratio {spent / times['forward']:.2f}")


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--batches", type=int, default=16)
    arguments.add_argument("--only", default="statistics,memory,cka,stream")
    options = arguments.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "statistics": partial(measure_statistics, options.repeats, options.batches),
        "memory": measure_memory,
        "cka": partial(measure_cka, options.repeats),
        "stream": measure_stream,
    }
    for part in options.only.split(","):
        parts[part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
