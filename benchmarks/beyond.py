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

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from beyond_networks import Network, find, networks

TITLE = "## Beyond timm"
START, END = "<!-- beyond -->", "<!-- /beyond -->"
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


def batch_norms(model: Any) -> dict[str, Any]:
    """The modules that hold running statistics, by name; an InstanceNorm's are its own affair."""
    import torch
    from torch.nn.modules.instancenorm import _InstanceNorm

    def holds(module: Any) -> bool:
        return all(isinstance(getattr(module, k, None), torch.Tensor) for k in ("running_mean", "running_var"))

    return {n: m for n, m in model.named_modules() if holds(m) and not isinstance(m, _InstanceNorm)}


def enliven_(model: Any, inputs: Any) -> Any:
    """Statistics and affines far from the identity and from the data; eval mode.

    A mean is up to a standard deviation or so from the mean of what the norm sees, a variance 0.3 to 3 times that, so
    that the signal lives through all layers of random weights. Weights are 0.5 to 1.5 in size, of either sign.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def between(low: float, high: float, like: Any) -> Any:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)

    def set_statistics(norm: Any, mean: float = 0.0, std: float = 1.0) -> None:
        apart = torch.randn(norm.running_mean.shape, generator=generator, dtype=torch.float64)
        norm.running_mean.copy_(mean + 0.3 * std * apart)
        norm.running_var.copy_(std**2 * between(0.3, 3, norm.running_var))

    seen = set()

    def look(norm: Any, given: Any) -> None:
        x = given[0] if given and hasattr(given[0], "is_floating_point") else None
        if id(norm) not in seen and x is not None and x.numel() > 1 and x.std() > 0:
            set_statistics(norm, float(x.mean()), float(x.std()))
        seen.add(id(norm))

    model.eval()
    norms = list(batch_norms(model).values())
    with torch.no_grad():
        for norm in norms:
            set_statistics(norm)
            weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
            if weight is not None:
                sign = torch.where(between(0, 1, weight) < 0.5, -1.0, 1.0)
                weight.copy_(sign * between(0.5, 1.5, weight))
            if bias is not None:
                bias.copy_(between(-0.3, 0.3, bias))
        handles = [norm.register_forward_pre_hook(look) for norm in norms]
        call(model, inputs)
        for handle in handles:
            handle.remove()
    return model


def mapped(tree: Any, function: Any) -> Any:
    """A tree of arguments with every tensor replaced."""
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, function) for value in tree)
    return function(tree) if hasattr(tree, "is_floating_point") else tree


def _other(tensor: Any) -> Any:
    """Another input of the same kind."""
    return 0.8 * tensor + 0.1 * tensor.flip(-1) if tensor.is_floating_point() else tensor.flip(-1)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors of an output, by path, whatever it is made of."""
    if hasattr(tree, "is_floating_point"):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}.{number}")
    elif hasattr(tree, "__dict__"):
        yield from leaves(vars(tree), path)


def call(model: Any, inputs: Any) -> Any:
    """One call, with a tuple of positional or a dict of keyword arguments, both, or one argument."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], dict):
            return model(*inputs[0], **inputs[1])
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def observed(model: Any, inputs: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outputs of a network, and samples of what comes out of the named modules at their first call."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            if name not in seen and hasattr(output, "is_floating_point"):
                flat = output.detach().reshape(-1)
                seen[name] = flat[:: max(1, flat.numel() // SAMPLES)].clone()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
    try:
        outputs = {path: tensor.clone() for path, tensor in leaves(call(model, inputs))}
    finally:
        for handle in handles:
            handle.remove()
    return outputs, seen


def off_by(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest difference, relative to the largest value of its tensor; infinite for other shapes or no number."""
    worst = 0.0
    if expected.keys() != found.keys():
        return float("inf")
    for path, a in expected.items():
        b = found[path]
        if a.shape != b.shape:
            return float("inf")
        if not a.numel():
            continue
        if not a.is_floating_point():
            worst = max(worst, float((a != b).any()))
            continue
        same = a == b  # infinities of masks among them
        difference = (a - b).abs().masked_fill(same | (a.isnan() & b.isnan()), 0.0)
        error = float(difference.max() / a[a.isfinite()].abs().max().clamp_min(1e-300)) if a.isfinite().any() else 0.0
        worst = max(worst, error) if error == error else float("inf")
    return worst


