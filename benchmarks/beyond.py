"""Convert the networks of other projects, with random statistics, and write their part of docs/coverage.md.

    python benchmarks/beyond.py [--only GLOB] [--processes 2] [--output docs/coverage.md]

`make coverage` installs the packages. Every network has random weights, statistics and affines, and is in float64 and
eval mode. For each: how many modules behave like a batch norm (found here, without normsurgeon), how many of them are
in the account, folded, converted by the affine, refused; and how far `fold` and `affine` are from the original, in all
outputs. Exits with 1 if a batch norm is missing in the account, an error is above 1e-11, a target of folds is missed,
or a network cannot be converted at all.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TITLE = "## Beyond timm"
TOLERANCE = 1e-11
SECONDS = 900

FOLDS = {
    "smp.FPN(mobilenet_v2)": 52,
    "smp.UnetPlusPlus(resnet18)": 42,
    "transformers.ResNet": 20,
    "transformers.LeViT": 62,
    "ultralytics.yolo11n": 81,
    "torchvision.ssdlite320_mobilenet_v3_large": 70,
    "torchvision.retinanet_resnet50_fpn_v2": 53,
    "torchvision.r3d_18": 20,
    "torchvision.fasterrcnn_resnet50_fpn": 53,
    "efficientnet-pytorch.b0": 49,
}
"""The least that must be folded."""


@dataclass
class Network:
    """How to make one, and what to call it with (None: what normsurgeon guesses)."""

    make: Callable[[], Any]
    inputs: Callable[[], Any] | None = None


@dataclass
class Outcome:
    """What became of one network."""

    name: str
    batch_norms: int = 0
    sites: int = 0
    folded: int = 0
    affine: int = 0
    refused: int = 0
    fold_error: float | None = None
    affine_error: float | None = None
    check: str = ""
    reasons: dict[str, int] = field(default_factory=dict)
    failure: str | None = None
    skipped: str | None = None
    seconds: float = 0.0


def _torchvision() -> Iterator[tuple[str, Network]]:
    from torchvision import models

    for name in models.list_models(module=models):
        yield name, Network(lambda name=name: models.get_model(name, weights=None, **_plain(name)))
    for module in (models.segmentation, models.video):
        for name in models.list_models(module=module):
            options = {"weights_backbone": None} if module is models.segmentation else {}
            yield name, Network(lambda name=name, options=options: models.get_model(name, weights=None, **options))
    for name in models.list_models(module=models.quantization):
        build = getattr(models.quantization, name.removeprefix("quantized_"))
        yield name, Network(lambda build=build: build(weights=None, quantize=False, **_plain(build.__name__)))
    small = {"min_size": 160, "max_size": 224}
    for name in models.list_models(module=models.detection):
        options = {} if name.startswith("ssd") else small
        make = getattr(models.detection, name)
        yield name, Network(lambda make=make, options=options: make(weights=None, weights_backbone=None, **options))
    for name in models.list_models(module=models.optical_flow):
        make = getattr(models.optical_flow, name)
        yield name, Network(lambda make=make: make(weights=None), lambda: (_images(128), _images(128, seed=1)))


def _plain(name: str) -> dict[str, Any]:
    return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}


def _transformers() -> Iterator[tuple[str, Network]]:
    def of(model: str, config: str, **settings: Any) -> Callable[[], Any]:
        def make() -> Any:
            import transformers

            return getattr(transformers, model)(getattr(transformers, config)(**settings))

        return make

    basic = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    few = {"encoder_layers": 1, "decoder_layers": 1}
    yield "ResNet", Network(of("ResNetForImageClassification", "ResNetConfig", **basic))
    yield "RegNet", Network(of("RegNetForImageClassification", "RegNetConfig"))
    yield "LeViT", Network(of("LevitForImageClassification", "LevitConfig"))
    yield "LeViT with teacher", Network(of("LevitForImageClassificationWithTeacher", "LevitConfig"))
    yield "MobileNetV1", Network(of("MobileNetV1ForImageClassification", "MobileNetV1Config"))
    yield "MobileNetV2", Network(of("MobileNetV2ForImageClassification", "MobileNetV2Config"))
    yield "MobileNetV2 segmentation", Network(of("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config"))
    yield "EfficientNet", Network(of("EfficientNetForImageClassification", "EfficientNetConfig"))
    yield "MobileViT", Network(of("MobileViTForImageClassification", "MobileViTConfig", image_size=256))
    yield "MobileViTV2", Network(of("MobileViTV2ForImageClassification", "MobileViTV2Config", image_size=256))
    yield "CvT", Network(of("CvtForImageClassification", "CvtConfig"))
    yield "SwiftFormer", Network(of("SwiftFormerForImageClassification", "SwiftFormerConfig"))
    yield "SegFormer", Network(of("SegformerForSemanticSegmentation", "SegformerConfig"))
    yield "PoolFormer", Network(of("PoolFormerForImageClassification", "PoolFormerConfig"))
    yield "DPT", Network(of("DPTForSemanticSegmentation", "DPTConfig", num_hidden_layers=12))
    detr = {**few, "use_timm_backbone": True, "use_pretrained_backbone": False}
    yield "DETR", Network(of("DetrForObjectDetection", "DetrConfig", **detr))
    yield "Conditional DETR", Network(of("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", **detr))
    yield "Deformable DETR", Network(of("DeformableDetrForObjectDetection", "DeformableDetrConfig", **detr))
    yield "Table Transformer", Network(of("TableTransformerForObjectDetection", "TableTransformerConfig", **detr))
    yield "RT-DETR", Network(of("RTDetrForObjectDetection", "RTDetrConfig", decoder_layers=1))
    yield "RT-DETR v2", Network(of("RTDetrV2ForObjectDetection", "RTDetrV2Config", decoder_layers=1))
    yield "D-FINE", Network(of("DFineForObjectDetection", "DFineConfig", decoder_layers=1))
    yield "HGNet-V2", Network(of("HGNetV2ForImageClassification", "HGNetV2Config"))
    yield (
        "Wav2Vec2-Conformer",
        Network(of("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", num_hidden_layers=2), lambda: _normal(2, 4000)),
    )
    yield "UperNet (ResNet)", Network(_upernet)


def _upernet() -> Any:
    import transformers as t

    backbone = t.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    return t.UperNetForSemanticSegmentation(t.UperNetConfig(backbone_config=backbone))


def _smp() -> Iterator[tuple[str, Network]]:
    import segmentation_models_pytorch as smp

    for decoder in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN"):
        for encoder in ("resnet18", "mobilenet_v2"):
            build = getattr(smp, decoder)
            yield (
                f"{decoder}({encoder})",
                Network(lambda build=build, encoder=encoder: build(encoder, encoder_weights=None)),
            )
    yield "UPerNet(resnet18)", Network(lambda: smp.UPerNet("resnet18", encoder_weights=None))
    yield "Segformer(resnet18)", Network(lambda: smp.Segformer("resnet18", encoder_weights=None))


def _monai() -> Iterator[tuple[str, Network]]:
    from monai.networks import nets

    steps = {"channels": (8, 16, 32), "strides": (2, 2), "norm": "batch"}
    three = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}

    def volume() -> Any:
        return _normal(2, 1, 32, 32, 32)

    yield "UNet 3-D", Network(lambda: nets.UNet(**three, **steps, num_res_units=2), volume)
    dyn = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "norm_name": "batch"}
    yield "DynUNet 3-D", Network(lambda: nets.DynUNet(**three, **dyn, deep_supervision=True), volume)
    yield "SegResNet 3-D", Network(lambda: nets.SegResNet(**three, init_filters=8, norm="batch"), volume)
    yield "DenseNet121 3-D", Network(lambda: nets.DenseNet121(**three), volume)
    yield "HighResNet 3-D", Network(lambda: nets.HighResNet(**three), volume)
    yield "AttentionUnet 3-D", Network(lambda: nets.AttentionUnet(**three, channels=(8, 16), strides=(2,)), volume)
    yield "BasicUNet 3-D", Network(lambda: nets.BasicUNet(**three, features=(8,) * 6, norm="batch"), volume)
    yield "ResNet18 3-D", Network(lambda: nets.resnet18(spatial_dims=3, n_input_channels=1), volume)
    yield "VNet 3-D", Network(lambda: nets.VNet(**three), volume)


def _ultralytics() -> Iterator[tuple[str, Network]]:
    from ultralytics.nn import tasks

    for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"):
        yield name, Network(lambda name=name: tasks.DetectionModel(f"{name}.yaml", verbose=False))
    yield "yolo11n-seg", Network(lambda: tasks.SegmentationModel("yolo11n-seg.yaml", verbose=False))
    yield "yolo11n-cls", Network(lambda: tasks.ClassificationModel("yolo11n-cls.yaml", verbose=False))
    yield "rtdetr-l", Network(lambda: tasks.RTDETRDetectionModel("rtdetr-l.yaml", verbose=False))


def _speechbrain() -> Iterator[tuple[str, Network]]:
    def of(module: str, name: str, **settings: Any) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module(f"speechbrain.lobes.models.{module}"), name)(**settings)

    def features() -> Any:
        return _normal(2, 60, 40)

    yield "ECAPA-TDNN", Network(of("ECAPA_TDNN", "ECAPA_TDNN", input_size=40, channels=[64] * 4 + [192]), features)
    yield "Xvector", Network(of("Xvector", "Xvector", in_channels=40, device="cpu"), features)
    yield "ResNet", Network(of("ResNet", "ResNet", input_size=40, channels=[16, 16, 32, 32]), features)


def _geometric() -> Iterator[tuple[str, Network]]:
    def graph() -> Any:
        import torch

        return _normal(12, 16), torch.randint(0, 12, (2, 40), generator=torch.Generator().manual_seed(0))

    for name in ("GCN", "GraphSAGE", "GIN", "GAT"):

        def make(name: str = name) -> Any:
            from torch_geometric.nn import models

            return getattr(models, name)(16, 32, num_layers=3, out_channels=7, norm="batch_norm")

        yield name, Network(make, graph)


def _efficientnet() -> Iterator[tuple[str, Network]]:
    from efficientnet_pytorch import EfficientNet

    yield "b0", Network(lambda: EfficientNet.from_name("efficientnet-b0"))


def _torchcrepe() -> Iterator[tuple[str, Network]]:
    def make() -> Any:
        import torchcrepe

        return torchcrepe.Crepe("tiny")

    yield "tiny", Network(make, lambda: _normal(2, 1024))


PACKAGES: dict[str, tuple[str, Callable[[], Iterator[tuple[str, Network]]]]] = {
    "torchvision": ("torchvision", _torchvision),
    "transformers": ("transformers", _transformers),
    "smp": ("segmentation_models_pytorch", _smp),
    "monai": ("monai", _monai),
    "ultralytics": ("ultralytics", _ultralytics),
    "speechbrain": ("speechbrain", _speechbrain),
    "torch-geometric": ("torch_geometric", _geometric),
    "efficientnet-pytorch": ("efficientnet_pytorch", _efficientnet),
    "torchcrepe": ("torchcrepe", _torchcrepe),
}


def _normal(*shape: int, seed: int = 0) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _images(side: int, seed: int = 0) -> Any:
    return _normal(2, 3, side, side, seed=seed)


def networks() -> Iterator[tuple[str, Network | str]]:
    """Every network by name, or why its package is left out."""
    for package, (module, listed) in PACKAGES.items():
        try:
            importlib.import_module(module)
            found = list(listed())
        except Exception as error:  # a package that lacks another, or does not fit this torch
            yield f"{package}.*", f"cannot be imported here ({' '.join(str(error).split())[:80]})"
            continue
        for name, network in found:
            yield f"{package}.{name}", network


def batch_norms(model: Any) -> list[Any]:
    """The modules that hold running statistics, found without normsurgeon; an InstanceNorm's are its own affair."""
    import torch
    from torch.nn.modules.instancenorm import _InstanceNorm

    def holds(module: Any) -> bool:
        return all(isinstance(getattr(module, k, None), torch.Tensor) for k in ("running_mean", "running_var"))

    return [m for m in model.modules() if holds(m) and not isinstance(m, _InstanceNorm)]


