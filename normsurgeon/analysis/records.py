"""What an analysis finds, as plain records: no tensors, no renderer. None stands for "has no value", never nan."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Matrix = tuple[tuple[float | None, ...], ...]
"""Rows of equal length; None where a pair has no value."""


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's output looked like, over all images and positions. Variances are of the population.

    layer, kind        module path; ``norm``, ``convolution``, ``linear``, ``block`` or ``other``
    class_name         Python class
    shape              of one image's output: channels first for maps, without the batch dimension
    channels           size of the channel dimension
    calls              how often one forward pass calls it (statistics are over all calls)
    values             how many finite values were counted
    mean, var          of all values; ``var`` = ``channel_var`` + the variance of the channels' means
    min, max, abs_mean, zero_fraction, skewness, kurtosis (excess): of all values
    squared_mean       mean over channels of the squared channel mean    } the signal-propagation pair
    channel_var        mean over channels of the channel's variance      } (Brock et al., arXiv 2101.08692)
    between_var        mean over channels: variance of the images' means (between samples)
    within_var         mean over channels: variance around the image's mean (within samples)
    dead_channels      channels that never fire: always 0 or, where a ReLU follows, never above 0
    dormant_channels   channels whose mean |x| is at most ``tau`` of the layer's average (Sokar et al., 2302.12902);
                       where a ReLU follows, mean of relu(x)
    dead, dormant      their numbers (at most 100 of them)
    effective_rank     exp of the entropy of the channel covariance's normalised eigenvalues (Roy & Vetterli, 2007)
    participation_ratio  (Σλ)² / Σλ² of the same eigenvalues
    rank_samples       how many feature vectors the covariance was estimated from: bounds both from above
    nan, inf           non-finite values, counted and left out of everything else
    first_nonfinite    index of the first image with one, or None
    group_fluctuation  at a norm site: how far the statistics that a per-sample norm divides by vary from image to
                       image, as a coefficient of variation of the group's standard deviation
    mean_fluctuation   at a norm site: standard deviation over images of the group's mean, over the group's std
    groups             the groups those two were computed for
    channel_means, channel_stds  one number a channel, for the profile plots
    """

    layer: str
    kind: str
    class_name: str
    shape: tuple[int, ...]
    channels: int
    calls: int
    values: int
    mean: float | None
    var: float | None
    min: float | None
    max: float | None
    abs_mean: float | None
    zero_fraction: float | None
    skewness: float | None
    kurtosis: float | None
    squared_mean: float | None
    channel_var: float | None
    between_var: float | None
    within_var: float | None
    dead_channels: int
    dormant_channels: int
    dead: tuple[int, ...] = ()
    dormant: tuple[int, ...] = ()
    effective_rank: float | None = None
    participation_ratio: float | None = None
    rank_samples: int = 0
    nan: int = 0
    inf: int = 0
    first_nonfinite: int | None = None
    group_fluctuation: float | None = None
    mean_fluctuation: float | None = None
    groups: int | None = None
    channel_means: tuple[float, ...] = field(default=(), repr=False)
    channel_stds: tuple[float, ...] = field(default=(), repr=False)

    @property
    def std(self) -> float | None:
        """Standard deviation of all values."""
        return None if self.var is None else math.sqrt(max(self.var, 0.0))