def unfit(outputs: dict[str, Any], changed: dict[str, Any]) -> tuple[str | None, float]:
    """Why outputs are not worth comparing, if they are not; and how far they change with the input."""
    floats = {path: t for path, t in outputs.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return "outputs are empty", 0.0
    if not any(t.isfinite().all() and t.abs().max() > 0 for t in floats.values()):
        return "outputs are not finite, or zero", 0.0
    change = off_by(floats, {path: t for path, t in changed.items() if path in floats})
    return (None if change > 1e-6 else "outputs do not depend on the input"), change


def has_batch_norms(network: Network) -> bool:
    """Found without memory, where the network can be made so."""
    import torch

    try:
        with torch.device("meta"):
            return bool(batch_norms(network.make()))
    except Exception:  # then it is made in earnest
        return True


def examine(name: str, original_only: bool = False) -> Outcome:
    """Make one network, call it, convert it, compare."""
    import torch

    outcome = Outcome(name)
    started = time.perf_counter()
    network = find(name)
    if not has_batch_norms(network):
        outcome.skipped = "no batch norm"
        return outcome
    try:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64 if network.default else torch.float32)
        model, inputs = network.make(), network.inputs()
        norms = list(batch_norms(model))
        outcome.batch_norms = len(norms)
        if not norms:
            outcome.skipped = "no batch norm"
            return outcome
        if network.single:
            model, inputs = model.float(), mapped(inputs, lambda t: t.float() if t.is_floating_point() else t)
            outcome.tolerance = SINGLE_TOLERANCE
            outcome.notes.append(f"in float32, to {SINGLE_TOLERANCE:.0e}")
        else:
            model = model.double()
        enliven_(model, inputs)
        expected = observed(model, inputs, norms)
        again = observed(model, inputs, norms)
        changed, _ = observed(model, mapped(inputs, _other), [])
    except Exception as error:  # of the network itself, before normsurgeon has seen it
        outcome.skipped = f"the original fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        outcome.seconds = time.perf_counter() - started
        return outcome
    reason, outcome.change = unfit(expected[0], changed)
    if reason is not None:
        outcome.notes.append(f"{reason}: compared at the batch norms")
    if off_by(expected[0], again[0]) > 0:
        outcome.notes.append("not deterministic")
    if not network.single and any(
        t.is_floating_point() and t.dtype != torch.float64 for t in [*expected[0].values(), *expected[1].values()]
    ):
        outcome.notes.append("computes partly in less than float64")
    outcome.compared = len(expected[1])
    del again, changed
    if not original_only:
        try:
            _convert(model, inputs, norms, expected, outcome)
        except Exception as error:  # whatever goes wrong is this network's result
            outcome.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        outcome.failure = outcome.failure or _verdict(outcome, network.sorts, reason is not None)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _convert(model: Any, inputs: Any, norms: list[str], expected: Any, outcome: Outcome) -> None:
    import normsurgeon as ns

    for target in ("fold", "affine"):
        result = ns.convert(model, to=target, example_inputs=inputs, verdict=False)
        outputs, seen = observed(result.model, inputs, norms)
        outcome.errors[target] = off_by(expected[0], outputs)
        common = expected[1].keys() & seen.keys()
        outcome.at_norms[target] = off_by({n: expected[1][n] for n in common}, {n: seen[n] for n in common})
        if target == "fold":
            outcome.compared = len(common)
            outcome.sites = sum(not site.site.functional for site in result.sites)
            outcome.folded = sum(site.target == "fold" for site in result.sites)
            outcome.affine = sum(site.status == "converted" and site.target != "fold" for site in result.sites)
            outcome.refused = sum(site.status == "refused" for site in result.sites)
            unfolded = [site for site in result.sites if site.target != "fold" or site.status != "converted"]
            refused = [site for site in unfolded if site.status == "refused"]
            outcome.reasons = dict(Counter(kind(site.reason or "none given") for site in unfolded))
            outcome.refusals = dict(Counter(kind(site.reason or "none given") for site in refused))
        del result, outputs, seen
    converted = ns.convert(model, to="gn", example_inputs=inputs, check=False, verdict=False).model
    found = dict(leaves(call(converted, inputs)))
    if found.keys() != expected[0].keys() or any(found[p].dim() != t.dim() for p, t in expected[0].items()):
        outcome.failure = "gn gives outputs of another structure"


def _verdict(outcome: Outcome, sorts: bool, degenerate: bool) -> str | None:
    """What a network fails of. Outputs that are sorted by score may change order where scores are equal up to rounding;
    then what comes out at the batch norms decides, and a note says so."""
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


def kind(reason: str) -> str:
    """A reason without the names of one model's layers."""
    reason = reason.removeprefix("not folded: ")
    for mark in (
        "is also read by",
        "is also read directly",
        "is parametrized",
        "is not linear in its weight",
        "shares its parameters",
        "not always for this norm",
        "not reached",
        "channels",
        "holds running statistics",
    ):
        if mark in reason:
            return mark
    return " ".join(reason.split()[:2]) if "follows" in reason else reason[:80]


def _work(connection: Any, name: str, original_only: bool) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    connection.send(examine(name, original_only))


def in_process(name: str, original_only: bool) -> Outcome:
    """``examine`` in a process of its own, which is ended when its time is over."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, name, original_only), daemon=True)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv() if receiver.poll(SECONDS) else Outcome(name, failure=f"took more than {SECONDS} s")
    except EOFError:
        process.join()
        outcome = Outcome(name, failure=f"the process ended with {process.exitcode} (out of memory?)")
    process.kill()
    process.join()
    return outcome


def read(file: Path | None) -> dict[str, Outcome]:
    """The outcomes of earlier runs, by network; failures are to be tried again."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    found = [Outcome(**json.loads(line)) for line in lines if line.endswith("}")]  # the last may be half written
    return {outcome.name: outcome for outcome in found if outcome.failure is None}


