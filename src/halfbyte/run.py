"""Execute a model's graph. Whatever looks at or alters a running tensor is a tap: ``(value name, tensor) -> tensor``."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.errors import DataError, UsageError
from halfbyte.graph import extent, output_values
from halfbyte.model import Example, Inputs, Outputs, Params, QModel, Tap, value_name
from halfbyte.ops import CLAMP_CHANNELS, is_tensor

Evaluate = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
_aten = torch.ops.aten
# What clamp does, at two operations backward instead of seven; for inputs that need a gradient.
_CLAMPS: dict[Any, Any] = {_aten.clamp.default: _aten.hardtanh.default}
_AS_WELL: dict[Any, Any] = {_aten.view.default: _aten.reshape.default, _aten._unsafe_view.default: _aten.reshape.default}  # fmt: skip
# Elements of the widest value of a portion: on the CPU 16 MiB, for each page of larger blocks costs a fault whenever they are new;
# on an accelerator 1 GiB, for memory alone.
_WIDEST, _WIDEST_ELSEWHERE = 1 << 22, 1 << 28
_FEWEST = 2  # samples of a portion


def keep(_: str, x: Tensor) -> Tensor:
    """The tap that does nothing."""
    return x


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody needs after it."""
    seen: set[fx.Node] = set()
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                freed.setdefault(node, []).append(source)
    return freed


