"""How much of a pretrained network's function survives each conversion, without data.

    python benchmarks/function.py [IMAGES] [--max-images N] [--settings]

EfficientNet-Lite0 with its real ImageNet weights on a folder of ImageNet class folders (default: the project's sample,
../shared/data/imagenet-sample). Prints a Markdown table: top-1 with its standard error, the share of the BatchNorm
original's, agreement and KL with it. ``--settings`` adds the dials: eps, groups, no balancing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import normsurgeon as ns
from normsurgeon.data.batches import Batches
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"
TARGETS = ("affine", "fold", "rms", "ln", "gn", "rms2d", "ln2d", "in")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--max-images", type=int, default=None)
    parser.add_argument("--settings", action="store_true")
    options = parser.parse_args()
    if not options.images.is_dir():
        print(f"no images at {options.images}: give a folder of ImageNet class folders", file=sys.stderr)
        return 1
    model = ns.load("demo")
    source = open_source(options.images, classes=1000)
    batches = list(Batches(source, DataConfig.of(model), batch_size=50, max_images=options.max_images))
    original = ns.evaluate(model, batches)
    assert original.top1 is not None
    print("| conversion | top-1 | of BN | agreement | KL (nats) |\n|---|---:|---:|---:|---:|")

    def row(label: str, network: nn.Module) -> None:
        result = ns.evaluate(network, batches, baseline=model)
        assert result.top1 is not None
        assert original.top1 is not None
        print(
            f"| {label} | {100 * result.top1:.1f} ± {100 * (result.top1_stderr or 0):.1f} "
            f"| {result.top1 / original.top1:.3f} | {result.agreement:.3f} | {result.kl:.3f} |",
            flush=True,
        )

    row("BatchNorm original", model)
    for target in ("gn", "ln"):
        row(f"plain swap to {target}", ns.plain_swap(model, target))
    for target in TARGETS:
        row(target, ns.convert(model, to=target).model)
    if options.settings:
        for target in ("rms", "ln", "gn"):
            row(f"{target}, no balancing", ns.convert(model, to=target, balance=False).model)
        for eps in (0.3, 1.0, 3.0):
            for target in ("ln", "gn"):
                row(f"{target}, eps {eps}", ns.convert(model, to=target, eps=eps).model)
        for groups in (2, 8):
            row(f"gn, {groups} groups", ns.convert(model, to="gn", groups=groups).model)
    print(f"\n{original.images} images, torch {torch.__version__.partition('+')[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
