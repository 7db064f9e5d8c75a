"""Which layers are measured, which parameters count as theirs, and how samples become scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normsurgeon._util.suggest import suggest
from normsurgeon.analysis.records import Score
from normsurgeon.errors import PatternError, UsageError
from normsurgeon.inference.run import name_of


@dataclass(frozen=True)
class Selection:
    """The layers asked for, in the network's order.

    modules     layer → module
    owned       layer → names of the parameters that count as its own
    parameters  name → tensor, of all that some layer owns

    A shared tensor has one name, its first, and belongs to the layer of that name.
    """

    modules: dict[str, nn.Module]
    owned: dict[str, tuple[str, ...]]
    parameters: dict[str, nn.Parameter]

    @property
    def names(self) -> list[str]:
        """The parameters' names."""
        return list(self.parameters)

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The parameters, in the order of ``names``."""
        return list(self.parameters.values())

    def scores(self, samples_RP: Tensor) -> tuple[tuple[Score, ...], tuple[Score, ...]]:
        """Scores of the layers and of the P parameters from R independent samples of the parameters' values.

        A layer's sample is the sum over its parameters; it has no value where it owns none.
        """
        column = {name: samples_RP[:, number] for number, name in enumerate(self.parameters)}
        layers = tuple(
            estimate(layer, torch.stack([column[name] for name in names]).sum(0) if names else None)
            for layer, names in self.owned.items()
        )
        return layers, tuple(estimate(name, samples_R) for name, samples_R in column.items())

    def require_parameters(self, model: nn.Module, method: str) -> None:
        """Nothing, where there is a parameter to measure.

        :raises UsageError: where no layer owns one.
        """
        if not self.parameters:
            raise UsageError(
                f"{method} has nothing to measure in {name_of(model)}: none of the {len(self.owned)} layers owns a "
                "parameter; try other layers, or feature_ablation"
            )


def estimate(name: str, samples_R: Tensor | None) -> Score:
    """Mean of R independent samples and its standard error; None where there is no finite value.

    >>> estimate("fc", torch.tensor([1.0, 3.0]))
    Score(name='fc', score=2.0, stderr=1.0)
    >>> estimate("fc", torch.tensor([1.0]))
    Score(name='fc', score=1.0, stderr=None)
    """
    if samples_R is None or not len(samples_R):
        return Score(name, None)
    samples_R = samples_R.double()
    mean = samples_R.mean().item()
    if not math.isfinite(mean):
        return Score(name, None)
    spread = samples_R.std().item() / math.sqrt(len(samples_R)) if len(samples_R) > 1 else None
    return Score(name, mean, spread)


def select_layers(model: nn.Module, layers: Sequence[str] | None = None) -> Selection:
    """The layers of these module paths; None: every module that owns parameters directly.

    A layer owns the parameters that are its own attributes or, where there are none (a block), all those inside.

    :raises PatternError: a path that the model does not have.

    >>> chosen = select_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False)))
    >>> chosen.owned
    {'0': ('0.weight', '0.bias'), '2': ('2.weight',)}
    """
    named = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    owners = {name: name.rpartition(".")[0] for name in named}
    first_path = {id(module): path for path, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    if layers is None:
        wanted = set(owners.values())
    else:
        wanted = {layers} if isinstance(layers, str) else set(layers)
        for path in sorted(wanted - modules.keys()):
            otherwise = f"try one of its {len(modules)} module paths, as named_modules() gives them"
            raise PatternError(f"{name_of(model)} has no layer {path!r}; {suggest(path, modules, otherwise)}")
    chosen = {path: module for path, module in modules.items() if path in wanted}
    owned = {}
    for path, module in chosen.items():
        home = first_path[id(module)]
        direct = tuple(name for name, owner in owners.items() if owner == home)
        owned[path] = direct or tuple(name for name, owner in owners.items() if f"{owner}.".startswith(f"{home}."))
    counted = {name for names in owned.values() for name in names}
    return Selection(chosen, owned, {name: tensor for name, tensor in named.items() if name in counted})
