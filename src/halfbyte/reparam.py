"""Quantized tensors as functions of numbers that can be learned, and the loop that learns them for one layer.

The loop minimises what the layer-wise methods publish (arXiv 2004.10568, equation 25; arXiv 2006.10518, equation 1),

    mean over positions of  sum over channels of  (f(W x + b) - f(W_hat x_hat + b_hat))^2  + penalty,

with x what the float network gives the layer, x_hat what the quantized network so far gives it, and f the activation function
that follows; with Adam, on random samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.affine import Grid
from halfbyte.errors import UsageError
from halfbyte.formats import Format
from halfbyte.graph import input_axis
from halfbyte.local import Problem
from halfbyte.walk import Frontier

Leaves = dict[str, Tensor]  # the numbers that are learned, by name
_TICKS = 100  # reports of progress
_LOOKS = 50  # times that a fit measures how it does on held-out samples
_HELD_OUT = 8  # one sample of so many, where the problem's own held-out rows cannot tell
_SHARE = 0.25  # of the accelerator's free memory that samples may take to lie in one piece


class Reparam(ABC):
    """A tensor ``x`` with a format and a grid as a function of learned numbers, its leaves."""

    @abstractmethod
    def init(self, x: Tensor, f: Format, g: Grid) -> Leaves:
        """Where to start."""

    @abstractmethod
    def soft(self, leaves: Leaves, x: Tensor, f: Format, g: Grid) -> Tensor:
        """The tensor while it is learned, differentiable in the leaves."""

    def penalty(self, leaves: Leaves, f: Format, progress: float) -> Tensor:
        """What is added to the loss after this share, 0 to 1, of the iterations."""
        return torch.zeros((), device=next(iter(leaves.values())).device)

    @abstractmethod
    def hard(self, leaves: Leaves, x: Tensor, f: Format, g: Grid) -> tuple[Tensor, Format, Grid]:
        """The tensor at the end, exactly on the grid that is returned with it."""


@dataclass(frozen=True)
class Part:
    """A tensor of the layer and how it is learned. rates: Adam's rate for each leaf, by name."""

    reparam: Reparam
    form: Format
    grid: Grid
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Fitted:
    """What a fit found: the weight on its grid, the bias, the grid of the layer's input, and the weight's leaves."""

    weight: Tensor
    grid: Grid
    bias: Tensor | None
    input_grid: Grid | None
    leaves: Leaves


def check(method: str, **limits: tuple[float, float, float]) -> None:
    """Raise :class:`UsageError` for an option that is not within [least, largest]: ``name=(value, least, largest)``."""
    for name, (value, least, largest) in limits.items():
        if not least <= value <= largest:
            bounds = f"at least {least:g}" if largest == float("inf") else f"from {least:g} to {largest:g}"
            raise UsageError(f"{name.replace('_', ' ')} of {method} is {value}: choose a value {bounds}")


