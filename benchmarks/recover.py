"""What unlabelled images bring back after a conversion, and how long it takes.

    python benchmarks/recover.py [IMAGES] [--to gn,ln] [--finetune STEPS] [--seed 0]

EfficientNet-Lite0 with its real ImageNet weights. Of the images (default: the project's sample of 500,
../shared/data/imagenet-sample), 200 chosen by the seed are judged by; the others are fitted on, without their labels.
Prints a Markdown table: top-1 with its binomial standard error, its share of the BatchNorm original's, agreement and
KL with the original, agreement on twelve views of each demo photograph, and seconds of each step.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from judging import Against, check, image_parser

import normsurgeon as ns
from normsurgeon.data.batches import Batches
from normsurgeon.data.demo_images import photographs, views
from normsurgeon.data.sources import open_source
from normsurgeon.data.splitting import split_source
from normsurgeon.data.transforms import DataConfig

JUDGED = 200


def main() -> int:
    arguments = image_parser(__doc__)
    arguments.add_argument("--to", default="ln,gn")
    arguments.add_argument("--finetune", type=int, default=0, metavar="STEPS")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=None)
    options = arguments.parse_args()
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = ns.load("demo")
    fit, judge = split_source(open_source(options.images, classes=1000), JUDGED, options.seed)
    config = DataConfig.of(model)
    demo = [(views(photographs(), config), None)]
    table = Against(model, list(Batches(judge, config, batch_size=50)), "step", ("demo agreement", "seconds"))

    def row(label: str, network: torch.nn.Module, seconds: float) -> None:
        seen = ns.evaluate(network, demo, baseline=model)
        table.add(label, network, f"{seen.agreement:.3f}", f"{seconds:.0f}")

    table.add("BatchNorm original", model, "1.000", "")
    for target in options.to.split(","):
        begin = time.perf_counter()
        result = ns.convert(model, to=target)
        row(f"{target}: converted", result.model, time.perf_counter() - begin)
        done: Any = ns.calibrate_(result, fit).history[-1]
        row(f"{target}: + calibrated", result.model, done.seconds)
        done = ns.reconstruct_(result, fit).history[-1]
        row(f"{target}: + reconstructed ({done.best_step} of {done.steps} updates kept)", result.model, done.seconds)
        if options.finetune:
            settings: dict[str, Any] = {"lr": 3e-5, "batch_size": 32, "mixup": 0.8, "cutmix": 1.0, "scale": (0.2, 1.0)}
            tuned = ns.finetune(result, fit, steps=options.finetune, ce=0.0, **settings)
            done = tuned.history[-1]
            row(f"{target}: + fine-tuned ({done.steps} updates)", tuned.model, done.seconds)
    print(f"\n{len(fit)} images fitted on, without labels; {JUDGED} judged by; seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
