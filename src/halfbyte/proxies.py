"""Cheap stand-ins for a measured sensitivity: the noise of a unit where it arises, plain or weighted by what it does to the outputs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.graph import bias_of, by_value, is_real, output_values, weight_of
from halfbyte.model import Inputs, Outputs, QModel
from halfbyte.run import portions, run
from halfbyte.units import Candidates, Units, merged

_PORTION = 8  # all running values of so many samples are held at once
_DRAWS = 4  # decisions drawn for each sample


def proxies(candidates: Candidates, u: Units, data: Sequence[Inputs], *, weighted: bool) -> dict[str, dict[int, float]]:
    """unit -> width -> score over the widest width's: one pass of the float network, and one of each layer for each width.

    The error of a weight is that of its layers' outputs on float inputs; that of running values their rounding error. Plain:
    squared error over squared value (noise-to-signal). weighted: half the squared product of the error with the gradient of a
    drawn decision's log-likelihood, sample by sample: the second order of the output divergence (its Hessian is the Fisher
    matrix; arXiv 2102.05426, equation 8, whose elementwise form misses errors that all point one way).
    """
    changes = {(k, w): merged(candidates, u, {k: w}) for k in u.open for w in u.widths[k]}
    base = candidates[max(candidates)]
    nodes = by_value(base.graph)
    readers: dict[str, list[fx.Node]] = {}
    for reader in u.readers:
        readers.setdefault(reader.weight, []).append(nodes[reader.name])
    noise = dict.fromkeys(changes, 0.0)
    signal = dict.fromkeys(u.open, 0.0)
    generator = torch.Generator().manual_seed(0)
    samples = 0
    for x in portions(base, data, _PORTION):
        seen, slopes = _observed(base.as_float(), x, _values(u, readers), generator if weighted else None)
        samples += len(x[0])
        for (unit, width), m in changes.items():
            for node in readers.get(unit, [nodes[unit]]):
                if node not in seen:
                    continue
                error = (_rounded(m, node, seen, layer=unit in readers) - seen[node]).double()
                if weighted:
                    for slope in slopes.get(node, ()):
                        product = (error * slope).reshape(len(x[0]), -1).sum(1)
                        noise[unit, width] += float(product.square().sum()) / (2 * _DRAWS)
                else:
                    noise[unit, width] += float(error.square().sum())
                    if width == u.widths[unit][-1]:
                        signal[unit] += float(seen[node].double().square().sum())
    scale = {k: samples if weighted else max(s, 1e-30) for k, s in signal.items()}
    score = {(k, w): n / scale[k] for (k, w), n in noise.items()}
    return {k: {w: score[k, w] - score[k, u.widths[k][-1]] for w in u.widths[k]} for k in u.open}


def _values(u: Units, readers: dict[str, list[fx.Node]]) -> set[str]:
    """Names of what has to be seen: groups, and what the layers of open weights read and put out."""
    found = {unit for unit in u.open if unit not in readers}
    for unit in u.open:
        for layer in readers.get(unit, ()):
            found |= {str(n.meta["value"]) for n in (layer, layer.args[0])}  # type: ignore[union-attr]
    return found


def _observed(
    m: QModel, x: Inputs, wanted: set[str], generator: torch.Generator | None
) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, list[Tensor]]]:
    """Values of the float network and, with a generator, the gradients of drawn log-likelihoods at each."""
    nodes = by_value(m.graph)
    seen: dict[fx.Node, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        if name not in wanted:
            return value
        if generator is not None and not value.requires_grad and value.dtype.is_floating_point:
            value = value.detach().requires_grad_()
        seen[nodes[name]] = value
        return value

    with torch.set_grad_enabled(generator is not None):
        outputs = run(m, x, tap)
        if generator is None:
            return seen, {}
        followed = [n for n, t in seen.items() if t.requires_grad]
        slopes: dict[fx.Node, list[Tensor]] = {n: [] for n in followed}
        for _ in range(_DRAWS):
            loss = _likelihood(m, outputs, generator)
            found = torch.autograd.grad(loss, [seen[n] for n in followed], allow_unused=True, retain_graph=True)
            for n, g in zip(followed, found, strict=True):
                slopes[n] += [] if g is None else [g.double()]
    return {n: t.detach() for n, t in seen.items()}, slopes


def _likelihood(m: QModel, outputs: Outputs, generator: torch.Generator) -> Tensor:
    """A scalar whose squared gradient is, on average, the curvature of the divergence (Fisher): of a class drawn from the softmax.

    For other outputs the divergence is noise-to-signal, and the scalar a sum of random signs.
    """
    real = [n for n in output_values(m.graph) if is_real(n)]
    if len(real) == len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1:
        scores = outputs[0].log_softmax(1)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
        return scores.gather(1, drawn).sum()
    parts = []
    for y in (t for t in outputs if t.dtype.is_floating_point):
        signs = (torch.randint(0, 2, y.shape, generator=generator) * 2 - 1).to(y)
        power = float((y.detach() - y.detach().mean()).double().square().sum()) / len(y)
        parts.append((y * signs).sum() * math.sqrt(2 / max(power, 1e-30) / len(outputs)))
    return torch.stack(parts).sum()


@torch.no_grad()
def _rounded(m: QModel, node: fx.Node, seen: dict[fx.Node, Tensor], *, layer: bool) -> Tensor:
    """A value as one unit makes it: of a layer with its rounded weight, or rounded itself."""
    if not layer:
        grid = m.grid(str(node.meta["value"]))
        assert grid is not None
        return fake_quantize(seen[node], grid)
    weight, bias, values = weight_of(node), bias_of(node), m.parameters
    assert weight is not None

    def load(n: fx.Node) -> Any:
        if n is weight:
            grid = m.grid(str(n.meta["value"]))
            assert grid is not None
            return fake_quantize(values[str(n.target)], grid)
        return values[str(n.target)] if n is bias else seen[n]

    return node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator,no-any-return]
