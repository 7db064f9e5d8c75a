"""Which parameters train, in which groups, and how much of the network is dropped meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from normsurgeon._util.suggest import suggest
from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.norms.families import family_of
from normsurgeon.norms.foreign import own_tensor
from normsurgeon.patterns import select


def choose_trainable_(model: nn.Module, what: str) -> tuple[str, ...]:
    """Freeze every parameter but the chosen ones, in place; the names of those that train.

    ``all``, ``norms``, ``norms+biases`` (every bias of the network), or a glob of parameter names. A parameter that
    the caller froze stays frozen.

    :raises PatternError: a glob that matches no parameter.
    :raises UsageError: nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    if what == "all":
        chosen = set(names)
    elif what in ("norms", "norms+biases"):
        chosen = {
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            if family_of(module) is not None
            for name, _ in module.named_parameters()
        }
        if what == "norms+biases":
            chosen |= {name for name in names if name.rpartition(".")[2] == "bias"}
    else:
        chosen = set(select(what, names, "parameter"))
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
        if parameter.requires_grad:
            trained.append(name)
    if not trained:
        raise UsageError(f"nothing trains: train_what={what!r} leaves no parameter that requires a gradient")
    return tuple(trained)


def frozen_norms(model: nn.Module) -> tuple[str, ...]:
    """The norms whose running statistics must not move in training, after ``choose_trainable_``.

    Those whose parameters are all frozen, and those that the caller put in eval mode. A network that is in eval mode
    as a whole, as ``normsurgeon.load`` gives it, is given to be trained, which means nothing for its norms. A norm
    without parameters has none that could be frozen: for it the caller's mode alone counts.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    >>> _ = net[1].eval(), net[2].requires_grad_(False)
    >>> frozen_norms(net)
    ('1', '2')
    """
    found = []
    for name, module in model.named_modules():
        if holds_statistics(module):
            own = own_parameters(module)
            untrained = bool(own) and not any(parameter.requires_grad for parameter in own)
            if untrained or (model.training and not module.training):
                found.append(name)
    return tuple(found)


def all_asleep(model: nn.Module) -> int:
    """How many norms with running statistics there are, if the caller has all of them in eval mode, and some train.

    That was intended, or overlooked: a network loaded in eval mode, in a wrapper that was made in training mode.
    """
    norms = [module for module in model.modules() if holds_statistics(module)]
    if not model.training or any(norm.training for norm in norms):
        return 0
    return len(norms) if any(p.requires_grad for norm in norms for p in own_parameters(norm)) else 0


def holds_statistics(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm, or another norm with running statistics, of whatever shape.

    >>> holds_statistics(nn.InstanceNorm2d(4, track_running_stats=True)), holds_statistics(nn.GroupNorm(2, 4))
    (True, False)
    """
    return is_batch_norm(module) or any(
        own_tensor(module, name) is not None for name in ("running_mean", "running_var")
    )


def own_parameters(norm: nn.Module) -> list[nn.Parameter]:
    """A norm's parameters, but for those of its fused activation and drop, and of norms within it."""
    parts = [part for part in (getattr(norm, "act", None), getattr(norm, "drop", None)) if isinstance(part, nn.Module)]
    parts += [module for module in norm.modules() if module is not norm and holds_statistics(module)]
    others = {parameter for part in parts for parameter in part.parameters()}
    return [parameter for parameter in norm.parameters() if parameter not in others]


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """timm's optimizer by name, over groups in which norms and biases are not decayed.

    :raises UsageError: an unknown optimizer, or one that cannot be made.
    """
    exempt: Any = getattr(model, "no_weight_decay", None)
    skip = exempt() if callable(exempt) else ()
    try:
        if config.layer_decay is not None:
            groups = param_groups_layer_decay(
                model, config.weight_decay, no_weight_decay_list=skip, layer_decay=config.layer_decay
            )
        else:
            groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=skip)
        known = [str(name) for name in list_optimizers()]
        if config.opt not in known:
            offer = suggest(config.opt, known, otherwise="try adamw, sgd or lamb")
            raise UsageError(f"timm has no optimizer {config.opt!r}; {offer}")
        return create_optimizer_v2(groups, config.opt, lr=config.lr, weight_decay=0.0, momentum=config.momentum)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(
            f"the optimizer {config.opt} cannot be made ({' '.join(str(error).split())[:140]}); try adamw or sgd"
        ) from error


def make_scheduler(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps: int, per_epoch: int) -> Scheduler:
    """timm's scheduler over ``steps`` updates; ``step_update(k)`` before update k sets its learning rate."""
    warmup = min(round(config.warmup_epochs * per_epoch), steps // 2)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "step" if config.sched == "constant" else config.sched,
        num_epochs=steps,
        decay_epochs=max(1, steps // 3),
        decay_rate=1.0 if config.sched in ("constant", "poly") else 0.1,
        min_lr=config.min_lr,
        warmup_lr=config.lr / 100,
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def set_drops_(model: nn.Module, drop: float | None, drop_path: float | None) -> None:
    """Set the rates of the classifier's dropout and of stochastic depth, in place; None leaves them alone.

    Stochastic depth rises linearly from 0 at the first block to ``drop_path`` at the last, as timm has it.

    :raises UsageError: a network that has no place for them.
    """
    if drop is not None:
        places = [m for m in model.modules() if isinstance(getattr(m, "drop_rate", None), float | int)]
        layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout) and ({"head", "classifier", "head_drop"} & set(name.split(".")))
        ]
        if not places and not layers:
            raise UsageError(f"{type(model).__name__} has no dropout before its classifier; leave out drop={drop}")
        for place in places:
            place.drop_rate = drop  # type: ignore[assignment]
        for layer in layers:
            layer.p = drop
    if drop_path is not None:
        blocks = [m for m in model.modules() if hasattr(m, "drop_path") and not isinstance(m, DropPath)]
        if not blocks:
            raise UsageError(f"{type(model).__name__} has no place for drop paths; leave out drop_path={drop_path}")
        for number, block in enumerate(blocks):
            rate = drop_path * number / max(1, len(blocks) - 1)
            block.drop_path = DropPath(rate) if rate > 0 else nn.Identity()
