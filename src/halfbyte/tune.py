"""The whole network tuned end to end: the quantized network learns to put out what the float network does, without labels.

With biases alone this is the bias tuning of CalibTIP (arXiv 2006.10518), with scales the refinement of all scaling factors of OMSE
(arXiv 1902.06822), with codes everything moves. Gradients go straight through the rounding.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.blocks import blocks_of, end_of
from halfbyte.calibrate import Progress, silent
from halfbyte.errors import UsageError, check_choice
from halfbyte.graph import is_real, macs, output_values
from halfbyte.losses import Loss, classifies, comparable, divergence, noise_of, relative_error
from halfbyte.model import Inputs, LogEntry, Outputs, QModel
from halfbyte.reconstruct import Kept, fingerprint, split
from halfbyte.refinement import LEARNED, Clock, Env, Learned, Part, Rates, Refined, descend, execute
from halfbyte.run import fixed_batch, laid_out, portions, run, whole
from halfbyte.store import load, save

_WARMUP = 0.1  # share of the steps over which the rates rise: the first steps of Adam know only the sign of a gradient
_CHECKS = 8
_FEW = 64  # samples that tell the spread of what each layer puts out
_LAYERS = 3  # of a block, whose end is a feature
_MIXED = 0.5  # share of the samples that are mixed with others
_LARGE = 0.15  # of a relative error; steps do not grow with what is worse, for such networks are easily upset


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def tune(
    m: QModel,
    data: Iterable[Inputs],
    *,
    learn: Sequence[Learned] = ("biases",),
    loss: Loss = "error",
    features: bool = False,
    mix: bool = False,
    iterations: int = 200,
    batch: int = 16,
    rate: float = 0.01,
    scale_rate: float = 0.02,
    seed: int = 0,
    time_limit: float | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> QModel:
    """Let the outputs of the quantized network follow those of the float network on the data. Use last.

    data: unlabelled batches, of which the last eighth of each is held out: the model stays as it was unless it does better
    there. learn: what moves: biases, scales (of weights, each on its own, and of running values of fewer than eight bits),
    codes of weights of fewer than eight bits. loss: ``error`` is the squared difference of the outputs over their variance in
    float, averaged over outputs, of class scores less their mean over the classes; ``divergence``, as published,
    KL(softmax(float) || softmax(quantized)) of a single output [samples, classes]: it sees only samples that the network is in
    doubt about, which are few among those that it was trained on. features: values between blocks, those at the cuts of
    :func:`refine`, count while learning, their mean relative error as much as the outputs'. mix: half of the samples of a step are
    mixed with others (arXiv 1710.09412), and the float network says what becomes of them (arXiv 2106.05237), so that few
    samples last for many steps; of networks with real inputs alone. iterations: steps of Adam with ``batch`` samples.
    rate: of codes, in steps of the grid. scale_rate: of logarithms of scales, and of biases in standard deviations of what
    their layer puts out, as a share of the relative error of the outputs (0.15 at most): what is nearly right moves in small
    steps. time_limit: seconds. kept: a folder that keeps the result; with it, the first Ctrl-C ends
    the tuning with the best model so far in the folder, which the next run takes. Raises :class:`UsageError` for a model
    without grids, an empty or unknown ``learn``, and a divergence of outputs that are no classes.
    """
    given, m = m, comparable(m)
    check_choice("loss", loss, Loss)
    _check(m, learn, loss, iterations, batch)
    fixed, batch = fixed_batch(m), whole(m, batch)
    fit, held = split(data, unit=fixed)
    samples = tuple(torch.cat(parts) for parts in zip(*fit, *held, strict=True))
    count = sum(len(b[0]) for b in fit)
    options = (tuple(learn), loss, features, mix, iterations, batch, rate, scale_rate, seed)
    store = Kept(kept, "tune", *options, fingerprint(m, [samples]))
    known = _resumed(kept, store.identity)
    if known is not None:
        return known
    part = Part(m, [n for n in m.graph.nodes if n.op != "output"], learn, seed=seed)
    judge = _Judge(part, samples, count, divergent=loss == "divergence", features=features, mix=mix)
    if "biases" in learn:
        few = torch.arange(whole(m, min(count, _FEW)))
        part.free_biases(*(judge.env(at) for at in torch.split(few, fixed or len(few))))

    def rates(before: float) -> Rates:
        step = scale_rate * min(math.sqrt(max(before, 0.0)), _LARGE)
        return Rates(rate, step, step)

    def tick(step: int, steps: int) -> bool:
        progress("tune", step, steps)
        return not store.stopped

    clock = Clock(time_limit, [sum(macs(n) for n in part.nodes)])
    with store.interruptible():
        found = descend(
            part, judge, (count, len(samples[0])), rates, clock,
            steps=iterations, batch=batch, warmup=_WARMUP, checks=_CHECKS, tick=tick,
        )  # fmt: skip
        better = part.written(found.state) if found.after < found.before else m
        better = replace(better, graph=given.graph, outputs=given.outputs)
        m = better.logged(_entry(learn, judge, found, iterations))
        _keep(m, kept, store.identity)
    return m


def _check(m: QModel, learn: Sequence[Learned], loss: Loss, iterations: int, batch: int) -> None:
    if not m.grids or m.target is None:
        raise UsageError("there is nothing to tune yet: call place and calibrate before tune")
    unknown = [what for what in learn if what not in LEARNED]
    if unknown or not learn or isinstance(learn, str):
        raise UsageError(f"learn = {learn!r} must be a tuple of some of {', '.join(map(repr, LEARNED))}")
    if iterations < 1 or batch < 1:
        raise UsageError(f"iterations ({iterations}) and batch ({batch}) must be positive")
    if loss == "divergence" and not classifies(m):
        raise UsageError("loss 'divergence' needs a single output of class scores [N, classes]: take 'error'")


class _Judge:
    """The loss of the network as it is on some of the samples; the float network's outputs are computed once.

    While the part is in training, features and mixed samples count, too. count: samples that may be mixed, from the first.
    """

    def __init__(self, part: Part, samples: Inputs, count: int, *, divergent: bool, features: bool, mix: bool) -> None:
        self.part, self.count, self.divergent, self.centred = part, count, divergent, classifies(part.m)
        self.name = "divergence" if divergent else "relative error"
        self.samples = tuple(x.to(part.m.device) for x in samples)
        self.mix = mix and all(x.is_floating_point() for x in samples)
        ends = [end_of(nodes) for nodes in blocks_of(part.m, _LAYERS)[:-1]] if features else []
        self.features = [n for n in ends if is_real(n)]
        part.keep(self.features)
        self.outputs = output_values(part.m.graph)
        self.at = [i for i, n in enumerate(self.outputs) if is_real(n)]  # decisions, such as an index, have no gradient
        with torch.no_grad():
            reference = part.m.as_float()
            made = [run(reference, x) for x in portions(part.m, [self.samples])]
        self.wanted: Outputs = tuple(torch.cat([y[i] for y in made]) for i in self.at)
        self.signals = tuple(self._signal(y) for y in self.wanted)

    def _signal(self, y: Tensor) -> Tensor:
        return (y - (y.mean(1, keepdim=True) if self.centred else y.mean())).square().mean()

    def env(self, at: Tensor) -> Env:
        """What the network is given of some of the samples."""
        m = self.part.m
        return {n: laid_out(x[at.to(x.device)]) for n, x in zip(m.inputs, self.samples, strict=True)}

    def __call__(self, at: Tensor) -> Tensor:
        """The loss over some of the samples."""
        if self.part.training and (self.features or self.mix):
            return self._training(self._mixed(self.env(at)) if self.mix else self.env(at))
        return self._loss(self.part.run(self.env(at)), tuple(y[at.to(y.device)] for y in self.wanted))

    def _loss(self, env: Env, wanted: Outputs) -> Tensor:
        found = tuple(env[self.outputs[i]] for i in self.at)
        if self.divergent:
            return divergence(found, wanted)
        return relative_error(found, wanted, self.signals, centred=self.centred)

    def _mixed(self, env: Env) -> Env:
        """Half of the samples as they are, the others each mixed with one that may be learned from."""
        count = len(env[self.part.m.inputs[0]])
        others = self.env(torch.randint(0, self.count, (count,), generator=self.part.generator))
        share = torch.rand(count, generator=self.part.generator)
        share = torch.where(torch.rand(count, generator=self.part.generator) < _MIXED, share, torch.ones(()))
        return {n: others[n].lerp(x, share.to(x).reshape(-1, *[1] * (x.ndim - 1))) for n, x in env.items()}

    def _training(self, given: Env) -> Tensor:
        """The loss on samples that the float network sees for the first time, and of the features."""
        m, part = self.part.m, self.part
        with torch.no_grad():
            target = execute(m, part.nodes, given, None, part.freed)
        found = part.run(given)
        loss = self._loss(found, tuple(target[self.outputs[i]] for i in self.at))
        errors = [noise_of(found[n], target[n]) for n in self.features]
        return loss + torch.stack(errors).mean() if errors else loss


def _entry(learn: Sequence[Learned], judge: _Judge, found: Refined, planned: int) -> LogEntry:
    stopped = "" if found.steps == planned else f" of {planned}"
    kept = "" if found.after < found.before else "; left as it was"
    text = f"{', '.join(learn)} of {len(judge.part.layers)} layers, {found.steps}{stopped} steps: {judge.name} of the outputs on "
    text += f"held-out samples {found.before:.4g} before, {found.after:.4g} after{kept}"
    return LogEntry("tune", None, text, {"method": "tune", "learn": list(learn), **found.figures})


def _resumed(kept: Path | None, identity: str) -> QModel | None:
    """What an earlier run with the same options, model and data has kept."""
    about = None if kept is None else kept / _about(identity) / "identity.json"
    if about is None or not about.is_file() or about.read_text(encoding="utf-8") != identity:
        return None
    return load(about.parent)


def _keep(m: QModel, kept: Path | None, identity: str) -> None:
    if kept is not None:
        folder = kept / _about(identity)
        save(m, folder)
        (folder / "identity.json").write_text(identity, encoding="utf-8")


def _about(identity: str) -> str:
    """A folder of its own for each tuning of a recipe."""
    return f"tune-{zlib.crc32(identity.encode()):08x}"
