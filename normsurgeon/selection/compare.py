"""``compare``: several conversions of one network in one table, and which to take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.calls import Call, on, outputs_of
from normsurgeon.data.label_ways import Labels
from normsurgeon.errors import UsageError
from normsurgeon.graph.skeleton import why_valueless
from normsurgeon.inference.run import eval_mode, home_of, placed
from normsurgeon.inference.views import Data
from normsurgeon.render.document import Bars, Column, Document, Facts, Finding, Findings, Notes, Section, Table
from normsurgeon.render.presentable import Presentable
from normsurgeon.selection.damage import Answers, Damage, damages, mean_and_error
from normsurgeon.selection.sweep import SweptBatches
from normsurgeon.surgery.convert import convert
from normsurgeon.surgery.deciding import Request, parse_target
from normsurgeon.surgery.plan import plan
from normsurgeon.surgery.probing import synthetic_calls

TARGETS = ("rms", "ln", "gn")
TIMED_RUNS = 5


@dataclass(frozen=True)
class ComparedConversion:
    """One conversion of the network that was compared.

    target      as ``--to`` takes it, with groups and eps where those were given: ``gn:8``
    converted, exact, left  sites that got the norm, became a fixed affine, or stay batch norms
    kept        in one word: exactly, closely, partly, hardly, not
    norm_error  how far the new norms are from the fixed affines that they stand in for, root mean square over the sites
                (an exact one counts as 0): on the first batch of the data, or on synthetic features
    kl, lost    on data, of a classifier: mean KL to the original in nats, and the share of answers (with labels: of
                right answers) that are lost; ``kl_stderr`` and ``lost_stderr`` are their standard errors
    error       on data, of any other network: relative error of its outputs, with ``error_stderr``
    parameters  of the converted network, over the original's
    time        of a forward pass, over the original's (median of runs in turns)
    advice      what to do next
    """

    target: str
    converted: int
    exact: int
    left: int
    kept: str
    norm_error: float | None
    kl: float | None
    kl_stderr: float | None
    lost: float | None
    lost_stderr: float | None
    error: float | None
    error_stderr: float | None
    parameters: float
    time: float | None
    advice: str

    @property
    def score(self) -> float:
        """What the order goes by, least first: the damage on data, or the norms' error without."""
        for value in (self.kl, self.error, self.norm_error):
            if value is not None:
                return value
        return 0.0


@dataclass(frozen=True)
class ComparedNorms(Presentable):
    """What ``compare`` gives: ``conversions``, the one that keeps most first.

    images  of the data; 0: synthetic images alone
    """

    model: str
    images: int
    labelled: bool
    conversions: tuple[ComparedConversion, ...]

    @property
    def recommendation(self) -> str:
        """In words: what to take, and where the difference to the next is no more than noise."""
        best, *rest = self.conversions
        words = [f"take {best.target}: the function is {best.kept} kept"]
        equal = [other.target for other in rest if self._alike(best, other)]
        if equal:
            words.append(f"{' and '.join(equal)} {'are' if len(equal) > 1 else 'is'} not measurably worse")
        faster = [o for o in rest if o.target in equal and o.time and best.time and o.time < 0.9 * best.time]
        if faster:
            words.append(
                f"{faster[0].target} is faster ({faster[0].time:.2f} against {best.time:.2f} of BatchNorm's time)"
            )
        words.append(best.advice)
        return "; ".join(words)

    def _alike(self, a: ComparedConversion, b: ComparedConversion) -> bool:
        if a.kl is not None and b.kl is not None and a.kl_stderr is not None and b.kl_stderr is not None:
            return abs(a.kl - b.kl) <= 2 * max(a.kl_stderr, b.kl_stderr)
        if a.error is not None and b.error is not None and a.error_stderr is not None and b.error_stderr is not None:
            return abs(a.error - b.error) <= 2 * max(a.error_stderr, b.error_stderr)
        return abs(a.score - b.score) <= 0.1 * max(a.score, b.score)  # within what different synthetic images change

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "model": self.model,
            "images": self.images,
            "recommendation": self.recommendation,
            "conversions": [asdict(each) for each in self.conversions],
        }

    def document(self) -> Document:
        """The recommendation, the table, and a bar for each."""
        lost = "right answers lost" if self.labelled else "images with another answer than the original's"
        columns = (
            Column("norm"),
            Column("function", "text", "how much of it is kept"),
            Column("KL", "number", "mean KL to the original, nats"),
            Column("± KL", "number"),
            Column("lost", "percent", lost),
            Column("± lost", "percent"),
            Column("error", "percent", "relative error of the outputs"),
            Column("± error", "percent"),
            Column("norm error", "percent", "how far the new norms are from the batch norms"),
            Column("time", "number", "of a forward pass, over the original's"),
            Column("parameters", "number", "over the original's"),
            Column("sites", "text", "that got the norm, and others"),
        )
        rows = tuple(
            (
                c.target, c.kept, c.kl, c.kl_stderr, c.lost, c.lost_stderr, c.error, c.error_stderr, c.norm_error,
                c.time, c.parameters, _sites(c),
            )
            for c in self.conversions
        )  # fmt: skip
        source = f"{self.images} images" if self.images else "synthetic images; with --data, on yours"
        spread = [(c.target, c.score, c.kl_stderr if c.kl is not None else c.error_stderr) for c in self.conversions]
        words = "KL to the original" if self.conversions[0].kl is not None else "error of the norms"
        section = Section(
            "norms",
            "Norms",
            (
                Findings((Finding(self.recommendation, "good", kind="recommendation"),)),
                Table(columns, rows, noun="conversions"),
                Bars(tuple(spread), words),
                Notes(
                    ("Least damage first. A batch norm that is kept or fixed costs nothing and is no per-sample norm.",)
                ),
            ),
        )
        return Document(
            "normsurgeon", f"Norms for {self.model}", (section,), facts=(Facts((("measured on", source),)),)
        )