def evaluate_plainly(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the node's operation, in the kernel that does the same at the least cost."""
    target: Any = _AS_WELL.get(node.target, node.target)
    if target in _CLAMPS and len(args) == 3 and None not in args and args[0].requires_grad:
        target = _CLAMPS[target]
    return target(*args, **kwargs)


class _ClampedChannels(torch.autograd.Function):
    """Limits for each channel, with a gradient where they change nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        y = torch.clamp(x, lower, upper)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grads[0] * (x == y), None, None


_CLAMPS[CLAMP_CHANNELS] = _ClampedChannels.apply


def laid_out(x: Tensor) -> Tensor:
    """An input as the CPU's kernels read it without conversion: images with their channels last. No number changes."""
    on_cpu = x.device.type == "cpu" and x.is_floating_point()
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and on_cpu else x


def _plain(x: Any) -> Any:
    """A result as users expect it in memory."""
    return x.contiguous() if isinstance(x, Tensor) else x


def fitting(m: QModel, nodes: Iterable[fx.Node]) -> int:
    """How many samples run at a time through some nodes, so that memory stays small and running is fast."""
    fixed = fixed_batch(m)
    if fixed is not None:
        return fixed
    shapes = [n.meta["shape"] for n in nodes if n.op != "get_attr" and is_tensor(n)]
    widest = max((math.prod(map(extent, s)) for s in shapes), default=1)
    on_cpu = all(t.device.type == "cpu" for t in m.params.values())
    return max(_FEWEST, (_WIDEST if on_cpu else _WIDEST_ELSEWHERE) // max(1, widest))


def fixed_batch(m: QModel) -> int | None:
    """How many samples a network of a fixed batch takes; None where any number will do, or inputs do not agree."""
    sizes = {n.meta["shape"][0] if n.meta["shape"] else "" for n in m.inputs}
    (size,) = sizes if len(sizes) == 1 else ("",)
    return size if isinstance(size, int) else None


def whole(m: QModel, count: int) -> int:
    """So many samples, or as many fewer as make whole batches of a network that fixes its batch; one batch at least."""
    unit = fixed_batch(m) or 1
    return max(unit, count // unit * unit)


def expected_inputs(m: QModel) -> list[tuple[str, tuple[int | str, ...], torch.dtype]]:
    """Name, shape and type of each input, to check data against: any number of samples is run as often as it takes."""
    free = fixed_batch(m) is not None
    return [
        (str(n.target), ("batch", *n.meta["shape"][1:]) if free else n.meta["shape"], getattr(torch, n.meta["dtype"]))
        for n in m.inputs
    ]


def portions(m: QModel, data: Iterable[Inputs], most: int = 1 << 10) -> Iterator[Inputs]:
    """The same samples, as many at a time as fit (:func:`fitting`), ``most`` at most.

    A network of a fixed batch gets batches of that size, and what does not fill one is left out; where its inputs do not agree on
    it, batches stay as they are.
    """
    free = all(n.meta["shape"] and not isinstance(n.meta["shape"][0], int) for n in m.inputs)
    fixed = fixed_batch(m)
    count = fixed or (min(most, fitting(m, m.graph.nodes)) if free else 0)
    for batch in data:
        check_finite(m, batch)
        for i in range(0, len(batch[0]), count or max(1, len(batch[0]))):
            if fixed is None or i + fixed <= len(batch[0]):
                yield tuple(t[i : i + count] for t in batch) if count else batch


def filled(x: Inputs, unit: int) -> Inputs:
    """The samples, and some of them again until they make whole batches of so many."""
    count = len(x[0])
    rows = torch.arange(-(-count // unit) * unit) % count
    return x if len(rows) == count else tuple(t[rows.to(t.device)] for t in x)


def in_batches(m: QModel, x: Inputs, forward: Callable[[Inputs], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Outputs of any number of samples, of a network that may take a fixed number: the last batch is filled up and cut off again."""
    fixed = fixed_batch(m)
    count = len(x[0]) if x and x[0].ndim else 0
    if fixed is None or fixed == count or not count:
        return forward(x)
    full = filled(x, fixed)
    parts = [forward(tuple(t[i : i + fixed] for t in full)) for i in range(0, count, fixed)]
    # Of windows, several rows belong to a sample.
    return tuple(torch.cat(some)[: count * len(some[0]) // fixed] for some in zip(*parts, strict=True))


def steps(
    nodes: Iterable[fx.Node],
    env: dict[fx.Node, Any],
    given: Callable[[fx.Node], Any],
    tap: Tap = keep,
    *,
    freed: Mapping[fx.Node, Sequence[fx.Node]],
    evaluate: Evaluate = evaluate_plainly,
) -> Iterator[fx.Node]:
    """Compute nodes in order, out of the values in ``env`` and into it, up to the output.

    given: the values of inputs and parameters. freed: see :func:`last_uses`. Yields each node when its value is there; what
    nobody needs after it is dropped as soon as the caller goes on.
    """

    def load(node: fx.Node) -> Any:
        return env[node]

    for node in nodes:
        if node.op == "output":
            yield node
            return
        if node.op in ("placeholder", "get_attr"):
            result = given(node)
        else:
            result = evaluate(node, fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load))
        if isinstance(result, Tensor) and "value" in node.meta:
            result = tap(value_name(node), result)
        env[node] = result
        yield node
        for dead in freed.get(node, ()):
            del env[dead]


def given_in_order(m: QModel, x: Example) -> Inputs:
    """A tensor for each input, from such in order or by name, or from that of a single input. Raises :class:`UsageError`."""
    if isinstance(x, Mapping):
        names = [str(n.target) for n in m.inputs]
        missing = [n for n in names if n not in x]
        if missing:
            raise UsageError(f"the network takes {', '.join(names)}, and {', '.join(missing)} was not given")
        return tuple(x[n] for n in names)
    return (x,) if isinstance(x, Tensor) else tuple(x)


def check_finite(m: QModel, x: Inputs) -> None:
    """Raises :class:`DataError` for NaN and infinity, of which nothing can be learnt."""
    for node, given in zip(m.inputs, x, strict=False):
        if isinstance(given, Tensor) and given.is_floating_point() and not bool(torch.isfinite(given).all()):
            raise DataError(f"input '{node.target}' holds NaN or infinity: repair the data or leave the sample out")


def check_given(m: QModel, x: Inputs) -> None:
    """Raises :class:`UsageError` for what is no batch: another number of inputs, of dimensions or of channels."""
    if len(x) < len(m.inputs):
        raise UsageError(f"the network takes {len(m.inputs)} inputs, {len(x)} were given")
    every: Sequence[Any] = x
    for node, given in zip(m.inputs, every, strict=False):
        sizes = node.meta["shape"]
        if not hasattr(given, "to"):
            raise UsageError(
                f"input '{node.target}' is of type {type(given).__name__}: give batches of tensors, such as [(x,)]"
            )
        if not isinstance(given, Tensor):
            continue  # what stands for a tensor, such as its moments
        takes = (
            f"input '{node.target}' has shape {list(given.shape)}, and the network takes [{', '.join(map(str, sizes))}]"
        )
        if given.ndim != len(sizes):
            raise UsageError(f"{takes}: give a list of batches, [(x,)] for a single one")
        if len(sizes) > 2 and isinstance(sizes[1], int) and sizes[1] != given.shape[1]:
            raise UsageError(takes)


def run(
    m: QModel,
    x: Inputs,
    tap: Tap = keep,
    *,
    params: Params | None = None,
    stop: str | None = None,
    evaluate: Evaluate = evaluate_plainly,
) -> Outputs:
    """Run the network on a batch and return its outputs.

    x: one tensor for each input, moved to where the parameters are. tap: sees and may replace every tensor, inputs and
    parameters included. params: replacements by name. stop: end behind this value and return it alone. evaluate: how one
    operation is computed. Each value is freed after its last use, so the peak memory is that of the widest point.
    """
    check_given(m, x)
    inputs = iter(x)
    values = {**m.parameters, **(params or {})}
    env: dict[fx.Node, Any] = {}

    def given(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return values[str(node.target)]
        result = next(inputs)
        result = result.to(m.device)
        return laid_out(result) if isinstance(result, Tensor) else result

    for node in steps(m.graph.nodes, env, given, tap, freed=last_uses(m.graph), evaluate=evaluate):
        if node.op == "output":
            return tuple(map(_plain, (env[n] for n in output_values(m.graph))))
        if stop is not None and node.meta.get("value") == stop and isinstance(env[node], Tensor):
            return (_plain(env[node]),)
    raise UsageError("the graph has no output")


def simulate(m: QModel, *, only: Callable[[str], bool] | None = None) -> Tap:
    """The tap that fake-quantizes every value the plan gives a grid (``only`` restricts it to some values).

    Parameters are quantized once and remembered, so that a second batch costs nothing.
    """
    remembered: dict[str, Tensor] = {}
    weights = {str(n.target) for n in m.graph.nodes if n.op == "get_attr"}

    def tap(name: str, x: Tensor) -> Tensor:
        grid = m.grid(name)
        if grid is None or (only is not None and not only(name)):
            return x
        if name not in weights:
            return fake_quantize(x, grid)
        if name not in remembered:
            remembered[name] = fake_quantize(x, grid)
        return remembered[name]

    return tap
