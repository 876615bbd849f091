"""Products of matrices, and equations solved by them, at the speed that convolutions have."""

import torch
from torch import Tensor

_LARGE = 1 << 22  # multiplications
_BLOCK = 256  # columns of a factor, where it is made of products
# No public call reaches its product of matrices.
_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, group after group: [groups, M, N] of [groups, M, K] and [groups, N, K].

    Where the BLAS is not tuned for the processor, as MKL for those of AMD, oneDNN takes half its time.
    """
    large = len(a) == 1 and a.shape[1] * a.shape[2] * b.shape[1] >= _LARGE
    if not (large and _ONEDNN) or a.device.type != "cpu" or a.dtype != torch.float32:
        return a @ b.transpose(1, 2)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a[0].contiguous(), b[0].contiguous(), None, "none", [], "")
    return found[None]


def cholesky(gram: Tensor) -> Tensor | None:
    """The lower factor of positive definite matrices [groups, K, K]; None if one of them is none."""
    k = gram.shape[1]
    width = _BLOCK if len(gram) == 1 else k
    lower = torch.zeros_like(gram)
    for start in range(0, k, width):
        stop = min(k, start + width)
        panel = gram[:, start:, start:stop]
        if start:
            panel = panel - product(lower[:, start:, :start], lower[:, start:stop, :start])
        corner, failed = torch.linalg.cholesky_ex(panel[:, : stop - start])
        if bool((failed > 0).any()):
            return None
        lower[:, start:stop, start:stop] = corner
        if stop < k:
            below = torch.linalg.solve_triangular(
                corner.transpose(1, 2), panel[:, stop - start :], upper=True, left=False
            )
            lower[:, stop:, start:stop] = below
    return lower


def solved(right: Tensor, lower: Tensor) -> Tensor:
    """X of ``X L L^T = right``, [groups, N, K], for a factor [groups, K, K]."""
    k = lower.shape[1]
    if len(lower) > 1 or k <= _BLOCK:
        return torch.cholesky_solve(right.transpose(1, 2), lower).transpose(1, 2).contiguous()
    found = right.clone()
    blocks = [slice(start, min(k, start + _BLOCK)) for start in range(0, k, _BLOCK)]
    for at in blocks:
        part = found[:, :, at] - product(found[:, :, : at.start], lower[:, at, : at.start])
        found[:, :, at] = torch.linalg.solve_triangular(lower[:, at, at].transpose(1, 2), part, upper=True, left=False)
    for at in reversed(blocks):
        part = found[:, :, at] - product(found[:, :, at.stop :], lower[:, at.stop :, at].transpose(1, 2))
        found[:, :, at] = torch.linalg.solve_triangular(lower[:, at, at], part, upper=False, left=False)
    return found
