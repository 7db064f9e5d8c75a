"""Convert every architecture of the installed timm that holds a BatchNorm, and write docs/coverage.md.

    python benchmarks/zoo.py [--to gn] [--processes 2] [--only GLOB] [--output docs/coverage.md]

Models are made on the meta device, so this takes minutes and little memory. For each, after one forward pass in eval
mode (some keep tensors of it): every batch norm is converted, kept or refused with a reason; none of the converted is
left in the module tree; the forward pass gives the original's output shapes. Exits with 1 if any architecture fails.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import coverage_report
import timm
import torch
from coverage_report import kind, listed, total
from measuring import brief, parser, table

from normsurgeon.graph.trace import shapes_of, trace
from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.surgery import convert
from normsurgeon.surgery.plan import plan


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


def examine(name: str, to: str) -> Outcome:
    """Create, plan, convert and run one architecture on the meta device."""
    outcome = Outcome(name)
    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        _convert(model, to, outcome)
    except Exception as error:  # whatever goes wrong is this architecture's result
        outcome.failure = brief(error, 200)
    return outcome


def _convert(model: torch.nn.Module, to: str, outcome: Outcome) -> None:
    outcome.family = type(model).__module__.rpartition(".")[2]
    outcome.batch_norms = sum(map(is_batch_norm, model.modules()))
    if not outcome.batch_norms:
        return
    traced = trace(model)
    decided = plan(model, to, traced=traced)
    outcome.traced_by, outcome.counts = traced.traced_by, decided.counts
    refused = [d for d in decided.decisions if d.status == "refused"]
    outcome.refusals = Counter(d.reason or "" for d in refused)
    outcome.whitening = Counter(d.whitening or "kept" for d in decided.decisions if d not in refused)
    outcome.reasons = Counter(kind(d.reason) for d in decided.decisions if d.whitening == "affine")
    if traced.input_shape is not None:
        with torch.device("meta"):
            model(torch.empty(traced.input_shape))
    converted = convert.convert(model, decided, check=False, verdict=False).model
    left = sum(map(is_batch_norm, converted.modules()))
    expected = sum(d.status != "converted" and not d.site.functional for d in decided.decisions)
    if len(decided.decisions) < outcome.batch_norms or left != expected:
        outcome.failure = f"{left} batch norms left, {expected} expected"
    if traced.shape_problem:
        outcome.failure = f"original: {traced.shape_problem}"
        return
    with torch.no_grad(), torch.device("meta"):
        shapes = shapes_of(converted(torch.empty(traced.input_shape)))
    if shapes != traced.output_shapes:
        outcome.failure = f"output {shapes} instead of {traced.output_shapes}"


def _set_up() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def run(names: list[str], to: str, processes: int) -> list[Outcome]:
    """All outcomes, in the order of the names."""
    from rich.progress import track

    with multiprocessing.get_context("spawn").Pool(processes, _set_up, maxtasksperchild=60) as pool:
        outcomes = pool.imap(partial(examine, to=to), names, chunksize=4)
        return list(track(outcomes, total=len(names), description="zoo"))


def report(outcomes: list[Outcome], to: str) -> str:
    """The first part of docs/coverage.md."""
    with_bn = [o for o in outcomes if o.batch_norms or o.failure]
    failures = [o for o in with_bn if o.failure]
    counts, whitening = total(o.counts for o in with_bn), total(o.whitening for o in with_bn)
    facts = (
        ("architectures in timm", len(outcomes)),
        ("of them with a BatchNorm", len(with_bn)),
        ("**failures**", f"**{len(failures)}**"),
        ("BatchNorm modules", sum(o.batch_norms for o in with_bn)),
        (f"converted to `{to}` or what the plan put in its place", counts["converted"]),
        ("kept", counts["kept"]),
        ("refused", counts["refused"]),
        ("whitened by folding into the producer", whitening["fold"]),
        ("whitened by the analytic affine", whitening["affine"]),
        ("exact (`affine`: too few elements for a per-sample norm)", whitening["exact"]),
        ("architectures traced by torch.fx", sum(o.traced_by == "fx" for o in with_bn)),
        ("architectures that a recorded call stands for", sum(o.traced_by == "run" for o in with_bn)),
    )
    families = {family: [o for o in with_bn if o.family == family] for family in sorted({o.family for o in with_bn})}
    by_family = [
        (
            family,
            len(of),
            sum(o.batch_norms for o in of),
            *(sum(o.whitening.get(key, 0) for o in of) for key in ("fold", "affine", "exact")),
            sum(o.counts.get("refused", 0) for o in of),
            sum(o.failure is not None for o in of),
        )
        for family, of in families.items()
    ]
    columns = (
        "family (timm module)", "architectures", "BatchNorms", "folded", "analytic", "exact", "refused", "failures",
    )  # fmt: skip
    return f"""# Coverage: every BatchNorm architecture of timm

Made by `make zoo` with timm {timm.__version__} and torch {torch.__version__.partition("+")[0]}. Do not edit by hand.

{table(("", ""), facts)}

An architecture counts as converted when, after one forward pass, every BatchNorm of it is converted, kept or refused \
with a reason, no converted one is left in the module tree, and a forward pass on the meta device gives the original's \
output shapes.

## Why a producer could not absorb the whitening

{coverage_report.reasons(total(o.reasons for o in with_bn))}

## Refusals

{listed(total(o.refusals for o in with_bn).most_common())}

## Failures

{listed((f"`{o.name}`", o.failure) for o in failures)}

## By family

{table(columns, by_family)}
"""


def main() -> int:
    """The command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--to", default="gn")
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--only", default="*")
    arguments.add_argument("--output", type=Path, default=None)
    options = arguments.parse_args()
    started = time.perf_counter()
    outcomes = run([n for n in timm.list_models() if fnmatchcase(n, options.only)], options.to, options.processes)
    if options.output:
        coverage_report.write(options.output, timm=report(outcomes, options.to))
    else:
        print(report(outcomes, options.to))
    failures, with_bn = sum(o.failure is not None for o in outcomes), sum(o.batch_norms > 0 for o in outcomes)
    minutes = (time.perf_counter() - started) / 60
    print(f"{with_bn} architectures with a BatchNorm, {failures} failures, {minutes:.1f} min", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
