"""What the Hessian's trace of every layer costs, next to PyHessian's one trace of the whole network.

    pip install pyhessian
    OMP_NUM_THREADS=1 python benchmarks/hessian.py [--model resnet18] [--size 64] [--batch 8] [--probes 8] [--repeats 5]

Both take the same network in eval mode, the same batch and labels, and as many probes:
``measure_sensitivity(methods=["hessian_trace"])``, which gives a trace with its standard error for each layer and each
parameter tensor, against ``pyhessian.hessian(...).trace(maxIter=probes, tol=-inf)``, one number a probe for the whole
network (with tol=0 it stops after the second probe wherever the running trace is negative). Each repeat times both, in
alternating order, whole calls from the model and the batch to the figures; the medians, and the median of the repeats'
ratios, are printed. The two totals are printed next to each other, as a check.
"""

from __future__ import annotations

import math
import statistics
from functools import partial

import timm
import torch
from measuring import alternating, parser
from pyhessian import hessian

from normsurgeon.analysis.sensitivity.measure import measure_sensitivity


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="resnet18")
    arguments.add_argument("--size", type=int, default=64)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--probes", type=int, default=8)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = arguments.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(options.model).eval().to(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(0, 1000, (options.batch,))

    def ours() -> tuple[float, float]:
        (found,) = measure_sensitivity(
            model, [(images, labels)], methods=["hessian_trace"], probes=options.probes, seed=0
        )
        return found.details["total"], found.details["total_stderr"]

    def theirs() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        judge = hessian(model, torch.nn.CrossEntropyLoss(), data=(images, labels), cuda=options.device == "cuda")
        traces = torch.tensor(judge.trace(maxIter=options.probes, tol=-math.inf), dtype=torch.float64)
        assert len(traces) == options.probes
        model.zero_grad(set_to_none=True)  # its graph hangs on the gradients
        return traces.mean().item(), (traces.std() / len(traces) ** 0.5).item()

    figures: dict[str, tuple[float, float]] = {}
    peers = {"normsurgeon": ours, "PyHessian": theirs}
    seconds = alternating(
        options.repeats, {name: partial(lambda n, f: figures.update({n: f()}), name, f) for name, f in peers.items()}
    )
    for name, spent in seconds.items():
        total, error = figures[name]
        times = " ".join(f"{each:.2f}" for each in spent)
        print(f"{name:12} median {statistics.median(spent):7.3f} s   trace {total:10.2f} ± {error:.2f}   ({times})")
    ratios = [a / b for a, b in zip(seconds["normsurgeon"], seconds["PyHessian"], strict=True)]
    print(f"ratio (ours / PyHessian), median of {options.repeats} repeats: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
