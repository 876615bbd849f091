"""Execute a model's graph. Whatever looks at or alters a running tensor is a tap: ``(value name, tensor) -> tensor``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from halfbyte.affine import fake_quantize
from halfbyte.errors import UsageError
from halfbyte.model import Inputs, Outputs, Params, QModel, Tap, value_name

Evaluate = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


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
    """Call the node's operation."""
    return node.target(*args, **kwargs)  # type: ignore[operator]


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
    inputs = iter(x)
    values = {**m.parameters, **(params or {})}
    device = next((t.device for t in values.values()), None)
    freed = last_uses(m.graph)
    env: dict[fx.Node, Any] = {}

    def load(node: fx.Node) -> Any:
        return env[node]

    for node in m.graph.nodes:
        if node.op == "output":
            return tuple(env[n] for n in node.args[0])
        if node.op == "placeholder":
            try:
                result: Any = next(inputs)
            except StopIteration:
                raise UsageError(f"the network takes {len(m.inputs)} inputs, {len(x)} were given") from None
            result = result if device is None else result.to(device)
        elif node.op == "get_attr":
            result = values[str(node.target)]
        else:
            result = evaluate(node, fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load))
        if isinstance(result, Tensor) and "value" in node.meta:
            result = tap(value_name(node), result)
            if stop is not None and value_name(node) == stop:
                return (result,)
        env[node] = result
        for dead in freed.get(node, ()):
            del env[dead]
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
