"""Ranges of running values by what they do to the network's outputs, and not by the values' own squared error.

Gradients of a few samples judge every range of every value at once, without labels (:mod:`halfbyte.effects`).
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from halfbyte.affine import Grid, fake_quantize
from halfbyte.calibrate import Progress, regridded, room_for_bias, silent
from halfbyte.effects import sloped
from halfbyte.errors import DataError, UsageError
from halfbyte.formats import Format
from halfbyte.graph import is_real, output_values
from halfbyte.losses import noise_to_signal
from halfbyte.model import Inputs, LogEntry, QModel, value_name
from halfbyte.run import fixed_batch, portions

FACTORS = (0.4, 0.5, 0.63, 0.8, 1.0, 1.26)  # on the scale
_SAME = FACTORS.index(1.0)
_ROUNDS, _WORTH, _LITTLE = (
    3,
    0.9,
    0.01,
)  # at most; another one where so much of the noise is left at most, but not a little
_MOST = 32  # samples whose activations and gradients are held at a time


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def refine_ranges(
    m: QModel,
    data: Iterable[Inputs],
    *,
    widest: int = 8,
    fixed: Container[str] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> QModel:
    """Give running values of at most ``widest`` bits the scale that disturbs the outputs least. After ``calibrate``.

    data: unlabelled batches; 64 samples will do. Every scale is tried times 0.4 to 1.26, each value alone and to first order; two
    halves of the samples must agree. The last quarter of the samples then decides how many of them, of those that promise most,
    do best together, by the outputs of a network with these values rounded and float weights. Where that lowered the noise by a
    tenth, to more than a hundredth of the signal, all is tried again from there. What the network reads and puts out
    keeps its range, and so do the values in ``fixed``, by name. Before ``reconstruct``, leave values of 8 bits alone: what narrower
    ranges cut off there costs layers that try to make up for it more than finer steps bring. Raises :class:`UsageError` for a
    model without grids and :class:`DataError` where there are no data.
    """
    if not m.grids or m.target is None:
        raise UsageError("there are no ranges to refine yet: call place and calibrate before refine_ranges")
    values = [name for name in _candidates(m, widest) if name not in fixed]
    if not values:
        return m.logged(
            LogEntry("refine_ranges", None, f"left as they are: no running value has at most {widest} bits")
        )
    batches = list(data)
    if not batches:
        raise DataError("there are no data to refine ranges by")
    samples = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    unit = fixed_batch(m) or 1
    cut = max(unit, len(samples[0]) - len(samples[0]) // 4 // unit * unit)
    fit, held = (list(portions(m, [tuple(t[part] for t in samples)], _MOST)) for part in (slice(cut), slice(cut, None)))
    for i in range(_ROUNDS):
        changed = {n: e for n, e in _effects(m, fit, values, seed + i, progress).items() if e.best() != _SAME}
        refined = _decided(m, dict(sorted(changed.items(), key=lambda c: -c[1].gain())), held or fit, values)
        told = refined.log[-1].figures
        m = refined if told["kept"] or not i else m
        if told["after"] > _WORTH * told["before"] or told["after"] < _LITTLE:
            break
    return m


def _decided(m: QModel, changed: dict[str, "_Effect"], held: Sequence[Inputs], values: Sequence[str]) -> QModel:
    """The model with as many changes as do best together: all, the half that promises most, a quarter of them, and so on."""
    noise = noise_to_signal(_alone(m, values), held, m.as_float())
    best, least, count, raised = m, noise, len(changed), list[LogEntry]()
    kept: list[str] = []
    while count:
        some = list(changed)[:count]
        scales = {n: m.grids[n].scale * FACTORS[changed[n].best()] for n in some}
        refined = regridded(m, {n: replace(m.grids[n], scale=scale) for n, scale in scales.items()})
        grids, log = room_for_bias(refined, dict(refined.grids))
        refined = replace(refined, grids=grids)
        loss = noise_to_signal(_alone(refined, values), held, m.as_float())
        if loss < least:
            best, least, raised, kept = refined, loss, list(log), some
        count //= 2
    text = f"kept {len(kept)} of {len(changed)} changes" if kept else "undone"
    text += (
        f": noise-to-signal at the outputs on held-out samples, float weights: {noise:.4g} before, {least:.4g} after"
    )
    entry = LogEntry("refine_ranges", None, text, {"before": noise, "after": least, "kept": bool(kept)})
    return best.logged(*(changed[n].entry(n) for n in kept), *raised, entry)


@dataclass
class _Effect:
    """Squared effect on the outputs for every factor, float64 [2 halves of the samples, factors]."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(2, len(FACTORS), dtype=torch.float64))

    def best(self) -> int:
        """The factor of least effect, if both halves agree that it does better than none."""
        index = int(self.sums.sum(0).argmin())
        return index if bool((self.sums[:, index] < self.sums[:, _SAME]).all()) else _SAME

    def gain(self) -> float:
        """How much less effect the best factor has than none."""
        return float(self.sums[:, _SAME].sum() - self.sums[:, self.best()].sum())

    def entry(self, name: str) -> LogEntry:
        """What the refinement of one value brings."""
        before, after = (float(self.sums[:, i].sum()) for i in (_SAME, self.best()))
        text = f"scale times {FACTORS[self.best()]:g}: {after / max(before, 1e-300):.0%} of its effect on the outputs"
        return LogEntry("refine_ranges", name, text, {"factor": FACTORS[self.best()], "before": before, "after": after})


