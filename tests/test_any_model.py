"""Conversion of any ``nn.Module``: who reads what, what is proven, how a model may be called, what is turned away."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import normsurgeon as ns
from normsurgeon.calls import as_call
from normsurgeon.errors import ConversionError, TargetError, UsageError
from normsurgeon.graph.moves import Move
from normsurgeon.graph.recording import record
from normsurgeon.graph.skeleton import shadow_of, skeleton_of
from normsurgeon.graph.trace import trace
from normsurgeon.surgery.check import Check
from normsurgeon.surgery.float64 import Float64

X = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def alive(model: nn.Module) -> nn.Module:
    return randomise_(model).double().eval()


class LooksAtValues(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        if float(images.mean()) > 1e6:
            raise ValueError
        return self.network(torch.stack(list(images)))


# Records.


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    axis=st.integers(0, 4),
    data=st.data(),
)
def test_a_move_follows_a_dimension_as_the_values_do(sizes, axis, data):
    """Fill a tensor with each element's index along one dimension: it must be the index along the dimension found."""
    axis %= len(sizes)
    x = torch.arange(sizes[axis]).view([-1 if d == axis else 1 for d in range(len(sizes))]).expand(sizes)
    if data.draw(st.booleans()):
        order = tuple(data.draw(st.permutations(range(len(sizes)))))
        y, move = x.permute(order), Move(tuple(sizes), tuple(sizes[d] for d in order), order)
    else:
        start = data.draw(st.integers(0, len(sizes) - 1))
        y = x.flatten(start, data.draw(st.integers(start, len(sizes) - 1)))
        move = Move(tuple(sizes), tuple(y.shape))
    found = move.axis(axis)
    if found is None:
        assert y.shape != x.shape
        return
    expected = torch.arange(sizes[axis]).view([-1 if d == found else 1 for d in range(y.ndim)]).expand(y.shape)
    assert torch.equal(y, expected)


def test_a_record_names_readers_and_lines_that_look_at_values():
    model = shadow_of(LooksAtValues(alive(ConvNet())))
    found = record(model, as_call(X))
    readers = [label for label, _, _ in found.calls["network.conv2"][0].made.readers]
    assert readers == ["network.bn2", "add"]
    assert [re.sub(r"\d+", "N", line) for line in found.branches] == ["test_any_model.py:N"]


def test_recording_leaves_no_hook_and_no_patch():
    model = skeleton_of(ConvNet())
    record(model, as_call(torch.empty(2, 3, 8, 8, device="meta")))
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_wrapped_network_converts_exactly_as_the_bare_one():
    bare = alive(ConvNet())
    wrapped = LooksAtValues(bare)
    for target in ("gn", "fold"):
        one = ns.convert(bare, to=target, example_inputs=X)
        other = ns.convert(wrapped, to=target, example_inputs=X)
        assert [s.whitening for s in one.sites] == [s.whitening for s in other.sites]
        pairs = zip(one.model.state_dict().values(), other.model.network.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_notes_name_what_was_not_followed():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("no targets")
            return self.bn(self.conv(x)) if targets is None else targets["boxes"]

    notes = ns.plan(Trained(), to="gn").notes
    assert notes[-1].startswith("not followed: training mode (ValueError: no targets at test_any_model.py:")
    assert notes[-1].endswith("targets; what only these ways read is not known")


def test_planning_is_quick_where_the_meta_device_is_slow():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.cell = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            return self.cell(self.bn(self.conv(x)).flatten(2).transpose(1, 2))[0]

    traced = trace(Behind(), torch.zeros(2, 1, 40, 40))
    assert traced.output_shapes == [(2, 1444, 8)]


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}])
def test_recurrent_layers_have_their_shapes_on_the_meta_device(cls, options):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cls(5, 7, **options)

        def forward(self, x):
            output, hidden = self.cell(x)
            return output, *(hidden if isinstance(hidden, tuple) else (hidden,))

    x = torch.zeros(3, 4, 5)
    assert trace(Net(), x).output_shapes == [tuple(t.shape) for t in Net()(x)]


# How a model is called.


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

    def forward(self, image, other, *, scale=None):
        y = self.bn(self.conv(image))
        return y * other.mean() if scale is None else y * scale


