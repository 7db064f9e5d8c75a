"""Similarity: CKA and cosines equal direct implementations, and the peers where those compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from conftest import ConvNet, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normsurgeon as ns
from normsurgeon.analysis.similarity import centred_gram, cka, gram, hsic_vectors

SIMILARITY = ["similarity"]


def hsic1(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator as Song et al. (2012) print it, term by term."""
    n = len(k)
    k, m = k.copy(), m.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    return (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def direct_cka(x: np.ndarray, y: np.ndarray) -> float:
    k, m = x @ x.T, y @ y.T
    return hsic1(k, m) / np.sqrt(hsic1(k, k) * hsic1(m, m))


def our_cka(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (hsic_vectors(centred_gram(torch.from_numpy(v))[None]) for v in (x, y))
    return float(cka(a @ b.T, np.square(a).sum(1), np.square(b).sum(1))[0, 0])


def test_cka_equals_the_printed_formula_on_full_features():
    rng = np.random.default_rng(0)
    for n, p, q in ((4, 3, 2), (12, 30, 7), (40, 5, 900)):
        x = rng.normal(size=(n, p)) + 3
        y = rng.normal(size=(n, q)) + 0.5 * x[:, :1]
        assert our_cka(x, y) == pytest.approx(direct_cka(x, y), abs=1e-10)


def test_cka_is_1_for_a_rotated_and_scaled_copy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 50)) + 2
    rotation, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    assert our_cka(x, 7 * x @ rotation) == pytest.approx(1, abs=1e-9)


def test_cka_of_independent_features_far_wider_than_the_sample_is_0():
    rng = np.random.default_rng(0)
    values = [our_cka(rng.normal(size=(256, 4000)), rng.normal(size=(256, 4000))) for _ in range(5)]
    assert max(map(abs, values)) <= 0.02


def test_groups_of_16_images_are_averaged_before_the_ratio():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 30)), rng.normal(size=(24, 40))
    y[:, :30] += x
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 40, bias=False)).double()
    mine = ns.analyze(model, [torch.from_numpy(x[:5]), torch.from_numpy(x[5:])], only=SIMILARITY).similarity
    with torch.no_grad():
        first = model[0](torch.from_numpy(x)).numpy()
        second = model(torch.from_numpy(x)).numpy()
    sums = np.zeros(3)
    for rows in (slice(0, 16), slice(16, 24)):
        k, m = first[rows] @ first[rows].T, second[rows] @ second[rows].T
        sums += hsic1(k, m), hsic1(k, k), hsic1(m, m)
    assert mine.cka[0][1] == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), abs=1e-9)
    assert (mine.samples, mine.batch_size) == (24, 8)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 45), min_size=1, max_size=9), st.booleans())
def test_similarity_does_not_depend_on_the_batches(sizes, labelled):
    images = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(len(sizes))).double()
    labels = torch.arange(len(images)) % 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2)).double().eval()
    batches = list(zip(images.split(sizes), labels.split(sizes), strict=True)) if labelled else images.split(sizes)
    found, whole = (ns.analyze(model, data, only=SIMILARITY).similarity for data in (batches, [images]))
    assert (found.samples, found.batch_size, found.notes) == (whole.samples, whole.batch_size, whole.notes)
    for measure in ("cka", "cosine", "gram_cosine"):
        mine, all_at_once = (np.array(getattr(each, measure), float) for each in (found, whole))
        np.testing.assert_allclose(mine, all_at_once, atol=1e-9)


@pytest.mark.long
def test_the_demo_network_has_one_cka_at_any_batch_size(imagenet_sample):
    model = ns.load("demo")
    found = []
    for size in (5, 8, 16, 40):
        report = ns.analyze(model, str(imagenet_sample), only=SIMILARITY, batch_size=size, max_images=40)
        found.append(np.array(report.similarity.cka, float))
    by_5, by_8, by_16, by_40 = found
    assert (by_5 == by_16).all()
    assert (by_8 == by_16).all()
    assert np.abs(by_40 - by_16).max() < 1e-5  # other batches round otherwise in float32; in float64 it is 1e-9, above


def test_images_of_two_sizes_are_compared_each_with_its_own_kind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).eval()
    large, small = torch.randn(3, 3, 12, 12), torch.randn(6, 3, 8, 8)
    found = ns.analyze(model, [large, large, small], only=SIMILARITY).similarity
    assert (found.samples, found.batch_size) == (12, 6)


def test_a_mean_far_larger_than_the_differences_does_not_drown_them():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 200)).astype(np.float32)
    y = x + 0.5 * rng.normal(size=(16, 200)).astype(np.float32)
    assert our_cka(x + 3000, y) == pytest.approx(our_cka(x, y), abs=2e-3)


def loader(images: torch.Tensor, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(images), batch_size=batch_size)


