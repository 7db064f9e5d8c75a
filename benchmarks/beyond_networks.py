"""The networks of other projects that benchmarks/beyond.py converts: how each is made, and what it is called with.

Nothing is downloaded: weights are random, and configurations are the packages' own, or made smaller where the layers
are the same. Inputs are as small as a network takes them. A tuple holds positional arguments, a dict keyword arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


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


def normal(*shape: int, seed: int = 0) -> Any:
    """Standard normal numbers in float64."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(side: int = 96, number: int = 2, channels: int = 3) -> Callable[[], Any]:
    """A batch of images."""
    return lambda: normal(number, channels, side, side)


def pixels(side: int = 96, number: int = 2, **more: Any) -> Callable[[], dict[str, Any]]:
    """The same as keyword argument of a network of transformers, with more arguments."""
    return lambda: {"pixel_values": normal(number, 3, side, side), **more}


def tokens(length: int, number: int = 1) -> Any:
    """Identifiers of words."""
    import torch

    return torch.arange(1, 1 + length).expand(number, length).contiguous()


def _torchvision() -> Listed:
    from torchvision import models

    for name in models.list_models(module=models):
        plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        side = 224 if name == "maxvit_t" else 96
        yield (
            name,
            Network(lambda name=name, plain=plain: models.get_model(name, weights=None, **plain), pictures(side)),
        )
    for name in models.list_models(module=models.quantization):
        build = getattr(models.quantization, name.removeprefix("quantized_"))
        plain = {"init_weights": False} if "ception" in name or "googlenet" in name else {}
        yield name, Network(lambda build=build, plain=plain: build(weights=None, quantize=False, **plain), pictures())
    for name in models.list_models(module=models.segmentation):
        build = getattr(models.segmentation, name)
        more = {} if name.startswith("lraspp") else {"aux_loss": True}
        yield (
            name,
            Network(lambda build=build, more=more: build(weights=None, weights_backbone=None, **more), pictures()),
        )
    for name in models.list_models(module=models.video):
        build, size = getattr(models.video, name), (16, 224, 224) if name == "s3d" else (8, 56, 56)
        yield name, Network(lambda build=build: build(weights=None), lambda size=size: normal(1, 3, *size))
    for name in models.list_models(module=models.optical_flow):
        build = getattr(models.optical_flow, name)
        pair = {"image1": normal(1, 3, 128, 128), "image2": normal(1, 3, 128, 128, seed=1), "num_flow_updates": 3}
        yield name, Network(lambda build=build: build(weights=None), lambda pair=pair: pair, single=True)
    yield from _detectors(models.detection)


def _detectors(detection: Any) -> Listed:
    """With every score allowed, so that random weights give boxes."""
    from torchvision import models
    from torchvision.ops import FrozenBatchNorm2d

    def photographs() -> list[Any]:
        return [normal(3, 160, 192).sigmoid(), normal(3, 144, 176, seed=1).sigmoid()]

    two = {"box_score_thresh": 0.0, "box_detections_per_img": 20, "rpn_post_nms_top_n_test": 50}
    one = {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50}
    size = {"min_size": 160, "max_size": 224}
    for name in models.list_models(module=detection):
        build = getattr(detection, name)
        settings = one if name.startswith("ssd") else {**size, **(two if "rcnn" in name else one)}

        def make(build: Any = build, settings: dict[str, Any] = settings) -> Any:
            return build(weights=None, weights_backbone=None, **settings)

        yield name, Network(make, photographs, sorts=True)

    def frozen(build: Any) -> Any:
        body = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d
        )
        return build(body, num_classes=91, **size, **two)

    for build in (detection.FasterRCNN, detection.MaskRCNN, detection.KeypointRCNN):
        name = f"{build.__name__.lower()}_resnet50_fpn frozen"
        yield name, Network(lambda build=build: frozen(build), photographs, sorts=True)