@pytest.mark.parametrize(
    "inputs",
    [(X, X), {"image": X, "other": X}, ((X,), {"other": X}), ((X, X), {"scale": torch.tensor(2.0).double()})],
    ids=["tuple", "dict", "args and kwargs", "with an option"],
)
def test_example_inputs_are_what_the_model_takes(inputs):
    model = alive(Two())
    result = ns.convert(model, to="fold", example_inputs=inputs)
    assert (result.sites[0].target, result.sites[0].site.input_shape) == ("fold", (2, 16, 10, 10))
    assert result.check.problem is None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_data_loaders_first_batch_is_an_example(labelled):
    data = TensorDataset(X, torch.zeros(2)) if labelled else TensorDataset(X)
    call = as_call(DataLoader(data, batch_size=2))
    assert torch.equal(call.tensor, X)


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_batches_of_what_the_model_takes_calibrate_and_are_analyzed(form):
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 40, 3, 12, 12, dtype=torch.float64, generator=generator) for _ in range(2)]
    batches = [{"image": a, "other": b, "labels": torch.zeros(40)} for a, b in pairs]
    if form == "tuple":
        batches = [((batch["image"], batch["other"]), None) for batch in batches]
    model = alive(Two())
    result = ns.convert(model, to="ln", example_inputs=(pairs[0][0], pairs[0][1]))
    done = ns.calibrate_(result, batches).history[-1]
    assert (done.images, done.sites, done.balanced) == (80, 1, 1)
    with torch.no_grad():
        wanted, found = model.bn(model.conv(pairs[0][0])), result.model.bn(result.model.conv(pairs[0][0]))
    torch.testing.assert_close(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0.1, atol=0.1)
    report = ns.analyze(result, batches, baseline=model, only=["statistics"], kinds=["norm"])
    assert (report.provenance.images, report.statistics[0].layer) == (80, "bn")


def test_what_takes_images_alone_says_so_of_other_batches():
    batches = [{"image": torch.cat([X] * 20), "other": torch.cat([X] * 20)}]
    result = ns.convert(alive(Two()), to="ln", example_inputs=(X, X))
    with pytest.raises(
        UsageError, match=r"sensitivity is measured on images, .*try only=\['statistics', 'similarity'\]"
    ):
        ns.analyze(result, batches, methods=["taylor"])
    with pytest.raises(UsageError, match="reconstruction takes images; try calibrate, which takes them"):
        ns.reconstruct_(result, batches)
    other = [*batches, {"image": X, "other": X, "scale": torch.ones(2)}]
    with pytest.raises(UsageError, match="the batches hold different arguments; give every batch the same ones"):
        ns.calibrate_(result, other, balance=False)


def test_a_list_is_one_argument():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

        def forward(self, images):
            return [{"features": self.bn(self.conv(image[None]))} for image in images]

    model = alive(Detector())
    result = ns.convert(model, to="fold", example_inputs=[X[0], X[1]])
    assert result.sites[0].target == "fold"
    for a, b in zip(model([X[0]]), result.model([X[0]]), strict=True):
        torch.testing.assert_close(a["features"], b["features"])


def test_inputs_that_the_model_refuses_are_one_clear_line():
    with pytest.raises(UsageError, match=r"the model cannot be called with example_inputs \(RuntimeError: "):
        ns.plan(ConvNet(), to="gn", example_inputs=torch.zeros(2, 5, 8, 8))
    with pytest.raises(UsageError, match=r"example_inputs is a int; give a tensor, a tuple of arguments, a dict"):
        ns.plan(ConvNet(), to="gn", example_inputs=3)


# What is proven.


def test_the_check_is_exact_and_says_so():
    result = ns.convert(alive(ConvNet()), to="gn")
    assert re.fullmatch(r"exact to \de-1\d on 4 images", str(result.check))
    assert result.check.sites == (3, 3)
    assert json.loads(json.dumps(result.check.to_dict()))["precision"] == "float64"


