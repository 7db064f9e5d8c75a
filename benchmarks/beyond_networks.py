"""The networks of other projects that benchmarks/beyond.py converts: how each is made, and what it is called with.

Nothing is downloaded: weights are random, and configurations are the packages' own, or made smaller where the layers
are the same. Inputs are as small as a network takes them. Here are the networks that follow a rule; the others are
listed in beyond_networks.yaml.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor


@dataclass(frozen=True)
class Network:
    """How to make a network, and what to call it with.

    sorts    its outputs are sorted by score, and may change places where scores are equal up to rounding
    default  it makes tensors of the default dtype in its forward, so that this has to be float64, too
    single   it casts to float32 in its forward, and is converted in that
    """

    make: Callable[[], Any]
    inputs: Callable[[], Any]
    sorts: bool = False
    default: bool = False
    single: bool = False


Listed = Iterator[tuple[str, Network]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(side: int = 96, number: int = 2) -> Callable[[], Tensor]:
    """A batch of images."""
    return partial(normal, number, 3, side, side)


def pixels(side: int, number: int = 2) -> dict[str, Tensor]:
    """A batch of images as transformers takes them."""
    return {"pixel_values": normal(number, 3, side, side)}


def config(**settings: Any) -> Any:
    """A configuration of transformers."""
    return getattr(importlib.import_module("transformers"), settings.pop("class"))(**settings)


TAGS: dict[str, Callable[..., Any]] = {
    "!normal": normal,
    "!pixels": pixels,
    "!shares": lambda *shape: normal(*shape).sigmoid(),  # between 0 and 1
    "!ones": lambda *shape: torch.ones(*shape, dtype=torch.float64),
    "!tokens": lambda length, number: torch.arange(1, 1 + length).expand(number, length).contiguous(),
    "!edges": lambda nodes, count: torch.randint(0, nodes, (2, count), generator=torch.Generator().manual_seed(0)),
    "!tensor": lambda *values: torch.tensor(values),
    "!config": config,
}


class _Loader(yaml.SafeLoader):
    """Leaves each tag as a function, which is called when the network is made."""


def _deferred(loader: _Loader, node: yaml.Node) -> Callable[[], Any]:
    if isinstance(node, yaml.MappingNode):
        return partial(TAGS[node.tag], **loader.construct_mapping(node, deep=True))
    assert isinstance(node, yaml.SequenceNode)
    return partial(TAGS[node.tag], *loader.construct_sequence(node, deep=True))


for tag in TAGS:
    _Loader.add_constructor(tag, _deferred)


def _called(tree: Any) -> Any:
    """A value of the file with every tag's function called; a list becomes a tuple where a call takes several."""
    if isinstance(tree, dict):
        return {key: _called(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_called(value) for value in tree]
    return tree() if callable(tree) else tree


def _listed(root: str) -> Listed:
    """The networks that the file lists for one package."""
    with open(Path(__file__).with_suffix(".yaml")) as file:
        entries = yaml.load(file, _Loader)[root]

    def make(path: str, settings: dict[str, Any]) -> Any:
        module, _, name = path.rpartition(":")
        build = attrgetter(name)(importlib.import_module(f"{root}.{module}" if module else root))
        settings = _called(settings)
        return build(build.config_class(**settings)) if root == "transformers" else build(**settings)

    def inputs(given: Any) -> Any:
        found = _called(given)
        return tuple(found) if isinstance(found, list) else found

    for name, entry in entries.items():
        flags = {key: value for key, value in entry.items() if key not in ("make", "settings", "inputs")}
        make_it = partial(make, entry["make"], entry.get("settings", {}))
        yield name, Network(make_it, partial(inputs, entry["inputs"]), **flags)


def _torchvision() -> Listed:
    from torchvision import models
    from torchvision.models import optical_flow, quantization, segmentation, video

    def settings_of(name: str, module: Any) -> dict[str, Any]:
        if module is segmentation:
            return {"weights_backbone": None} | ({} if name.startswith("lraspp") else {"aux_loss": True})
        plain = {"init_weights": False} if name.removeprefix("quantized_") in ("googlenet", "inception_v3") else {}
        return plain | ({"quantize": False} if module is quantization else {})

    def inputs_of(name: str, module: Any) -> Callable[[], Any]:
        if module is video:
            return partial(normal, 1, 3, *((16, 224, 224) if name == "s3d" else (8, 56, 56)))
        if module is optical_flow:
            images = {"image1": normal(1, 3, 128, 128), "image2": normal(1, 3, 128, 128, seed=1)}
            return lambda: {**images, "num_flow_updates": 3}
        return pictures(224 if name == "maxvit_t" else 96)

    for module in (models, quantization, segmentation, video, optical_flow):
        for name in models.list_models(module=module):
            make = partial(models.get_model_builder(name), weights=None, **settings_of(name, module))
            yield name, Network(make, inputs_of(name, module), single=module is optical_flow)
    yield from _detectors(models.detection)


def _detectors(detection: Any) -> Listed:
    """With every score allowed, so that random weights give boxes."""
    from torchvision import models
    from torchvision.ops import FrozenBatchNorm2d

    def photographs() -> list[Tensor]:
        return [normal(3, 160, 192).sigmoid(), normal(3, 144, 176, seed=1).sigmoid()]

    two = {"box_score_thresh": 0.0, "box_detections_per_img": 20, "rpn_post_nms_top_n_test": 50}
    one = {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50}
    size = {"min_size": 160, "max_size": 224}
    for name in models.list_models(module=detection):
        settings = one if name.startswith("ssd") else {**size, **(two if "rcnn" in name else one)}
        make = partial(getattr(detection, name), weights=None, weights_backbone=None, **settings)
        yield name, Network(make, photographs, sorts=True)

    def frozen(build: Any) -> Any:
        body = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d
        )
        return build(body, num_classes=91, **size, **two)

    for build in (detection.FasterRCNN, detection.MaskRCNN, detection.KeypointRCNN):
        yield f"{build.__name__.lower()}_resnet50_fpn frozen", Network(partial(frozen, build), photographs, sorts=True)


