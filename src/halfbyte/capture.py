"""A network and an example become a :class:`QModel`: ``torch.export``'s ATen graph with stable value names."""

import copy
import inspect
import io
import logging
import math
import operator
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from halfbyte.errors import CaptureError
from halfbyte.graph import drop_dead, layers, output_node, output_values
from halfbyte.model import Example, Inputs, LogEntry, QModel, value_name
from halfbyte.opening import SCRIPTED
from halfbyte.ops import base_name
from halfbyte.run import run
from halfbyte.transforms.canonicalize import canonicalize

_log = logging.getLogger("halfbyte")
# A graph that computes the same thing in another order (a different kernel) differs by float rounding only.
_TOLERANCE = 1e-4
_UNKNOWN_SIZE = re.compile(r"\bu\d+")  # what torch.export calls sizes that no shape tells
_LAST_DIGITS, _ROUNDINGS = 2.0**-23, 10.0  # where it differs by more, by so many times what roundings of parameters do


@torch.inference_mode(False)  # gradients, whatever the caller has turned off
def capture(net: nn.Module | ExportedProgram, example: Example) -> QModel:
    """Capture a network as a graph of ATen operations.

    net: any module that ``torch.export`` takes, or an exported program. example: one tensor for each input, in order or, as a
    mapping, by the names that ``forward`` gives them; the first dimension is the batch, and stays free where the network allows
    it (an example of batch 1 is doubled for that, because torch would make a constant of it). The module is captured in eval mode
    and left as it was found; one of another floating-point type is captured as if it were of float32. Raises
    :class:`CaptureError`.
    """
    reference = net.module() if isinstance(net, ExportedProgram) else net
    _check_module(reference)
    given = _Given.of(example, net)
    types = _other_floats(reference)
    if types and isinstance(net, ExportedProgram):
        raise CaptureError(f"the exported program computes in {types}: export the network after net.float()")
    if types:
        net = reference = copy.deepcopy(reference).float()
    program = net if isinstance(net, ExportedProgram) else _export(net, given)
    m = _from_program(_functional(program))
    m = canonicalize(m)
    _check_same(m, reference, given)
    return m.logged(LogEntry("capture", None, f"its parameters of {types} were taken as float32")) if types else m


def _other_floats(net: nn.Module) -> str:
    """Floating-point types of parameters and buffers other than float32."""
    found = {t.dtype for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()}
    return " and ".join(sorted(str(d).removeprefix("torch.") for d in found - {torch.float32}))


@dataclass(frozen=True)
class _Given:
    """Example inputs: in order, or by name."""

    tensors: Inputs
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, example: Example, net: nn.Module | ExportedProgram) -> "_Given":
        """On the network's device, and by name in the order of ``forward``.

        Raises :class:`CaptureError` where there is something else than tensors.
        """
        names: tuple[str, ...] = ()
        if isinstance(example, Mapping):
            known = list(inspect.signature(net.forward).parameters) if isinstance(net, nn.Module) else []
            example = dict(sorted(example.items(), key=lambda k: known.index(k[0]) if k[0] in known else len(known)))
            names = tuple(example)
        values = example.values() if isinstance(example, Mapping) else example
        tensors = (values,) if isinstance(values, Tensor) else tuple(values)
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise CaptureError(
                "the example must be a tensor, or a sequence or a mapping of tensors, one for each input of the network"
            )
        device = _device_of(net)
        return cls(tuple(t.to(device, torch.float32 if t.is_floating_point() else None) for t in tensors), names)

    @property
    def named(self) -> dict[str, Tensor]:
        """What is given by name."""
        return dict(zip(self.names, self.tensors, strict=True)) if self.names else {}

    @property
    def ordered(self) -> Inputs:
        """What is given in order."""
        return () if self.names else self.tensors

    def called(self, net: nn.Module) -> Any:
        """What a network makes of them."""
        return net(*self.ordered, **self.named)

    def inputs(self, m: QModel) -> Inputs:
        """In the order of a graph's inputs."""
        return tuple(self.named[str(n.target)] for n in m.inputs) if self.names else self.tensors