def test_a_float32_network_is_checked_in_float64_without_being_touched():
    model = randomise_(ConvNet()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = ns.convert(model, to="gn")
    assert result.check.error < 1e-12
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_float64_mode_computes_what_a_float64_copy_does(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.cell = nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.LSTM(100, 5)
            self.offset = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            y = self.act(self.conv(x)) + self.offset.to(self.conv.weight.dtype)
            out = torch.zeros(y.shape, dtype=y.dtype)
            out[:, :2] = y[:, :2].float()
            return self.cell(out.flatten(2))[0].mean(dtype=torch.float32)

    model = Mixed().to(dtype).eval()
    with torch.no_grad(), Float64():
        found = model(X)
    with torch.no_grad():
        expected = model.double()(X)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wide", [True, False])
def test_a_scaled_weight_is_scaled_wherever_it_is_read(wide):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.fc(x) + x @ self.fc.weight.data.T + x @ self.fc.weight.t().clone() + x @ self.fc.weight.mT

    model, x, factors = Reader(), torch.randn(2, 3), torch.tensor([[2.0], [-1.0], [0.5]])
    with torch.no_grad(), Float64({id(model.fc.weight): factors}, wide=wide):
        found = model(x)
    assert found.dtype == (torch.float64 if wide else torch.float32)
    torch.testing.assert_close(found.float(), 4 * x @ (factors * model.fc.weight).T)


def test_a_model_that_refuses_float64_is_checked_in_its_own_precision():
    class Particular(Hidden):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return super().forward(x)

    result = ns.convert(alive(Particular()).float(), to="fold")
    assert [site.target for site in result.sites] == ["fold", "fold"]
    assert (result.check.precision, result.check.unfolded) == ("its own precision", ())
    assert result.check.error < 1e-5


class Hidden(nn.Module):
    """A second reader that no record sees: the raw output goes out through an object that is not looked into."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn2(self.other(self.bn(self.conv(x))))


def test_a_fold_that_breaks_the_network_is_found_by_bisection_and_taken_back(monkeypatch):
    class Smuggled(Hidden):
        def forward(self, x):
            y = self.conv(x)
            return self.bn2(self.other(self.bn(y))) + y

    from normsurgeon.graph import producers

    fed = producers.ProducerFinder._fed

    def blind(self, call):
        """Sees no second reader."""
        if call.given is not None:
            call.given.readers[:] = [reader for reader in call.given.readers if reader[1] is call]
        return fed(self, call)

    monkeypatch.setattr(producers.ProducerFinder, "_fed", blind)
    model = alive(Smuggled())
    assert [d.whitening for d in ns.plan(model, to="gn").decisions] == ["fold", "fold"]
    result = ns.convert(model, to="fold")
    assert [site.target for site in result.sites] == ["affine", "fold"]
    assert result.check.unfolded == ("bn",)
    assert result.sites[0].reason.startswith("not folded: folding into conv changes the network: the output differs by")
    assert "not folded after all: bn" in str(result.check)
    torch.testing.assert_close(result.model(X), model(X))
    soft = ns.convert(model, to="gn")
    assert [(s.whitening, s.balanced) for s in soft.sites] == [("affine", False), ("fold", True)]


def test_a_norm_whose_attributes_the_forward_needs_is_refused_after_all():
    class Needs(Hidden):
        def forward(self, x):
            return super().forward(x) * self.bn.momentum

    model = alive(Needs())
    result = ns.convert(model, to="affine")
    assert [site.status for site in result.sites] == ["refused", "converted"]
    assert result.sites[0].reason == (
        "replacing it changes the network: AttributeError: '_Fixed' object has no attribute 'momentum' in eval mode"
    )
    torch.testing.assert_close(result.model(X), model(X))


def test_a_network_of_random_outputs_is_checked_with_the_same_random_numbers():
    class Noisy(Hidden):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    assert ns.convert(alive(Noisy()), to="fold").check.error < 1e-9


def test_a_network_that_counts_its_calls_is_not_changed_by_being_checked():
    class Counting(Hidden):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(1)
            return super().forward(x)

    model = alive(Counting())
    result = ns.convert(model, to="gn")
    assert (model.calls, model.seen, result.model.calls) == (0, [], 0)


def test_sorted_outputs_are_judged_by_the_layers_before_them():
    class Ranks(Hidden):
        def forward(self, x):
            scores = super().forward(x).flatten(1)
            return torch.cat([scores, scores / 3 * 3], 1).argsort(1)  # which of two equals is first, rounding decides

    result = ns.convert(alive(Ranks()), to="fold")
    assert [site.target for site in result.sites] == ["fold", "fold"]
    assert result.check.jumps
    assert str(result.check).endswith(" on 4 images, at every layer (outputs jump with rounding)")


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (Check(problem="no input is known"), "not checked: no input is known"),
        (Check(error=0.0, images=1, ways=("eval mode",), sites=(2, 2)), "exact on 1 image"),
        (
            Check(error=2e-15, images=4, ways=("eval mode", "raw=True"), sites=(2, 3), unfolded=("a", "b", "c", "d")),
            "exact to 2e-15 on 4 images, 2 ways of calling; 1 of 3 converted norms were not reached; "
            "not folded after all: a, b, c …",
        ),
    ],
)
def test_a_check_in_words(check, text):
    assert str(check) == text


def test_without_an_input_it_is_said_that_nothing_was_checked():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(x)

    result = ns.convert(Odd(), to="affine")
    assert str(result.check) == "not checked: no input is known, pass example_inputs (--input-shape)"
    with torch.device("meta"):
        model = ConvNet()
    assert str(ns.convert(model, to="gn").check) == "not checked: its weights are on the meta device"


# What is left of the function.


def test_a_good_and_a_ruined_conversion_get_other_verdicts():
    torch.manual_seed(0)
    model = alive(timm.create_model("test_resnet"))
    small = torch.zeros(2, 3, 48, 48, dtype=torch.float64)
    verdicts = {
        target: ns.convert(model, to=target, check=False, example_inputs=small).verdict
        for target in ("affine", "ln", "in")
    }
    assert (verdicts["affine"].kept, verdicts["affine"].norm_error) == ("exactly", 0.0)
    assert verdicts["ln"].norm_error < verdicts["in"].norm_error
    texts = {str(verdict) for verdict in verdicts.values()}
    assert len(texts) == 3
    assert str(verdicts["affine"]).endswith("nothing is lost: use it as it is")
    assert verdicts["in"].worst_site in dict(model.named_modules())


def test_a_site_that_is_exact_counts_as_no_error_in_a_verdict_without_data():
    torch.manual_seed(0)
    model = alive(timm.create_model("test_resnet"))
    small = torch.zeros(2, 3, 48, 48, dtype=torch.float64)
    plan = ns.plan(model, to="affine", example_inputs=small)
    one = ns.convert(model, plan.set("layer2.0.bn1", "in"), check=False).verdict
    assert one.worst_site == "layer2.0.bn1"
    assert one.norm_error == pytest.approx(one.worst_error / len(plan.decisions) ** 0.5)
    kept = plan.keep("*").set("layer2.0.bn1", "in")
    assert ns.convert(model, kept, check=False).verdict.norm_error == pytest.approx(one.norm_error)
    whole = ns.convert(model, to="in", check=False, example_inputs=small).verdict
    assert one.norm_error < whole.norm_error


def test_the_users_own_images_are_measured_on_where_they_are_given():
    model = alive(ConvNet())
    images = torch.randn(20, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)  # answers that differ
    result = ns.convert(model, to="ln", probe=images)
    verdict = result.verdict
    with torch.no_grad():
        before, after = model(images), result.model(images)
    assert (verdict.images, verdict.synthetic) == (20, False)
    assert verdict.agreement == (before.argmax(1) == after.argmax(1)).double().mean()
    kl = (before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))).sum(1).mean()
    assert verdict.kl == pytest.approx(float(kl))
    error = ((before - after).square().sum() / (before - before.mean(0)).square().sum()).sqrt()
    assert verdict.error == pytest.approx(float(error))
    assert json.loads(json.dumps(verdict.to_dict()))["kept"] == verdict.kept


def test_a_probe_that_the_model_refuses_is_one_clear_line():
    with pytest.raises(UsageError, match=r"^the model cannot be called with probe \(RuntimeError: "):
        ns.convert(ConvNet(), to="ln", probe=torch.zeros(2, 5, 8, 8))


class Viewer(nn.Module):
    """Counts on the memory layout that a batch norm gives."""

    def __init__(self, last: bool = False):
        super().__init__()
        self.last = last
        self.linear, self.bn, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(40, 2)

    def forward(self, x):
        y = self.bn(self.linear(x).mT)  # (N, 8, 5), permuted
        return self.head((y.mT if self.last else y).view(len(x), -1))


@pytest.mark.parametrize("to", ["affine", "fold", "gn", "ln", "rms", "ln2d", "rms2d", "in"])
def test_code_that_counts_on_a_batch_norms_memory_layout_still_runs(to):
    result = ns.convert(alive(Viewer()), to=to, example_inputs=torch.randn(4, 5, 3).double())
    assert result.model(torch.randn(2, 5, 3).double()).shape == (2, 2)
    assert [site.status for site in result.sites] == ["converted"]
    assert result.verdict.problem is None


def test_a_converted_network_that_does_not_run_is_a_verdict():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.conv(x)).view(len(x), -1)

    verdict = ns.convert(alive(Images()), to="ln2d", example_inputs=X).verdict
    assert (verdict.kept, verdict.to_dict()["kept"]) == ("not", "not")
    assert str(verdict).startswith("the converted network does not run (RuntimeError: view size is not compatible")
    assert str(verdict).endswith("where it is a view, reshape does")


def test_in_place_conversion_gives_the_same_verdict():
    one, other = (alive(timm.create_model("test_resnet")) for _ in range(2))
    other.load_state_dict(one.state_dict())
    small = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    verdict = ns.convert(one, to="gn", example_inputs=small).verdict
    assert verdict is not None
    assert verdict == ns.convert_(other, to="gn", example_inputs=small).verdict


def test_the_worst_site_is_the_one_with_the_fewest_values():
    model = alive(ConvNet())
    result = ns.convert(model, to="affine", set={"bn2": "in"}, probe=torch.randn(8, 3, 12, 12, dtype=torch.float64))
    assert result.verdict.worst_site == "bn2"


# What can be converted, and what says what can.


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, ModelEmaV3, nn.Sequential])
def test_wrappers_are_converted_inside(wrap):
    model = wrap(alive(ConvNet())).eval()
    result = ns.convert(model, to="fold", example_inputs=X)
    assert [site.target for site in result.sites] == ["fold", "affine", "affine"]
    torch.testing.assert_close(result.model(X), model(X))


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"])
def test_what_is_wrapped_for_several_processes_is_turned_away_with_the_way_out(name):
    wrapper = type(name, (nn.Sequential,), {})(ConvNet())
    for attempt in (lambda m: ns.plan(m, to="gn"), ns.inspect, lambda m: ns.convert_(m, to="gn")):
        with pytest.raises(ConversionError, match=f"^this is a {name}: convert the module inside, then wrap it$"):
            attempt(wrapper)
    with pytest.raises(ConversionError, match=f"^0 is wrapped in {name}: convert the module inside, then wrap it$"):
        ns.plan(nn.Sequential(wrapper), to="gn")


@pytest.mark.parametrize(
    ("thing", "match"),
    [
        ("resnet50", r"^'resnet50' is a name, not a module: convert normsurgeon\.load\('resnet50'\)$"),
        (3, r"^int is not a torch\.nn\.Module: hand over the network itself$"),
        (
            torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 1)), (torch.zeros(1, 3, 4, 4),)),
            r"^an ExportedProgram cannot be rewritten: convert the module before exporting it$",
        ),
    ],
    ids=["name", "number", "exported"],
)
def test_what_is_no_module_is_turned_away_with_the_way_out(thing, match):
    for attempt in (lambda: ns.convert(thing, to="gn"), lambda: ns.inspect(thing)):
        with pytest.raises(ConversionError, match=match):
            attempt()


def test_a_misspelt_setting_and_a_truth_value_are_no_settings():
    with pytest.raises(TypeError, match="unexpected keyword argument 'grops'"):
        ns.convert_(ConvNet(), to="gn", grops=4)
    with pytest.raises(TargetError, match=r"^groups must be a number or 'auto', not True$"):
        ns.convert_(ConvNet(), to="gn", groups=True)


def test_a_module_that_keeps_a_tensor_of_its_last_graph_is_copied_without_the_graph():
    model = timm.create_model("levit_128s").eval()
    x = torch.randn(1, 3, 224, 224)
    expected = model(x)
    result = ns.convert(model, to="affine", check=False, verdict=False)
    torch.testing.assert_close(result.model(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda n: n.running_mean.fill_(float("nan")), "running_mean holds values that are not finite"),
        (lambda n: n.weight.data.fill_(float("inf")), "weight holds values that are not finite"),
        (lambda n: n.running_var.fill_(-1.0), "running_var + eps is not positive in every channel (not in channel 0)"),
    ],
    ids=["mean", "weight", "variance"],
)
def test_impossible_numbers_are_refused_by_the_sites_name(spoil, reason):
    model = randomise_(ConvNet()).eval()
    spoil(model.bn1)
    decisions = {d.name: d for d in ns.plan(model, to="gn").decisions}
    assert (decisions["bn1"].status, decisions["bn1"].reason) == ("refused", reason)
    assert {site.name: site.reason for site in ns.inspect(model).sites}["bn1"] == reason
    assert ns.convert(model, to="gn").counts == {"converted": 2, "kept": 0, "refused": 1}


def test_a_norm_that_would_overflow_is_refused_where_the_batch_norm_does_not_and_folding_cannot_help():
    model = randomise_(ConvNet()).eval()
    for norm in (model.bn1, model.bn2):
        norm.running_var.fill_(1e37)
    decisions = {d.name: d for d in ns.plan(model, to="ln").decisions}
    assert decisions["bn1"].whitening == "fold", "its input is white"
    assert decisions["bn2"].status == "refused"
    assert "would overflow; try the target affine" in decisions["bn2"].reason
    assert ns.plan(model, to="affine").counts["converted"] == 3
