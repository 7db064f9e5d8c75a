"""Made-up Report records that look like real ones: a 12-layer network, a ResNet-50, and one with nothing in it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch

from normsurgeon.analysis.records import (
    Answers,
    Comparison,
    Finding,
    Flip,
    Guess,
    LayerPair,
    LayerStatistics,
    Matrix,
    Provenance,
    Score,
    Sensitivity,
    Similarity,
    SweepPoint,
)
from normsurgeon.analysis.report import Report
from normsurgeon.data.thumbnails import thumbnail

Named = tuple[str, str, str, tuple[int, ...]]
"""Layer, kind, class, shape."""


def small_layers() -> list[Named]:
    """Twelve layers."""
    layers: list[Named] = []
    for stage, (channels, size) in enumerate(((16, 32), (32, 16), (64, 8)), 1):
        layers.append((f"stage{stage}.conv", "convolution", "Conv2d", (channels, size, size)))
        layers.append((f"stage{stage}.norm", "norm", "GroupNorm", (channels, size, size)))
        layers.append((f"stage{stage}", "block", "Stage", (channels, size, size)))
    layers.append(("neck", "linear", "Linear", (64,)))
    layers.append(("neck_norm", "norm", "LayerNorm", (64,)))
    layers.append(("head", "linear", "Linear", (10,)))
    return layers


def resnet50_layers() -> list[Named]:
    """The 123 layers of a ResNet-50: 53 convolutions, 53 norms, 16 blocks, the classifier."""
    layers: list[Named] = [
        ("conv1", "convolution", "Conv2d", (64, 112, 112)),
        ("bn1", "norm", "GroupNorm", (64, 112, 112)),
    ]
    for stage, (blocks, width, size) in enumerate(((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for i, channels in enumerate((width, width, 4 * width), 1):
                layers.append((f"{name}.conv{i}", "convolution", "Conv2d", (channels, size, size)))
                layers.append((f"{name}.bn{i}", "norm", "GroupNorm", (channels, size, size)))
            if block == 0:
                layers.append((f"{name}.downsample.0", "convolution", "Conv2d", (4 * width, size, size)))
                layers.append((f"{name}.downsample.1", "norm", "GroupNorm", (4 * width, size, size)))
            layers.append((name, "block", "Bottleneck", (4 * width, size, size)))
    layers.append(("fc", "linear", "Linear", (1000,)))
    return layers


def statistics(layers: list[Named], seed: int = 0, drift: float = 0.0) -> tuple[LayerStatistics, ...]:
    """Believable numbers: variance grows along a stage and falls at its end, ReLU'd blocks hold zeros."""
    rng = random.Random(seed)
    entries = []
    for i, (layer, kind, class_name, shape) in enumerate(layers):
        depth = i / max(1, len(layers) - 1)
        scale = {"norm": 0.9, "convolution": 1.6, "block": 1.2 + 1.5 * depth, "linear": 2.0}[kind]
        scale *= math.exp(rng.gauss(0, 0.35) + drift * depth)
        means = tuple(rng.gauss(0.3 if kind == "block" else -0.15, 0.35) * scale for _ in range(shape[0]))
        stds = tuple(scale * math.exp(rng.gauss(0, 0.3)) for _ in range(shape[0]))
        squared_mean = sum(m * m for m in means) / len(means)
        channel_var = sum(s * s for s in stds) / len(stds)
        mean = sum(means) / len(means)
        var = channel_var + squared_mean - mean * mean
        between = channel_var * (0.05 + 0.6 * depth**2)
        dead = tuple(sorted(rng.sample(range(shape[0]), k=min(shape[0], 1 + shape[0] // 40)))) if kind == "norm" else ()
        rank = shape[0] * (0.75 - 0.5 * depth) * rng.uniform(0.7, 1.0)
        entries.append(
            LayerStatistics(
                layer=layer,
                kind=kind,
                class_name=class_name,
                shape=shape,
                channels=shape[0],
                calls=1,
                values=500 * math.prod(shape),
                mean=mean,
                var=var,
                min=0.0 if kind == "block" else mean - 6 * math.sqrt(var),
                max=mean + 9 * math.sqrt(var),
                abs_mean=0.8 * math.sqrt(var),
                zero_fraction=rng.uniform(0.35, 0.7) if kind == "block" else 0.0,
                skewness=rng.gauss(0.2, 0.5),
                kurtosis=math.exp(rng.gauss(0.5, 0.8)),
                squared_mean=squared_mean,
                channel_var=channel_var,
                between_var=between,
                within_var=channel_var - between,
                dead_channels=len(dead),
                dormant_channels=len(dead) + 2,
                dead=dead,
                dormant=dead,
                effective_rank=rank,
                participation_ratio=rank * 0.45,
                rank_samples=500,
                group_fluctuation=0.08 + 0.5 * depth**2 * rng.uniform(0.6, 1.2) if kind == "norm" else None,
                mean_fluctuation=0.05 + 0.3 * depth**2 * rng.uniform(0.6, 1.2) if kind == "norm" else None,
                groups=max(1, min(32, shape[0] // 16)) if kind == "norm" else None,
                channel_means=means,
                channel_stds=stds,
            )
        )
    return tuple(entries)


def matrix(rows: int, columns: int, seed: int = 0, floor: float = 0.05) -> Matrix:
    """Blocks along the diagonal that fade with the distance, symmetric when square."""
    rng = random.Random(seed)
    noise = {(i, j): rng.uniform(-0.06, 0.06) for i in range(rows) for j in range(columns)}

    def value(i: int, j: int) -> float:
        if i == j and rows == columns:
            return 1.0
        low, high = (i, j) if i <= j else (j, i)
        apart = abs(i / rows - j / columns)
        stage = 0.25 if int(4 * i / rows) == int(4 * j / columns) else 0.0
        return max(-0.02, min(1.0, floor + stage + 0.7 * math.exp(-4 * apart) + noise.get((low, high), 0.0)))

    return tuple(tuple(value(i, j) for j in range(columns)) for i in range(rows))


def similarity(layers: list[Named]) -> Similarity:
    """Three matrices; the cosine only where the shapes agree."""
    size = len(layers)
    shapes = [shape for *_, shape in layers]
    alike = matrix(size, size, seed=3, floor=0.0)
    cosine = tuple(tuple(alike[i][j] if shapes[i] == shapes[j] else None for j in range(size)) for i in range(size))
    return Similarity(
        tuple(name for name, *_ in layers),
        matrix(size, size, seed=1),
        cosine,
        matrix(size, size, seed=2),
        samples=500,
        batch_size=50,
        notes=("CKA from 500 images in batches of 50: differences below about 0.02 are noise",),
    )


def answers() -> Answers:
    """Two images with another answer, one of them with a picture."""
    flips = (
        Flip(17, 2.1, (Guess("tabby, tabby cat", 0.61), Guess("tiger cat", 0.22)), (Guess("lynx", 0.4),), "tiger cat",
             thumbnail(torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8))),
        Flip(3, 0.7, (Guess("<b>", 0.5),), (Guess("pier", 0.3), Guess("dock", 0.2)), None, None),
    )  # fmt: skip
    return Answers(500, 0.0154, 0.806, 0.0177, 0.884, 0.0143, 47, 8, 69, flips)


def comparison(layers: list[Named], baseline: str) -> Comparison:
    """Layers that drift from the baseline with depth; the head has no counterpart of the same shape."""
    rng = random.Random(11)
    names = tuple(name for name, *_ in layers)
    pairs = []
    for i, (name, _, _, shape) in enumerate(layers):
        depth = i / max(1, len(layers) - 1)
        error = 0.02 + 0.55 * depth**2 * rng.uniform(0.6, 1.4)
        pairs.append(
            LayerPair(
                layer=name,
                baseline_layer=name,
                cka=max(0.0, 1 - 0.6 * error**1.5),
                gram_cosine=max(0.0, 1 - 0.5 * error**1.5),
                cosine=None if i == 1 else max(0.0, 1 - 0.5 * error),
                relative_error=error,
                channel_cosine=max(0.0, 1 - 0.7 * error),
                worst_channel=rng.randrange(shape[0]),
                worst_channel_cosine=max(-0.2, 1 - 2.2 * error),
                mean_shift=0.3 * error,
                std_ratio=1 + 0.2 * rng.gauss(0, error),
            )
        )
    size = len(layers)
    return Comparison(
        baseline=baseline,
        layers=names,
        baseline_layers=names,
        cka=matrix(size, size, seed=5),
        gram_cosine=matrix(size, size, seed=6),
        pairs=tuple(pairs),
        only_baseline=("avgpool.extra",),
        samples=500,
        agreement=0.862,
        kl=0.1734,
        answers=answers(),
        notes=("the cosine is left out where the shapes differ",),
    )


def sensitivity(layers: list[Named]) -> tuple[Sensitivity, ...]:
    """Four measures, one with standard errors, one with negative scores, one by parameter tensor."""
    rng = random.Random(5)
    names = [name for name, *_ in layers]
    weights = [f"{name}.{what}" for name, kind, *_ in layers if kind != "block" for what in ("weight", "bias")]

    def scores(over: list[str], spread: float, low: float = 0.0, errors: bool = False) -> tuple[Score, ...]:
        made = []
        for i, name in enumerate(over):
            value = math.exp(rng.gauss(-3 + 2 * i / len(over), spread)) - low
            made.append(Score(name, value, 0.15 * abs(value) + 0.001 if errors else None))
        return tuple(made)

    explained = {"sigma": 0.1, "failed": dict.fromkeys(names, "is not called"), "delta": dict.fromkeys(names, 0.01)}
    taylor = scores(names, 0.8), scores(weights, 1.0)
    fisher = scores(names, 1.1), scores(weights, 1.2)
    trace = scores(names, 0.9, 0.04, True)
    noise = Score(names[0], None), *scores(names[1:], 0.7, errors=True)
    converged = {"converged": True, "relative_stderr": 0.0312}
    return (
        Sensitivity("taylor", "labels", *taylor, "nats: sum of |gradient · weight|", 500, None, {"unused": []}),
        Sensitivity("fisher", "prediction", *fisher, "nats² a unit²", 500),
        Sensitivity("hessian_trace", "labels", trace, (), "trace a parameter", 128, 20, converged),
        Sensitivity("noise", "prediction", noise, (), "KL, nats", 500, 4, explained),
    )


def sweep(layers: list[Named]) -> tuple[SweepPoint, ...]:
    """Each norm site at several eps and group counts."""
    rng = random.Random(8)
    points = []
    for layer in [name for name, kind, *_ in layers if kind == "norm"]:
        harm = math.exp(rng.gauss(-4, 1.2))
        for value in (1e-5, 1e-3, 1e-1, 1.0, 3.0):
            kl = harm / (1 + value)
            points.append(SweepPoint(layer, "eps", value, kl * 0.8 - 0.001, kl))
        for value in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
            kl = harm * value**0.7
            points.append(SweepPoint(layer, "groups", value, kl * 0.8, None if value == 4 else kl))
    return tuple(points)


def history() -> tuple[dict[str, object], ...]:
    """A calibration, and a fine-tuning with its curve: one entry a step."""
    steps = [
        {"event": "finetune", "step": step, "loss": 2.1 * math.exp(-step / 180) + 0.35 + 0.05 * math.sin(step),
         "lr": 1e-3 * (1 - step / 600), **({"top1": 0.72 + 0.1 * step / 600} if step % 60 == 0 else {})}
        for step in range(0, 600, 10)
    ]  # fmt: skip
    return ({"event": "calibrate", "images": 256, "sites": 53}, *steps)


FINETUNE = {
    "event": "finetune", "steps": 440, "images": 28160, "seconds": 12.4, "data": "digits", "settings": {"lr": 5e-5},
    "before": {"top1": 0.931, "loss": 0.25, "kl": 0.04},
    "best": {"step": 400, "top1": 0.975, "loss": 0.1, "kl": 0.0106},
    "curves": {
        "steps": [{"step": 1, "epoch": 0.1, "loss": 2.0, "grad_norm": 3.0}, {"step": 2, "epoch": 0.2, "loss": 1.0}],
        "epochs": [{"step": 0, "top1": 0.931, "loss": 0.25}, {"step": 400, "top1": 0.975, "loss": None}],
    },
}  # fmt: skip
DONE: tuple[dict[str, Any], ...] = (
    {"event": "convert", "to": "gn", "converted": 15, "kept": 1, "refused": 0},
    {"event": "calibrate", "images": 512, "matched_images": 128, "sites": 15, "balanced": 14, "forward_passes": 3,
     "worst_error": 0.3312, "worst_site": "layer4.0.bn2", "seconds": 3.2},
    {"event": "reconstruct", "images": 270, "held_out": 1, "blocks": 4, "steps": 60, "best_step": 40,
     "kl_before": 0.829, "kl": None, "curve": [[0, 0.829], [40, 0.494], [60, None]], "seconds": 99.6},
    FINETUNE,
)  # fmt: skip
"""What a checkpoint tells of a conversion that was recovered in three ways."""


def findings(layers: list[Named]) -> tuple[Finding, ...]:
    """One of each severity and more."""
    norms = [name for name, kind, *_ in layers if kind == "norm"] * 2  # a network may have but one
    return (
        Finding("drift", "problem", norms[-1],
                f"{norms[-1]} no longer computes what it did: its output differs from the baseline's by 61.2 %",
                "relative_error", 0.612, f"Keep it as a frozen affine: --keep {norms[-1]}"),
        Finding("dead_channels", "warning", norms[-2], f"3 of 64 channels of {norms[-2]} never fire",
                "dead_channels", 3.0, "Prune them, or calibrate with more images"),
        Finding("rank_collapse", "warning", layers[-1][0],
                "the features of the last layer span few directions: effective rank 4.17 of 10", "effective_rank",
                4.17, "Analyse more images before believing it: the rank is bounded by 500 samples"),
        Finding("between_share", "notice", norms[1], "most of this layer's variance lies between images, which a "
                "per-sample norm removes", "between_share", 0.643, "Prefer rms, which removes no mean"),
        Finding("agreement", "good", None, "The converted network gives the baseline's answer on 86.2 % of images",
                "agreement", 0.862),
    )  # fmt: skip


def make_report(layers: list[Named], model: str, whole: bool = True) -> Report:
    """A report of those layers: all of its parts, or statistics alone."""
    report = Report(
        Provenance(
            model=model,
            data="imagenet-sample",
            images=500,
            skipped=3,
            batch_size=50,
            seed=0,
            device="cpu",
            labelled=True,
            created="2026-11-24T04:30:00+00:00",
            seconds=184.2,
            versions={"normsurgeon": "0.2.0", "torch": "2.15.0", "timm": "1.0.31", "python": "3.11.7"},
        ),
        statistics=statistics(layers),
    )
    if not whole:
        return report
    baseline = model.partition(" ")[0]
    return replace(
        report,
        provenance=replace(
            report.provenance,
            baseline=baseline,
            command=f"normsurgeon analyze {baseline}-gn.safetensors --baseline {baseline} --data imagenet-sample "
            "--html report.html",
            notes=("3 files could not be read and were left out",),
        ),
        findings=findings(layers),
        baseline_statistics=statistics(layers, seed=1, drift=-0.5),
        similarity=similarity(layers),
        comparison=comparison(layers, baseline),
        sensitivity=sensitivity(layers),
        sweep=sweep(layers),
        history=history(),
    )


def small_report() -> Report:
    """Twelve layers, everything measured."""
    return make_report(small_layers(), "smallnet (gn)")


def resnet50_report() -> Report:
    """123 layers, everything measured."""
    return make_report(resnet50_layers(), "resnet50 (gn)")


def bare_report() -> Report:
    """Nothing but where it comes from."""
    return Report(Provenance("nothing", "demo", 0, 0, 1, 0, "cpu"))


def hollow_report() -> Report:
    """A small report in which every number that may be None is None."""
    report = small_report()
    hollow = []
    for entry in report.statistics or ():
        optional = [name for name, kind in LayerStatistics.__annotations__.items() if "None" in str(kind)]
        hollow.append(replace(entry, channel_means=(), channel_stds=(), **dict.fromkeys(optional)))
    assert report.similarity
    assert report.comparison
    assert report.sensitivity
    empty: Matrix = tuple((None,) * len(hollow) for _ in hollow)
    pairs = tuple(LayerPair(p.layer, p.baseline_layer, *(None,) * 5) for p in report.comparison.pairs)
    measures = tuple(
        replace(m, layers=tuple(replace(s, score=None, stderr=None) for s in m.layers)) for m in report.sensitivity
    )
    return replace(
        report,
        provenance=replace(report.provenance, seconds=None, command=None, created=""),
        findings=tuple(replace(f, value=None, layer=None) for f in report.findings),
        statistics=tuple(hollow),
        baseline_statistics=tuple(hollow),
        similarity=replace(report.similarity, cka=empty, cosine=empty, gram_cosine=empty),
        comparison=replace(report.comparison, cka=None, gram_cosine=None, pairs=pairs, agreement=None, kl=None),
        sensitivity=measures,
        sweep=tuple(replace(p, loss_change=None, kl=None) for p in report.sweep),
        history=({"event": "calibrate", "loss": None}, {"step": 1, "loss": None}),
    )