def test_cka_agrees_with_torch_cka():
    """In float64: torch-cka's float32 Gram matrices, not centred, lose three digits on features with a mean.

    It also keeps references to outputs, so that an in-place activation changes what it compares; there is none here.
    """
    peer = pytest.importorskip("torch_cka")
    torch.manual_seed(0)
    model, other = ConvNet().eval().double(), randomise_(ConvNet(), seed=3).eval().double()
    images = torch.randn(16, 3, 12, 12).double()
    names = ["conv1", "conv2", "bn3"]
    judge = peer.CKA(model, other, model1_layers=names, model2_layers=names, device="cpu")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_cka.cka.tqdm", lambda iterator, **_: iterator)
        torch.set_default_dtype(torch.float64)  # its vectors of ones have the default type
        try:
            judge.compare(loader(images, 16))
        finally:
            torch.set_default_dtype(torch.float32)
    expected = judge.export()["CKA"].numpy()
    found = ns.analyze(model, images.split(8), baseline=other, only=SIMILARITY, layers=names).comparison.cka
    np.testing.assert_allclose(np.array(found, float), expected, atol=1e-6)


def test_cka_agrees_with_pytorch_cka_where_that_does_not_clip():
    """pytorch-cka cuts values below 0 off, and an unbiased estimate of 0 is below it half of the time.

    In float64, as above: in float32 it differs from the exact value by up to 0.06 on this very network.
    """
    peer = pytest.importorskip("cka")
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=10)).eval().double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    images = torch.randn(24, 3, 64, 64).double()
    names = ["conv1.0", "layer1.0.conv1", "layer2.0.conv2", "layer4.0.conv2", "fc"]
    ours = ns.analyze(model, images.split(12), only=SIMILARITY, layers=names).similarity
    assert list(ours.layers) == names
    expected = peer.compute_cka(model, model, loader(images, 16), layers=names, progress=False)[0]
    np.testing.assert_allclose(np.array(ours.cka, float).clip(0, 1), np.asarray(expected, float), atol=1e-5)


def test_plain_cosine_and_gram_cosine_equal_their_definitions():
    torch.manual_seed(0)
    model = randomise_(ConvNet()).eval()
    images = torch.randn(6, 3, 12, 12)
    report = ns.analyze(model, images.split(3), only=SIMILARITY, kinds=["convolution", "norm"]).similarity
    with torch.no_grad():
        a = model.conv1(images)
        b = model.conv2(model.relu(model.bn1(a)))
    x, y = a.double().flatten(1).numpy(), b.double().flatten(1).numpy()
    i, j = report.layers.index("conv1"), report.layers.index("conv2")
    cosine = ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean()
    assert report.cosine[i][j] == pytest.approx(cosine, abs=1e-5)
    assert report.cosine[i][i] == pytest.approx(1, abs=1e-6)
    products = np.zeros(3)
    k, m = x @ x.T, y @ y.T
    products += (k * m).sum(), (k * k).sum(), (m * m).sum()
    assert report.gram_cosine[i][j] == pytest.approx(products[0] / np.sqrt(products[1] * products[2]), abs=1e-5)


def test_layers_of_other_shapes_have_no_plain_cosine_but_the_rest():
    model = timm.create_model("test_resnet").eval()
    report = ns.analyze(model, [torch.randn(8, 3, 64, 64)], only=SIMILARITY).similarity
    i, j = report.layers.index("conv1.0"), report.layers.index("layer3.0.conv1")
    assert report.cosine[i][j] is None
    assert report.gram_cosine[i][j] is not None
    assert report.cka[i][j] is not None


def test_too_few_images_are_explained_and_never_nan():
    model = timm.create_model("test_resnet").eval()
    for count in (1, 3):
        report = ns.analyze(model, [torch.randn(count, 3, 64, 64)], only=SIMILARITY)
        assert all(value is None for row in report.similarity.cka for value in row)
        assert report.similarity.notes[0].startswith(
            "CKA has no value: the unbiased estimator needs at least 4 images, and there were fewer at a time "
            f"({count} in all)"
        )
        assert "NaN" not in str(report.to_dict())
    mixed = ns.analyze(model, [torch.randn(16, 3, 64, 64), torch.randn(2, 3, 64, 64)], only=SIMILARITY).similarity
    assert mixed.notes[0] == "2 of 18 images, the last of them, are fewer than 4 at a time and are left out of CKA"


def test_a_constant_layer_has_no_cka():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    nn.init.zeros_(model[1].weight)
    report = ns.analyze(model, [torch.randn(8, 3, 6, 6)], only=SIMILARITY).similarity
    assert report.cka[0][1] is None
    assert report.cka[0][0] == pytest.approx(1)