def _candidates(m: QModel, widest: int = 8) -> list[str]:
    """Running values with a scale of their own, between what the network reads and what it puts out."""
    found, ends = [], {m.ties.get(value_name(n), value_name(n)) for n in output_values(m.graph) if "value" in n.meta}
    for node in m.graph.nodes:
        name = value_name(node) if node.op == "call_function" and "value" in node.meta and is_real(node) else ""
        form = m.plan.get(name)
        if form is None or name not in m.grids or m.ties.get(name, name) != name or name in ends or form.power_of_two:
            continue
        if form.bits <= widest and m.grids[name].axis is None:
            found.append(name)
    return found


def _alone(m: QModel, values: Sequence[str]) -> QModel:
    """The model with nothing rounded but these values, and parameters as they are in float."""
    kept = {n: g for n, g in m.grids.items() if m.ties.get(n, n) in set(values)}
    return replace(m, grids=kept, tuned={})


def _effects(
    m: QModel, fit: Sequence[Inputs], values: Sequence[str], seed: int, progress: Progress
) -> dict[str, _Effect]:
    """What each range of each value does to the outputs."""
    generator = torch.Generator().manual_seed(seed)
    effects = {name: _Effect() for name in values}
    for i, batch in enumerate(fit, 1):
        for name, (t, gradients) in sloped(m, batch, effects, generator).items():
            form = m.plan[name]
            assert form is not None
            effects[name].sums += _squares(t, m.grids[name], form, gradients)
        progress("refine_ranges", i, len(fit))
    return effects


@torch.no_grad()
def _squares(x: Tensor, grid: Grid, form: Format, gradients: Sequence[Tensor]) -> Tensor:
    """Sum of squared first-order changes of the outputs, [2, factors]: every other sample, and the rest."""
    flat = x.movedim(1, -1).flatten(1)  # as images lie in memory
    slopes = torch.stack([g.movedim(1, -1).flatten(1) for g in gradients], 1)  # [samples, directions, elements]
    lo, hi = (torch.full_like(grid.zero, limit) for limit in (form.lo, form.hi))
    rows = []
    for factor in FACTORS:
        change = fake_quantize(flat, Grid(grid.scale * factor, grid.zero, lo, hi)).sub_(flat)
        each = (slopes @ change[:, :, None])[:, :, 0].double().square().sum(1)
        rows.append(torch.stack([each[0::2].sum(), each[1::2].sum()]))
    return torch.stack(rows, 1).cpu()