def compare(
    model: nn.Module,
    data: Data | None = None,
    *,
    to: Sequence[str] = TARGETS,
    groups: Sequence[int | Literal["auto"]] = ("auto",),
    eps: Sequence[float | None] = (None,),
    labels: Labels = "by-name",
    batch_size: int = 32,
    max_images: int | None = 300,
    device: str | torch.device | None = None,
    workers: int = 0,
    example_inputs: Any = None,
    name: str | None = None,
    on_progress: OnProgress | None = None,
) -> ComparedNorms:
    """Convert ``model`` to several norms and say what each keeps, costs and needs next.

    data    a data spec, an ImageSource or batches to measure the damage on; None: the norms' own error on synthetic
            images is measured, whose order agrees with that of the damage (docs/targets.md)
    to      targets, as ``normsurgeon.plan`` takes them; ``gn:8`` sets the groups, too
    groups  for ``gn`` without a number of its own: each of these
    eps     each of these; None is the batch norm's own
    labels  as for ``evaluate``: with them, the share of right answers that are lost is measured

    :raises UsageError: nothing to compare, or a model without weights.
    :raises TargetError: an unknown target, or groups that divide no site's channels.
    :raises ConversionError: a model without a batch norm.
    :raises DataError: no images.

    >>> import timm
    >>> found = compare(timm.create_model("test_resnet").eval(), to=["ln", "affine"])
    >>> [(each.target, each.kept) for each in found.conversions][0]
    ('affine', 'exactly')
    """
    why = why_valueless(model)
    if why is not None:
        raise UsageError(f"there is nothing to compare: {why}")
    requests = _requests(to, groups, eps)
    if not requests:
        raise UsageError("there is nothing to compare: give at least one target, such as gn")
    batches = SweptBatches.open(model, data, batch_size, max_images, workers, labels) if data is not None else None
    inputs = list(batches.labelled()) if batches is not None else []
    if inputs and example_inputs is None:
        example_inputs = inputs[0][0][:1]
    found = []
    with placed(model, device), eval_mode(model):
        answers = [_answers(model, x, labels) for x, labels in inputs]
        for done, (label, request) in enumerate(requests):
            if on_progress is not None:
                on_progress(Progress(f"converting to {label}", done, len(requests)))
            found.append(_measured(model, label, request, inputs, answers, example_inputs))
    if on_progress is not None:
        on_progress(Progress("compared", len(requests), len(requests)))
    return ComparedNorms(
        model=name or type(model).__name__,
        images=sum(len(x) for x, _ in inputs),
        labelled=any(labels is not None for _, labels in inputs),
        conversions=tuple(sorted(found, key=lambda c: (c.kept == "not", c.score))),
    )


