"""``plan``, also within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from normsurgeon._util.progress import OnProgress
from normsurgeon.data.label_ways import Labels
from normsurgeon.errors import UsageError
from normsurgeon.graph.trace import TracedModel
from normsurgeon.inference.views import Data
from normsurgeon.selection.budget import Budget
from normsurgeon.selection.trade_off import trade_off
from normsurgeon.surgery import plan as surgery
from normsurgeon.surgery.plan import ConversionPlan


def plan(
    model: nn.Module,
    to: str,
    *,
    groups: int | Literal["auto"] = "auto",
    eps: float | None = None,
    keep: Sequence[str] = (),
    set: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    as_graph: bool = False,
    balance: bool = True,
    example_inputs: Any = None,
    traced: TracedModel | None = None,
    name: str | None = None,
    budget: Budget | str | float | None = None,
    data: Data | None = None,
    among: Sequence[str] = ("affine",),
    labels: Labels = "by-name",
    batch_size: int = 32,
    max_images: int | None = 300,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> ConversionPlan:
    """Decide what becomes of every batch norm of ``model``, without changing it.

    to              one of ``TARGETS``
    groups          groups of ``gn``: a number that divides every site's channels, or "auto"
    eps             softening E: the norm divides by sqrt(var + E) of whitened input and gamma grows by sqrt(1 + E)
    keep            globs of sites to leave alone; stronger than ``set``
    set             {glob: target}, the last match wins; "gn:8" sets the groups, too
    balance         whether folding may also choose each channel's sign and weight, from synthetic images: keeps more
                    of the function for one forward pass of 64 small images (see ``surgery.balancing``)
    as_graph        plan for an fx.GraphModule, in which functional batch norms can be converted
    example_inputs  what the model is called with, if that is not known from its first layer or timm's configuration: a
                    tensor, a tuple of arguments, a list (one argument), a dict of keyword arguments, ``(args,
                    kwargs)``, or a data loader, of which the first batch is taken
    budget          how much of the function may be lost: "1%" of top-1, "kl=0.05" nats, "error=5%" of the outputs of
                    what is no classifier. As many sites as possible get ``to`` within it, measured on ``data``
    among           with a budget: what the other sites may get, whichever does least damage; and other groups for
                    ``to``, such as ``gn:4``, where they do less damage
    data, labels, batch_size, max_images, device, workers, on_progress  with a budget, as for ``trade_off``

    :raises TargetError: unknown target, or groups that do not divide a site's channels.
    :raises PatternError: a glob that matches no site.
    :raises ConversionError: a model without a batch norm, something else than a plain module, or a budget that no plan
        stays within.
    :raises UsageError: inputs that are none, a budget that is none or has no data.
    :raises DataError: too few images for a budget.

    >>> import timm
    >>> p = plan(timm.create_model("test_resnet"), to="gn", keep=["conv1.1"])
    >>> p.counts
    {'converted': 14, 'kept': 1, 'refused': 0}
    """
    if budget is None:
        if data is not None:
            raise UsageError("data is for a budget, which is not given: budget='1%' or budget='kl=0.05'")
        return surgery.plan(
            model,
            to,
            groups=groups,
            eps=eps,
            keep=keep,
            set=set,
            as_graph=as_graph,
            balance=balance,
            example_inputs=example_inputs,
            traced=traced,
            name=name,
        )
    budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
    if data is None:
        raise UsageError(f"a budget of {budget} has to be kept on images: give data, such as a folder")
    if as_graph or not balance:
        raise UsageError("a budget goes with neither as_graph nor balance=False: leave them out")
    curve = trade_off(
        model,
        data,
        to=to,
        among=among,
        budget=budget,
        must=set,
        keep=keep,
        groups=groups,
        eps=eps,
        labels=labels,
        batch_size=batch_size,
        max_images=max_images,
        device=device,
        workers=workers,
        example_inputs=example_inputs,
        name=name,
        on_progress=on_progress,
    )
    return curve.plan(budget)