def test_a_converted_network_is_compared_layer_by_layer_with_its_original():
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=10)).eval()
    images = torch.randn(12, 3, 64, 64)
    same = ns.convert(model, to="affine", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False).model
    comparison = ns.analyze(same, images.split(6), baseline=model, only=["statistics", "similarity"]).comparison
    assert comparison.agreement == 1
    assert (comparison.only_model, comparison.only_baseline) == ((), ())
    assert max(pair.relative_error for pair in comparison.pairs if ".bn" in pair.layer) < 1e-4
    assert all(pair.cka == pytest.approx(1, abs=1e-3) for pair in comparison.pairs)

    changed = ns.convert(model, to="ln", balance=False, example_inputs=torch.zeros(2, 3, 32, 32), verdict=False).model
    comparison = ns.analyze(changed, [images], baseline=model, only=["statistics", "similarity"]).comparison
    pair = next(pair for pair in comparison.pairs if pair.layer == "bn1")
    outputs = {}
    for key, network in (("a", changed), ("b", model)):
        handle = network.bn1.register_forward_hook(
            lambda m, i, y, key=key: outputs.__setitem__(key, y.double().numpy())
        )
        with torch.no_grad():
            network(images)
        handle.remove()
    # At the grid: 32 × 32 positions are more than 256, every 4th is looked at.
    a, b = (outputs[key].reshape(12, 32, -1)[:, :, ::4] for key in "ab")
    assert pair.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-4)
    per_image = (a * b).sum((1, 2)) / np.linalg.norm(a, axis=(1, 2)) / np.linalg.norm(b, axis=(1, 2))
    assert pair.cosine == pytest.approx(per_image.mean(), rel=1e-5)
    channel = (a * b).sum((0, 2)) / np.linalg.norm(a, axis=(0, 2)) / np.linalg.norm(b, axis=(0, 2))
    assert pair.channel_cosine == pytest.approx(channel.mean(), rel=1e-5)
    assert pair.worst_channel == channel.argmin()
    a, b = (outputs[key].reshape(12, 32, -1) for key in "ab")
    shift = np.abs(a.mean((0, 2)) - b.mean((0, 2))) / b.std((0, 2))
    assert pair.mean_shift == pytest.approx(shift.mean(), rel=1e-3)
    assert pair.std_ratio == pytest.approx(np.exp(np.log(a.std((0, 2)) / b.std((0, 2))).mean()), rel=1e-4)


@pytest.mark.parametrize(("to", "layers"), [("ln", ()), ("fold", ()), ("ln", ("conv1.0", "layer1.0.conv1"))])
def test_layers_that_the_conversion_rewrote_are_marked_and_raise_no_alarm(to, layers):
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=10)).eval()
    result = ns.convert(model, to=to, example_inputs=torch.zeros(2, 3, 32, 32), verdict=False)
    images = [torch.randn(8, 3, 64, 64)]
    report = ns.analyze(result.model, images, baseline=model, only=["statistics", "similarity"], layers=layers)
    folded = {site.site.producer for site in result.sites if site.whitening == "fold" or site.target == "fold"}
    expected = folded & set(layers) if layers else folded
    assert expected
    assert {pair.layer for pair in report.comparison.pairs if pair.rewritten} == expected
    assert f"{len(expected)} layers took in the norm after them, or its whitening" in report.comparison.notes[0]
    assert not expected & {finding.layer for finding in report.findings if finding.kind == "drift"}


def test_layers_that_kept_their_weights_are_not_marked_as_rewritten():
    torch.manual_seed(0)
    model = randomise_(timm.create_model("test_resnet", num_classes=10)).eval()
    for other in (model, ns.convert(model, to="affine", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False).model):
        found = ns.analyze(other, [torch.randn(4, 3, 64, 64)], baseline=model, only=["statistics"])
        assert not any(pair.rewritten for pair in found.comparison.pairs)
        assert found.comparison.notes == ()


def test_a_baseline_of_another_architecture_is_compared_where_names_agree_and_the_rest_is_listed():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    other = timm.create_model("resnet10t", num_classes=10).eval()
    comparison = ns.analyze(
        model, [torch.randn(6, 3, 64, 64)], baseline=other, only=["statistics", "similarity"]
    ).comparison
    names = {pair.layer for pair in comparison.pairs}
    assert "layer1.0.conv1" in names
    assert "fc" in names
    assert len(comparison.cka) == len(comparison.layers)
    assert len(comparison.cka[0]) == len(comparison.baseline_layers) != len(comparison.layers)
    assert not names & set(comparison.only_model)


def test_gram_is_computed_in_float32_of_half_precision():
    x = torch.randn(5, 7).half()
    np.testing.assert_allclose(gram(x), (x.double() @ x.double().T).numpy(), rtol=1e-5, atol=1e-5)
