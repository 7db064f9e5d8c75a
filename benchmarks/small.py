"""How many updates bring a converted small network back: digits and Fashion-MNIST.

    python benchmarks/small.py [--data digits,fashion-mnist] [--models test_resnet,test_efficientnet]

Trains timm's small networks with BatchNorm, converts them to gn and ln, calibrates on training images, and fine-tunes
by distillation and labels in a tenth of the updates. The last network is judged, none is picked. Prints a Markdown
table of accuracies on the held-out images.
"""

from __future__ import annotations

import time

import timm
import torch
from measuring import head, parser, row
from torch import nn

import normsurgeon as ns
from normsurgeon.data.sources import ImageSource, open_source

UPDATES = {"digits": 440, "fashion-mnist": 1200}
BATCH = {"digits": 64, "fashion-mnist": 128}


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, in_chans=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 32, 32), "crop_pct": 1.0}
    return model


def top1(model: nn.Module, test: ImageSource) -> str:
    return f"{100 * (ns.evaluate(model, test, batch_size=250).top1 or 0):.2f}"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="digits,fashion-mnist")
    arguments.add_argument("--models", default="test_resnet,test_efficientnet")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    columns = (
        "data", "network", "BN", "to", "plain swap", "converted", "calibrated", "recovered", "updates", "seconds",
    )  # fmt: skip
    print(head(columns, texts=(0, 1, 3)), flush=True)
    for data in options.data.split(","):
        train, test = open_source(data, split="train"), open_source(data, split="test")
        for name in options.models.split(","):
            common = {"batch_size": BATCH[data], "scale": (0.7, 1.0), "seed": options.seed}
            made = network(name, options.seed)
            trained = ns.finetune(made, train, steps=UPDATES[data], lr=4e-3, **common)
            original = trained.model.eval()
            for target in ("gn", "ln"):
                begin = time.perf_counter()
                result = ns.convert(original, to=target)
                swapped = top1(ns.plain_swap(original, target), test)
                cells = [data, name, top1(original, test), target, swapped, top1(result.model, test)]
                ns.calibrate_(result, train, max_images=512)
                cells.append(top1(result.model, test))
                tuned = ns.finetune(result, train, steps=UPDATES[data] // 10, lr=5e-4, **common)
                cells += [top1(tuned.model, test), f"{UPDATES[data] // 10} of {UPDATES[data]}"]
                print(row([*cells, f"{time.perf_counter() - begin:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