def _hf(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    """A network of transformers from its configuration; ``module:Class`` for what it does not export."""

    def find(name: str) -> Any:
        module, _, cls = name.rpartition(":")
        where = importlib.import_module(f"transformers.models.{module}" if module else "transformers")
        return getattr(where, cls)

    def make() -> Any:
        given = {k: v() if callable(v) else v for k, v in settings.items()}
        return find(model)(find(config)(**given))

    return make


def _hf_resnet(cls: str = "ResNetConfig", **settings: Any) -> Callable[[], Any]:
    """The configuration of a small backbone, to be made when it is needed."""
    small = {"layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "embedding_size": 16}

    def make() -> Any:
        import transformers

        stages = ["stage1", "stage2", "stage3", "stage4"]
        return getattr(transformers, cls)(**{**small, "out_features": stages, **settings})

    return make


def _transformers() -> Listed:
    basic = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    classification = {
        "ResNet": (_hf("ResNetForImageClassification", "ResNetConfig", **basic), 96),
        "ResNet-50": (_hf("ResNetForImageClassification", "ResNetConfig"), 96),
        "RegNet": (_hf("RegNetForImageClassification", "RegNetConfig"), 96),
        "LeViT": (_hf("LevitForImageClassification", "LevitConfig"), 224),
        "LeViT with teacher": (_hf("LevitForImageClassificationWithTeacher", "LevitConfig"), 224),
        "MobileNetV1": (_hf("MobileNetV1ForImageClassification", "MobileNetV1Config"), 96),
        "MobileNetV2": (_hf("MobileNetV2ForImageClassification", "MobileNetV2Config"), 96),
        "MobileNetV2 segmentation": (_hf("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config"), 96),
        "EfficientNet": (_hf("EfficientNetForImageClassification", "EfficientNetConfig"), 96),
        "ALIGN vision": (_hf("AlignVisionModel", "AlignVisionConfig"), 96),
        "MobileViT": (_hf("MobileViTForImageClassification", "MobileViTConfig"), 128),
        "MobileViT segmentation": (_hf("MobileViTForSemanticSegmentation", "MobileViTConfig"), 128),
        "MobileViTV2": (_hf("MobileViTV2ForImageClassification", "MobileViTV2Config"), 128),
        "MobileViTV2 segmentation": (_hf("MobileViTV2ForSemanticSegmentation", "MobileViTV2Config"), 128),
        "CvT": (_hf("CvtForImageClassification", "CvtConfig"), 96),
        "SwiftFormer": (_hf("SwiftFormerForImageClassification", "SwiftFormerConfig"), 224),
        "SegFormer": (_hf("SegformerForSemanticSegmentation", "SegformerConfig"), 96),
        "GLPN": (_hf("GLPNForDepthEstimation", "GLPNConfig"), 96),
        "PoolFormer": (_hf("PoolFormerForImageClassification", "PoolFormerConfig"), 96),
        "BiT": (_hf("BitForImageClassification", "BitConfig"), 96),
        "TextNet": (_hf("TextNetForImageClassification", "TextNetConfig"), 96),
        "HGNet-V2": (_hf("HGNetV2ForImageClassification", "HGNetV2Config"), 96),
        "PP-LCNet": (_hf("PPLCNetForImageClassification", "PPLCNetConfig"), 96),
        "PP-LCNetV3": (_hf("PPLCNetV3Backbone", "PPLCNetV3Config"), 96),
        "timm backbone": (
            _hf("TimmBackbone", "TimmBackboneConfig", backbone="resnet18", use_pretrained_backbone=False),
            96,
        ),
    }
    for name, (make, side) in classification.items():
        yield name, Network(make, pixels(side))
    yield from _hf_detection()
    yield from _hf_dense()
    yield from _hf_signals()


def _hf_detection() -> Listed:
    few = {"encoder_layers": 1, "decoder_layers": 2}
    through_timm = {**few, "use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": "resnet50"}
    own = {**few, "use_timm_backbone": False, "backbone": None, "backbone_config": _hf_resnet()}
    for label, name in (
        ("DETR", "Detr"),
        ("Conditional DETR", "ConditionalDetr"),
        ("Deformable DETR", "DeformableDetr"),
        ("DAB-DETR", "DabDetr"),
        ("Table Transformer", "TableTransformer"),
    ):
        for backbone, settings in (("timm", through_timm), ("own", own)):
            make = _hf(f"{name}ForObjectDetection", f"{name}Config", **settings)
            yield f"{label} ({backbone} backbone)", Network(make, pixels(128), default=name == "DabDetr")
    for label, name in (
        ("RT-DETR", "RTDetr"),
        ("RT-DETR v2", "RTDetrV2"),
        ("D-FINE", "DFine"),
        ("DEIMv2", "Deimv2"),
        ("PP-DocLayoutV2", "PPDocLayoutV2"),
        ("PP-DocLayoutV3", "PPDocLayoutV3"),
    ):
        make = _hf(f"{name}ForObjectDetection", f"{name}Config", decoder_layers=2)
        yield label, Network(make, pixels(640, 1), sorts=True)
    yield "RT-DETR ResNet", Network(_hf("RTDetrResNetBackbone", "RTDetrResNetConfig"), pixels())
    make = _hf("PPOCRV5MobileDetForObjectDetection", "PPOCRV5MobileDetConfig")
    yield "PP-OCRv5 mobile detection", Network(make, pixels(128))


def _hf_dense() -> Listed:
    vit = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}
    small = {**vit, "num_hidden_layers": 4}
    points = {"out_indices": [0, 1, 2, 3]}
    fused = {"use_batch_norm_in_fusion_residual": True, "fusion_hidden_size": 32}

    def detector_of_windows() -> Any:
        import transformers

        return transformers.VitDetConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_channels=4, out_features=["stage2"]
        )

    def poses() -> Any:
        import transformers

        return transformers.VitPoseBackboneConfig(**small, out_features=["stage4"])

    yield (
        "DPT",
        Network(
            _hf("DPTForDepthEstimation", "DPTConfig", **small, **fused, backbone_out_indices=[0, 1, 2, 3]),
            pixels(384, 1),
        ),
    )
    yield "BEiT segmentation", Network(_hf("BeitForSemanticSegmentation", "BeitConfig", **small, **points), pixels(224))
    make = _hf("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", **small, **points)
    yield "Data2Vec segmentation", Network(make, pixels(224))
    backbone = {"backbone_config": _hf_resnet()}
    yield "UperNet (ResNet)", Network(_hf("UperNetForSemanticSegmentation", "UperNetConfig", **backbone), pixels())
    yield (
        "MaskFormer (ResNet)",
        Network(_hf("MaskFormerForInstanceSegmentation", "MaskFormerConfig", **backbone), pixels(128, 1)),
    )
    yield (
        "Mask2Former (ResNet)",
        Network(_hf("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", **backbone), pixels(128, 1)),
    )
    make = _hf(
        "VitMatteForImageMatting",
        "VitMatteConfig",
        backbone_config=detector_of_windows,
        hidden_size=48,
        convstream_hidden_sizes=[8, 16, 32],
        fusion_hidden_sizes=[32, 16, 16, 8],
    )
    yield "ViTMatte", Network(make, lambda: {"pixel_values": normal(1, 4, 128, 128)})
    make = _hf("VitPoseForPoseEstimation", "VitPoseConfig", backbone_config=poses, use_simple_decoder=False)
    yield "ViTPose", Network(make, lambda: {"pixel_values": normal(1, 3, 256, 192)})
    yield "UVDoc", Network(_hf("UVDocModel", "UVDocConfig"), lambda: {"pixel_values": normal(1, 3, 712, 488)})
    pair = {"pixel_values": normal(1, 2, 3, 128, 128).sigmoid()}
    yield (
        "EfficientLoFTR",
        Network(_hf("EfficientLoFTRForKeypointMatching", "EfficientLoFTRConfig"), lambda: pair, sorts=True),
    )
    yield (
        "SuperGlue",
        Network(_hf("SuperGlueForKeypointMatching", "SuperGlueConfig"), lambda: pair, sorts=True),
    )
    make = _hf("GroupViTModel", "GroupViTConfig")
    yield "GroupViT", Network(make, lambda: {**pixels(224)(), "input_ids": tokens(8, 2)})