@dataclass(frozen=True)
class Similarity:
    """How alike the layers of one network are. Each matrix is L × L.

    cka          debiased linear CKA, minibatch estimator (Kornblith et al., 1905.00414; Nguyen et al., 2010.15327)
    cosine       mean over images of the cosine of the two features, where their shapes agree
    gram_cosine  cosine of the two centred sample-Gram matrices
    samples      images; ``batch_size`` is how many of them the estimator compared at a time, at least
    notes        what limits the figures, in words
    """

    layers: tuple[str, ...]
    cka: Matrix
    cosine: Matrix
    gram_cosine: Matrix
    samples: int
    batch_size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerPair:
    """A layer of the model and the baseline's layer of the same name.

    cosine           mean over images of the cosine of the features, None where shapes differ
    relative_error   √(Σ‖a − b‖² / Σ‖b‖²) over all images: 0 for the same function
    channel_cosine   mean over channels of the cosine of a channel's values in both; ``worst_channel`` the least
    mean_shift       mean over channels of |mean_a − mean_b| / std_b
    std_ratio        geometric mean over channels of std_a / std_b
    rewritten        whether a conversion put the norm after it, or its whitening, into this layer: it differs by design
    """

    layer: str
    baseline_layer: str
    cka: float | None
    gram_cosine: float | None
    cosine: float | None
    relative_error: float | None
    channel_cosine: float | None
    worst_channel: int | None = None
    worst_channel_cosine: float | None = None
    mean_shift: float | None = None
    std_ratio: float | None = None
    rewritten: bool = False


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Flip:
    """An image that the model answers otherwise than the baseline.

    image          its number in the data
    kl             KL(baseline ‖ model) in nats
    before, after  the most likely classes of the baseline and of the model, at most three
    label          the class that the data give it, or None
    picture        the image as the model got it, a small JPEG in base64; None where it has not 1 or 3 channels
    """

    image: int
    kl: float
    before: tuple[Guess, ...]
    after: tuple[Guess, ...]
    label: str | None = None
    picture: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answers:
    """What two classifiers answer to the same images; with labels, how many answers are right.

    ``lost`` counts images that only the baseline has right, ``gained`` those that only the model has right; ``flipped``
    all with another answer, of which ``flips`` are the farthest apart. Standard errors are over the images.
    """

    images: int
    agreement_stderr: float | None
    accuracy: float | None
    accuracy_stderr: float | None
    baseline_accuracy: float | None
    baseline_accuracy_stderr: float | None
    lost: int | None
    gained: int | None
    flipped: int
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The model against its baseline: every layer of one with every layer of the other (L × M), and pairs by name.

    ``only_model`` and ``only_baseline`` list the layers without a counterpart. The matrices are None without the
    similarity part of an analysis.
    """

    baseline: str
    layers: tuple[str, ...]
    baseline_layers: tuple[str, ...]
    cka: Matrix | None
    gram_cosine: Matrix | None
    pairs: tuple[LayerPair, ...]
    only_model: tuple[str, ...] = ()
    only_baseline: tuple[str, ...] = ()
    samples: int = 0
    agreement: float | None = None
    kl: float | None = None
    answers: Answers | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """One layer's (or parameter tensor's) score and, where it is an estimate, its standard error."""

    name: str
    score: float | None
    stderr: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """One measure of how much the loss cares, for every layer.

    method      ``taylor``, ``fisher``, ``hessian_trace``, ``noise``, ``conductance``, …
    loss        what was differentiated: ``labels`` (cross-entropy with the data's), ``prediction`` (with the
                network's own answer), or what an attribution method explains
    layers, parameters   scores by layer and by parameter tensor, in the network's order
    unit        of the score, in words
    samples     images, and ``probes`` random directions, behind each figure
    details     what else the method reports: convergence delta, noise level, …
    """

    method: str
    loss: str
    layers: tuple[Score, ...]
    parameters: tuple[Score, ...] = ()
    unit: str = ""
    samples: int = 0
    probes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepPoint:
    """One setting of one norm site and what it did to the loss and to the logits."""

    layer: str
    setting: str
    value: float
    loss_change: float | None
    kl: float | None


@dataclass(frozen=True)
class Finding:
    """Something that stands out: in words, with the number behind it and what one could do.

    severity  ``problem``, ``warning``, ``notice`` or ``good``
    metric    the name of the number, ``value`` the number
    """

    kind: str
    severity: Literal["problem", "warning", "notice", "good"]
    layer: str | None
    text: str
    metric: str
    value: float | None
    advice: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from: enough to make it again."""

    model: str
    data: str
    images: int
    skipped: int
    batch_size: int
    seed: int
    device: str
    baseline: str | None = None
    labelled: bool = False
    max_images: int | None = None
    command: str | None = None
    created: str = ""
    seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
