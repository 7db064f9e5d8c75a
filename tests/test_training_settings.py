"""Settings, parameter groups, the order of the images, the history."""

from __future__ import annotations

import inspect
import json
import typing

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import normsurgeon as ns
from normsurgeon.data.augmentation import Augmentation
from normsurgeon.data.feeding import make_feed
from normsurgeon.data.sources import open_source
from normsurgeon.data.transforms import DataConfig
from normsurgeon.distributed import Shard
from normsurgeon.errors import CheckpointError, PatternError, UsageError
from normsurgeon.finetuning.config import FinetuneConfig, differences
from normsurgeon.finetuning.record import Window
from normsurgeon.finetuning.trainable import choose_trainable_, make_optimizer, make_scheduler, set_drops_


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epochs": 0}, r"^epochs=0 must be a whole number of at least 1$"),
        ({"steps": 1.5}, r"^steps=1\.5 must be a whole number of at least 1$"),
        ({"batch_size": True}, r"^batch_size=True must be a whole number of at least 1$"),
        ({"lr": 0}, r"^lr=0 must be a number above 0$"),
        ({"lr": float("nan")}, r"^lr=nan must be a number above 0$"),
        ({"smoothing": 1.5}, r"^smoothing=1\.5 must be a number from 0 to 1$"),
        ({"kl": -1}, r"^kl=-1 must be a number of at least 0$"),
        ({"distance": float("inf")}, r"^distance=inf must be a finite number$"),
        ({"sched": "cosin"}, r"^sched='cosin' is unknown; did you mean cosine\?$"),
        ({"keep": "first"}, r"^keep='first' is unknown; choose one of: best, last$"),
        ({"precision": "half"}, r"^precision='half' is unknown; choose one of: no, bf16, fp16$"),
        ({"scale": (0.9, 0.1)}, r"^scale=\(0\.9, 0\.1\) must be two shares of an image, the smaller first$"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(values, text):
    with pytest.raises(UsageError, match=text):
        FinetuneConfig(**values)


def test_an_unknown_setting_is_named_with_the_nearest_one():
    with pytest.raises(
        UsageError,
        match=r"^fine-tuning has no setting 'learning_rate'; choose one of: augment, scale, .*, epochs, steps, ",
    ):
        FinetuneConfig(learning_rate=1)
    with pytest.raises(UsageError, match=r"^fine-tuning has no setting 'wight_decay'; did you mean weight_decay\?$"):
        FinetuneConfig().replace(wight_decay=1)


def signature_of(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    ("function", "config"),
    [
        (ns.finetune, ns.FinetuneConfig),
        (ns.reconstruct, ns.ReconstructionConfig),
        (ns.reconstruct_, ns.ReconstructionConfig),
    ],
)
def test_a_functions_signature_shows_every_setting_with_its_default(function, config):
    shown = signature_of(function)
    assert {name: shown[name] for name in config.model_fields} == dict(config())
    hints = typing.get_type_hints(function)
    for name, field in config.model_fields.items():
        if name != "trackers":  # any sequence, kept as a tuple
            assert hints[name] == field.annotation, name
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def test_settings_survive_json_and_differences_are_named():
    before = json.loads(json.dumps(FinetuneConfig().to_dict()))
    assert differences(before, FinetuneConfig().to_dict()) == []
    now = FinetuneConfig(lr=1.0, sched="poly", checkpoint_minutes=0).to_dict()
    assert differences(before, now) == ["lr (5e-05 → 1.0)", "sched (cosine → poly)"]


def test_what_trains():
    def trained(what):
        net = timm.create_model("test_resnet")
        return net, set(choose_trainable_(net, what))

    net, everything = trained("all")
    assert everything == {name for name, _ in net.named_parameters()}
    norms = {f"{n}.{p}" for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) for p in ("weight", "bias")}
    assert trained("norms")[1] == norms
    assert trained("norms+biases")[1] == norms | {name for name in everything if name.endswith(".bias")}
    assert trained("layer4.*")[1] == {name for name in everything if name.startswith("layer4.")}
    with pytest.raises(PatternError, match=r"^the pattern 'layer9\.\*' matches no parameter; there are: conv1\.0"):
        trained("layer9.*")
    net.requires_grad_(False)
    with pytest.raises(UsageError, match=r"^nothing trains: train_what='all' leaves no parameter that requires a "):
        choose_trainable_(net, "all")


def test_norms_and_biases_are_not_decayed():
    net = ns.convert(
        timm.create_model("test_resnet"),
        to="gn",
        balance=False,
        example_inputs=torch.zeros(2, 3, 32, 32),
        verdict=False,
    ).model
    optimizer = make_optimizer(net, FinetuneConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in net.parameters() if p.ndim > 1}


def test_layer_decay_slows_the_first_layers():
    net = timm.create_model("test_resnet")
    settings = FinetuneConfig(layer_decay=0.5, sched="constant", warmup_epochs=0, lr=0.1)
    optimizer = make_optimizer(net, settings)
    make_scheduler(optimizer, settings, 10, 5).step_update(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(net.fc.weight)] == pytest.approx(0.1)
    assert rates[id(net.conv1[0].weight)] < 0.05


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    optimizer = make_optimizer(nn.Linear(2, 2), FinetuneConfig(lr=1.0))
    scheduler = make_scheduler(optimizer, FinetuneConfig(lr=1.0, warmup_epochs=0.5), 20, 8)
    rates = []
    for step in range(20):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warm = [0.01 + 0.99 * step / 4 for step in range(4)]
    cosine = [0.5 * (1 + np.cos(np.pi * step / 20)) for step in range(4, 20)]
    assert rates == pytest.approx(warm + cosine)


def test_unknown_optimizers_are_one_line():
    with pytest.raises(UsageError, match=r"^timm has no optimizer 'adamv'; did you mean adam"):
        make_optimizer(nn.Linear(2, 2), FinetuneConfig(opt="adamv"))


def test_drop_and_drop_path_are_set_or_refused():
    net = timm.create_model("test_resnet")
    set_drops_(net, 0.3, 0.2)
    assert net.drop_rate == 0.3
    rates = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 / 3, 0.4 / 3, 0.2])
    with pytest.raises(UsageError, match=r"^Linear has no place for drop paths; leave out drop_path=0\.2$"):
        set_drops_(nn.Linear(2, 2), None, 0.2)
    with pytest.raises(UsageError, match=r"^Linear has no dropout before its classifier; leave out drop=0\.5$"):
        set_drops_(nn.Linear(2, 2), 0.5, None)


def feed(rank=0, world=1, images=50, seed=0):
    batches = [(torch.arange(images).view(-1, 1, 1, 1).float(), torch.zeros(images, dtype=torch.int64))]
    return make_feed(batches, None, Augmentation(), 16, seed, Shard(rank, world))


def drawn(feed, first, last):
    return [images.flatten().tolist() for images, _, _ in feed.batches(first, last)]


def test_an_epoch_shows_every_image_at_most_once_and_each_epoch_in_another_order():
    one = feed()
    assert one.per_epoch == 3
    batches = drawn(one, 0, 6)
    for epoch in (batches[:3], batches[3:]):
        assert len({image for batch in epoch for image in batch}) == 48
    assert batches[:3] != batches[3:]
    assert drawn(feed(seed=1), 0, 3) != batches[:3]


def test_the_order_does_not_depend_on_where_a_run_was_resumed_or_on_the_number_of_processes():
    whole = drawn(feed(), 0, 6)
    assert drawn(feed(), 4, 6) == whole[4:]
    shares = [drawn(feed(rank, 4), 0, 6) for rank in range(4)]
    assert [[image for share in shares for image in share[step]] for step in range(6)] == whole


def test_a_batch_that_the_processes_cannot_share_is_an_error():
    with pytest.raises(UsageError, match=r"^batch_size=16 cannot be shared by 3 processes; try 15$"):
        feed(0, 3)


def test_augmentation_depends_on_the_image_and_the_epoch_alone():
    source = open_source("digits")
    config = DataConfig((1, 16, 16), (0.5,), (0.5,))
    feeds = [make_feed(source, config, Augmentation(reprob=0.5), 64, 0, workers=workers) for workers in (0, 1)]
    torch.manual_seed(1)
    first = next(feeds[0].batches(3, 4))[0]
    torch.manual_seed(2)
    second = next(feeds[1].batches(3, 4))[0]
    assert torch.equal(first, second)
    again = feeds[0].samples[(1, feeds[0].keys(3)[0][1])][0]
    assert not torch.equal(first[0], again)


def test_history_survives_json_and_gives_curves():
    history = ns.Curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [{"step": 2, "top1": 0.5}])
    assert ns.Curves.from_dict(json.loads(history.to_json())) == history
    assert history.column("loss") == ([1, 2], [2.0, 1.0])
    assert history.column("top1", "epochs") == ([2], [0.5])
    with pytest.raises(CheckpointError, match=r"^these are no curves of a training run \(KeyError 'steps'\)$"):
        ns.Curves.from_dict({})


def test_a_row_is_the_mean_over_its_updates():
    window = Window()
    window.add(loss=1.0, images=4, seconds=1.0)
    window = Window(json.loads(json.dumps(window.sums)))
    window.add(loss=3.0, images=4, seconds=3.0)
    assert window.take() == {"loss": 2.0, "images_per_second": 2.0}