def _hf_signals() -> Listed:
    audio = {"num_hidden_layers": 2}
    conformer = "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig"
    yield "Wav2Vec2-Conformer", Network(_hf(*conformer, **audio), lambda: normal(2, 4000))
    yield (
        "HuBERT",
        Network(_hf("HubertModel", "HubertConfig", **audio, conv_pos_batch_norm=True), lambda: normal(2, 4000)),
    )
    yield "Parakeet", Network(_hf("ParakeetEncoder", "ParakeetEncoderConfig", **audio), lambda: normal(2, 100, 80))
    yield "LASR", Network(_hf("LasrEncoder", "LasrEncoderConfig", **audio), lambda: normal(2, 100, 128))
    seamless = "seamless_m4t.modeling_seamless_m4t:SeamlessM4TSpeechEncoder"
    settings = {"speech_encoder_layers": 2, "hidden_size": 64, "speech_encoder_attention_heads": 4}
    settings |= {"speech_encoder_intermediate_size": 64}
    yield "Seamless M4T speech", Network(_hf(seamless, "SeamlessM4TConfig", **settings), lambda: normal(2, 60, 160))
    granite = "granite_speech.modeling_granite_speech:GraniteSpeechCTCEncoder"
    yield (
        "Granite speech",
        Network(_hf(granite, "GraniteSpeechEncoderConfig", num_layers=2, hidden_dim=64), lambda: normal(2, 60, 160)),
    )
    few = {"encoder_layers": 1, "decoder_layers": 1}
    yield (
        "FastSpeech2-Conformer",
        Network(
            _hf("FastSpeech2ConformerModel", "FastSpeech2ConformerConfig"),
            lambda: {"input_ids": tokens(12)},
            single=True,
            default=True,
        ),
    )

    def speech() -> dict[str, Any]:
        return {
            "input_ids": tokens(10),
            "decoder_input_values": normal(1, 6, 80),
            "speaker_embeddings": normal(1, 512),
        }

    yield "SpeechT5", Network(_hf("SpeechT5ForTextToSpeech", "SpeechT5Config", **few), speech)
    clap = "ClapAudioModelWithProjection", "ClapAudioConfig"
    yield "CLAP audio", Network(_hf(*clap), lambda: {"input_features": normal(1, 1, 1001, 64), "is_longer": None})
    series = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1, **few}

    def past() -> dict[str, Any]:
        import torch

        values = {"past_values": normal(2, 18), "past_observed_mask": torch.ones(2, 18, dtype=torch.float64)}
        return {
            **values,
            "past_time_features": normal(2, 18, 1),
            "future_values": normal(2, 4, seed=1),
            "future_time_features": normal(2, 4, 1),
        }

    yield "Informer", Network(_hf("InformerModel", "InformerConfig", **{**series, "encoder_layers": 2}), past)
    yield "PatchTST", Network(_hf("PatchTSTForPrediction", "PatchTSTConfig"), lambda: {"past_values": normal(2, 32, 1)})
    mixer = _hf("PatchTSMixerForPrediction", "PatchTSMixerConfig", norm_mlp="BatchNorm")
    yield "PatchTSMixer", Network(mixer, lambda: {"past_values": normal(2, 32, 1)})


