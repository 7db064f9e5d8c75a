"""What training makes small: pure functions of tensors, each the mean over a batch, in float32 or wider.

Every one but ``layer_similarity`` is a mean over images, so that micro-batches and processes add up to the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from normsurgeon.norms.layers import wide

TINY = 1e-12


def cross_entropy(logits_NK: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """``-mean log p(target)`` in nats; targets are class numbers (N,), or mixed probabilities (N, K).

    With smoothing e (Szegedy et al., arXiv:1512.00567) a class number stands for ``(1 - e) * one hot + e / K``.

    >>> round(cross_entropy(torch.zeros(2, 10), torch.tensor([3, 4])).item(), 4)
    2.3026
    """
    logits_NK = wide(logits_NK)
    if targets.ndim == 2:
        return F.cross_entropy(logits_NK, targets.to(logits_NK.dtype))
    return F.cross_entropy(logits_NK, targets, label_smoothing=smoothing)


def distillation(logits_NK: Tensor, teacher_NK: Tensor, temperature: float = 1.0) -> Tensor:
    """``T² * mean KL(softmax(teacher / T) ‖ softmax(student / T))`` in nats (Hinton et al., arXiv:1503.02531).

    >>> distillation(torch.ones(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    ours = F.log_softmax(wide(logits_NK) / temperature, dim=1)
    theirs = F.log_softmax(wide(teacher_NK) / temperature, dim=1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def feature_matching(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over layers and images of ``‖s - t‖² / ‖t‖²``: how far, of what there is, block outputs are off.

    The squared distance of FitNets (Romero et al., arXiv:1412.6550), normalised so that every layer has the same say.

    >>> feature_matching([torch.full((2, 3), 1.5)], [torch.ones(2, 3)]).item()
    0.25
    """
    parts = []
    for s, t in zip(student, teacher, strict=True):
        s, t = wide(s).flatten(1), wide(t).flatten(1)
        parts.append(((s - t).square().sum(1) / t.square().sum(1).clamp_min(TINY)).mean())
    return torch.stack(parts).mean()


def layer_similarity(features: Sequence[Tensor]) -> Tensor:
    """The mean over pairs of layers of ``<K, L> / (‖K‖ ‖L‖)``, K = X Xᵀ the sample-Gram matrix of a layer's features X.

    0 to 1 for features that are not negative. Made small, it moves the features of different layers apart. The cosine
    of ``analysis.similarity``, without centring, here with a gradient; over the images of a micro-batch.

    >>> round(layer_similarity([torch.eye(3), 2 * torch.eye(3)]).item(), 4)
    1.0
    """
    units = []
    for x in features:
        x = wide(x).flatten(1)
        x = x / x.detach().square().sum().sqrt().clamp_min(TINY)  # the cosine does not see it; float32 does
        k = (x @ x.T).flatten()
        units.append(k / torch.linalg.vector_norm(k).clamp_min(TINY))
    u = torch.stack(units)
    cosines = u @ u.T
    rows, columns = torch.triu_indices(len(u), len(u), 1)
    return cosines[rows, columns].mean()
