"""What changes of a network do to the loss: noise on a layer's weights, other settings of a norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normsurgeon._util.progress import OnProgress
from normsurgeon._util.suggest import suggest
from normsurgeon.analysis.records import Sensitivity, SweepPoint
from normsurgeon.analysis.sensitivity.borrowing import attribute, borrowed, generator_for, restored
from normsurgeon.analysis.sensitivity.objective import Batches, Objective
from normsurgeon.analysis.sensitivity.selection import Selection, estimate
from normsurgeon.errors import PatternError, UsageError
from normsurgeon.inference.run import name_of
from normsurgeon.norms.families import family_of
from normsurgeon.norms.layers import ChannelAffine
from normsurgeon.patterns import shorten

EPS_FACTORS = (0.1, 10.0, 1000.0)
SCALE_FACTORS = (0.9, 1.1)
MOST_GROUPS = 8


def noise(objective: Objective, selection: Selection, *, draws: int, sigma: float, seed: int) -> Sensitivity:
    """The mean loss's change when a layer's parameters become ``θ + sigma · rms(θ) · n``, n standard normal.

    The noise is relative to the tensor's root mean square, not to each weight, so that small weights move as far as
    large ones (as rounding to a grid does); a tensor of zeros stays as it is. The score is the mean over the draws,
    with its standard error. All batches and all noise levels see the same n, which depends only on the seed, the
    draw and the parameter's name: two networks with the same names are compared under the same noise.

    Parameters are put back bit for bit, also after an error or an interruption. ``details["loss"]`` is the loss
    without noise.
    """
    owners = {
        layer: {name: selection.parameters[name] for name in names} for layer, names in selection.owned.items() if names
    }
    changes = [partial(noisy, own, sigma, seed, draw) for own in owners.values() for draw in range(draws)]
    effects = objective.effects("noise", changes)[:, 0].view(-1, draws)
    samples = dict(zip(owners, effects, strict=True))
    scores = tuple(estimate(layer, samples.get(layer)) for layer in selection.owned)
    unit = f"nats: change of the loss under noise of {sigma:g} of the weights' rms"
    details = {"sigma": sigma, "relative_to": "root mean square of the tensor", "loss": objective.loss}
    return Sensitivity("noise", objective.kind, scores, (), unit, objective.images, draws, details)


@contextmanager
def noisy(parameters: dict[str, torch.nn.Parameter], sigma: float, seed: int, draw: int) -> Iterator[None]:
    """Parameters with relative noise on them for a while."""
    with restored(parameters.values()):
        for name, tensor in parameters.items():
            generator = generator_for(tensor.device, seed, "noise", draw, name)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            n = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=wide)
            scale = sigma * tensor.data.double().square().mean().sqrt().item()
            tensor.data.copy_(tensor.data.to(wide).add_(n, alpha=scale))
        yield


def sweep_norms(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[SweepPoint, ...]:
    """Change one setting of one norm layer at a time, and see what the loss and the logits do.

    layers  paths of norm layers; None: all of them

    ``eps`` is the layer's own times each of ``EPS_FACTORS`` (the point's ``value`` is the eps itself), ``scale`` its
    weight times each of ``SCALE_FACTORS`` (``value`` is the factor), ``groups`` other divisors of the channel count,
    where the layer has ``num_groups``: at most ``MOST_GROUPS``, spread evenly over them, 1 and C included.

    ``loss_change`` is the mean loss minus the unchanged network's, in nats, ``kl`` the mean
    KL(unchanged ‖ changed) of the softmaxes; None where logits are not finite. The other arguments are those of
    ``measure_sensitivity``. Each layer gets its setting back, bit for bit, also after an error.

    :raises PatternError: a path that is no norm layer of the model.
    :raises UsageError: a model that is no classifier or has no norm layer.
    :raises DataError: labels that the head cannot have or that some images lack, or a loss that is not finite.

    >>> import timm
    >>> net = timm.create_model("test_resnet")
    >>> points = sweep_norms(net, [(torch.rand(2, 3, 32, 32), None)], layers=["bn1"])
    >>> [(point.setting, point.value) for point in points]
    [('eps', 1e-06), ('eps', 0.0001), ('eps', 0.01), ('scale', 0.9), ('scale', 1.1)]
    """
    sites = _norm_sites(model, layers)
    settings = [(layer, *setting) for layer, module in sites.items() for setting in _settings(module)]
    with borrowed(model):
        effects = Objective(model, batches, on_progress).effects(
            "sweep", [partial(changed, sites[layer], setting, value) for layer, setting, value in settings]
        )
    return tuple(
        # Rounding can take a KL below zero.
        SweepPoint(*setting, *((change, max(kl, 0.0)) if finite else (None, None)))
        for setting, (change, kl), finite in zip(
            settings, effects.tolist(), effects.isfinite().all(1).tolist(), strict=True
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


def other_groups(channels: int, own: int) -> list[int]:
    """The divisors of ``channels`` but ``own``, thinned evenly to at most ``MOST_GROUPS``.

    >>> other_groups(12, own=4), other_groups(512, own=32)
    ([1, 2, 3, 6, 12], [1, 2, 4, 8, 64, 128, 256, 512])
    """
    divisors = [count for count in range(1, channels + 1) if channels % count == 0 and count != own]
    if len(divisors) <= MOST_GROUPS:
        return divisors
    return [divisors[round(step * (len(divisors) - 1) / (MOST_GROUPS - 1))] for step in range(MOST_GROUPS)]


def _settings(module: Any) -> Iterator[tuple[str, float]]:
    own = getattr(module, "eps", None)
    if own and not isinstance(module, ChannelAffine):  # that one has an eps and does not use it
        for factor in EPS_FACTORS:
            yield "eps", float(f"{own * factor:.6g}")
    if isinstance(module, nn.GroupNorm):
        for count in other_groups(module.num_channels, module.num_groups):
            yield "groups", count
    if isinstance(getattr(module, "weight", None), Tensor):
        for factor in SCALE_FACTORS:
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
