"""Convert every architecture of the installed timm that holds a BatchNorm, and write docs/coverage.md.

    python benchmarks/zoo.py [--to gn] [--processes 2] [--only GLOB] [--output docs/coverage.md]

Models are made on the meta device, so this takes minutes and little memory. For each, after one forward pass in eval
mode (some keep tensors of it): every batch norm is converted, kept or refused with a reason; none of the converted is
left in the module tree; the forward pass gives the original's output shapes. Exits with 1 if any architecture fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

BEYOND = "<!-- beyond -->"


@dataclass
class Outcome:
    """What became of one architecture."""

    name: str
    family: str = ""
    batch_norms: int = 0
    traced_by: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    whitening: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    failure: str | None = None
    seconds: float = 0.0


def examine(name: str, to: str) -> Outcome:
    """Create, plan, convert and run one architecture on the meta device."""
    import timm
    import torch

    from normsurgeon.graph.trace import shapes_of, trace
    from normsurgeon.norms.batchnorm import is_batch_norm
    from normsurgeon.surgery.convert import convert
    from normsurgeon.surgery.plan import plan

    started = time.perf_counter()
    outcome = Outcome(name)
    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        outcome.family = type(model).__module__.rpartition(".")[2]
        modules = [module for module in model.modules() if is_batch_norm(module)]
        outcome.batch_norms = len(modules)
        if not modules:
            return outcome
        traced = trace(model)
        decided = plan(model, to, traced=traced)
        outcome.traced_by = traced.traced_by
        outcome.counts = decided.counts
        for d in decided.decisions:
            if d.status == "refused":
                _count(outcome.refusals, d.reason or "")
            else:
                _count(outcome.whitening, d.whitening or "kept")
            if d.whitening == "affine":
                _count(outcome.reasons, _kind(d.reason or ""))
        if traced.input_shape is not None:
            with torch.device("meta"):
                model(torch.empty(traced.input_shape))
        converted = convert(model, decided, check=False, verdict=False).model
        left = sum(is_batch_norm(module) for module in converted.modules())
        expected = sum(d.status != "converted" and not d.site.functional for d in decided.decisions)
        if len(decided.decisions) < len(modules) or left != expected:
            outcome.failure = f"{left} batch norms left, {expected} expected"
        if traced.shape_problem:
            outcome.failure = f"original: {traced.shape_problem}"
        else:
            with torch.no_grad(), torch.device("meta"):
                shapes = shapes_of(converted(torch.empty(traced.input_shape)))
            if shapes != traced.output_shapes:
                outcome.failure = f"output {shapes} instead of {traced.output_shapes}"
    except Exception as error:  # whatever goes wrong is this architecture's result
        outcome.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    outcome.seconds = time.perf_counter() - started
    return outcome


def _count(counter: dict[str, int], key: str) -> None:
    counter[key] = counter.get(key, 0) + 1


def _kind(reason: str) -> str:
    """A reason without the names of one model's layers."""
    if "is also read by" in reason:
        return "its input has another reader"
    for mark in (
        "is parametrized",
        "is not linear in its weight",
        "shares its parameters",
        "times, not always for this norm",
        "times, behind",
        "one of its",
        "not reached",
        "read directly",
        "channels",
    ):
        if mark in reason:
            return mark
    return " ".join(reason.split()[:2]) if reason.startswith("follows") else reason


def _work(task: tuple[str, str]) -> Outcome:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return examine(*task)


def run(names: list[str], to: str, processes: int) -> list[Outcome]:
    """All outcomes, in the order of the names."""
    from rich.progress import track

    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=60) as pool:
        tasks = [(name, to) for name in names]
        outcomes = track(pool.imap(_work, tasks, chunksize=4), total=len(tasks), description="zoo")
        return list(outcomes)


