"""Adapting to a new domain while it is being tested, without labels: Tent and SAR, on a stream of images.

Tent (Wang et al., arXiv:2006.10726) makes the entropy of the network's answers small by one SGD step a batch on the
weights and biases of the norms; all else is fixed. A batch norm takes its statistics from the batch, as published.
SAR (Niu et al., arXiv:2302.12400) finds that Tent breaks down at batch 1, on batch norms most and on group and layer
norms less, and adds three guards: it learns from answers of low entropy only, at a flat minimum (Foret et al.,
arXiv:2010.01412), and goes back to the start where the entropy has collapsed.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from normsurgeon.norms.batchnorm import is_batch_norm
from normsurgeon.norms.families import family_of
from training import domains, starts
from training.cells import Cell

TEST_IMAGES = 1000
RELIABLE = 0.4  # of the entropy of a guess, log(classes): SAR's E_0
RADIUS = 0.05  # of the neighbourhood in which SAR wants the entropy to be small: rho
COLLAPSED = 0.2  # of the moving mean of the entropy: SAR's e_m
MEMORY = 0.9  # of the moving mean


def run(cell: Cell) -> float:
    """The accuracy over a stream, each image answered before it is learned from.

    ``setting`` is "none" (no adaptation), "tent BATCH_SIZE" or "sar BATCH_SIZE".
    """
    method, _, batch_size = cell.setting.partition(" ")
    task = domains.load(cell.network, cell.domain, 0, TEST_IMAGES)
    model = starts.start(
        task.model, cell.start, domains.source_images(cell.network)
    )  # images of the domain are yet to come
    order = torch.randperm(len(task.test_x), generator=torch.Generator().manual_seed(cell.seed))
    x, y = task.test_x[order], task.test_y[order]
    if method == "none":
        return starts.top1(model, x, y)
    return adapt_(model, x, y, method, int(batch_size), cell.lr, batch_statistics=cell.start == "bn")


def adapt_(
    model: nn.Module, x: Tensor, y: Tensor, method: str, batch_size: int, lr: float, batch_statistics: bool
) -> float:
    """The share of right answers before each update. ``batch_statistics``: batch norms use no running ones."""
    optimizer = torch.optim.SGD(prepare_(model, batch_statistics), lr=lr, momentum=0.9)
    guards = Guards(model, optimizer) if method == "sar" else None
    right = 0
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits = model(images)
        right += int((logits.argmax(1) == labels).sum())
        optimizer.zero_grad()
        if guards is None:
            entropy(logits).mean().backward()
            optimizer.step()
        else:
            guards.step(images, logits)
    return right / len(y)


def prepare_(model: nn.Module, batch_statistics: bool) -> list[nn.Parameter]:
    """The parameters that are adapted, the only ones that ask for gradients: weights and biases of the norms."""
    model.eval().requires_grad_(False)
    found = []
    for module in model.modules():
        if family_of(module) is None:
            continue
        found += [parameter.requires_grad_() for parameter in module.parameters(recurse=False)]
        if is_batch_norm(module) and batch_statistics:
            module.train()
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return found


def entropy(logits: Tensor) -> Tensor:
    """Of each row's softmax."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class Guards:
    """SAR's step (its algorithm 1) on an optimizer's parameters; the norms of the last blocks are adapted, too."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        self.at_start = [parameter.detach().clone() for parameter in self.parameters]
        self.fresh = copy.deepcopy(optimizer.state_dict())
        self.mean: float | None = None

    def step(self, images: Tensor, logits: Tensor) -> None:
        """Learn from the images whose answer, and whose answer from the worst point nearby, is of low entropy."""
        bound = RELIABLE * math.log(logits.shape[1])
        found = entropy(logits)
        kept = found < bound
        if not kept.any():
            return
        found[kept].mean().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        before = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter += RADIUS * gradient / (norm + 1e-12)
        self.optimizer.zero_grad()
        nearby = entropy(self.model(images))[kept]
        kept_nearby = nearby < bound
        if kept_nearby.any():
            nearby[kept_nearby].mean().backward()
        self._put(before)
        if not kept_nearby.any():
            return
        self.optimizer.step()
        value = nearby.mean().item()
        self.mean = value if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * value
        if self.mean < COLLAPSED:
            self._put(self.at_start)
            self.optimizer.load_state_dict(self.fresh)
            self.mean = None

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
