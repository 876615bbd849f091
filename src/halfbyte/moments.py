"""What each value is expected to be when there is no data: normal distributions from the batch norms, carried through the graph.

A batch norm says of its output that channel c has mean beta_c and spread gamma_c. From there the moments follow: in closed form
through ReLU, ReLU6 and other clamps (arXiv 1906.04721, appendix; white paper 2106.08295, section 3.3), by addition of means and
variances, by quadrature through any other function of one value.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from halfbyte.graph import layers, weight_of
from halfbyte.model import Moments, QModel, value_name
from halfbyte.ops import CONV_TRANSPOSE, LINEAR, Kind, base_name, clamp_bounds, kind
from halfbyte.run import run

# Beyond so many deviations the white paper (section 3.1) lets no value of a batch norm go.
DEVIATIONS = 6.0
_UNARY = (
    "silu gelu hardswish hardsigmoid sigmoid tanh elu softplus mish leaky_relu exp sqrt square abs neg log_sigmoid celu selu"
).split()
_NODES = 24
# A picture whose pixels fill 0..255 has about this mean and spread, as shares of the range.
_PICTURE_MEAN, _PICTURE_STD = 0.46, 0.26
# Black and white in deviations from the mean of an estimated input: a fifth more than (0 - 0.46) / 0.26 and (1 - 0.46) / 0.26,
# because a range too wide costs little and one too narrow cuts.
_BLACK, _WHITE = -2.2, 2.5
# Neighbouring pixels, and the colours of one pixel, are about this much alike in photographs.
_PIXELS_ALIKE, _COLOURS_ALIKE = 0.95, 0.9


@dataclass(frozen=True)
class Spread:
    """A value's elements as normal variables cut off at two ends: ``clip(N(mu, sigma^2), low, high)``; NaN where unknown.

    mu, sigma, low, high: float32, of the value's shape (a batch of 1). mean, var: the moments of what results.
    """

    mu: Tensor
    sigma: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor
    var: Tensor

    @property
    def least(self) -> Tensor:
        """The smallest value to be expected."""
        return self.ends(DEVIATIONS)[0]

    @property
    def greatest(self) -> Tensor:
        """The largest value to be expected."""
        return self.ends(DEVIATIONS)[1]

    def ends(self, deviations: float) -> tuple[Tensor, Tensor]:
        """The values so many deviations from the mean, within the limits."""

        def reach(mu: Tensor, sigma: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
            far = deviations * sigma
            least = torch.minimum(torch.maximum(mu - far, low), high)
            return least, torch.maximum(torch.minimum(mu + far, high), low)

        least, greatest = _elementwise(reach, self.mu, self.sigma, self.low, self.high)
        return least, greatest

    def to(self, device: torch.device) -> "Spread":
        """The same on another device."""
        return Spread(*(t.to(device) for t in (self.mu, self.sigma, self.low, self.high, self.mean, self.var)))

    def channels(self, axis: int, of: Tensor) -> Tensor:
        """The average of one of its tensors over everything but one dimension, [channels]."""
        flat = _compact(of).movedim(axis, 0).flatten(1).mean(1)
        return flat.expand(of.shape[axis]) if len(flat) == 1 else flat


def normal(mean: Tensor, std: Tensor) -> Spread:
    """A normal variable."""
    end = torch.full((1,) * mean.ndim, math.inf, device=mean.device)
    low, high = (-end).expand(mean.shape), end.expand(mean.shape)
    return Spread(mean, std, low, high, mean, _compact(std).square().expand(std.shape))


def matched(mean: Tensor, var: Tensor, low: Tensor, high: Tensor) -> Spread:
    """A variable of which only moments and ends are known."""
    positive = _compact(var).clamp(min=0)
    return Spread(mean, positive.sqrt().expand(var.shape), low, high, mean, positive.expand(var.shape))


def clipped(s: Spread, low: Tensor | float, high: Tensor | float) -> Spread:
    """Behind a clamp: the moments of a normal variable cut off at both ends, in closed form."""

    def cut(mu: Tensor, sigma: Tensor, a: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        lo, hi = torch.maximum(a, _tensor(low, a)), torch.minimum(b, _tensor(high, b))
        lo, hi = torch.minimum(lo, _tensor(high, lo)), torch.maximum(hi, _tensor(low, hi))
        cut_mean, cut_var = _cut_moments(mu, sigma, lo, hi)
        narrower = (lo > a) | (hi < b)  # else what is known of the moments stays
        moments = (torch.where(narrower, cut_mean, mean), torch.where(narrower, cut_var, var))
        return (mu.expand_as(lo), sigma.expand_as(lo), lo, hi, *moments)

    return Spread(*_elementwise(cut, s.mu, s.sigma, s.low, s.high, s.mean, s.var))


def _tensor(x: Tensor | float, like: Tensor) -> Tensor:
    return x.to(like) if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)


def _cut_moments(mu: Tensor, sigma: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``clip(N(mu, sigma^2), low, high)``; float64 inside, because large terms cancel."""
    m, s, a, b = (t.double() for t in (mu, sigma, low, high))
    s = s.clamp(min=1e-30)
    za, zb = ((a - m) / s).clamp(-40, 40), ((b - m) / s).clamp(-40, 40)
    pa, pb = _density(za), _density(zb)
    ca, cb = torch.special.ndtr(za), torch.special.ndtr(-zb)
    inside = 1 - ca - cb
    # Moments about mu: what is cut off sits at the ends; an infinite end has no weight.
    da, db = (torch.where(torch.isfinite(end), end - m, torch.zeros_like(end - m)) for end in (a, b))
    first = da * ca + db * cb + s * (pa - pb)
    second = da.square() * ca + db.square() * cb + s.square() * (inside + za * pa - zb * pb)
    return (m + first).float(), (second - first.square()).clamp(min=0).float()


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def through(function: Callable[[Tensor], Tensor], s: Spread) -> Spread:
    """Behind any function of one value: Gauss-Hermite quadrature; the ends from the function over the expected range."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    at = torch.from_numpy(nodes).float().to(s.mu.device)
    w = torch.from_numpy(weights / weights.sum()).float().to(s.mu.device)

    def integrate(mu: Tensor, sigma: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        spread = (mu.unsqueeze(-1) + sigma.unsqueeze(-1) * at).clamp(low.unsqueeze(-1), high.unsqueeze(-1))
        y = function(spread)
        mean = (y * w).sum(-1)
        var = ((y - mean.unsqueeze(-1)).square() * w).sum(-1)
        lo, hi = torch.maximum(low, mu - 8 * sigma), torch.minimum(high, mu + 8 * sigma)
        net = function(lo.unsqueeze(-1) + (hi - lo).unsqueeze(-1) * torch.linspace(0, 1, 65, device=mu.device))
        return mean, var, net.amin(-1), net.amax(-1)

    return matched(*_elementwise(integrate, s.mu, s.sigma, s.low, s.high))


def _compact(t: Tensor) -> Tensor:
    """One element for each dimension along which a tensor only repeats itself."""
    for d in range(t.ndim):
        if t.stride(d) == 0 and t.shape[d] > 1:
            t = t.narrow(d, 0, 1)
    return t


def _elementwise(function: Callable[..., tuple[Tensor, ...]], *xs: Tensor) -> tuple[Tensor, ...]:
    """Apply a function of tensors of one shape without computing what only repeats."""
    shape = torch.broadcast_shapes(*(x.shape for x in xs))  # type: ignore[no-untyped-call]
    small = torch.broadcast_tensors(*(_compact(x) for x in xs))  # type: ignore[no-untyped-call]
    return tuple(t.expand(shape) if t.ndim == len(shape) else t for t in function(*small))


def unknown(shape: torch.Size, device: torch.device | None = None) -> Spread:
    """A value of which nothing is known."""
    nan = torch.full((1,) * len(shape), float("nan"), device=device).expand(shape)
    end = torch.full((1,) * len(shape), float("inf"), device=device).expand(shape)
    return Spread(nan, nan, -end, end, nan, nan)


def _added(a: Spread, b: Spread, sign: float) -> Spread:
    low, high = (b.low, b.high) if sign > 0 else (-b.high, -b.low)

    def add(*t: Tensor) -> tuple[Tensor, ...]:
        return t[0] + sign * t[4], t[1] + t[5], t[2] + t[6], t[3] + t[7]

    return matched(*_elementwise(add, a.mean, a.var, a.low, a.high, b.mean, b.var, low, high))


def _multiplied(a: Spread, b: Spread) -> Spread:
    def multiply(*t: Tensor) -> tuple[Tensor, ...]:
        second = (t[1] + t[0].square()) * (t[5] + t[4].square())
        mean = t[0] * t[4]
        corners = torch.stack([x * y for x in t[2:4] for y in t[6:8]])
        return mean, second - mean.square(), corners.amin(0), corners.amax(0)

    ends = (a.mean, a.var, a.least, a.greatest, b.mean, b.var, b.least, b.greatest)
    return matched(*_elementwise(multiply, *ends))


def _constant(t: Tensor) -> Spread:
    t = t.float()
    zero = torch.zeros_like(t)
    return Spread(t, zero, t, t, t, zero)


def _spread(x: Any, like: Spread) -> Spread:
    return x if isinstance(x, Spread) else _constant(torch.as_tensor(x, device=like.mean.device))


class _Propagation:
    """How each operation carries a :class:`Spread`; given to ``run`` in place of evaluating the operation."""

    def __init__(self, m: QModel, given: Mapping[str, Spread]) -> None:
        self.moments, self.given = m.moments, given
        self.layers = set(layers(m.graph))
        self.found: dict[str, Spread] = {}

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self._evaluated(node, args, kwargs)
        if isinstance(result, Spread) and "value" in node.meta:
            self.found[value_name(node)] = result
        return result

    def _evaluated(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat = [a for a in _flatten((args, tuple(kwargs.values()))) if isinstance(a, Spread)]
        if not flat:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        name, moments = base_name(node), self.moments.get(value_name(node)) if "value" in node.meta else None
        if node in self.layers:
            return self._layer(node, args, moments)
        if kind(node) is Kind.CLAMP:
            bounds = clamp_bounds(node)
            low, high = args[1:3] if bounds is None else bounds
            return clipped(args[0], low, high)
        if name in ("add", "sub") and not kwargs:
            return _added(_spread(args[0], flat[0]), _spread(args[1], flat[0]), 1.0 if name == "add" else -1.0)
        if name in ("mul", "div") and (name == "mul" or not isinstance(args[1], Spread)):
            other = args[1] if name == "mul" else 1 / args[1]
            return _multiplied(_spread(args[0], flat[0]), _spread(other, flat[0]))
        if name in _UNARY or name == "prelu":
            return through(lambda t: _call(node, t, args, kwargs), args[0])
        if name == "batch_norm" and not args[5]:
            return _normalized(args)
        if kind(node) is Kind.CODES or name in ("cat", "pad", "constant_pad_nd") or kind(node) is Kind.AVERAGE:
            return _moved(node, args, kwargs, flat[0])
        if name.startswith(("avg_pool", "adaptive_avg_pool", "upsample", "mean")):
            return _moved(node, args, kwargs, flat[0])
        return _unknown_like(node, args, kwargs)

    def _layer(self, node: fx.Node, args: tuple[Any, ...], moments: Moments | None) -> Spread:
        x, weight, bias, *rest = (*args, None)[: max(3, len(args))]
        if moments is not None:
            shape = _call_on(node, args, lambda s: s.mean).shape
            along = [1] * len(shape)
            along[-1 if node.target is LINEAR else 1] = -1
            return normal(*(t.to(weight).reshape(along).expand(shape) for t in (moments.mean, moments.std)))
        mean = node.target(x.mean, weight, bias, *rest)  # type: ignore[operator]
        var = node.target(x.var, weight.square(), None, *rest)  # type: ignore[operator]
        # What a layer without batch norm reads is neither independent nor moves as one: the ends lie between both cases.
        together = node.target(x.var.sqrt(), weight.abs(), None, *rest)  # type: ignore[operator]
        std = var.clamp(min=0).sqrt()
        found = normal(mean, (std * together).clamp(min=0).sqrt())
        return replace(found, var=var.clamp(min=0))


def _flatten(x: Any) -> list[Any]:
    return [y for item in x for y in _flatten(item)] if isinstance(x, list | tuple) else [x]


def _map(x: Any, f: Callable[[Spread], Tensor]) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(_map(item, f) for item in x)
    return f(x) if isinstance(x, Spread) else x


def _call_on(node: fx.Node, args: Any, f: Callable[[Spread], Tensor], kwargs: Mapping[str, Any] | None = None) -> Any:
    return node.target(*_map(args, f), **{k: _map(v, f) for k, v in (kwargs or {}).items()})  # type: ignore[operator]


def _call(node: fx.Node, t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    rest = args[1:]
    if base_name(node) == "prelu":  # the slopes lie along dimension 1 of the value, as they do of t
        slope = rest[0].reshape(1, -1, *[1] * (t.ndim - 2)) if rest[0].numel() > 1 else rest[0]
        return torch.where(t > 0, t, slope * t)
    return torch.as_tensor(node.target(t, *rest, **kwargs))  # type: ignore[operator]


def _moved(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], like: Spread) -> Any:
    """Operations that move, repeat or average values do the same to everything known of them."""
    device = like.mean.device

    def every(name: str) -> Any:
        return _call_on(node, args, lambda s: getattr(s, name), kwargs)

    def one(*parts: Tensor) -> Spread:
        return Spread(*(p.to(device) for p in parts))

    fields = [every(n) for n in ("mu", "sigma", "low", "high", "mean", "var")]
    if isinstance(fields[0], list | tuple):
        return [one(*parts) for parts in zip(*fields, strict=True)]
    return one(*fields)


def _normalized(args: tuple[Any, ...]) -> Spread:
    """A batch norm that was not folded says what comes out of it."""
    x, gamma, beta = args[0], args[1], args[2]
    shape = [1, -1, *[1] * (x.mean.ndim - 2)]
    one = torch.ones_like(args[3])
    std, mean = (one if gamma is None else gamma.abs()), (torch.zeros_like(one) if beta is None else beta)
    return normal(mean.reshape(shape).expand(x.mean.shape), std.reshape(shape).expand(x.mean.shape))


_ENDS = {"softmax": (0.0, 1.0), "_softmax": (0.0, 1.0)}


def _unknown_like(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = _call_on(node, args, lambda s: torch.zeros(s.mean.shape, device=s.mean.device), kwargs)
    if isinstance(result, Tensor) and result.is_floating_point():
        s = unknown(result.shape, result.device)
        return clipped(s, *_ENDS[base_name(node)]) if base_name(node) in _ENDS else s
    if isinstance(result, list | tuple):
        return [unknown(t.shape, t.device) if isinstance(t, Tensor) and t.is_floating_point() else t for t in result]
    return result


def picture_moments(low: float, high: float) -> tuple[float, float]:
    """Mean and spread to be expected of an input that is a picture whose black is ``low`` and white ``high``."""
    return low + _PICTURE_MEAN * (high - low), _PICTURE_STD * (high - low)


@torch.no_grad()
def propagate(m: QModel, ranges: Mapping[str, tuple[float, float]] | None = None) -> dict[str, Spread]:
    """What is expected of every running value, by name, without any data.

    ranges: known ends of values, the inputs' among them. An input without one is estimated by :func:`estimated_input`.
    """
    ranges = dict(ranges or {})
    inputs, given = [], {}
    for node in m.inputs:
        shape = torch.Size(d if isinstance(d, int) else 1 for d in node.meta["shape"])
        if not str(node.meta["dtype"]).startswith("float"):
            inputs.append(torch.zeros(shape, dtype=getattr(torch, str(node.meta["dtype"]))))
            continue
        name = value_name(node)
        found = ranges.get(name) or estimated_input(m, node)
        given[name] = _between(*found, shape, m.device) if found else unknown(shape, m.device)
        inputs.append(given[name])  # type: ignore[arg-type]
    walk = _Propagation(m, given)
    run(m.as_float(), tuple(inputs), evaluate=walk)
    walk.found |= given
    for name, (low, high) in ranges.items():
        if name in walk.found:
            walk.found[name] = clipped(walk.found[name], low, high)
    return walk.found


def _between(low: float, high: float, shape: torch.Size, device: torch.device) -> Spread:
    mean, std = picture_moments(low, high)
    one = torch.ones((1,) * len(shape), device=device).expand(shape)
    return matched(mean * one, std**2 * one, low * one, high * one)


def estimated_input(m: QModel, node: fx.Node) -> tuple[float, float] | None:
    """The range of an input, from what the first batch norm remembers of its convolution's output; None if there is none.

    The layer computes ``y = W x + b`` and its batch norm has seen mean and variance of y over the training data. The means
    of the colours follow by least squares. The variance follows from how alike neighbouring pixels are in photographs, which
    leaves one unknown, the spread of a pixel; and a photograph's range is a known multiple of it.
    """
    readers = [u for u in node.users if u in set(layers(m.graph)) and value_name(u) in m.moments]
    if not readers or readers[0].target in (LINEAR, CONV_TRANSPOSE) or len(node.meta["shape"]) != 4:
        return None
    layer, values = readers[0], m.parameters
    w = values[str(weight_of(layer).target)]  # type: ignore[union-attr]
    seen = m.moments[value_name(layer)]
    alive = seen.std > 1e-3 * seen.std.max()
    w, std = w[alive].double(), seen.std[alive].double()
    if layer.args[6] != 1 or len(w) < w.shape[1]:
        return None
    bias = values[str(layer.args[2].target)][alive].double() if isinstance(layer.args[2], fx.Node) else 0.0
    per_std = 1 / std  # every channel counts by how well it is known
    sums = w.sum((2, 3)) * per_std[:, None]
    means = torch.linalg.lstsq(sums, ((seen.mean[alive].double() - bias) * per_std)[:, None]).solution[:, 0]
    kh, kw = w.shape[2:]
    places = torch.cartesian_prod(torch.arange(kh), torch.arange(kw)).double().to(w.device)
    far = torch.cdist(places, places)
    alike = _PIXELS_ALIKE**far
    colours = torch.full((w.shape[1],) * 2, _COLOURS_ALIKE, dtype=torch.float64, device=w.device).fill_diagonal_(1.0)
    flat = w.flatten(2)
    expected = torch.einsum("oip,ij,ojq,pq->o", flat, colours, flat, alike)
    deviation = float((std / expected.clamp(min=1e-30).sqrt()).median())
    centre = float(means.mean())
    return centre + _BLACK * deviation, centre + _WHITE * deviation
