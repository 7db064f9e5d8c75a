"""A study's pre-processing: each transform is its formula, fitted to the training images in one bounded pass."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from skimage.exposure import rescale_intensity
from sklearn.decomposition import PCA
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import Tensor

from normsurgeon.data.preprocessing import KINDS, _channels, _covariance, fit
from normsurgeon.data.sources import open_source
from normsurgeon.errors import DataError, UsageError
from normsurgeon.study.grid import PREPROCESSING

NAMES = tuple(KINDS)
FITTED = ("zero-mean", "min-max", "standard", "linear-prediction", "zca")


def pictures(count: int, channels: int = 3, height: int = 8, width: int = 7, seed: int = 0) -> Tensor:
    """Images of 0 to 1 whose neighbouring pixels resemble each other, each channel with its own scale."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, channels, height + 4, width + 4))
    smooth = sum(noise[:, :, i : i + height, j : j + width] for i in range(5) for j in range(5)) / 25
    smooth += 0.05 * rng.normal(size=smooth.shape)
    smooth *= np.arange(1, channels + 1)[:, None, None] / channels
    return torch.from_numpy((0.5 + smooth / 4).clip(0, 1).astype(np.float32))


def digits(count: int) -> Tensor:
    source = open_source("digits", split="train")
    return torch.stack([torch.from_numpy(np.array(source[i][0], np.float32) / 255)[None] for i in range(count)])


def channelwise(x_NCHW: Tensor) -> np.ndarray:
    """(N, C, H, W) → (N·H·W, C) in float64."""
    return x_NCHW.double().numpy().transpose(0, 2, 3, 1).reshape(-1, x_NCHW.shape[1])


def back(x_PC: np.ndarray, like: Tensor) -> np.ndarray:
    n, c, h, w = like.shape
    return x_PC.reshape(n, h, w, c).transpose(0, 3, 1, 2)


# The formulas


def test_none_is_the_images_as_they_are():
    x = pictures(3)
    assert fit("none", x)(x) is x


def test_zero_mean_takes_each_channels_training_mean_away():
    train, test = pictures(40), pictures(5, seed=1)
    fitted = fit("zero-mean", train)
    expected = test.double().numpy() - train.double().numpy().mean((0, 2, 3))[:, None, None]
    assert_allclose(fitted(test).numpy(), expected, atol=1e-6)


def test_standard_is_scikit_learns_standard_scaler_over_the_channels():
    train, test = pictures(40), pictures(5, seed=1)
    scaler = StandardScaler().fit(channelwise(train))
    assert_allclose(fit("standard", train)(test).numpy(), back(scaler.transform(channelwise(test)), test), atol=2e-5)


def test_min_max_is_scikit_learns_scaler_over_the_channels_and_does_not_clip():
    train, test = pictures(40) / 2 + 0.2, pictures(40, seed=1)
    scaler = MinMaxScaler().fit(channelwise(train))
    fitted = fit("min-max", train)
    assert_allclose(fitted(test).numpy(), back(scaler.transform(channelwise(test)), test), atol=1e-5)
    assert (float(fitted(train).min()), float(fitted(train).max())) == pytest.approx((0, 1), abs=1e-6)
    assert float(fitted(test).max()) > 1


