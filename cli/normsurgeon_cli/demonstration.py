"""What ``normsurgeon demo`` shows: a real network, photographs, and what four conversions make of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from normsurgeon._util.progress import OnProgress, Progress
from normsurgeon.data.demo_images import UNLIKE_IMAGENET, VIEWS, photographs, views
from normsurgeon.data.labels import class_names_for
from normsurgeon.data.transforms import DataConfig
from normsurgeon.inference.run import classifier_logits
from normsurgeon.models.checkpoint import save
from normsurgeon.models.load import load
from normsurgeon.surgery.agreement import Agreement
from normsurgeon.surgery.convert import convert
from normsurgeon.surgery.plain_swap import plain_swap

ROWS = ("BatchNorm (original)", "plain swap to gn", "plain swap to ln", "gn", "ln", "rms", "fold")


@dataclass(frozen=True)
class Row:
    """One network of the demo. ``agreement`` and ``kl`` (nats) compare it with the BatchNorm original.

    ``verdict`` is the conversion's own verdict, without these photographs; None if it was no conversion.
    """

    network: str
    agreement: float
    kl: float
    parameters: int
    seconds: float
    verdict: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """The demo's results: a row a network, and what each network sees on each whole photograph."""

    images: int
    rows: tuple[Row, ...]
    seen: tuple[tuple[str, ...], ...]
    output: Path


def demonstrate(output: Path, on_progress: OnProgress = lambda progress: None) -> Demonstration:
    """Convert EfficientNet-Lite0 in several ways, compare each with the original on views of the photographs, and
    write the ``ln`` conversion to ``output``.

    :raises WeightsUnavailableError: without the package of weights.
    :raises DataError: without the packages of photographs.
    :raises CheckpointError: when ``output`` cannot be written.
    """
    model = load("demo")
    files = [file for file in photographs() if file.stem not in UNLIKE_IMAGENET]
    images = views(files, DataConfig.of(model))
    names = class_names_for(model) or []
    rows: list[Row] = []
    answers: list[list[str]] = []
    reference: Tensor | None = None
    for step, label in enumerate(ROWS):
        on_progress(Progress(f"converting and comparing: {label}", step, len(ROWS)))
        started = time.perf_counter()
        network: nn.Module = model
        verdict = None
        if label.startswith("plain"):
            network = plain_swap(model, label.split()[-1])
        elif label != ROWS[0]:
            result = convert(model, to=label)
            network = result.model
            verdict = result.verdict.gist if result.verdict is not None else None
            if label == "ln":
                save(result, output)
        seconds = time.perf_counter() - started
        with torch.inference_mode():
            logits = torch.cat([classifier_logits(network, batch).double() for batch in images.split(2 * VIEWS)])
        reference = logits if reference is None else reference
        sums = Agreement()
        sums.update(logits, reference)
        agreement, kl = sums.compute()
        assert agreement is not None
        assert kl is not None
        parameters = sum(p.numel() for p in network.parameters())
        rows.append(Row(label, agreement, kl, parameters, seconds, verdict))
        whole = logits[::VIEWS].argmax(1).tolist()
        answers.append([names[i].split(",")[0] for i in whole])
    on_progress(Progress("done", len(ROWS), len(ROWS)))
    seen = tuple((file.stem, *(answer[i] for answer in answers)) for i, file in enumerate(files))
    return Demonstration(len(images), tuple(rows), seen, output)