def _has_batch_norms(network: Network) -> bool:
    """Found without memory, where the network can be made so."""
    import torch

    try:
        with torch.device("meta"):
            return bool(batch_norms(network.make()))
    except Exception:  # then it is made in earnest
        return True


def enliven_(model: Any) -> Any:
    """Statistics and affines far from the identity, float64, eval mode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in batch_norms(model):
            norm.running_mean.copy_(0.3 * torch.randn(norm.running_mean.shape, generator=generator))
            norm.running_var.copy_(0.3 + 2 * torch.rand(norm.running_var.shape, generator=generator))
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3)):
                tensor = getattr(norm, name, None)
                if tensor is not None:
                    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.double().eval()


def examine(name: str) -> Outcome:
    """Make, convert and compare one network."""
    import torch

    import normsurgeon as ns
    from normsurgeon.calls import as_call
    from normsurgeon.graph.skeleton import tensors_in

    outcome = Outcome(name)
    started = time.perf_counter()
    network = dict(networks())[name]
    assert isinstance(network, Network)
    if not _has_batch_norms(network):
        outcome.skipped = "no batch norm"
        return outcome
    try:
        torch.manual_seed(0)
        model = enliven_(network.make())
    except Exception as error:  # a package may want what cannot be had here
        outcome.skipped = f"cannot be made here ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
        return outcome
    outcome.batch_norms = len(batch_norms(model))
    if not outcome.batch_norms:
        outcome.skipped = "no batch norm"
        return outcome

    def outputs(net: Any) -> list[Any]:
        torch.manual_seed(0)
        with torch.no_grad():
            return [t.clone() for t in tensors_in(call(net)) if t.is_floating_point() and t.numel()]

    try:
        example = network.inputs() if network.inputs is not None else None
        result = ns.convert(model, to="fold", example_inputs=example, verdict=False)
        for given in [example] if example is not None else _smaller(result.plan.input_shape):
            call = as_call(given)
            try:
                expected = outputs(model)
                break
            except Exception:  # of a fixed input size
                continue
        for target in ("fold", "affine"):
            if target != "fold":
                del result
                result = ns.convert(model, to=target, example_inputs=example, check=False, verdict=False)
            found = outputs(result.model)
            if [t.shape for t in expected] != [t.shape for t in found]:
                error = None
            else:
                pairs = zip(expected, found, strict=True)
                error = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)
            if target == "fold":
                outcome.sites, outcome.fold_error = len([s for s in result.sites if not s.site.functional]), error
                outcome.folded = sum(site.target == "fold" for site in result.sites)
                outcome.affine = sum(site.target == "affine" for site in result.sites)
                outcome.refused = result.counts["refused"]
                outcome.check = str(result.check)
                outcome.reasons = dict(Counter(_kind(s.reason) for s in result.sites if s.reason))
            else:
                outcome.affine_error = error
        ns.convert(model, to="gn", example_inputs=example, check=False, verdict=False)
    except Exception as error:  # whatever goes wrong is this network's result
        outcome.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    outcome.seconds = time.perf_counter() - started
    outcome.failure = outcome.failure or _verdict(outcome)
    return outcome


def _verdict(outcome: Outcome) -> str | None:
    if outcome.sites != outcome.batch_norms:
        return f"{outcome.sites} sites for {outcome.batch_norms} batch norms"
    if outcome.folded < FOLDS.get(outcome.name, 0):
        return f"{outcome.folded} folded, {FOLDS[outcome.name]} wanted"
    for target, error in (("fold", outcome.fold_error), ("affine", outcome.affine_error)):
        if error is None:
            return f"{target} gives outputs of other shapes"
        if not error <= TOLERANCE:
            return f"{target} is off by {error:.0e}"
    return None


def _smaller(shape: tuple[int, ...]) -> list[Any]:
    """An input of 96 pixels a side, and one of the size that the model surely takes."""
    small = (*shape[:2], *[min(96, extent) for extent in shape[2:]])
    return [_normal(*small), _normal(*shape)]


def _kind(reason: str) -> str:
    """A reason without the names of one model's layers."""
    reason = reason.removeprefix("not folded: ")
    for mark in (
        "is also read by",
        "is also read directly",
        "is parametrized",
        "is not linear in its weight",
        "shares its parameters",
        "not always for this norm",
        "not reached",
        "channels",
        "holds running statistics",
    ):
        if mark in reason:
            return mark
    return " ".join(reason.split()[:2]) if "follows" in reason else reason[:80]


