"""What other settings of a norm layer do to the loss: its eps, its groups, the size of its affine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgeon._util.progress import OnProgress
from normsurgeon._util.suggest import suggest
from normsurgeon.analysis.records import SweepPoint
from normsurgeon.analysis.sensitivity.borrowing import attribute, borrowed, restored
from normsurgeon.analysis.sensitivity.objective import Batches, Loss, Objective, cross_entropies
from normsurgeon.errors import PatternError, UsageError
from normsurgeon.inference.run import classifier_logits, name_of
from normsurgeon.norms.families import family_of
from normsurgeon.norms.layers import ChannelAffine
from normsurgeon.patterns import shorten

EPS_FACTORS = (0.1, 10.0, 1000.0)
SCALE_FACTORS = (0.9, 1.1)


def sweep_norms(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Sequence[str] | None = None,
    eps_factors: Sequence[float] = EPS_FACTORS,
    scale_factors: Sequence[float] = SCALE_FACTORS,
    most_groups: int = 8,
    loss: Loss = "auto",
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[SweepPoint, ...]:
    """Change one setting of one norm layer at a time, and see what the loss and the logits do.

    layers         paths of norm layers; None: all of them
    eps_factors    ``eps``: the layer's own times each of these (the point's ``value`` is the eps itself)
    scale_factors  ``scale``: the layer's weight times each of these (``value`` is the factor)
    most_groups    ``groups``: other divisors of the channel count, where the layer has ``num_groups``; if there
                   are more than this, that many spread evenly over them, 1 and C included

    ``loss_change`` is the mean loss minus the unchanged network's, in nats, ``kl`` the mean
    KL(unchanged ‖ changed) of the softmaxes; None where logits are not finite. The other arguments are those of
    ``measure_sensitivity``. Each layer gets its setting back, bit for bit, also after an error.

    :raises PatternError: a path that is no norm layer of the model.
    :raises UsageError: a model that is no classifier or has no norm layer.
    :raises DataError: no images, or a loss that is not finite.

    >>> import timm
    >>> net = timm.create_model("test_resnet")
    >>> points = sweep_norms(net, [(torch.rand(2, 3, 32, 32), None)], layers=["bn1"])
    >>> [(point.setting, point.value) for point in points]
    [('eps', 1e-06), ('eps', 0.0001), ('eps', 0.01), ('scale', 0.9), ('scale', 1.1)]
    """
    sites = _norm_sites(model, layers)
    settings = [
        (layer, setting, value)
        for layer, module in sites.items()
        for setting, value in _settings(module, eps_factors, scale_factors, most_groups)
    ]
    objective = Objective(model, batches, loss, max_batches, on_progress)
    sums = torch.zeros(len(settings), 2, dtype=torch.float64)
    with borrowed(model, device), torch.no_grad():
        for images, labels in objective.run("sweep"):
            logits, targets, _ = objective.forward(images, labels)
            logits = logits.double()
            base = cross_entropies(logits, targets).sum()
            for row, (layer, setting, value) in zip(sums, settings, strict=True):
                with changed(sites[layer], setting, value):
                    other = classifier_logits(model, images).double()
                row[0] += (cross_entropies(other, targets).sum() - base).item()
                row[1] += _kl(logits, other)
    means = sums / objective.images
    return tuple(
        # Rounding can take a KL below zero.
        SweepPoint(layer, setting, value, *((change, max(kl, 0.0)) if finite else (None, None)))
        for (layer, setting, value), (change, kl), finite in zip(
            settings, means.tolist(), means.isfinite().all(1).tolist(), strict=True
        )
    )


@contextmanager
def changed(module: Any, setting: str, value: float) -> Iterator[None]:
    """A norm layer with another ``eps``, ``groups`` or ``scale`` for a while."""
    if setting == "scale":
        with restored([module.weight]):
            module.weight.data.mul_(value)
            yield
        return
    with attribute(module, {"eps": "eps", "groups": "num_groups"}[setting], value):
        yield


def other_groups(channels: int, own: int, most: int) -> list[int]:
    """The divisors of ``channels`` but ``own``, thinned evenly to at most ``most``.

    >>> other_groups(12, own=4, most=8), other_groups(512, own=32, most=4)
    ([1, 2, 3, 6, 12], [1, 8, 64, 512])
    """
    divisors = [count for count in range(1, channels + 1) if channels % count == 0 and count != own]
    if len(divisors) <= most:
        return divisors
    return (
        [divisors[round(step * (len(divisors) - 1) / (most - 1))] for step in range(most)]
        if most > 1
        else divisors[:most]
    )


def _settings(
    module: Any, eps_factors: Sequence[float], scale_factors: Sequence[float], most_groups: int
) -> Iterator[tuple[str, float]]:
    own = getattr(module, "eps", None)
    if own and not isinstance(module, ChannelAffine):  # that one has an eps and does not use it
        for factor in eps_factors:
            yield "eps", float(f"{own * factor:.6g}")
    if isinstance(module, nn.GroupNorm):
        for count in other_groups(module.num_channels, module.num_groups, most_groups):
            yield "groups", count
    if isinstance(getattr(module, "weight", None), Tensor):
        for factor in scale_factors:
            yield "scale", factor


def _norm_sites(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    sites = {path: module for path, module in model.named_modules() if family_of(module) is not None}
    if not sites:
        raise UsageError(f"{name_of(model)} has no norm layer to sweep; try the other methods of the sensitivity")
    if layers is None:
        return sites
    wanted = {layers} if isinstance(layers, str) else set(layers)
    for path in sorted(wanted - sites.keys()):
        hint = suggest(path, sites, otherwise=f"there are: {shorten(sites)}")
        raise PatternError(f"{name_of(model)} has no norm layer {path!r}; {hint}")
    return {path: module for path, module in sites.items() if path in wanted}


def _kl(reference_NK: Tensor, other_NK: Tensor) -> float:
    return F.kl_div(F.log_softmax(other_NK, 1), F.log_softmax(reference_NK, 1), reduction="sum", log_target=True).item()
