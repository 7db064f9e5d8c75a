"""Convert the networks of other projects, with random statistics, and write their section of docs/coverage.md.

    python benchmarks/beyond.py [--only GLOB] [--processes 2] [--output docs/coverage.md] [--results FILE]
        [--original] [--list]

`make coverage` installs the packages; benchmarks/beyond_networks.py lists the networks. Each has random weights,
statistics and affines, and is in float64 and eval mode. Every module that holds running statistics counts as a batch
norm; they are found here, without normsurgeon. Compared are all outputs, and what comes out at each batch norm.

The original must be worth comparing with: its outputs are finite, not empty, and change with the input. A network fails
if anything raises, a batch norm is missing in the account, `fold` or `affine` is off by more than 1e-12, or fewer are
folded than FOLDS says. `--original` makes and calls the originals only. Exits with 1 if a network fails.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import coverage_report
import torch
from beyond_networks import Network, find, networks
from coverage_report import kind, listed, total
from measuring import append, brief, in_a_process, parser, records, table
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

import normsurgeon as ns
from normsurgeon.calls import Call, as_call
from normsurgeon.inference.hooks import listening

TOLERANCE = 1e-12
SINGLE_TOLERANCE = 1e-4
"""For the few that cast to float32 themselves."""
SECONDS = 900
SAMPLES = 4096
"""Numbers that are compared at each batch norm."""

FOLDS = {
    "smp.FPN(mobilenet_v2)": 52,
    "smp.UnetPlusPlus(resnet18)": 42,
    "transformers.ResNet": 20,
    "transformers.LeViT": 62,
    "ultralytics.yolo11n": 81,
    "torchvision.ssdlite320_mobilenet_v3_large": 70,
    "torchvision.retinanet_resnet50_fpn_v2": 53,
    "torchvision.r3d_18": 20,
    "torchvision.fasterrcnn_resnet50_fpn": 53,
    "torchvision.fasterrcnn_resnet50_fpn frozen": 53,
    "efficientnet-pytorch.b0": 49,
}
"""The least that must be folded."""

Tensors = dict[str, Tensor]


@dataclass
class Outcome:
    """What became of one network."""

    name: str
    batch_norms: int = 0
    sites: int = 0
    folded: int = 0
    affine: int = 0
    refused: int = 0
    compared: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    at_norms: dict[str, float] = field(default_factory=dict)
    change: float | None = None
    tolerance: float = TOLERANCE
    reasons: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    skipped: str | None = None
    seconds: float = 0.0


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """The modules that hold running statistics, by name; an InstanceNorm's are its own affair."""

    def holds(module: nn.Module) -> bool:
        return all(isinstance(getattr(module, k, None), Tensor) for k in ("running_mean", "running_var"))

    return {n: m for n, m in model.named_modules() if holds(m) and not isinstance(m, _InstanceNorm)}


@torch.no_grad()
def randomise_(model: nn.Module, inputs: Call) -> None:
    """Statistics and affines far from the identity and from the data; eval mode.

    A mean is up to a standard deviation or so from the mean of what the norm sees, a variance 0.3 to 3 times that, so
    that the signal lives through all layers of random weights. Weights are 0.5 to 1.5 in size, of either sign.
    """
    generator = torch.Generator().manual_seed(0)

    def between(low: float, high: float, like: Tensor) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)

    def set_statistics(norm: Any, mean: float = 0.0, std: float = 1.0) -> None:
        apart = torch.randn(norm.running_mean.shape, generator=generator, dtype=torch.float64)
        norm.running_mean.copy_(mean + 0.3 * std * apart)
        norm.running_var.copy_(std**2 * between(0.3, 3, norm.running_var))

    seen = set()

    def look(norm: nn.Module, x: Tensor) -> None:
        if id(norm) not in seen and x.numel() > 1 and x.std() > 0:
            set_statistics(norm, float(x.mean()), float(x.std()))
        seen.add(id(norm))

    model.eval()
    norms = list(batch_norms(model).values())
    for norm in norms:
        set_statistics(norm)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if weight is not None:
            sign = torch.where(between(0, 1, weight) < 0.5, -1.0, 1.0)
            weight.copy_(sign * between(0.5, 1.5, weight))
        if bias is not None:
            bias.copy_(between(-0.3, 0.3, bias))
    with listening([(norm, "input", partial(look, norm)) for norm in norms]):
        called(model, inputs)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of an output, by path, whatever it is made of."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}.{number}")
    elif hasattr(tree, "__dict__"):
        yield from leaves(vars(tree), path)


