"""Which norm, where, at what price: swap sensitivity, plans within a budget, and the order that ``compare`` gives.

    python benchmarks/choosing.py PART [--network lite0] [--images 300]

Parts: ``sweep`` (single swaps against brute force: the same KL, and the time), ``predictors`` (rank correlation of the
cheap ones with the measured damage), ``curve`` (sites against function kept, for gn and ln, and mixed plans),
``promise`` (plans found on one half of the images, judged on the other), ``compare`` (its order without data against
the measured one). Networks: ``lite0`` (the demo network, ../shared/data/imagenet-sample), ``resnet20`` and ``resnet56``
(../shared/data/cifar10). No labels are used to choose. Images: the first ones choose, others judge: 200 of ImageNet,
1,500 of CIFAR-10.
"""

from __future__ import annotations

import math
import sys
import time

import torch
from measuring import SAMPLE, head, parser, row
from torch import Tensor, nn
from training import cifar

import normsurgeon as ns
from normsurgeon.data.batches import Batches
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.selection.damage import Answers, Damage, damages
from normsurgeon.selection.sweep import Change, Sweep, original_answers
from normsurgeon.selection.switching import Switchable

BATCH = {"lite0": 5, "resnet20": 25, "resnet56": 25}  # 25 images of 224 pixels leave the caches
JUDGES = {"lite0": 200, "resnet20": 1500, "resnet56": 1500}
BUDGETS = ("kl=0.02", "kl=0.1", "2%", "5%")

Shares = tuple[float, ...]
PLANS: tuple[tuple[str, str, tuple[str, ...], float | None, Shares], ...] = (
    ("gn, rest affine", "gn", ("affine",), None, (0.25, 0.5, 0.75, 1)),
    ("ln, rest affine", "ln", ("affine",), None, (0.25, 0.5, 0.75, 1)),
    ("gn of auto, 4 or 2 groups, eps 1, rest affine", "gn", ("gn:4", "gn:2", "affine"), 1.0, (0.5, 0.75, 1)),
    ("gn of auto, 4 or 2 groups, eps 1, rest rms", "gn", ("gn:4", "gn:2", "rms"), 1.0, (0.5,)),
    ("rms, rest ln, eps 1", "rms", ("ln",), 1.0, (0.5, 1)),
)
"""Label, the norm that is asked for, the others, eps, and the shares of the sites that get it."""