class Samples:
    """Draws samples from all batches of a layer's inputs and targets.

    Where the accelerator has room they are put together once, because picking from many batches costs a transfer for each.
    """

    def __init__(self, inputs: Frontier, targets: Frontier, device: torch.device) -> None:
        self.device = device
        self.batches = list(zip(inputs, targets, strict=True))
        size = sum(t.numel() * t.element_size() for pair in self.batches for t in pair)
        if device.type == "cuda" and size < _SHARE * torch.cuda.mem_get_info(device)[0]:
            self.batches = [(torch.cat([x.to(device) for x in inputs]), torch.cat([y.to(device) for y in targets]))]
        self.starts = torch.tensor([0] + [len(x) for x, _ in self.batches]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pick(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples, batch after batch."""
        which = torch.bucketize(at, self.starts[1:], right=True)
        found = []
        for i in sorted(set(which.tolist())):
            x, y = self.batches[i]
            inside = at[which == i] - self.starts[i]
            found.append((x[inside.to(x.device)], y[inside.to(y.device)]))
        x, y = (torch.cat(parts).to(self.device) for parts in zip(*found, strict=True))
        return x, y


@dataclass
class _Learner:
    """The layer with its leaves. bias_unit: the standard deviation of the outputs, by which the bias moves."""

    p: Problem
    weight: Part
    reading: Part | None
    bias_unit: float
    leaves: Leaves = field(default_factory=dict)
    read_leaves: Leaves = field(default_factory=dict)
    bias_leaf: Tensor | None = None

    def start(self, bias_rate: float | None) -> list[dict[str, object]]:
        """Make the leaves; what Adam needs to know of them."""
        p, learned = self.p, []
        self.leaves = self.weight.reparam.init(p.weight.detach(), self.weight.form, self.weight.grid)
        learned += [(leaf, self.weight.rates[name]) for name, leaf in self.leaves.items()]
        if self.reading is not None:
            some = torch.empty(0, device=p.weight.device)
            self.read_leaves = self.reading.reparam.init(some, self.reading.form, self.reading.grid)
            learned += [(leaf, self.reading.rates[name]) for name, leaf in self.read_leaves.items()]
        if p.bias is not None and bias_rate is not None:
            self.bias_leaf = torch.zeros_like(p.bias)
            learned.append((self.bias_leaf, bias_rate))
        return [{"params": [leaf.requires_grad_()], "lr": rate} for leaf, rate in learned]

    def all_leaves(self) -> list[Tensor]:
        return [
            *self.leaves.values(),
            *self.read_leaves.values(),
            *([] if self.bias_leaf is None else [self.bias_leaf]),
        ]

    def bias(self) -> Tensor | None:
        """The bias as learned so far."""
        if self.p.bias is None or self.bias_leaf is None:
            return self.p.bias
        return self.p.bias + self.bias_unit * self.bias_leaf

    def read(self, x: Tensor) -> Tensor:
        """The layer's input, rounded to its learned grid if that is learned."""
        r = self.reading
        return x if r is None else r.reparam.soft(self.read_leaves, x, r.form, r.grid)

    def error(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Squared error behind the activation function: the mean over positions of the sum over channels."""
        found = self.p.apply(self.read(x), weight, self.bias())
        if self.p.following is not None:
            found, y = self.p.following(found), self.p.following(y)
        positions = y.numel() // y.shape[input_axis(self.p.layer)]
        return (found - y).square().sum() / positions

    def loss(self, x: Tensor, y: Tensor, progress: float) -> Tensor:
        """What the fit minimises."""
        w = self.weight
        error = self.error(x, y, w.reparam.soft(self.leaves, self.p.weight, w.form, w.grid))
        return error + w.reparam.penalty(self.leaves, w.form, progress) if self.leaves else error

    @torch.no_grad()
    def result(self) -> Fitted:
        """Everything hardened."""
        w, r = self.weight, self.reading
        weight, _, grid = w.reparam.hard(self.leaves, self.p.weight, w.form, w.grid)
        read = None
        if r is not None:
            read = r.reparam.hard(self.read_leaves, torch.zeros((), device=weight.device), r.form, r.grid)[2]
        bias, leaves = self.bias(), {k: v.detach().clone() for k, v in self.leaves.items()}
        return Fitted(weight, grid, None if bias is None else bias.detach().clone(), read, leaves)


class _Judge:
    """Measures a learner on held-out samples and remembers its leaves where they did best."""

    def __init__(self, learner: _Learner, samples: Samples, held: Tensor, batch: int) -> None:
        self.learner, self.samples, self.held, self.batch = learner, samples, held, batch
        self.best: list[Tensor] = []
        self.least = float("inf")

    def measure(self) -> float:
        """The loss of the hardened layer.

        By the problem's own rows, which decide in the end as well; but they are rounded to the old grid of the input, so that a
        learned one is judged by samples of its own.
        """
        learner, found = self.learner, self.learner.result()
        if learner.reading is None:
            return learner.p.loss(found.weight, found.bias)
        total = 0.0
        for at in torch.split(self.held, self.batch):
            total += float(learner.error(*self.samples.pick(at), found.weight)) * len(at)
        return total / len(self.held)

    @torch.no_grad()
    def look(self) -> None:
        """Remember the leaves if they do better than all before; those of the start count as the first."""
        loss = self.measure()
        if not self.best or loss < self.least:
            self.best, self.least = [leaf.clone() for leaf in self.learner.all_leaves()], loss

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best leaves back."""
        for leaf, kept in zip(self.learner.all_leaves(), self.best, strict=True):
            leaf.copy_(kept)


def _same_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA, convolutions whose sums come in the same order in every run."""
    if device.type != "cuda":
        return nullcontext()
    cudnn = torch.backends.cudnn
    found: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32
    )
    return found


@torch.enable_grad()
def fit(
    p: Problem,
    weight: Part,
    *,
    iterations: int,
    batch: int,
    bias_rate: float | None = None,
    reading: Part | None = None,
    keep_best: bool = False,
) -> Fitted:
    """Learn a layer's weight, and what else is asked for, on mini-batches of ``batch`` samples.

    bias_rate: Adam's rate for the bias in standard deviations of the outputs; None leaves it alone. reading: how to learn the
    grid of the input, which needs ``p.raw_inputs``. keep_best: return the iterate that did best on held-out samples, the start
    among them, instead of the last. The same ``p.seed`` gives the same bits.
    """
    device, generator = p.weight.device, p.generator()
    inputs = p.inputs if reading is None or p.raw_inputs is None else p.raw_inputs
    samples = Samples(inputs, p.targets, device)
    unit = float(p.held_out.outputs.std(correction=0))
    learner = _Learner(p, weight, reading, unit if unit > 0 else 1.0)
    groups = learner.start(bias_rate)
    order = torch.randperm(len(samples), generator=generator)
    keep = max(1, len(samples) // _HELD_OUT) if keep_best and reading is not None and len(samples) > 1 else 0
    train = order[keep:]
    judge = _Judge(learner, samples, order[:keep] if keep else order, batch) if keep_best else None
    if not groups:
        return learner.result()
    if judge is not None:
        judge.look()
    adam = torch.optim.Adam(groups)
    often, seldom = max(1, iterations // _TICKS), max(1, iterations // _LOOKS)
    with _same_kernels(device):
        for done in range(iterations):
            at = train[torch.randperm(len(train), generator=generator)[:batch]]
            loss = learner.loss(*samples.pick(at), done / iterations)
            if not bool(torch.isfinite(loss)):  # nothing can be learned from here on
                break
            adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            if judge is not None and ((done + 1) % seldom == 0 or done + 1 == iterations):
                judge.look()
            if (done + 1) % often == 0 or done + 1 == iterations:
                p.progress(done + 1, iterations)
    if judge is not None:
        judge.restore()
    return learner.result()