def _device_of(net: nn.Module | ExportedProgram) -> torch.device:
    """Where the parameters of a network lie."""
    held = net.state_dict.values() if isinstance(net, ExportedProgram) else (*net.parameters(), *net.buffers())
    return next((t.device for t in held), torch.device("cpu"))


def _check_module(net: nn.Module) -> None:
    """Raises :class:`CaptureError` for a module that torch cannot export, or whose parameters are no finite numbers."""
    if isinstance(net, torch.jit.ScriptModule):
        raise CaptureError(SCRIPTED)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(f"parameter '{name}' has no shape yet: run the network once before it is captured")
        if tensor.is_meta:
            raise CaptureError(
                f"parameter '{name}' is on the device 'meta' and holds no numbers: load the weights first"
            )
        mask = not isinstance(tensor, nn.Parameter) and "running_" not in name  # a buffer: attention masks hold -inf
        if tensor.is_floating_point() and bool((tensor.isnan() if mask else ~tensor.isfinite()).any()):
            raise CaptureError(
                f"parameter '{name}' holds NaN or infinite values: the checkpoint is damaged or training diverged"
            )


@contextmanager
def _as_found(net: nn.Module) -> Any:
    """Eval mode inside; outside, each module as it was: its mode, and whatever ``forward`` keeps in attributes (YOLO its anchors)."""
    before = [(module, dict(vars(module))) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def doubled(inputs: Inputs) -> Inputs:
    """A batch of 1 twice, so that torch does not make the batch size a constant."""
    if all(t.ndim > 0 and t.shape[0] == 1 for t in inputs):
        return tuple(torch.cat([t, t]) for t in inputs)
    return inputs


def _export(net: nn.Module, given: _Given) -> ExportedProgram:
    inputs = given.tensors
    sizes = {t.shape[0] for t in inputs if t.ndim}
    with torch.no_grad():
        if len(sizes) == 1 and all(t.ndim for t in inputs):
            example = replace(given, tensors=doubled(inputs))
            try:
                with _as_found(net):
                    return _exported(net, example, dynamic_shapes=_free_batch(example.tensors))
            except Exception as error:
                _log.debug("capture with a free batch size failed: %s", error)
        with _as_found(net):
            _outputs(net, given)  # it runs, and what it computes once for inputs of this size is there
            try:
                return _exported(net, given)
            except Exception as error:
                returned = re.search(r"Found <class '(?:.*\.)?(\w+)'> in output", str(error))
                if returned:
                    raise CaptureError(
                        f"{type(net).__name__} returns a {returned[1]}, which is no tensor: return tensors only (networks of "
                        "transformers return their cache unless config.use_cache is False)"
                    ) from error
                raise CaptureError(
                    f"torch.export cannot capture {type(net).__name__}: {_first_line(error)}; forward has to take one path for "
                    "all data (torch.where in place of an if) and to compute with torch alone"
                ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Where torch gives up it prints and logs tracebacks and the whole graph, which would bury the reason."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _exported(net: nn.Module, given: _Given, **options: Any) -> ExportedProgram:
    with quiet():
        return export(net, given.ordered, given.named, **options)


def _outputs(net: nn.Module, given: _Given) -> list[Any]:
    """What the network puts out, without its structure. Raises :class:`CaptureError` where it does not run on the example."""
    try:
        return [y for y in pytree.tree_leaves(given.called(net)) if y is not None]
    except Exception as error:
        shapes = " and ".join(f"{list(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in given.tensors)
        raise CaptureError(
            f"{type(net).__name__} does not run on an example of shape {shapes}: {_first_line(error)}; give an example as "
            "the network takes it, batch first"
        ) from error


def _free_batch(inputs: Inputs) -> Any:
    """The first dimension of every input is one free size, however ``forward`` names or packs its arguments."""
    shapes, batch = ShapesCollection(), Dim("batch", min=1)  # type: ignore[no-untyped-call]
    for tensor in inputs:
        shapes[tensor] = {0: batch}
    return shapes


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Turn in-place operations into ones that return new tensors, and what runs without gradients or autocast into its operations.

    Nothing else is decomposed.
    """
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    wrapped = any(str(t).startswith("wrap_with_") for t in targets)
    if wrapped or any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets):
        with quiet():
            return cast(ExportedProgram, program.run_decompositions({}))
    return program


def _from_program(program: ExportedProgram) -> QModel:
    signature = program.graph_signature
    mutated = [s.target for s in signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(
            f"the network changes its buffer '{mutated[0]}' while it runs: call net.eval() or remove the state"
        )
    graph, params, copied = _copied(program)
    every = [s.arg for s in signature.output_specs]
    kept = [i for i, a in enumerate(every) if not (isinstance(a, ConstantArgument) and a.value is None)]
    outputs = [a for i in kept if isinstance(a := every[i], TensorArgument)]
    if len(outputs) < len(kept) or not outputs:
        raise CaptureError("the network returns something that is not a tensor: return tensors only")
    by_name = {n.name: n for n in copied}
    graph.output(tuple(copied[by_name[a.name]] for a in outputs))
    _name_values(graph, {new: old for old, new in copied.items()})
    drop_dead(graph)
    dynamic = any(isinstance(d, str) for n in graph.nodes if n.op == "placeholder" for d in n.meta["shape"])
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    names = tuple(name for i, name in enumerate(_output_names(program, len(every))) if i in kept)
    _check_sizes(graph, names)
    m = QModel(graph, {k: v for k, v in params.items() if k in used}, names, dynamic=dynamic)
    return m.logged(*_capture_log(graph, dynamic))


def _copied(program: ExportedProgram) -> tuple[fx.Graph, dict[str, Tensor], dict[fx.Node, fx.Node]]:
    """A graph without outputs, its parameters by name, and where each node of the program is."""
    tensors: dict[str, Tensor] = {**program.state_dict, **program.constants}
    graph, params = fx.Graph(), {}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if node.op == "output":
            continue
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            target = str(spec.target)
            copied[node] = graph.create_node("get_attr", target)
            params[target] = tensors[target].detach().clone()  # the network may go on training
        elif node.op == "get_attr":
            raise CaptureError(
                f"the network contains a sub-graph ({node.target}), as of control flow: it cannot be quantized"
            )
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return graph, params, copied


def _check_sizes(graph: fx.Graph, names: Sequence[str]) -> None:
    """Raises CaptureError where data decide how much an output, which has a name, or a layer puts out."""
    compared = [*((f"output '{name}'", n) for name, n in zip(names, output_values(graph), strict=True)),
                *((f"layer '{value_name(n)}'", n) for n in layers(graph))]  # fmt: skip
    for what, node in compared:
        if any(_UNKNOWN_SIZE.search(str(d)) for d in node.meta.get("shape", ())):
            raise CaptureError(
                f"how much {what} puts out depends on what the data hold, so that it cannot be compared with anything: end the "
                "network in front of what picks values, or compute all of them and mask"
            )


def _capture_log(graph: fx.Graph, dynamic: bool) -> list[LogEntry]:
    log = [] if dynamic else [LogEntry("capture", None, "the network fixes its batch size; captured static")]
    modal = [
        n.meta["value"]
        for n in graph.nodes
        if base_name(n) in ("dropout", "batch_norm", "instance_norm") and "value" in n.meta
    ]
    if modal:
        log.append(
            LogEntry("capture", None, f"{len(modal)} operations depend on train/eval mode; captured in eval mode")
        )
    return log


def _output_names(program: ExportedProgram, count: int) -> tuple[str, ...]:
    """Names from the structure the network returns: dictionary keys and positions; 'output' for a tensor alone."""
    names = [f"output_{i}" if count > 1 else "output" for i in range(count)]
    spec = program.call_spec.out_spec
    if spec is not None and spec.num_leaves == count:
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))[0]
        keyed = ["_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in paths]
        if len(set(keyed)) == count and not any(k.isdigit() or not k for k in keyed):
            names = keyed
    return tuple(names)


def _shape(value: Tensor, batch: Mapping[str, str]) -> tuple[int | str, ...]:
    """Sizes; where they depend on a free batch, what torch calls that is named ``batch``."""
    return tuple(
        d if isinstance(d, int) else re.sub(r"\w+", lambda s: batch.get(s[0], s[0]), str(d)) for d in value.shape
    )


def _name_values(graph: fx.Graph, source: Mapping[fx.Node, fx.Node]) -> None:
    """Give each tensor its stable name, shape and type, and drop everything else that the exporter attached."""
    symbols: dict[str, str] = {}
    for node in graph.nodes:
        value = source[node].meta.get("val") if node in source else None
        if node.op == "placeholder" and isinstance(value, Tensor) and value.ndim:
            size: Any = value.shape[0]
            if not isinstance(size, int):
                symbols.setdefault(str(size), "batch")
    modules = {node: _module_of(source[node]) if node in source else "" for node in graph.nodes}
    alone = Counter(modules[n] for n in graph.nodes if n.op == "call_function" and _is_value(source[n].meta.get("val")))
    taken: Counter[str] = Counter()
    for node in graph.nodes:
        value = source[node].meta.get("val") if node in source else None
        node.meta = {}
        if not _is_value(value):
            continue
        name = _name(node, modules[node], alone[modules[node]] == 1)
        taken[name] += 1
        node.meta["value"] = name if taken[name] == 1 else f"{name}.{taken[name] - 1}"
        if isinstance(value, Tensor):
            node.meta |= {"shape": _shape(value, symbols), "dtype": str(value.dtype).removeprefix("torch.")}
        else:
            node.meta["list"] = len(cast(Sequence[Tensor], value))
    output_node(graph).meta = {}


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Tensor)
    )


def _module_of(node: fx.Node) -> str:
    """``path`` or ``path@call`` of the module whose forward made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    if node.op != "call_function" or not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]
    if path.startswith("_empty_nn_module_stack"):
        return ""
    call = key.rsplit("@", 1)[1] if "@" in key and "@" not in path else ""
    return f"{path}@{call}" if call else str(path)


def _name(node: fx.Node, module: str, alone: bool) -> str:
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    operation = base_name(node) if node.target is not operator.getitem else "item"
    if alone and module:
        return module
    return f"{module}:{operation}" if module else operation


@torch.inference_mode()
def _check_same(m: QModel, reference: nn.Module, given: _Given) -> None:
    """The captured graph must compute what the network computes; otherwise everything after it is about another network."""
    with _as_found(reference) if not isinstance(reference, fx.GraphModule) else nullcontext():
        expected = _outputs(reference, given)
        found = {name: _off(a, b) for name, a, b in zip(m.outputs, expected, run(m, given.inputs(m)), strict=True)}
        name = max(found, key=lambda k: found[k])
        if found[name] <= _TOLERANCE:
            return
        again = _outputs(reference, given)
        if all(map(torch.equal, expected, again)) and found[name] <= _ROUNDINGS * _rounding(reference, given, expected):
            return
    raise CaptureError(
        f"the captured graph differs from the network at output '{name}' by {found[name]:.2g} of its largest value: "
        "does the network use random numbers, or state outside its parameters?"
    )


def _off(a: Tensor, b: Tensor) -> float:
    """How much an output is off, as a share of its largest value; infinite where it cannot be said."""
    error = (a - b).abs().max() / a.abs().max().clamp(min=1e-6) if a.is_floating_point() else torch.zeros(())
    return float(error) if bool(torch.isfinite(error)) else math.inf


def _rounding(net: nn.Module, given: _Given, expected: Sequence[Tensor]) -> float:
    """How much the outputs move when parameters change in their last digits: hundreds of layers can make that much."""
    generator = torch.Generator().manual_seed(0)
    nudged = {
        name: p * (1 + _LAST_DIGITS * torch.randn(p.shape, generator=generator).to(p))
        for name, p in net.named_parameters()
        if p.is_floating_point()
    }
    moved = pytree.tree_leaves(torch.func.functional_call(net, nudged, given.ordered, given.named))
    return max(map(_off, expected, moved))
