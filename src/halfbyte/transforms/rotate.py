"""Mix the channels of values between linear operations so that rounding them and what reads them costs least; the function stays.

Where a value reaches its layers without an activation function, such as the bottlenecks of MobileNetV2 and the sums of them, any
invertible matrix R may stand between: ``R W1, R (b1 - mean)`` and ``W2 R^-1, b2 + W2 mean``. One scale serves all channels, so an error
of the rounded value has the power of the widest channel, and counts for what the next layers make of it:

    noise of the value = max_i (R C R^T)_ii  tr(H R^-1 R^-T)

with C the covariance of the value, H the sum of the readers' ``W2^T D W2`` and D the reciprocal variances of what they put out. By
``P = R^T R`` and a rotation that gives all channels one variance it is ``tr(C P) tr(H P^-1) / n``, which is least where P is the
geometric mean of H and C^-1; then ``(sum of the square roots of the eigenvalues of H C)^2 / n``. Scaling channels, R diagonal, reaches
``(sum of sqrt(H_ii C_ii))^2 / n`` at best. The optimum is that of transform coding, where the noise shall be small behind a matrix;
rotations against outliers in language models (arXiv 2404.00456) are the special case that looks at neither C nor H.

The weights of the readers are rounded in proportion to their rows, and where each code makes up for the errors of others, an error
counts by the geometric mean of the eigenvalues of ``R C R^T``:

    noise of the readers' weights ~ tr(H P^-1) det(P)^(1/n) det(C)^(1/n),

least at ``P = H``, by any rotation. Half way between, on the geodesic from H to the geometric mean, both noises are close to least.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.chains import Link, padded, pairs, streams
from halfbyte.errors import DataError, UsageError
from halfbyte.formats import Format
from halfbyte.graph import bias_of, blocks, groups, input_axis, unblocks, weight_name
from halfbyte.grids import MSE
from halfbyte.model import Inputs, LogEntry, Moments, QModel, value_name
from halfbyte.ops import Kind, kind
from halfbyte.run import portions, run
from halfbyte.stats import histogram

_TOWARDS_VALUES = 0.25  # on the geodesic from H at 0 to C^-1 at 1; 0.5 is least for values
_FLOOR = 1e-4  # of the mean diagonal, added to C and H: few samples and few readers say nothing of some directions
_TURNS = 8  # for each channel, until all have one variance
_EVEN = 1e-6  # of the mean variance
_COLUMNS = 512  # positions of each portion on which both ways are tried
_CONSTANT = 1e-8  # of the power of the means: less variance is rounding in float


def rotate(
    m: QModel,
    data: Iterable[Inputs],
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    fixed: Container[str] = (),
) -> QModel:
    """Mix channels wherever that lowers the noise of rounding. Use before :func:`equalize`, with batch norms folded.

    data: a few batches, for covariances and means; where the next layers do not pad, means go into their biases. weight_bits,
    activation_bits: at which mixed and scaled channels are tried. fixed: names of values that stay as they are, because somebody
    knows their range. Every value and its gain is logged. Raises :class:`UsageError` for a model that is placed already, and
    :class:`DataError` where there are no data.
    """
    if m.plan:
        raise UsageError("rotate changes float weights: call it before place")
    legal, _ = pairs(m.graph)
    every: list[Link] = [*legal, *streams(m.graph, legal)]
    links = [link for link in every if _is_linear(link) and not any(value_name(n) in fixed for n in link.values)]
    if not links:
        return m.logged(LogEntry("rotate", None, "nothing to mix: an activation function follows every layer"))
    seen = _observed(m, data, links)
    params, moments, log = dict(m.parameters), dict(m.moments), []
    for link in links:
        name = value_name(link.writers[0])
        found = _solved(link, m.parameters, seen, (weight_bits, activation_bits))
        ends = f"{len(link.writers)} layers that write and {len(link.readers)} that read"
        if found is None or found[1] <= 0:
            gain = "" if found is None else f": {found[1]:.1f} dB over scaled channels"
            log.append(LogEntry("rotate", name, f"left as it is between {ends}{gain}"))
            continue
        mixing, gained = found
        centred = _centred(link, params, seen)
        _apply(link, mixing, params)
        for layer in link.writers:
            if value_name(layer) in moments:
                s = seen[value_name(layer)]
                mean = torch.zeros_like(s.mean) if centred else mixing @ s.mean
                spread = (mixing @ s.covariance @ mixing.T).diagonal().clamp(min=0).sqrt()
                moments[value_name(layer)] = Moments(*(t.to(m.moments[value_name(layer)].mean) for t in (mean, spread)))
        text = f"{link.channels} channels mixed between {ends}{', means absorbed' if centred else ''}: "
        log.append(LogEntry("rotate", name, f"{text}{gained:.1f} dB less noise than scaled channels", {"gain": gained}))
    return replace(m, params=params, tuned={}, moments=moments).logged(*log)


def _is_linear(link: Link) -> bool:
    """Whether nothing but sums lies between dense layers that read every channel as it was written."""
    sums = all(kind(n) is Kind.ADD for n in link.values if n not in link.writers)
    plain = all(torch.equal(source, torch.arange(link.channels)) for _, source in link.readers)
    return sums and plain and all(groups(n) == 1 for n in link.layers)


@dataclass(frozen=True)
class _Seen:
    """Mean, variance [channels] and, of values to mix, covariance [channels, channels] and some columns, float64."""

    mean: Tensor
    variance: Tensor
    covariance: Tensor
    some: Tensor


@torch.no_grad()
def _observed(m: QModel, data: Iterable[Inputs], links: list[Link]) -> dict[str, _Seen]:
    """All values that the links write and read, and of what their readers put out the variances."""
    mixed = {value_name(n): input_axis(n) for link in links for n in link.writers}
    mixed |= {value_name(r.args[0]): input_axis(r) for link in links for r, _ in link.readers}  # type: ignore[arg-type]
    axes = mixed | {value_name(r): input_axis(r) for link in links for r, _ in link.readers}
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    some: dict[str, list[Tensor]] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name in axes:
            flat = x.movedim(axes[name], 0).flatten(1).double()
            if name in mixed:
                square = flat @ flat.T
                some.setdefault(name, []).append(flat[:, :: max(1, flat.shape[1] // _COLUMNS)].cpu())
            else:
                square = flat.square().sum(1)
            total, squares, count = sums.get(name, (0.0, 0.0, 0))
            sums[name] = (total + flat.sum(1), squares + square, count + flat.shape[1])
        return x

    for batch in portions(m, data):
        run(m.as_float(), batch, tap)
    if not sums:
        raise DataError("there are no data to learn covariances from")
    found = {}
    for name, (total, squares, count) in sums.items():
        mean, square = (total / count).cpu(), (squares / count).cpu()
        if name in mixed:
            covariance = square - torch.outer(mean, mean)
            found[name] = _Seen(mean, covariance.diagonal(), covariance, torch.cat(some[name], 1))
        else:
            nothing = mean.new_empty(0, 0)
            found[name] = _Seen(mean, square - mean.square(), nothing, nothing)
    return found


def _solved(
    link: Link, params: Mapping[str, Tensor], seen: dict[str, _Seen], bits: tuple[int, int]
) -> tuple[Tensor, float] | None:
    """R, float64 [channels, channels], and how many decibels less noise it makes than scaled channels; None for values of no spread."""
    n, read = link.channels, []
    covariance, importance = torch.zeros(2, n, n, dtype=torch.float64)
    for reader, _ in link.readers:
        w = blocks(reader, params[weight_name(reader)].cpu().double())[0]  # [outputs, inputs, taps]
        variance = seen[value_name(reader)].variance
        counts = 1 / (variance.clamp(min=1e-6 * float(variance.max()) + 1e-30) * len(variance))
        read.append(w * counts.sqrt()[:, None, None])
        covariance += seen[value_name(reader.args[0])].covariance / len(link.readers)  # type: ignore[arg-type]
        importance += torch.einsum("oit,ojt->ij", read[-1], read[-1])
    power = sum(float(seen[value_name(r.args[0])].mean.square().sum()) for r, _ in link.readers)  # type: ignore
    finite = all(bool(torch.isfinite(t).all()) for t in (covariance, importance))
    if not finite or float(covariance.trace()) <= _CONSTANT * power or float(importance.trace()) <= 0:
        return None
    measured = covariance
    covariance, importance = (
        t + _FLOOR * t.trace() / n * torch.eye(n, dtype=t.dtype) for t in (covariance, importance)
    )
    root, t = _power(importance), _TOWARDS_VALUES
    half = _power(root @ _power(root @ covariance @ root, -t) @ root)  # of P
    mixing = _levelled(half @ measured @ half) @ half
    mixing *= (measured.trace() / torch.trace(mixing @ measured @ mixing.T)).sqrt()  # the value keeps its size
    scaled = torch.diag(importance.diagonal() ** ((1 - t) / 2) * covariance.diagonal() ** (-t / 2))
    values = {value_name(r.args[0]) for r, _ in link.readers}  # type: ignore[arg-type]
    centre = _may_be_centred(link)
    x = torch.cat([seen[v].some - (seen[v].mean[:, None] if centre else 0.0) for v in sorted(values)], 1)
    noises = [_noise(r, x, read, covariance, root, bits) for r in (scaled, mixing)]
    return mixing, 10 * math.log10(noises[0] / max(noises[1], 1e-30 * noises[0])) if noises[0] > 0 else 0.0


def _noise(
    mixing: Tensor, x: Tensor, read: list[Tensor], covariance: Tensor, root: Tensor, bits: tuple[int, int]
) -> float:
    """What rounding the mixed values [channels, positions] and the weights that read them does, on grids of least error."""
    inverse = torch.linalg.inv(mixing)
    z = (mixing @ x).float()
    error = fake_quantize(z, MSE().activation(histogram(z), Format(bits[1]))) - z
    noise = float((root @ inverse @ error.double()).square().sum()) / z.shape[1]
    level = torch.logdet(mixing @ covariance @ mixing.T).div(len(mixing)).exp()
    form = Format(bits[0], signed=True, axis=0)
    for w in read:
        mixed = torch.einsum("oit,ij->ojt", w, inverse).float()
        error = fake_quantize(mixed, MSE().weight(mixed, form, pairs=False)) - mixed
        noise += float(error.double().square().sum() * level)
    return noise


def _power(a: Tensor, exponent: float = 0.5) -> Tensor:
    """A power of a symmetric matrix with positive eigenvalues, its square root by default."""
    values, vectors = torch.linalg.eigh((a + a.T) / 2)
    found: Tensor = (vectors * values.clamp(min=torch.finfo(a.dtype).tiny) ** exponent) @ vectors.T
    return found


def _levelled(a: Tensor) -> Tensor:
    """A rotation Q for which all diagonal numbers of ``Q a Q^T`` are equal.

    A random one to mix all channels, then plane rotations, each of which gives one of two channels the mean (Bendel and Mickey, 1978).
    """
    n = len(a)
    normal = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=a.dtype)
    q: Tensor = torch.linalg.qr(normal).Q
    a = q @ a @ q.T
    mean = float(a.trace()) / n
    for _ in range(_TURNS * n):
        spread = a.diagonal() - mean
        i, j = int(spread.argmax()), int(spread.argmin())
        if float(spread[i] - spread[j]) <= _EVEN * abs(mean):
            break
        above, cross, below = float(spread[i]), float(a[i, j]), float(spread[j])
        # above + 2 t cross + t^2 below = 0 for the tangent t of the angle; above > 0 > below, so that there are two.
        t = (-cross + math.copysign(math.sqrt(cross * cross - above * below), cross)) / below if below else 0.0
        c = 1 / math.sqrt(1 + t * t)
        turn = torch.tensor([[c, c * t], [-c * t, c]], dtype=a.dtype)
        q[[i, j]] = turn @ q[[i, j]]
        a[[i, j]] = turn @ a[[i, j]]
        a[:, [i, j]] = a[:, [i, j]] @ turn.T
    return q


def _may_be_centred(link: Link) -> bool:
    """Whether every layer has a bias of its own and none pads with zeros."""
    biases = [bias_of(n) for n in link.layers]
    return not any(b is None or len(b.users) > 1 for b in biases) and not any(padded(r) for r, _ in link.readers)


def _centred(link: Link, params: dict[str, Tensor], seen: dict[str, _Seen]) -> bool:
    """Take the means out of all values of a link, if that is possible; whether it was done."""
    if not _may_be_centred(link):
        return False
    shifts: dict[fx.Node, Tensor] = {}
    for node in link.values:
        own = node in link.writers
        shifts[node] = seen[value_name(node)].mean if own else sum(shifts[n] for n in node.all_input_nodes)  # type: ignore[assignment]
    for layer in link.writers:
        _add(params, layer, -shifts[layer])
    for reader, _ in link.readers:
        w = blocks(reader, params[weight_name(reader)].cpu().double())[0].sum(2)
        _add(params, reader, w @ shifts[reader.args[0]])  # type: ignore[index]
    return True


def _add(params: dict[str, Tensor], layer: fx.Node, shift: Tensor) -> None:
    name = str(bias_of(layer).target)  # type: ignore[union-attr]
    params[name] = (params[name].double() + shift.to(params[name].device)).to(params[name])


def _apply(link: Link, mixing: Tensor, params: dict[str, Tensor]) -> None:
    """``R W1, R b1`` for the layers that write, ``W2 R^-1`` for those that read."""
    inverse = torch.linalg.inv(mixing)
    for layer in link.writers:
        w = params[weight_name(layer)]
        mixed = torch.einsum("ij,gjkt->gikt", mixing, blocks(layer, w.cpu().double()))
        params[weight_name(layer)] = unblocks(layer, mixed, w.shape).to(w)
        bias = bias_of(layer)
        if bias is not None:
            b = params[str(bias.target)]
            params[str(bias.target)] = (mixing @ b.cpu().double()).to(b)
    for reader, _ in link.readers:
        w = params[weight_name(reader)]
        mixed = torch.einsum("gojt,ji->goit", blocks(reader, w.cpu().double()), inverse)
        params[weight_name(reader)] = unblocks(reader, mixed, w.shape).to(w)
