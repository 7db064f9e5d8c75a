"""Which network is the best start for training: a BatchNorm network, what others make of it, or a conversion.

    python benchmarks/trainability.py PART [--network resnet20] [--seeds 3] [--minutes 60] [--results FOLDER]

Every start is trained at every learning rate with the same images in the same order; compared are the best rates of
each, over seeds in pairs. A rate that the first seed found far behind the best of its start is not run with the other
seeds (``--prune``). Parts: ``rates`` (SGD, batches of 2, many learning rates), ``batches`` (SGD and AdamW, batches of 1
to 32, two domains), ``defaults`` (``ns.finetune`` with its defaults, and with one of them changed), ``private`` (DP-SGD
with Opacus), ``federated`` (clients with different labels), ``adaptation`` (without labels, at test time). Each run is
written when it ends, so that a part that was stopped, or ran out of ``--minutes``, goes on where it was; the table
shows what is done. Weights and images: ../shared/data/cifar10; ``lite0`` is the demo network (extra ``demo``). Opacus:
``pip install --group trainability``.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from measuring import parser
from training import adaptation, cifar, defaults, federated, private, supervised
from training.cells import Cell, far_behind, product, read, table, write
from training.starts import STARTS

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
PRIVATE_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)  # affine does best at 0.3, gn around 1, swap at 3 or more
FEDERATED_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ADAPTATION_RATES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # the smallest hardly change the network

REFERENCE = {"private": private.FIX}
"""What the other starts are compared with, where that is not ``bn``."""


def cells(part: str, network: str, seeds: int) -> list[Cell]:
    """What a part runs, in order."""
    if part == "rates":
        return product(part, network, ["grey"], ["sgd 2"], RATES, STARTS[:7], seeds)
    if part == "private":
        possible = [private.FIX, *(name for name in STARTS if name not in ("bn", "bn frozen"))]
        settings = [f"epsilon {epsilon} clip 1" for epsilon in (1, 3, 8)]
        return product(part, network, ["grey"], settings, PRIVATE_RATES, possible, seeds)
    if part == "federated":
        return product(part, network, ["grey"], ["alpha 0.1", "alpha 0.5"], FEDERATED_RATES, STARTS, seeds)
    if part == "adaptation":
        able = [name for name in STARTS if name != "swap"]  # without labels, nothing makes up for a lost function
        settings = ["tent 1", "sar 1", "tent 16"]
        none = product(part, network, ["grey"], ["none"], [0.0], able, seeds)
        rest = product(part, network, ["grey"], settings, ADAPTATION_RATES, able, seeds)
        return sorted(none + rest, key=lambda cell: cell.seed)
    if part == "defaults":
        return product(part, network, ["grey"], defaults.SETTINGS, defaults.RATES, ["bn", "gn", "ln"], seeds)
    settings = [f"{optimizer} {size}" for optimizer in ("sgd", "adamw") for size in (1, 2, 4, 32)]
    return product(part, network, ["grey", "fashion"], settings, RATES[1:], STARTS, seeds)


RUN = {
    "rates": supervised.run,
    "batches": supervised.run,
    "defaults": defaults.run,
    "private": private.run,
    "federated": federated.run,
    "adaptation": adaptation.run,
}


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=sorted(RUN))
    arguments.add_argument("--network", default="resnet20", choices=cifar.NETWORKS)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--setting", default="*", help="only the settings that match, such as 'epsilon 3*'")
    arguments.add_argument("--domain", default="*", help="only the domains that match")
    arguments.add_argument("--start", action="append", help="only this start; may be repeated")
    arguments.add_argument("--lr", type=float, action="append", help="only this learning rate; may be repeated")
    arguments.add_argument("--prune", type=float, default=0.05, help="how far behind a rate is left out; default: 0.05")
    arguments.add_argument("--minutes", type=float, default=60.0)
    arguments.add_argument("--results", type=Path, default=Path("trainability"))
    arguments.add_argument(
        "--against", help="the start that others are compared with; default: bn, of private opacus fix"
    )
    options = arguments.parse_args()
    if not cifar.available():
        print(f"no networks at {cifar.FOLDER}: this benchmark needs the CIFAR sample", file=sys.stderr)
        return 1
    if options.part == "private" and importlib.util.find_spec("opacus") is None:
        print("private needs Opacus; try pip install --group trainability", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    file = options.results / f"{options.part}-{options.network}.jsonl"
    done = read(file)
    wanted = [
        cell
        for cell in cells(options.part, options.network, options.seeds)
        if fnmatchcase(cell.setting, options.setting)
        and fnmatchcase(cell.domain, options.domain)
        and (not options.start or cell.start in options.start)
        and (not options.lr or cell.lr in options.lr)
    ]
    end = time.monotonic() + 60 * options.minutes
    for cell in wanted:
        if cell in done or far_behind(cell, done, options.prune):
            continue
        if time.monotonic() > end:
            break
        started = time.perf_counter()
        top1 = RUN[cell.part](cell)
        write(file, cell, top1, time.perf_counter() - started)
        done[cell] = top1
        count = sum(each in done for each in wanted)
        print(f"{count}/{len(wanted)} {cell.domain} {cell.setting} {cell.start} {cell.lr:g}: {top1:.3f}", flush=True)
    against = options.against or REFERENCE.get(options.part, "bn")
    print(table({cell: done[cell] for cell in wanted if cell in done}, against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
