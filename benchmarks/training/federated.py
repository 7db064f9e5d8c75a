"""Federated averaging (McMahan et al., arXiv:1602.05629) over clients whose labels differ.

Each label's images are shared out in proportions that are drawn from a Dirichlet distribution (Hsu et al.,
arXiv:1909.06335): the smaller alpha, the fewer labels a client has. In a round every client trains the server's network
on its own images, and the server takes the mean of what comes back, weighted by the number of images: all of the state,
a batch norm's running statistics with it. Hsieh et al. (arXiv:1910.00189) found that batch norms fail on such clients,
as each trains on statistics of its own, and that group norms do not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import domains, starts
from training.cells import Cell

TRAIN_IMAGES, TEST_IMAGES = 2000, 1000
CLIENTS, ROUNDS, BATCH_SIZE = 8, 5, 8
State = dict[str, Tensor]


def run(cell: Cell) -> float:
    """The accuracy of the server's network after the last round; ``setting`` is "alpha ALPHA"."""
    _, alpha = cell.setting.split()
    task = domains.load(cell.network, cell.domain, TRAIN_IMAGES, TEST_IMAGES)
    server = starts.start(
        task.model, cell.start, domains.source_images(cell.network)
    )  # the server has no client's images
    task.fit_head_(server, cell.seed)
    clients = split(task.y, CLIENTS, float(alpha), cell.seed)
    for number in range(ROUNDS):
        states = []
        for client, own in enumerate(clients):
            model = starts.training_mode(copy.deepcopy(server), cell.start)
            order = torch.Generator().manual_seed((cell.seed * ROUNDS + number) * CLIENTS + client)
            if not fit(model, task.x[own], task.y[own], cell.lr, order):
                return 1 / task.classes
            states.append(model.state_dict())
        server.load_state_dict(average(states, [len(own) for own in clients]))
    return starts.top1(server, task.test_x, task.test_y)


def split(y: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """The indices of each client's images; every image is with one client, and a client without images is left out."""
    random = np.random.default_rng(seed)
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in y.unique():
        own = (y == label).nonzero().flatten()
        own = own[torch.from_numpy(random.permutation(len(own)))]
        ends = (random.dirichlet([alpha] * clients).cumsum()[:-1] * len(own)).round().astype(int)
        for part, share in zip(parts, own.tensor_split(ends.tolist()), strict=True):
            part.append(share)
    return [indices for part in parts if len(indices := torch.cat(part))]


def fit(model: nn.Module, x: Tensor, y: Tensor, lr: float, order: torch.Generator) -> bool:
    """One local pass. False where the loss is NaN."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for batch in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
    return math.isfinite(loss.item())


def average(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean of each floating-point tensor; what counts (batches seen) is the first one's."""
    shares = [weight / math.fsum(weights) for weight in weights]
    return {
        name: sum((share * state[name] for share, state in zip(shares, states, strict=True)), torch.zeros_like(first))
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }
