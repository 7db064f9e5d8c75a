"""A batch of one at a norm that pools over images: one line that names the layer and says what to try."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.nn import functional as F

import normsurgeon as ns
from normsurgeon.errors import TrainingError
from normsurgeon.finetuning import finetune as finetuning
from normsurgeon.finetuning.singles import larger_batch

STEPS = {"steps": 3, "device": "cpu", "lr": 1e-2}
FREEZE = r"freezing it \(requires_grad_\(False\)\)"
CONVERT = r"converting it \(normsurgeon convert MODEL --to gn\)"
WHY = ", which has no variance to train on"


def batches(count):
    return [(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 10)]


class Pooled(nn.Module):
    """A norm on pooled features, as projection heads have it; on a device that holds only so many images."""

    num_classes = 10

    def __init__(self, norm=None, most=99):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.neck = nn.Sequential(norm if norm is not None else nn.BatchNorm1d(4))
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
        return self.head(self.neck(self.conv(x).mean((2, 3))))


@pytest.mark.parametrize(
    ("images", "settings", "most", "given", "larger"),
    [
        (8, {"batch_size": 1}, 99, "a batch of 1", r"batch_size=2 \(--batch-size 2\)"),
        (8, {"batch_size": 2, "grad_accum": 2}, 99, r"a batch of 2 \(1 at once\)", r"batch_size=4 \(--batch-size 4\)"),
        (8, {"batch_size": 7, "grad_accum": 3}, 99, r"a batch of 7 \(3 at once\)", r"batch_size=8 \(--batch-size 8\)"),
        (9, {"batch_size": 5}, 4, r"a batch of 5 \(2 at once\)", r"batch_size=6 \(--batch-size 6\)"),
        (1, {}, 99, "a batch of 1", "more images than 1"),
    ],
    ids=["batch", "micro-batch", "last micro-batch", "memory", "data"],
)
def test_a_batch_of_one_at_a_batch_norm_names_it_and_offers_a_batch_that_trains(images, settings, most, given, larger):
    net, said = Pooled(most=most), []
    match = rf"^neck\.0 \(BatchNorm1d\) gets one value a channel from one image of {given}{WHY}; try {larger}, "
    with pytest.raises(TrainingError, match=rf"{match}{FREEZE}, or {CONVERT}$"):
        ns.finetune(net, batches(images), on_message=said.append, **STEPS, **settings)
    if "batch_size" in larger:
        offered = int(larger.partition("=")[2].split()[0])
        assert (
            ns.finetune(net, batches(16), on_message=said.append, **STEPS, **{**settings, "batch_size": offered})
            .history[-1]
            .steps
            == 3
        )


def test_where_memory_holds_one_image_no_batch_size_is_offered():
    given = r"one image of a batch of 2 \(1 at once\)"
    with pytest.raises(
        TrainingError,
        match=rf"^neck\.0 \(BatchNorm1d\) gets one value a channel from {given}{WHY}; try {FREEZE} or {CONVERT}$",
    ):
        ns.finetune(Pooled(most=1), batches(2), on_message=lambda text: None, **STEPS)


def test_what_is_offered_helps():
    frozen = Pooled()
    frozen.neck.requires_grad_(False)
    assert ns.finetune(frozen, batches(1), **STEPS).history[-1].steps == 3
    bare = Pooled(nn.BatchNorm1d(4, affine=False)).train()
    with pytest.raises(TrainingError, match=r"freezing it \(its eval\(\), in a network in training mode\), or conver"):
        ns.finetune(bare, batches(1), **STEPS)
    bare.neck[0].eval()
    assert ns.finetune(bare, batches(1), on_message=lambda text: None, **STEPS).history[-1].steps == 3
    converted = ns.convert(Pooled().eval(), to="gn", groups=1, example_inputs=torch.zeros(2, 3, 8, 8))
    assert ns.finetune(converted, batches(1), **STEPS).history[-1].steps == 3


@pytest.mark.parametrize(
    ("batch", "world", "parts", "most"), [(1, 1, 1, None), (7, 1, 3, None), (6, 2, 2, None), (9, 1, 2, 4), (5, 1, 1, 3)]
)
def test_a_larger_batch_has_no_micro_batch_of_one(batch, world, parts, most):
    found = larger_batch(batch, world, parts, most)
    assert found > batch
    share = torch.zeros(found // world)
    micro = -(-len(share) // parts) if most is None else min(-(-len(share) // parts), most)
    assert min(map(len, share.split(micro))) > 1


class Shrinking(Pooled):
    """A device that holds one image from the third update on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.most = 1 if self.calls > 2 else 99
        return super().forward(x)


def test_an_error_in_the_middle_of_a_run_keeps_what_was_saved(tmp_path):
    settings = {**STEPS, "checkpoint_minutes": 0.0, "on_message": lambda text: None}
    with pytest.raises(TrainingError, match=rf"{CONVERT}; the state after update 2 is kept in \S+$"):
        ns.finetune(Shrinking(), batches(2), output=tmp_path, **settings)


def test_a_compiled_network_names_its_layer_too(monkeypatch):
    launch = finetuning.launch

    def with_eager_backend(settings, device, output):
        accelerator = launch(settings, device, output)
        accelerator.state.dynamo_plugin.backend = DynamoBackend.EAGER  # inductor takes a compiler
        return accelerator

    monkeypatch.setattr(finetuning, "launch", with_eager_backend)
    with pytest.raises(TrainingError, match=r"^neck\.0 \(BatchNorm1d\) gets one value a channel from one image of a b"):
        ns.finetune(Pooled(), batches(1), compile=True, **STEPS)


def test_a_group_norm_is_not_taken_for_a_batch_norm():
    with pytest.raises(
        TrainingError,
        match=r"^neck\.0 \(GroupNorm\) gets one value a group from one image of a batch of 1, which has no variance; "
        r"try batch_size=2 \(--batch-size 2\) or another norm$",
    ):
        ns.finetune(Pooled(nn.GroupNorm(4, 4)), batches(2), batch_size=1, **STEPS)


def test_a_batch_norm_without_statistics_is_named_before_and_in_training():
    bare = Pooled(nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(
        TrainingError,
        match=r"^neck\.0 \(BatchNorm1d\) keeps no running statistics and gets one value a channel from one image of a "
        r"batch of 1; try batch_size=2 \(--batch-size 2\) or batch norms that keep some$",
    ):
        ns.finetune(bare, batches(2), batch_size=1, **STEPS)
    text = r"^neck\.0 \(BatchNorm1d\) keeps no running statistics and gets one value a channel; try batch norms that "
    with pytest.raises(TrainingError, match=text):
        ns.finetune(bare, batches(2), batches(1), **STEPS)
    teacher = Pooled(nn.BatchNorm1d(4, track_running_stats=False))
    text = r"^neck\.0 \(BatchNorm1d\) of the teacher keeps no running statistics and gets one value a channel"
    with pytest.raises(TrainingError, match=text):
        ns.finetune(Pooled(nn.LayerNorm(4)), batches(2), teacher=teacher, batch_size=1, features=0.0, **STEPS)


class Functional(nn.Module):
    num_classes = 10

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x):
        return self.head(F.batch_norm(x.mean((2, 3)), None, None, training=True))


def test_a_call_of_the_function_names_the_module_around_it():
    with pytest.raises(
        TrainingError,
        match=r"^a norm within Functional gets one value a channel from one image of a batch of 1, which has no varia",
    ):
        ns.finetune(Functional(), batches(2), batch_size=1, **STEPS)


def two(folder: Path) -> None:
    """One of two processes."""
    with pytest.raises(TrainingError, match=r"^neck\.0 \(BatchNorm1d\)") as caught:
        ns.finetune(Pooled(), batches(8), batch_size=2, **STEPS)
    (folder / os.environ["RANK"]).write_text(str(caught.value))
    frozen = Pooled()
    frozen.neck.requires_grad_(False)
    tuned = ns.finetune(frozen, batches(8), batch_size=2, **STEPS).model
    assert torch.equal(tuned.neck[0].running_mean, torch.zeros(4))
    assert tuned.neck[0].num_batches_tracked == 0


@pytest.mark.system
def test_processes_that_share_a_batch_each_say_it_and_freeze_alike(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    said = {path.read_text() for path in tmp_path.iterdir()}
    assert said == {
        "neck.0 (BatchNorm1d) gets one value a channel from one image of a batch of 2 (2 processes), which has no "
        "variance to train on; try batch_size=4 (--batch-size 4), freezing it (requires_grad_(False)), or converting "
        "it (normsurgeon convert MODEL --to gn)"
    }


if __name__ == "__main__":
    two(Path(sys.argv[1]))