def test_model_is_the_networks_own_mean_and_std():
    x = pictures(4)
    fitted = fit("model", (), own=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (x.numpy() - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    assert_allclose(fitted(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UsageError, match=r"^preprocessing 'model' takes the network's mean and std; give own=\(mean, std"
    ):
        fit("model", x)


def test_standard_per_image_gives_every_channel_of_every_image_mean_0_and_std_1():
    x = pictures(6)
    values = x.double().numpy()
    expected = (values - values.mean((2, 3), keepdims=True)) / values.std((2, 3), keepdims=True)
    assert_allclose(fit("standard-per-image", x)(x).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_constant_image_stays_finite_and_constant_ones_become_small(name, value):
    flat = torch.full((2, 3, 8, 7), value)
    assert fit(name, pictures(20))(flat).isfinite().all()
    out = fit(name, flat)(flat)
    assert float(out.abs().max()) <= 1e-3 + (value if name in ("none", "contrast-stretch") else 0)


def test_an_image_that_one_grey_level_sets_apart_is_not_blown_up():
    x = torch.full((1, 1, 8, 8), 0.5)
    x[0, 0, 3, 3] += 1 / 255
    out = fit("standard-per-image", x)(x)
    deviation = 1 / 255 * (1 - 1 / 64)  # of that pixel from the mean; the least divisor is 1 / (255 · 8)
    assert float(out[0, 0, 3, 3]) == pytest.approx(deviation * 255 * 8, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_stretch_is_scikit_images_rescale_intensity_between_percentiles_2_and_98(channels):
    x = pictures(8, channels, 9, 11)
    out = fit("contrast-stretch", x)(x).numpy()
    for image, stretched in zip(x.double().numpy(), out, strict=True):
        low, high = np.percentile(image, (2, 98))
        assert_allclose(stretched, rescale_intensity(image, in_range=(low, high), out_range=(0, 1)), atol=1e-6)
    assert (out.min(), out.max()) == (0, 1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_contrast_stretch_agrees_with_scikit_image_on_grey_levels_of_any_size(seed, height, width, channels):
    image = np.random.default_rng(seed).integers(0, 6, (channels, height, width)) / 255
    low, high = np.percentile(image, (2, 98))
    expected = rescale_intensity(image, in_range=(low, high), out_range=(0, 1))
    out = fit("contrast-stretch", ())(torch.from_numpy(image)[None])[0]
    assert_allclose(out.numpy(), expected, atol=1e-9)


def neighbourhood(plane: np.ndarray) -> np.ndarray:
    """One row a pixel: its 12 earlier neighbours and 1, written out pixel by pixel."""
    height, width = plane.shape
    rows = []
    for i in range(height):
        for j in range(width):
            places = [(i + a, j + b) for a in (-2, -1) for b in (-2, -1, 0, 1, 2)] + [(i, j - 2), (i, j - 1)]
            rows.append([plane[min(max(a, 0), height - 1), min(max(b, 0), width - 1)] for a, b in places] + [1.0])
    return np.array(rows)


def test_linear_prediction_leaves_what_least_squares_leaves():
    train, test = pictures(30), pictures(3, seed=1)
    fitted = fit("linear-prediction", train)
    for channel in range(3):
        a = np.concatenate([neighbourhood(plane) for plane in train[:, channel].double().numpy()])
        y = train[:, channel].double().numpy().ravel()
        solved, *_ = np.linalg.lstsq(a, y, rcond=None)
        scale = (y - a @ solved).std()
        assert_allclose(fitted.coefficients_CK[channel], solved[:-1], atol=1e-6)
        assert_allclose(fitted.bias_C[channel], solved[-1], atol=1e-6)
        for image, out in zip(test.double().numpy(), fitted(test).numpy(), strict=True):
            expected = (image[channel].ravel() - neighbourhood(image[channel]) @ solved) / scale
            assert_allclose(out[channel].ravel(), expected, atol=2e-4)


def test_the_residual_has_mean_0_and_variance_1_and_no_correlation_with_the_neighbours():
    train = digits(400)
    residual = fit("linear-prediction", train)(train.double()).numpy()
    assert_allclose([residual.mean(), residual.var()], [0, 1], atol=1e-9)
    a = np.concatenate([neighbourhood(plane) for plane in train[:, 0].double().numpy()])
    assert_allclose(a.T @ residual.ravel() / len(a), 0, atol=1e-9)


def test_linear_prediction_sees_earlier_pixels_only():
    fitted = fit("linear-prediction", pictures(30))
    x = pictures(1, seed=3)
    changed = x.clone()
    changed[..., 5, 4] += 0.5
    differs = (fitted(changed) != fitted(x))[0, 0]
    assert not differs[:5].any()
    assert not differs[5, :4].any()
    assert differs[5, 4]


def test_zca_is_the_whitening_of_scikit_learns_pca_turned_back():
    train, test = pictures(400, 1, 5, 5), pictures(6, 1, 5, 5, seed=1)
    pca = PCA(whiten=True, svd_solver="full").fit(train.double().flatten(1).numpy())
    whitened = pca.transform(test.double().flatten(1).numpy()) @ pca.components_ * np.sqrt(400 / 399)  # its n - 1
    out = fit("zca", train, zca_eps=1e-12)(test).flatten(1).numpy()
    assert_allclose(out, whitened, atol=2e-3)


def test_zca_makes_the_training_covariance_the_identity_and_stays_symmetric():
    train = pictures(500, 3, 4, 4)
    fitted = fit("zca", train, zca_eps=1e-10)
    out = fitted(train.double()).flatten(1).numpy()
    assert_allclose(out.mean(0), 0, atol=1e-4)
    assert_allclose(np.cov(out.T, bias=True), np.eye(48), atol=1e-3)
    assert_allclose(fitted.whitening_DD, fitted.whitening_DD.T, atol=1e-4)


def test_zcas_eps_softens_each_direction_by_its_own_variance():
    train = digits(500)
    values = np.linalg.eigvalsh(np.cov(train.double().flatten(1).numpy().T, bias=True)).clip(0)
    out = fit("zca", train)(train.double()).flatten(1).numpy()
    found = np.linalg.eigvalsh(np.cov(out.T, bias=True))
    assert_allclose(found, np.sort(values / (values + 1e-2)), atol=1e-4)


# Fitting


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.sampled_from(FITTED))
def test_the_fit_is_the_same_however_the_images_come_in_batches(sizes, name):
    x = pictures(sum(sizes), 2, 4, 4).double()
    whole, parts = fit(name, x), fit(name, iter(x.split(sizes)))
    for field in fields(whole):
        assert_allclose(getattr(parts, field.name), getattr(whole, field.name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FITTED)
def test_no_more_than_so_many_images_are_read(name):
    read = []

    def stream():
        for number in range(100):
            read.append(number)
            yield pictures(10, 1, 4, 4, seed=number)

    fitted = fit(name, stream(), max_images=25)
    assert read == [0, 1, 2]
    first = torch.cat([pictures(10, 1, 4, 4, seed=number) for number in range(3)])[:25]
    assert_allclose(fitted(first), fit(name, first)(first), atol=1e-4)


def test_large_images_are_summed_up_a_few_at_a_time(monkeypatch):
    seen = []
    monkeypatch.setattr(KINDS["standard"], "fit", classmethod(lambda cls, batches: seen.extend(map(len, batches))))
    fit("standard", torch.zeros(7, 3, 512, 300))
    assert seen == [2, 2, 2, 1]
    assert max(seen) * 3 * 512 * 300 <= 2**20


@given(st.floats(-1e3, 1e3), st.integers(0, 99))
def test_a_large_mean_costs_the_variance_no_digits(offset, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(12, 2, 3, 3))) * 1e-3 + offset
    mean_C, covariance_CC = _covariance(_channels(x.split(5)))
    assert_allclose(mean_C, x.numpy().mean((0, 2, 3)), rtol=1e-12)
    assert_allclose(covariance_CC.diagonal(), x.numpy().var((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_neighbours_and_keeps_its_type_and_is_not_changed(name):
    fitted, x = fit(name, pictures(50)), pictures(6, seed=2)
    before = x.clone()
    together = fitted(x)
    assert (together.shape, together.dtype) == (x.shape, torch.float32)
    for number in range(6):
        assert_allclose(fitted(x[number : number + 1])[0], together[number], atol=2e-5)
    assert torch.equal(fitted(x), together)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_fitted_pre_processing_is_frozen_and_survives_pickle(name):
    fitted, x = fit(name, pictures(50)), pictures(3, seed=2)
    again = pickle.loads(pickle.dumps(fitted))
    assert torch.equal(again(x), fitted(x))
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'name'"):
        fitted.name = "other"


def test_the_names_are_those_that_a_grid_takes():
    assert {*KINDS, "model"} == set(PREPROCESSING)


@pytest.mark.parametrize(
    ("name", "images", "kind", "text"),
    [
        ("standart", pictures(1), UsageError, r"^unknown pre-processing 'standart'; did you mean standard\?$"),
        ("standard", (), DataError, r"^there are no training images to fit the pre-processing to$"),
        (
            "standard",
            torch.zeros(0, 3, 4, 4),
            DataError,
            r"^there are no training images to fit the pre-processing to$",
        ),
        (
            "standard",
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
            UsageError,
            r"^images must be floats \(N, C, H, W\), and these are uint8 of shape \(1, 3, 4, 4\)$",
        ),
        (
            "zca",
            torch.zeros(3, 4, 4),
            UsageError,
            r"^images must be floats \(N, C, H, W\), and these are float32 of shape \(3, 4, 4\)$",
        ),
        ("zca", [5], UsageError, r"^images must be floats \(N, C, H, W\), and these are of type int$"),
        (
            "min-max",
            [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 5, 4)],
            UsageError,
            r"^the images have several sizes \(\(3, 4, 4\), \(3, 5, 4\)\); pre-processing is fitted to images of one "
            r"size$",
        ),
        (
            "zero-mean",
            torch.full((1, 1, 2, 2), float("nan")),
            DataError,
            r"^the training images have values that are not finite; is there a broken image\?$",
        ),
        (
            "zca",
            torch.zeros(1, 3, 224, 224),
            UsageError,
            r"^zca takes images of at most 3072 values, and 3×224×224 has 150528; try image_size: 32, or "
            r"linear-prediction$",
        ),
    ],
)
def test_what_cannot_be_fitted_is_one_line(name, images, kind, text):
    with pytest.raises(kind, match=text):
        fit(name, images)