def run(names: list[str], processes: int, original_only: bool, file: Path | None = None) -> list[Outcome]:
    """All outcomes, in the order of the names; those that ``file`` has are not run again, new ones go into it."""
    outcomes = read(file)
    todo = [name for name in names if name not in outcomes]
    with ThreadPoolExecutor(processes) as pool:
        for number, outcome in enumerate(pool.map(in_process, todo, [original_only] * len(todo)), 1):
            outcomes[outcome.name] = outcome
            if file is not None:
                with file.open("a") as stream:
                    stream.write("\n" + json.dumps(asdict(outcome)))
            counted = f"{outcome.batch_norms} batch norms" if original_only else f"of {outcome.batch_norms} folded"
            told = outcome.failure or outcome.skipped or (counted if original_only else f"{outcome.folded} {counted}")
            more = "".join(f"; {note}" for note in outcome.notes)
            print(
                f"{number}/{len(todo)} {outcome.name}: {told}{more} ({outcome.seconds:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    return [outcomes[name] for name in names]


def report(outcomes: list[Outcome], left_out: dict[str, str], chosen: str = "") -> str:
    """The section of docs/coverage.md; ``chosen`` says in words that it is of some networks only."""
    import torch

    done = [o for o in outcomes if o.skipped is None]
    reasons: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for outcome in done:
        reasons.update(outcome.reasons)
        refusals.update(outcome.refusals)
    skipped = {**left_out, **{o.name: o.skipped for o in outcomes if o.skipped not in (None, "no batch norm")}}
    without = sum(o.skipped == "no batch norm" for o in outcomes)
    lines = [
        TITLE,
        "",
        f"Made by `make coverage` with torch {torch.__version__.partition('+')[0]}"
        f"{', of ' + chosen + ' (`--only`)' if chosen else ''}. Do not edit by hand. Random "
        "weights, statistics and affines, float64, eval mode. Errors are relative to the largest value of each tensor: "
        "of all outputs, and of what comes out at each batch norm, against the original.",
        "",
        f"{len(done)} networks, {sum(o.batch_norms for o in done):,} batch norms: "
        f"{sum(o.folded for o in done):,} folded, "
        f"{sum(o.affine for o in done):,} by the affine, {sum(o.refused for o in done):,} refused; "
        f"**{sum(o.failure is not None for o in done)} failures**. {without} more networks have no batch norm.",
        "",
        "| network | batch norms | sites | folded | affine | refused | error of fold | of affine "
        "| at the norms | seconds | failure, notes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for o in done:
        errors = [f"{o.errors[t]:.0e}" if t in o.errors else "" for t in ("fold", "affine")]
        at_norms = f"{max(o.at_norms.values()):.0e}" if o.at_norms else ""
        told = "; ".join([*([f"**{o.failure}**"] if o.failure else []), *o.notes]).replace("|", "/")
        lines.append(
            f"| {o.name} | {o.batch_norms} | {o.sites} | {o.folded} | {o.affine} | {o.refused} | {errors[0]} "
            f"| {errors[1]} | {at_norms} | {o.seconds:.0f} | {told} |"
        )
    lines += ["", "### Why not folded", "", "| reason | sites |", "|---|---:|"]
    lines += [f"| {reason} | {n:,} |" for reason, n in reasons.most_common()]
    lines += ["", "### Refused", "", *([f"- {why}: {n}" for why, n in refusals.most_common()] or ["None."])]
    lines += ["", "### Left out", "", *([f"- {name}: {why}" for name, why in skipped.items()] or ["Nothing."])]
    return "\n".join(lines) + "\n"


def put_section(path: Path, section: str) -> None:
    """Write the section between its markers, and nothing else; at the end of a file that has none yet."""
    text = path.read_text() if path.exists() else ""
    before, start, rest = text.partition(START)
    if not start and TITLE in before:  # a section from before there were markers
        before = before.partition(TITLE)[0]
    after = rest.partition(END)[2]
    path.write_text(f"{before.rstrip()}\n\n{START}\n{section}{END}{after or chr(10)}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of networks, as package.name with * and ?")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=None, help="a file of outcomes: what it has is not run again")
    parser.add_argument("--original", action="store_true", help="make and call the originals, convert nothing")
    parser.add_argument("--list", action="store_true", help="print the names only")
    options = parser.parse_args()
    everything = networks()
    listed = {n: network for n, network in everything.items() if any(fnmatchcase(n, glob) for glob in options.only)}
    names = [name for name, network in listed.items() if isinstance(network, Network)]
    if options.list:
        print("\n".join(names))
        return 0
    outcomes = run(names, options.processes, options.original, options.results)
    chosen = f"{len(listed)} of the {len(everything)} networks that it knows" if len(listed) < len(everything) else ""
    text = report(outcomes, {name: why for name, why in listed.items() if isinstance(why, str)}, chosen)
    if options.output is None or options.original:
        print(text)
    else:
        put_section(options.output, text)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
