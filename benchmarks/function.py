"""How much of a pretrained network's function survives each conversion, without data.

    python benchmarks/function.py [IMAGES] [--max-images N] [--settings]

EfficientNet-Lite0 with its real ImageNet weights on a folder of ImageNet class folders (default: the project's sample,
../shared/data/imagenet-sample). Prints a Markdown table: top-1 with its standard error, the share of the BatchNorm
original's, agreement and KL with it. ``--settings`` adds the dials: eps, groups, no balancing.
"""

from __future__ import annotations

import sys

import torch
from judging import Against, check, image_parser

import normsurgeon as ns
from normsurgeon.data.batches import Batches
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig

TARGETS = ("affine", "fold", "rms", "ln", "gn", "rms2d", "ln2d", "in")


def main() -> int:
    arguments = image_parser(__doc__)
    arguments.add_argument("--max-images", type=int, default=None)
    arguments.add_argument("--settings", action="store_true")
    options = arguments.parse_args()
    check(options)
    model = ns.load("demo")
    source = open_source(options.images, classes=1000)
    batches = list(Batches(source, DataConfig.of(model), batch_size=50, max_images=options.max_images))
    table = Against(model, batches, "conversion")
    table.add("BatchNorm original", model)
    for target in ("gn", "ln"):
        table.add(f"plain swap to {target}", ns.plain_swap(model, target))
    for target in TARGETS:
        table.add(target, ns.convert(model, to=target).model)
    if options.settings:
        for target in ("rms", "ln", "gn"):
            table.add(f"{target}, no balancing", ns.convert(model, to=target, balance=False).model)
        for eps in (0.3, 1.0, 3.0):
            for target in ("ln", "gn"):
                table.add(f"{target}, eps {eps}", ns.convert(model, to=target, eps=eps).model)
        for groups in (2, 8):
            table.add(f"gn, {groups} groups", ns.convert(model, to="gn", groups=groups).model)
    print(f"\n{sum(len(images) for images, _ in batches)} images, torch {torch.__version__.partition('+')[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
