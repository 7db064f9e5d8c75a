"""One small architecture for each timm family that holds a BatchNorm (timm 1.0.31 has 53 such families).

Left out for their size alone: nasnet, pnasnet, vgg, inception_resnet_v2 and vision_transformer's hybrids; ``make zoo``
converts those, and everything else, on the meta device.
"""

from __future__ import annotations

import torch
from torch import nn

SMALLEST = {
    "byobnet": "test_byobnet",
    "convmixer": "convmixer_1024_20_ks9_p14",
    "cpubone": "cpubone_nano",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "ghostnet": "ghostnet_050",
    "hgnet": "hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "test_coatnet",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit (leaves that hide norms)": "mobilevit_xxs",
    "nextvit": "nextvit_small",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvgg (norms on identity branches)": "repvgg_a0",
    "repvit": "repvit_m1",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "tresnet": "tresnet_m",
    "visformer": "visformer_tiny",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

SMALL_SIDE = 96


def example_for(model: nn.Module) -> torch.Tensor:
    """An input as small as the architecture takes: 96 pixels a side, or its own size where that is fixed."""
    channels, height, width = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(2, channels, SMALL_SIDE, SMALL_SIDE, generator=generator, dtype=torch.float64)
    try:
        with torch.no_grad():
            model(small)
    except (RuntimeError, AssertionError, ValueError):
        return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    return small
