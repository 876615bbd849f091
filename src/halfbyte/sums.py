"""Exact sums of products of codes: float32 where every partial sum is below 2^24, in parts or in float64 beyond."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.ops import spatial_pad

_EXACT = 2**24  # float32 holds every integer up to here, so sums below it are exact in any order


def conv_sums(
    x: Tensor, w: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Convolution of integers (zero-points taken off) of 1 to 3 spatial dimensions, exact; pads in ONNX's order."""
    padded = F.pad(x, spatial_pad(pads)) if any(pads) else x
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(stride)]
    largest = float(padded.abs().max())
    if largest * float(w.flatten(1).abs().sum(1).max()) < _EXACT:
        return function(padded, w, None, stride, 0, dilation, groups)
    if groups == 1:  # sums over some of the input channels stay exact; their own sum is taken in float64
        return _by_parts(padded, w, largest, lambda xs, ws: function(xs, ws, None, stride, 0, dilation))
    return function(padded.double(), w.double(), None, stride, 0, dilation, groups)


def _by_parts(x: Tensor, w: Tensor, largest: float, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum of products over slices of dimension 1 that are each exact in float32."""
    per_input = w.abs().flatten(2).sum(2) if w.ndim > 2 else w.abs()
    reach = torch.cumsum(per_input, 1).amax(0) * largest
    parts, start = [], 0
    offset = 0.0
    for i, total in enumerate(reach.tolist()):
        if total - offset >= _EXACT and i > start:
            parts.append((start, i))
            start, offset = i, reach[i - 1].item()
    parts.append((start, w.shape[1]))
    total_sum: Tensor | None = None
    for a, b in parts:
        exact = float(per_input[:, a:b].sum(1).max()) * largest < _EXACT
        xs, ws = x[:, a:b], w[:, a:b]
        part = product(xs, ws).double() if exact else product(xs.double(), ws.double())
        total_sum = part if total_sum is None else total_sum + part
    assert total_sum is not None  # there is always a last part
    return total_sum


def matmul_sums(a: Tensor, b: Tensor) -> Tensor:
    """Product of integer matrices: float32 where every sum is below 2^24, float64 (exact to 2^53) beyond."""
    if float(a.abs().max()) * float(b.abs().sum(-2).max()) < _EXACT:
        return a @ b
    return a.double() @ b.double()