def report(outcomes: list[Outcome], to: str, minutes: float | None, command: str) -> str:
    """docs/coverage.md."""
    import timm
    import torch

    with_bn = [o for o in outcomes if o.batch_norms or o.failure]
    failures = [o for o in with_bn if o.failure]
    totals = Counter()
    whitening, reasons, refusals = Counter(), Counter(), Counter()
    for o in with_bn:
        totals.update(o.counts)
        whitening.update(o.whitening)
        reasons.update(o.reasons)
        refusals.update(o.refusals)
    lines = [
        "# Coverage: every BatchNorm architecture of timm",
        "",
        f"Made by `{command}` with timm {timm.__version__} and torch {torch.__version__.partition('+')[0]}. "
        "Do not edit by hand.",
        "",
        "| | |",
        "|---|---:|",
        f"| architectures in timm looked at | {len(outcomes):,} |",
        f"| of them with a BatchNorm | {len(with_bn):,} |",
        f"| **failures** | **{len(failures)}** |",
        f"| BatchNorm modules | {sum(o.batch_norms for o in with_bn):,} |",
        f"| converted to `{to}` or what the plan put in its place | {totals['converted']:,} |",
        f"| kept | {totals['kept']:,} |",
        f"| refused | {totals['refused']:,} |",
        f"| whitened by folding into the producer | {whitening['fold']:,} |",
        f"| whitened by the analytic affine | {whitening['affine']:,} |",
        f"| exact (`affine`: too few elements for a per-sample norm) | {whitening['exact']:,} |",
        f"| architectures traced by torch.fx | {sum(o.traced_by == 'fx' for o in with_bn):,} |",
        f"| architectures that a recorded call stands for | {sum(o.traced_by == 'run' for o in with_bn):,} |",
        "",
        "An architecture counts as converted when, after one forward pass, every BatchNorm of it is converted, kept or "
        "refused with a reason, "
        "no converted one is left in the module tree, and a forward pass on the meta device gives the original's "
        "output shapes.",
        "",
        "## Why a producer could not absorb the whitening",
        "",
        "| reason | sites |",
        "|---|---:|",
        *[f"| {reason} | {n:,} |" for reason, n in reasons.most_common()],
        "",
        "## Refusals",
        "",
        *([f"- {reason}: {n}" for reason, n in refusals.most_common()] or ["None."]),
        "",
        "## Failures",
        "",
        *([f"- `{o.name}`: {o.failure}" for o in failures] or ["None."]),
        "",
        "## By family",
        "",
        "| family (timm module) | architectures | BatchNorms | folded | analytic | exact | refused | failures |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for family in sorted({o.family for o in with_bn}):
        of = [o for o in with_bn if o.family == family]
        sums = [sum(o.whitening.get(key, 0) for o in of) for key in ("fold", "affine", "exact")]
        refused = sum(o.counts.get("refused", 0) for o in of)
        bns, failed = sum(o.batch_norms for o in of), sum(o.failure is not None for o in of)
        lines.append(
            f"| {family} | {len(of)} | {bns:,} | {sums[0]:,} | {sums[1]:,} | {sums[2]:,} | {refused:,} | {failed} |"
        )
    if minutes is not None:
        print(f"{minutes:.1f} minutes", file=sys.stderr)
    return "\n".join(lines) + "\n"


def kept_section(path: Path) -> str:
    """What benchmarks/beyond.py wrote into the file, to be kept."""
    _, mark, rest = path.read_text().partition(BEYOND) if path.exists() else ("", "", "")
    return f"\n{mark}{rest}" if mark else ""


def main() -> int:
    """The command line."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="gn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="*")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    names = [name for name in timm.list_models() if fnmatchcase(name, options.only)]
    started = time.perf_counter()
    outcomes = run(names, options.to, options.processes)
    minutes = (time.perf_counter() - started) / 60
    text = report(outcomes, options.to, minutes, "make zoo")
    if options.output:
        options.output.write_text(text + kept_section(options.output))
    else:
        print(text)
    failures = [o for o in outcomes if o.failure]
    with_bn = sum(o.batch_norms > 0 for o in outcomes)
    print(
        f"{with_bn} architectures with a BatchNorm, {len(failures)} failures, {minutes:.1f} min",
        file=sys.stderr,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