def load(name: str, images: int, skip: int = 0) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A network, batches of images, and their labels."""
    if name == "lite0":
        model = ns.load("demo")
        source = open_source(SAMPLE, classes=1000)
        numbers = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
        found = next(iter(Batches(source, DataConfig.of(model), batch_size=len(source))))
        x, y = found[0][numbers], found[1][numbers]  # the folder is in the order of its classes
    else:
        model = cifar.network(name)
        x, y = cifar.images("test")
        x = cifar.normalized(x)
    chosen = slice(skip, skip + images)
    return model, list(x[chosen].split(BATCH[name])), list(y[chosen].split(BATCH[name]))


@torch.no_grad()
def answers(network: nn.Module, x: list[Tensor]) -> Answers:
    return Answers.of(torch.cat([network(batch) for batch in x]), sum(map(len, x)))


def damage_of(before: Answers, after: Answers) -> Damage:
    found = Damage()
    found.update(*damages(before, after, len(before.outputs[0])))
    return found


def sweep(name: str, images: int) -> None:
    """The time of single swaps by replay and by full passes, on the same images."""
    model, x, _ = load(name, images)
    board = Switchable(model, [ns.plan(model, "gn", example_inputs=x[0][:2])])
    found = {Change(site, options[0]): Damage() for site, options in board.options.items()}
    swept = Sweep(board, {}, found)
    begin = time.process_time()
    for batch in x:
        swept.update(batch, original_answers(board, batch))
    seconds = time.process_time() - begin
    begin = time.process_time()
    brute = {change: Damage() for change in found}
    with torch.no_grad():
        for batch in x:
            board.reset()
            before = Answers.of(board.network(batch), len(batch))
            for change, damage in brute.items():
                board.reset()
                board.choose({change.site: change.option})
                damage.update(*damages(before, Answers.of(board.network(batch), len(batch)), len(batch)))
    whole = time.process_time() - begin
    worst = max(abs(found[c].compute()[0] - brute[c].compute()[0]) for c in found)
    print(f"{name}: {len(found)} sites, {images} images: {seconds:.1f} s against {whole:.1f} s of full passes,")
    print(f"ratio {seconds / whole:.2f} (target 0.4), largest difference of KL {worst:.1e} (target 1e-5)")


def predictors(name: str, images: int) -> None:
    """How well each predictor ranks the sites."""
    model, x, _ = load(name, images)
    print(head(("network", "norm", "elements", "norm error", "Taylor", "sum of single damages", "of all together")))
    for to in ("gn", "ln"):
        found = ns.swap_sensitivity(model, x, to=to, all_but_one=False, max_images=images, batch_size=BATCH[name])
        numbers = (f"{rho:.2f}" if rho is not None else "" for rho in found.correlations.values())
        print(row((name, to, *numbers, f"{found.total:.3f}", f"{found.all_damage:.3f}")), flush=True)


def curve(name: str, images: int) -> None:
    """Sites in a norm against function kept, on images that did not choose, with labels that chose nothing."""
    model, x, _ = load(name, images)
    _, others, labels = load(name, JUDGES[name], skip=images)
    before, right = answers(model, others), torch.cat(labels)
    whole = (before.outputs[0].argmax(1) == right).sum().item()
    print(head(("network", "plan", "sites", "KL", "same answer", "top-1 of BN's"), (0, 1)), flush=True)
    for label, to, among, eps, shares in PLANS:
        found = ns.trade_off(model, x, to=to, among=among, eps=eps, points=2, max_images=images, batch_size=BATCH[name])
        for k in (math.ceil(share * found.sites) for share in shares):
            after = answers(ns.convert(model, found.family.made(k), verdict=False, check=False).model, others)
            damage = damage_of(before, after)
            kl, error = damage.compute()
            same = 1 - sum(damage.lost) / damage.images
            share = (after.outputs[0].argmax(1) == right).sum().item() / whole
            cells = (f"{k} of {found.sites}", f"{kl:.3f} ± {error:.3f}", f"{same:.3f}", f"{share:.3f}")
            print(row((name, label, *cells)), flush=True)


def promise(name: str, images: int) -> None:
    """Whether a plan keeps its budget on other images."""
    model, x, _ = load(name, images)
    _, others, _ = load(name, JUDGES[name], skip=images)
    before = answers(model, others)
    print(head(("network", "budget", "sites", "used on the others", "kept"), (0, 1)), flush=True)
    for budget in map(ns.Budget.parse, BUDGETS):
        plan = ns.plan(model, "gn", budget=budget, data=x, max_images=images, batch_size=BATCH[name])
        network = ns.convert(model, plan, verdict=False, check=False).model
        used, error = budget.spent(damage_of(before, answers(network, others)))
        sites = sum(d.target == "gn" for d in plan.decisions)
        kept = "yes" if used - error <= budget.limit else "no"
        print(row((name, budget, sites, f"{used:.4f} ± {error:.4f}", kept)), flush=True)


def compare(name: str, images: int) -> None:
    """The order without data and with it, and the time of the first."""
    model, x, _ = load(name, images)
    begin = time.perf_counter()
    without = ns.compare(model, to=("rms", "ln", "gn", "in"), groups=("auto", 8), example_inputs=x[0][:2])
    seconds = time.perf_counter() - begin
    measured = ns.compare(model, x, to=("rms", "ln", "gn", "in"), groups=("auto", 8), example_inputs=x[0][:2])
    for label, found in (("without data", without), (f"on {images} images", measured)):
        print(f"{name}, {label}: " + ", ".join(f"{c.target} {c.score:.3f}" for c in found.conversions))
    print(f"without data: {seconds:.0f} s (target 90 s)")


PARTS = {"sweep": sweep, "predictors": predictors, "curve": curve, "promise": promise, "compare": compare}


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=PARTS)
    arguments.add_argument("--network", default="lite0", choices=cifar.NETWORKS)
    arguments.add_argument("--images", type=int, default=300)
    options = arguments.parse_args()
    if not (SAMPLE.is_dir() if options.network == "lite0" else cifar.available()):
        print(f"no images for {options.network}: this benchmark needs the project's sample", file=sys.stderr)
        return 1
    PARTS[options.part](options.network, options.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