@torch.no_grad()
def called(model: nn.Module, inputs: Call) -> Tensors:
    """The outputs of one call, by path."""
    torch.manual_seed(0)
    return {path: tensor.clone() for path, tensor in leaves(inputs(model))}


def observed(model: nn.Module, inputs: Call, names: list[str]) -> tuple[Tensors, Tensors]:
    """The outputs of a network, and samples of what comes out of the named modules at their first call."""
    seen: Tensors = {}

    def keep(name: str, output: Tensor) -> None:
        if name not in seen:
            flat = output.detach().reshape(-1)
            seen[name] = flat[:: max(1, flat.numel() // SAMPLES)].clone()

    modules = dict(model.named_modules())
    with listening([(modules[name], "output", partial(keep, name)) for name in names if name in modules]):
        return called(model, inputs), seen


def off_by(expected: Tensors, found: Tensors) -> float:
    """The largest difference, relative to the largest value of its tensor; infinite for other shapes or no number."""
    if expected.keys() != found.keys():
        return math.inf
    errors = [0.0]
    for path, a in expected.items():
        b = found[path]
        if a.shape != b.shape:
            return math.inf
        if not a.numel():
            continue
        if not a.is_floating_point():
            errors.append(float((a != b).any()))
            continue
        same = a == b  # infinities of masks among them
        difference = (a - b).abs().masked_fill(same | (a.isnan() & b.isnan()), 0.0)
        error = float(difference.max() / a[a.isfinite()].abs().max().clamp_min(1e-300)) if a.isfinite().any() else 0.0
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors)


def unfit(outputs: Tensors, changed: Tensors) -> tuple[str | None, float]:
    """Why outputs are not worth comparing, if they are not; and how far they change with the input."""
    floats = {path: t for path, t in outputs.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return "outputs are empty", 0.0
    if not any(t.isfinite().all() and t.abs().max() > 0 for t in floats.values()):
        return "outputs are not finite, or zero", 0.0
    change = off_by(floats, {path: t for path, t in changed.items() if path in floats})
    return (None if change > 1e-6 else "outputs do not depend on the input"), change


def has_batch_norms(network: Network) -> bool:
    """Found without memory, if the network can be made like that."""
    try:
        with torch.device("meta"):
            return bool(batch_norms(network.make()))
    except Exception:  # then it is made with values
        return True


def examine(name: str, original_only: bool = False) -> Outcome:
    """Make one network, call it, convert it, compare."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    outcome = Outcome(name)
    started = time.perf_counter()
    network = find(name)
    try:
        made = _made(network, outcome) if has_batch_norms(network) else None
        if made is None:
            outcome.skipped = "no batch norm"
            return outcome
        model, inputs, norms = made
        expected = observed(model, inputs, norms)
        again = observed(model, inputs, norms)
        changed = called(model, inputs.map(_other))
    except Exception as error:  # of the network itself, before normsurgeon has seen it
        outcome.skipped = f"the original fails ({brief(error, 120)})"
        outcome.seconds = time.perf_counter() - started
        return outcome
    reason, outcome.change = unfit(expected[0], changed)
    if reason is not None:
        outcome.notes.append(f"{reason}: compared at the batch norms")
    if off_by(expected[0], again[0]) > 0:
        outcome.notes.append("not deterministic")
    everything = [*expected[0].values(), *expected[1].values()]
    if not network.single and any(t.is_floating_point() and t.dtype != torch.float64 for t in everything):
        outcome.notes.append("computes partly in less than float64")
    outcome.compared = len(expected[1])
    del again, changed, everything
    if not original_only:
        try:
            _convert(model, inputs, norms, expected, outcome)
        except Exception as error:  # whatever goes wrong is this network's result
            outcome.failure = brief(error)
        outcome.failure = outcome.failure or _failure(outcome, network.sorts, reason is not None)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _made(network: Network, outcome: Outcome) -> tuple[nn.Module, Call, list[str]] | None:
    """The network with its inputs and the names of its batch norms; None if it has none."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if network.default else torch.float32)
    model, inputs = network.make(), as_call(network.inputs())
    norms = list(batch_norms(model))
    outcome.batch_norms = len(norms)
    if not norms:
        return None
    if network.single:
        model, inputs = model.float(), inputs.map(lambda t: t.float() if t.is_floating_point() else t)
        outcome.tolerance = SINGLE_TOLERANCE
        outcome.notes.append(f"in float32, to {SINGLE_TOLERANCE:.0e}")
    else:
        model = model.double()
    randomise_(model, inputs)
    return model, inputs, norms


def _other(tensor: Tensor) -> Tensor:
    """Another input of the same kind."""
    return 0.8 * tensor + 0.1 * tensor.flip(-1) if tensor.is_floating_point() else tensor.flip(-1)


def _convert(
    model: nn.Module, inputs: Call, norms: list[str], expected: tuple[Tensors, Tensors], outcome: Outcome
) -> None:
    for target in ("fold", "affine"):
        result = ns.convert(model, to=target, example_inputs=inputs, verdict=False)
        outputs, seen = observed(result.model, inputs, norms)
        outcome.errors[target] = off_by(expected[0], outputs)
        common = expected[1].keys() & seen.keys()
        outcome.at_norms[target] = off_by({n: expected[1][n] for n in common}, {n: seen[n] for n in common})
        if target == "fold":
            outcome.compared = len(common)
            folded = [site for site in result.sites if site.target == "fold" and site.status == "converted"]
            refused = [site for site in result.sites if site.status == "refused"]
            outcome.sites = sum(not site.site.functional for site in result.sites)
            outcome.folded, outcome.refused = len(folded), len(refused)
            outcome.affine = result.counts["converted"] - len(folded)
            outcome.reasons = dict(Counter(kind(site.reason) for site in result.sites if site not in folded))
            outcome.refusals = dict(Counter(kind(site.reason) for site in refused))
        del result, outputs, seen
    found = called(ns.convert(model, to="gn", example_inputs=inputs, check=False, verdict=False).model, inputs)
    if found.keys() != expected[0].keys() or any(found[p].dim() != t.dim() for p, t in expected[0].items()):
        outcome.failure = "gn gives outputs of another structure"


def _failure(outcome: Outcome, sorts: bool, degenerate: bool) -> str | None:
    """Why a network fails, or None.

    Outputs that are sorted by score may change order if scores are equal up to rounding; then what comes out at the
    batch norms decides, and a note says so.
    """
    if outcome.sites != outcome.batch_norms:
        return f"{outcome.sites} sites for {outcome.batch_norms} batch norms"
    if outcome.folded < FOLDS.get(outcome.name, 0):
        return f"{outcome.folded} folded, {FOLDS[outcome.name]} wanted"
    if degenerate and outcome.compared == 0:
        return "nothing to compare"
    for target, error in outcome.errors.items():
        at_norms = outcome.at_norms[target]
        if not at_norms <= outcome.tolerance:
            return f"{target} is off by {at_norms:.0e} at a batch norm"
        if error <= outcome.tolerance:
            continue
        if not sorts or not outcome.compared:
            return f"{target} is off by {error:.0e}"
        outcome.notes.append(f"{target}: sorted outputs differ by {error:.0e}, the batch norms do not")
    return None


def _in_a_process(name: str, original_only: bool) -> Outcome:
    try:
        return in_a_process(examine, name, original_only, limit=SECONDS)
    except RuntimeError as error:
        return Outcome(name, failure=str(error))


def run(names: list[str], processes: int, original_only: bool, file: Path | None = None) -> list[Outcome]:
    """All outcomes, in the order of the names; those that ``file`` has are not run again, but for failures."""
    known = [Outcome(**record) for record in records(file)]
    outcomes = {outcome.name: outcome for outcome in known if outcome.failure is None}
    todo = [name for name in names if name not in outcomes]
    with ThreadPoolExecutor(processes) as pool:
        found = pool.map(partial(_in_a_process, original_only=original_only), todo)
        for number, outcome in enumerate(found, 1):
            outcomes[outcome.name] = outcome
            append(file, asdict(outcome))
            count = f"{outcome.folded} of {outcome.batch_norms} folded"
            counted = f"{outcome.batch_norms} batch norms" if original_only else count
            notes = "; ".join([outcome.failure or outcome.skipped or counted, *outcome.notes])
            line = f"{number}/{len(todo)} {outcome.name}: {notes} ({outcome.seconds:.0f} s)"
            print(line, file=sys.stderr, flush=True)
    return [outcomes[name] for name in names]


def report(outcomes: list[Outcome], left_out: dict[str, str], chosen: str = "") -> str:
    """The section of docs/coverage.md; ``chosen`` says in words that it is of some networks only."""
    done = [o for o in outcomes if o.skipped is None]
    skipped = {**left_out, **{o.name: o.skipped for o in outcomes if o.skipped not in (None, "no batch norm")}}
    without = sum(o.skipped == "no batch norm" for o in outcomes)
    of = f", of {chosen} (`--only`)" if chosen else ""
    columns = ("network", "batch norms", "sites", "folded", "affine", "refused", "error of fold", "of affine")
    columns += ("at the norms", "seconds", "failure, notes")
    rows = [
        (
            *(o.name, o.batch_norms, o.sites, o.folded, o.affine, o.refused),
            *(f"{o.errors[target]:.0e}" if target in o.errors else "" for target in ("fold", "affine")),
            f"{max(o.at_norms.values()):.0e}" if o.at_norms else "",
            round(o.seconds),
            "; ".join([*([f"**{o.failure}**"] if o.failure else []), *o.notes]),
        )
        for o in done
    ]
    return f"""## Beyond timm

Made by `make coverage` with torch {torch.__version__.partition("+")[0]}{of}. Do not edit by hand. Random weights, \
statistics and affines, float64, eval mode. Errors are relative to the largest value of each tensor: of all outputs, \
and of what comes out at each batch norm, against the original.

{len(done)} networks, {sum(o.batch_norms for o in done):,} batch norms: {sum(o.folded for o in done):,} folded, \
{sum(o.affine for o in done):,} by the affine, {sum(o.refused for o in done):,} refused; \
**{sum(o.failure is not None for o in done)} failures**. {without} more networks have no batch norm.

{table(columns, rows, texts=(0, 10))}

### Why not folded

{coverage_report.reasons(total(o.reasons for o in done))}

### Refused

{listed(total(o.refusals for o in done).most_common())}

### Left out

{listed(skipped.items())}"""


def main() -> int:
    """The command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", default=["*"], help="names of networks, as package.name with * and ?")
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--output", type=Path, default=None)
    arguments.add_argument("--results", type=Path, default=None, help="a file of outcomes: they are not run again")
    arguments.add_argument("--original", action="store_true", help="make and call the originals, convert nothing")
    arguments.add_argument("--list", action="store_true", help="print the names only")
    options = arguments.parse_args()
    everything = networks()
    chosen = {n: network for n, network in everything.items() if any(fnmatchcase(n, glob) for glob in options.only)}
    names = [name for name, network in chosen.items() if isinstance(network, Network)]
    if options.list:
        print("\n".join(names))
        return 0
    outcomes = run(names, options.processes, options.original, options.results)
    some = f"{len(chosen)} of the {len(everything)} networks that it knows" if len(chosen) < len(everything) else ""
    text = report(outcomes, {name: why for name, why in chosen.items() if isinstance(why, str)}, some)
    if options.output is None or options.original:
        print(text)
    else:
        coverage_report.write(options.output, beyond=text)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