def _smp() -> Listed:
    import segmentation_models_pytorch as smp

    decoders = [
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3",
        "DeepLabV3Plus",
        "PAN",
        "UPerNet",
        "Segformer",
    ]
    for decoder in [*decoders, "UPerNet", "Segformer"]:
        for encoder in ("resnet18", "mobilenet_v2"):
            build = getattr(smp, decoder)
            make = lambda build=build, encoder=encoder: build(encoder, encoder_weights=None)  # noqa: E731
            yield f"{decoder}({encoder})", Network(make, pictures(128))
    yield "DPT(vit_tiny)", Network(lambda: smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None), pictures(224))


def _monai() -> Listed:
    from monai.networks import nets

    steps = {"channels": (8, 16, 32), "strides": (2, 2), "norm": "batch"}
    three = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    dyn = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "norm_name": "batch"}
    unetr = {"in_channels": 1, "out_channels": 2, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4, "feature_size": 8}
    volumes: dict[str, Callable[[], Any]] = {
        "UNet 3-D": lambda: nets.UNet(**three, **steps, num_res_units=2),
        "DynUNet 3-D": lambda: nets.DynUNet(**three, **dyn, deep_supervision=True),
        "DynUNet residual 3-D": lambda: nets.DynUNet(**three, **dyn, res_block=True),
        "SegResNet 3-D": lambda: nets.SegResNet(**three, init_filters=8, norm="batch"),
        "SegResNetVAE 3-D": lambda: nets.SegResNetVAE(
            (32, 32, 32), in_channels=1, out_channels=2, init_filters=8, norm="batch"
        ),
        "SegResNetDS 3-D": lambda: nets.SegResNetDS(**three, init_filters=8, norm="batch"),
        "DenseNet121 3-D": lambda: nets.DenseNet121(**three),
        "HighResNet 3-D": lambda: nets.HighResNet(**three),
        "AttentionUnet 3-D": lambda: nets.AttentionUnet(**three, channels=(8, 16), strides=(2,)),
        "BasicUNet 3-D": lambda: nets.BasicUNet(**three, features=(8,) * 6, norm="batch"),
        "BasicUNet++ 3-D": lambda: nets.BasicUNetPlusPlus(**three, features=(8,) * 6, norm="batch"),
        "ResNet18 3-D": lambda: nets.resnet18(spatial_dims=3, n_input_channels=1),
        "VNet 3-D": lambda: nets.VNet(**three),
        "UNETR 3-D": lambda: nets.UNETR(img_size=(32, 32, 32), **unetr, norm_name="batch"),
        "AutoEncoder 3-D": lambda: nets.AutoEncoder(**three, channels=(8, 16), strides=(2, 2), norm="batch"),
        "SEResNet50 3-D": lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2),
    }
    for name, make in volumes.items():
        yield name, Network(make, lambda: normal(2, 1, 32, 32, 32))
    images: dict[str, tuple[Callable[[], Any], int]] = {
        "EfficientNet-B0": (lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False), 96),
        "FlexibleUNet": (lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0", pretrained=False), 96),
        "AHNet": (lambda: nets.AHNet(spatial_dims=2, in_channels=3, out_channels=2), 128),
        "HoVerNet": (lambda: nets.HoVerNet(mode="fast", in_channels=3, out_classes=2), 256),
    }
    for name, (make, side) in images.items():
        yield name, Network(make, pictures(side, 1))


def _ultralytics() -> Listed:
    from ultralytics.nn import tasks

    kinds = {"seg": "SegmentationModel", "cls": "ClassificationModel", "pose": "PoseModel", "obb": "OBBModel"}
    names = ["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"]
    for name in [*names, *(f"yolo11n-{kind}" for kind in kinds), "yolov8n-ghost"]:
        build = getattr(tasks, kinds.get(name.rpartition("-")[2], "DetectionModel"))
        make = lambda build=build, name=name: build(f"{name}.yaml", verbose=False)  # noqa: E731
        yield name, Network(make, pictures(128, 1), sorts=name in ("yolov10n", "yolo26n"))
    for name in ("rtdetr-l", "rtdetr-resnet50"):
        make = lambda name=name: tasks.RTDETRDetectionModel(f"{name}.yaml", verbose=False)  # noqa: E731
        yield name, Network(make, pictures(128, 1), sorts=True)


def _speechbrain() -> Listed:
    def of(module: str, name: str, **settings: Any) -> Callable[[], Any]:
        return lambda: getattr(importlib.import_module(f"speechbrain.lobes.models.{module}"), name)(**settings)

    def features() -> Any:
        return normal(2, 60, 40)

    ecapa = {"input_size": 40, "channels": [64, 64, 64, 64, 192]}
    yield "ECAPA-TDNN", Network(of("ECAPA_TDNN", "ECAPA_TDNN", **ecapa), features)
    yield "Xvector", Network(of("Xvector", "Xvector", in_channels=40, device="cpu"), features)
    yield "ResNet", Network(of("ResNet", "ResNet", input_size=40, channels=[16, 16, 32, 32]), features)
    yield "CRDNN", Network(of("CRDNN", "CRDNN", input_shape=[2, 60, 40], rnn_layers=1, dnn_blocks=2), features)
    context = {"input_shape": [2, 60, 40], "out_channels": 32, "conv_channels": [16] * 4, "strides": [1, 2, 1, 1]}
    yield "ContextNet", Network(of("ContextNet", "ContextNet", **context, num_blocks=4), features)
    yield "CNN14", Network(of("Cnn14", "Cnn14", mel_bins=40, emb_dim=64, norm_type="bn"), lambda: normal(2, 64, 40))
    yield "MetricGAN discriminator", Network(of("MetricGAN", "MetricDiscriminator"), lambda: normal(2, 2, 64, 64))


def _geometric() -> Listed:
    def graph() -> Any:
        import torch

        edges = torch.randint(0, 12, (2, 40), generator=torch.Generator().manual_seed(0))
        return normal(12, 16), edges

    def of(name: str, **settings: Any) -> Callable[[], Any]:
        def make() -> Any:
            import torch
            from torch_geometric.nn import models

            more = {"deg": torch.tensor([1, 3, 4, 2, 2])} if name == "PNA" else {}
            return getattr(models, name)(16, 32, num_layers=3, out_channels=7, norm="batch_norm", **settings, **more)

        return make

    for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"):
        yield name, Network(of(name), graph)
    aggregate = {"aggregators": ["mean", "max"], "scalers": ["identity", "amplification"]}
    yield "PNA", Network(of("PNA", **aggregate), graph)
    yield "GCN with jumping knowledge", Network(of("GCN", jk="cat"), graph)

    def mlp() -> Any:
        from torch_geometric.nn import MLP

        return MLP([16, 32, 32, 7], norm="batch_norm")

    yield "MLP", Network(mlp, lambda: normal(12, 16))


def _efficientnet() -> Listed:
    from efficientnet_pytorch import EfficientNet

    yield "b0", Network(lambda: EfficientNet.from_name("efficientnet-b0"), pictures())


def _torchcrepe() -> Listed:
    import torchcrepe

    for size in ("tiny", "full"):
        yield size, Network(lambda size=size: torchcrepe.Crepe(size), lambda: normal(2, 1024))


PACKAGES: dict[str, tuple[str, Callable[[], Listed]]] = {
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


def stand_in_for_torchaudio() -> None:
    """An empty torchaudio where there is none that this torch can load.

    Speech packages and transformers import it where it is installed, fail if it was made for another torch, and then
    half of their networks cannot be imported. No network here calls it.
    """
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

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