def _work(name: str) -> Outcome:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return examine(name)


def run(names: list[str], processes: int) -> list[Outcome]:
    """All outcomes, in the order of the names; what takes too long is a failure."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        waiting = [(name, pool.apply_async(_work, (name,))) for name in names]
        outcomes = []
        for number, (name, result) in enumerate(waiting, 1):
            try:
                outcome = result.get(SECONDS)
            except multiprocessing.TimeoutError:
                outcome = Outcome(name, failure=f"took more than {SECONDS} s")
            outcomes.append(outcome)
            told = outcome.failure or outcome.skipped or f"{outcome.folded} of {outcome.batch_norms} folded"
            print(f"{number}/{len(names)} {name}: {told} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
        pool.terminate()
    return outcomes


def report(outcomes: list[Outcome], left_out: dict[str, str]) -> str:
    """The section of docs/coverage.md."""
    import torch

    done = [o for o in outcomes if o.skipped is None]
    reasons: Counter[str] = Counter()
    for outcome in done:
        reasons.update(outcome.reasons)
    skipped = {**left_out, **{o.name: o.skipped for o in outcomes if o.skipped not in (None, "no batch norm")}}
    number = sum(o.batch_norms for o in done)
    lines = [
        TITLE,
        "",
        f"Made by `make coverage` with torch {torch.__version__.partition('+')[0]}. Do not edit by hand. Random "
        "weights, statistics and affines, float64, eval mode. The errors are of the outputs, relative to the largest "
        "value of each: `fold` and `affine` against the original.",
        "",
        f"{len(done)} networks, {number:,} batch norms: {sum(o.folded for o in done):,} folded, "
        f"{sum(o.affine for o in done):,} by the affine, {sum(o.refused for o in done):,} refused; "
        f"**{sum(o.failure is not None for o in done)} failures**.",
        "",
        "| network | batch norms | folded | affine | refused | error of fold | of affine | failure |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for o in done:
        errors = [f"{e:.0e}" if e is not None else "" for e in (o.fold_error, o.affine_error)]
        lines.append(
            f"| {o.name} | {o.batch_norms} | {o.folded} | {o.affine} | {o.refused} | {errors[0]} | {errors[1]} "
            f"| {o.failure or ''} |"
        )
    lines += ["", "### Why not folded, or refused", "", "| reason | sites |", "|---|---:|"]
    lines += [f"| {reason} | {n:,} |" for reason, n in reasons.most_common()]
    lines += ["", "### Left out", "", *([f"- {name}: {why}" for name, why in skipped.items()] or ["Nothing."])]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    listed = {name: network for name, network in networks() if fnmatchcase(name, options.only)}
    names = [name for name, network in listed.items() if isinstance(network, Network)]
    outcomes = run(names, options.processes)
    text = report(outcomes, {name: why for name, why in listed.items() if isinstance(why, str)})
    if options.output is None:
        print(text)
    else:
        before = options.output.read_text().partition(TITLE)[0] if options.output.exists() else ""
        options.output.write_text(before.rstrip() + "\n\n" + text)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