def _requests(
    to: Sequence[str], groups: Sequence[int | Literal["auto"]], eps: Sequence[float | None]
) -> list[tuple[str, Request]]:
    found: dict[str, Request] = {}
    for text in to:
        request = parse_target(text, Request(None))
        several = groups if request.target == "gn" and request.groups is None else (request.groups,)
        for count in several:
            for softening in eps:
                label = str(request.target) + (f":{count}" if isinstance(count, int) else "")
                label += f", eps {softening:g}" if softening is not None else ""
                found[label] = replace(request, groups=count if isinstance(count, int) else None, eps=softening)
    return list(found.items())


@torch.no_grad()
def _answers(model: nn.Module, inputs: Any, labels: Any) -> Answers:
    return Answers.of(outputs_of(model, on(inputs, *home_of(model))), len(inputs), labels=labels)


def _measured(
    model: nn.Module, label: str, request: Request, inputs: Sequence[Any], answers: Sequence[Answers], example: Any
) -> ComparedConversion:
    made = plan(model, str(request.target), groups=request.groups or "auto", eps=request.eps, example_inputs=example)
    result = convert(model, made, probe=inputs[0][0] if inputs else None)
    assert result.plan is not None
    damage = Damage()
    for (x, _), before in zip(inputs, answers, strict=True):
        with torch.no_grad():
            after = Answers.of(outputs_of(result.model, on(x, *home_of(model))), len(x), before.classes)
        damage.update(*damages(before, after, len(x)))
    mean, stderr = damage.compute() if inputs else (None, None)
    lost, lost_stderr = mean_and_error(damage.lost) if damage.lost else (None, None)
    root = mean**0.5 if mean is not None and not damage.classes else None
    verdict = result.verdict
    exact = sum(d.status == "converted" and d.target in ("affine", "fold") for d in result.plan.decisions)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (result.model, model)]
    return ComparedConversion(
        target=label,
        converted=result.counts["converted"] - (exact if request.target not in ("affine", "fold") else 0),
        exact=exact if request.target not in ("affine", "fold") else 0,
        left=result.counts["kept"] + result.counts["refused"],
        kept=verdict.kept if verdict is not None else "not measured",
        norm_error=verdict.norm_error if verdict is not None and verdict.worst_site is not None else None,
        kl=mean if damage.classes else None,
        kl_stderr=stderr if damage.classes else None,
        lost=lost,
        lost_stderr=lost_stderr,
        error=root,
        error_stderr=stderr / (2 * root) if root and stderr is not None else None,
        parameters=sizes[0] / max(1, sizes[1]),
        time=_time_ratio(result.model, model, made.followed, inputs),
        advice=verdict.advice if verdict is not None else "",
    )


def _time_ratio(new: nn.Module, old: nn.Module, followed: Any, inputs: Sequence[Any]) -> float | None:
    """The median time of a forward pass over the original's, measured in turns; None for what cannot be run."""
    calls: Iterable[Any] = [inputs[0][0]] if inputs else (c for c, _ in synthetic_calls(old, followed, count=8))
    for given in calls:
        x = on(given, *home_of(old)) if not isinstance(given, Call) else given
        times: dict[nn.Module, list[float]] = {new: [], old: []}
        try:
            with torch.no_grad(), eval_mode(new):
                for _ in range(1 + TIMED_RUNS):
                    for each in (new, old):
                        begin = time.perf_counter()
                        outputs_of(each, x)
                        if torch.cuda.is_available():
                            torch.cuda.synchronize()
                        times[each].append(time.perf_counter() - begin)
        except Exception:  # a foreign forward may refuse an input in any way
            continue
        return statistics.median(times[new][1:]) / max(statistics.median(times[old][1:]), 1e-9)
    return None


def _sites(c: ComparedConversion) -> str:
    others = [f"{c.exact} affine"] * bool(c.exact) + [f"{c.left} left"] * bool(c.left)
    return f"{c.converted}" + (f" ({', '.join(others)})" if others else "")