def _smp() -> Listed:
    import segmentation_models_pytorch as smp

    decoders = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer"
    for decoder in decoders.split():
        for encoder in ("resnet18", "mobilenet_v2"):
            make = partial(getattr(smp, decoder), encoder, encoder_weights=None)
            yield f"{decoder}({encoder})", Network(make, pictures(128))
    make = partial(smp.DPT, "tu-vit_tiny_patch16_224", encoder_weights=None)
    yield "DPT(vit_tiny)", Network(make, pictures(224))


def _ultralytics() -> Listed:
    from ultralytics.nn import tasks

    kinds = {"seg": "SegmentationModel", "cls": "ClassificationModel", "pose": "PoseModel", "obb": "OBBModel"}
    kinds |= {"l": "RTDETRDetectionModel", "resnet50": "RTDETRDetectionModel"}
    names = "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n yolov8n-ghost"
    names += " yolo11n-seg yolo11n-cls yolo11n-pose yolo11n-obb rtdetr-l rtdetr-resnet50"
    for name in names.split():
        build = getattr(tasks, kinds.get(name.rpartition("-")[2], "DetectionModel"))
        sorts = name in ("yolov10n", "yolo26n") or name.startswith("rtdetr")
        yield name, Network(partial(build, f"{name}.yaml", verbose=False), pictures(128, 1), sorts=sorts)


PACKAGES: dict[str, tuple[str, Callable[[], Listed]]] = {
    "torchvision": ("torchvision", _torchvision),
    "transformers": ("transformers", partial(_listed, "transformers")),
    "smp": ("segmentation_models_pytorch", _smp),
    "monai": ("monai", partial(_listed, "monai.networks.nets")),
    "ultralytics": ("ultralytics", _ultralytics),
    "speechbrain": ("speechbrain", partial(_listed, "speechbrain.lobes.models")),
    "torch-geometric": ("torch_geometric", partial(_listed, "torch_geometric.nn.models")),
    "efficientnet-pytorch": ("efficientnet_pytorch", partial(_listed, "efficientnet_pytorch")),
    "torchcrepe": ("torchcrepe", partial(_listed, "torchcrepe")),
}


def stand_in_for_torchaudio() -> None:
    """An empty torchaudio where there is none that this torch can load.

    Speech packages and transformers import it where it is installed, fail if it was made for another torch, and then
    half of their networks cannot be imported. No network here calls it.
    """
    try:
        importlib.import_module("torchaudio")
        return
    except Exception:  # not installed, or made for another torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
    for name in ("", ".functional", ".transforms", ".compliance", ".compliance.kaldi"):
        module = ModuleType(f"torchaudio{name}")
        module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []  # type: ignore[attr-defined]
        module.__version__ = "2.11.0"  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        if name:
            setattr(sys.modules[module.__name__.rpartition(".")[0]], name.rpartition(".")[2], module)


def of_package(package: str) -> dict[str, Network]:
    """The networks of one package, by ``package.name``; raises what its import raises."""
    module, listed = PACKAGES[package]
    stand_in_for_torchaudio()
    importlib.import_module(module)
    return {f"{package}.{name}": network for name, network in listed()}


def networks() -> dict[str, Network | str]:
    """Every network by name, or why its package is left out."""
    found: dict[str, Network | str] = {}
    for package in PACKAGES:
        try:
            found.update(of_package(package))
        except Exception as error:  # a package that lacks another, or does not fit this torch
            found[f"{package}.*"] = f"cannot be imported here ({' '.join(str(error).split())[:80]})"
    return found


def find(name: str) -> Network:
    """The network of that name; imports its package only."""
    return of_package(name.partition(".")[0])[name]
