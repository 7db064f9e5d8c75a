"""How nearly two classifiers say the same."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def compare_logits(logits_NK: Tensor, reference_NK: Tensor) -> tuple[int, float]:
    """On how many of N images two sets of logits put the same class first, and the sum of KL(reference ‖ model), nats.

    Logits that are not finite agree with nothing, and make the KL nan.

    >>> import torch
    >>> compare_logits(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]]))[0]
    1
    """
    both = (logits_NK.isfinite() & reference_NK.isfinite()).all(dim=1)
    same = (logits_NK.argmax(dim=1) == reference_NK.argmax(dim=1)) & both
    ours, theirs = F.log_softmax(logits_NK, dim=1), F.log_softmax(reference_NK, dim=1)
    kl = F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    return int(same.sum()), kl if both.all() else math.nan
