"""What unlabelled images bring back after a conversion, and how long it takes.

    python benchmarks/recover.py [IMAGES] [--to gn,ln] [--finetune STEPS] [--seed 0]

EfficientNet-Lite0 with its real ImageNet weights. Of the images (default: the project's sample of 500,
../shared/data/imagenet-sample), 200 chosen by the seed are judged by; the others are fitted on, without their labels.
Prints a Markdown table: top-1 with its binomial standard error, its share of the BatchNorm original's, agreement and
KL with the original, agreement on twelve views of each demo photograph, and seconds of each step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import normsurgeon as ns
from normsurgeon.data.batches import Batches
from normsurgeon.data.demo_images import photographs, views
from normsurgeon.data.sources import open_source
from normsurgeon.data.splitting import split_source
from normsurgeon.data.transforms import DataConfig

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"
JUDGED = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--to", default="ln,gn")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if not options.images.is_dir():
        print(f"no images at {options.images}: give a folder of ImageNet class folders", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    model = ns.load("demo")
    fit, judge = split_source(open_source(options.images, classes=1000), JUDGED, options.seed)
    config = DataConfig.of(model)
    held = list(Batches(judge, config, batch_size=50))
    demo = [(views(photographs(), config), None)]
    original = ns.evaluate(model, held)
    print("| step | top-1 | of BN | agreement | KL (nats) | demo agreement | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print(f"| BatchNorm original | {_share(original)} | 1.000 | 1.000 | 0.000 | 1.000 | |", flush=True)

    def row(label: str, network: torch.nn.Module, seconds: float) -> None:
        found = ns.evaluate(network, held, baseline=model)
        seen = ns.evaluate(network, demo, baseline=model)
        assert found.top1 is not None
        assert original.top1
        print(
            f"| {label} | {_share(found)} | {found.top1 / original.top1:.3f} | {found.agreement:.3f} "
            f"| {found.kl:.3f} | {seen.agreement:.3f} | {seconds:.0f} |",
            flush=True,
        )

    for target in options.to.split(","):
        begin = time.perf_counter()
        result = ns.convert(model, to=target)
        row(f"{target}: converted", result.model, time.perf_counter() - begin)
        row(f"{target}: + calibrated", result.model, ns.calibrate(result, fit).seconds)
        done = ns.reconstruct(result, fit)
        row(f"{target}: + reconstructed ({done.best_step} of {done.steps} updates kept)", result.model, done.seconds)
        if options.finetune:
            settings = {"lr": 3e-5, "batch_size": 32, "mixup": 0.8, "cutmix": 1.0, "scale": (0.2, 1.0)}
            tuned = ns.finetune(result, fit, steps=options.finetune, ce=0.0, **settings)
            row(f"{target}: + fine-tuned ({tuned.steps} updates)", tuned.model, tuned.seconds)
    print(f"\n{len(fit)} images fitted on, without labels; {original.images} judged by; seed {options.seed}")
    return 0


def _share(found: ns.Evaluation) -> str:
    assert found.top1 is not None
    return f"{100 * found.top1:.1f} ± {100 * (found.top1_stderr or 0):.1f}"


if __name__ == "__main__":
    sys.exit(main())
