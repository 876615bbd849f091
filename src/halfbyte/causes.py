"""The causes that a diagnosis can name: small rules, each with evidence, a threshold with its reason, a score and a command."""

import shlex
from collections.abc import Callable, Iterable

from torch import fx

from halfbyte.causes_grids import accumulators, biased, ranges, uneven, unlike
from halfbyte.diagnosis import Cause
from halfbyte.evidence import FINE, GAIN, WORTH, Evidence, Rule
from halfbyte.graph import by_value, macs, per_sample
from halfbyte.matching import SHIFT
from halfbyte.model import QModel, value_name
from halfbyte.ops import base_name


def train_mode(e: Evidence) -> Iterable[Cause]:
    """A batch norm that normalizes by the batch: what a sample gives depends on its neighbours."""
    norms = [
        value_name(n)
        for n in e.m.graph.nodes
        if base_name(n) == "batch_norm" and (n.args[5] is True or n.args[3] is None or n.args[4] is None)
    ]
    as_given = e.training is not None and e.training > 1e-3 and (e.reference is None or e.reference <= 1e-3)
    if norms or as_given:
        where = f"{len(norms)} batch norms, {norms[0]} first," if norms else "the module as given"
        yield Cause(
            "train-mode batch norm",
            f"{where} use the statistics of the batch: results depend on the other samples, and nothing can be folded",
            float(len(norms) or 1), 0.0, "a deployed network has none", 1.0,
            "call net.eval() before export (and keep running statistics: track_running_stats=True), then quantize again",
            order=0, values=tuple(norms),
        )  # fmt: skip


def float_sanity(e: Evidence) -> Iterable[Cause]:
    """With all quantizers bypassed the graph is not the network."""
    if e.reference is not None and e.reference > 1e-3:
        yield Cause(
            "a transform changed the network",
            f"with every quantizer bypassed the outputs differ from the module's by noise-to-signal {e.reference:.3g}",
            e.reference, 1e-3, "float transforms keep outputs up to rounding, high-bias absorption up to rare samples",
            0.5, e.again("--recipe omse"), order=0,
        )  # fmt: skip


def preprocessing(e: Evidence) -> Iterable[Cause]:
    """The first layers see what no training picture has shown them."""
    for found, which in ((e.calibration, "calibration"), (e.data, "evaluation")):
        if found is None or not found.off:
            continue
        other = e.data if which == "calibration" else e.calibration
        if other is not None and not other.off and not (found.corrected or (found.repairable and found.exact)):
            continue  # one of two data sets is off by no usual slip: they are unlike each other
        hint = f"; {found.repair} would explain it" if found.repairable else ""
        if found.repairable and found.right is not None and found.repaired_right is not None:
            hint += f" ({found.right:.0%} right in float, {found.repaired_right:.0%} then)"
        yield Cause(
            "wrong or missing pre-processing",
            f"on the {which} data the first layers put out values {found.shift:.1f} standard deviations from what their batch "
            f"norms remember, spread {found.spread:.2g} times as wide{hint}",
            found.shift, SHIFT, "data of the right kind reproduce the moments roughly, whatever they show", 1.0,
            e.again(*(found.options if found.repairable else "--mean MEAN --std STD").replace(" --", "\n--").split("\n")),
            order=0,
        )  # fmt: skip
        return


def file_differs(e: Evidence) -> Iterable[Cause]:
    """The exported file computes something else than the simulation."""
    if e.unusable or (e.parity is not None and not e.parity.proven):
        first = e.unusable or str(e.parity.first_difference if e.parity is not None else "")
        count = e.parity.integer_mismatches if e.parity is not None else 0
        value = "" if e.parity is None or e.parity.first_difference is None else e.parity.first_difference.value
        yield Cause(
            "a file that differs from the simulation", first, float(count), 0.0,
            "integers are equal or they are not", 1.0, f"{e.again()}   # writes and proves the file again", order=1,
            values=(value,) if value else (),
        )  # fmt: skip


def float_operations(e: Evidence) -> Iterable[Cause]:
    """Operations that stay in float between integers, with the share of the work in them."""
    nodes = by_value(e.m.graph)
    left = {
        x.value: x.message.removeprefix("computed in float: ")
        for x in e.m.log
        if x.stage == "place" and x.value in nodes and x.message.startswith("computed in float")
    }
    inside = [n for n in left if n is not None and _feeds_integers(e.m, nodes[n])]
    inside += [n for n in left if n is not None and n not in inside and macs(nodes[n])]
    if not inside:
        return
    asked = [n for n in inside if left[n].endswith("on request")]
    inside.sort(key=lambda n: (n not in asked, -macs(nodes[n]), -_elements(nodes[n])))
    share, moved = (sum(of(nodes[n]) for n in inside) / _total(e.m, of) for of in (macs, _elements))
    # what has no integer kernel and multiplies nothing is no fault: it is told, behind the finding that nothing is wrong
    score = max(share, moved) if asked or share >= WORTH else -2.0
    yield Cause(
        "an operation left in float",
        f"{len(inside)} operations with {share:.0%} of the multiply-accumulates and {moved:.0%} of all computed numbers stay in float, "
        f"{inside[0]} first: {left[inside[0]]}",
        share, WORTH, "integers end and begin again around each, which costs time and a rounding", score,
        f"halfbyte benchmark {shlex.quote(_output(e.command))}   # what they cost in time", order=3, values=tuple(inside),
    )  # fmt: skip


def _elements(node: fx.Node) -> int:
    """How many numbers an operation computes for one sample."""
    computed = node.op == "call_function" and "shape" in node.meta
    return per_sample(node.meta["shape"]) if computed else 0


def _total(m: QModel, of: Callable[[fx.Node], int]) -> int:
    return sum(of(n) for n in m.graph.nodes) or 1


def _output(command: str) -> str:
    words = shlex.split(command)
    at = next((i for i, w in enumerate(words) if w in ("-o", "--output")), None)
    return words[at + 1] if at is not None and at + 1 < len(words) else "out"


def _feeds_integers(m: QModel, node: fx.Node) -> bool:
    """Some value behind the operation is quantized."""
    seen, ahead = set(), list(node.users)
    while ahead:
        n = ahead.pop()
        if n in seen or n.op == "output":
            continue
        seen.add(n)
        if "value" in n.meta and m.grid(value_name(n)) is not None:
            return True
        ahead += list(n.users)
    return "value" in node.meta and m.grid(value_name(node)) is not None


def width(e: Evidence) -> Iterable[Cause]:
    """Nothing is wrong but the number of bits."""
    if e.fine:
        return
    mine = "weights" if e.weights.noise >= e.values.noise else "running values"
    worst = next(iter(e.alone), "")
    best = max(e.repairs, key=lambda r: r.gain, default=None)
    text = f"; of the repairs tried, {best.name} takes away most ({best.gain:.0%})" if best and best.gain else ""
    command = e.again("--recipe low-bit") if mine == "weights" else e.again("--bits W8A8")
    if best is not None and best.gain >= GAIN and best.name.startswith("float"):
        command = e.again(f"--keep-float '{best.name.split()[-1]}'")
    yield Cause(
        "too few bits",
        f"rounding the {mine} causes most of the noise, spread over the network, {worst} most{text}",
        e.whole.noise, FINE, "from there on about a point of decisions flips", 0.25, command, values=(worst,),
    )  # fmt: skip


def nothing(e: Evidence) -> Iterable[Cause]:
    """The network holds."""
    if e.fine:
        lost = (
            "" if e.points is None else f", {e.points:.1f} points lost{'' if e.bench.labelled else ' by its own odds'}"
        )
        yield Cause(
            "nothing found", f"noise-to-signal at the outputs is {e.whole.noise:.3g}{lost} on {e.bench.samples} samples",
            e.whole.noise, FINE, "below it hardly a decision flips", -1.0,
            f"halfbyte evaluate {shlex.quote(_output(e.command))} --data LABELLED", order=3,
        )  # fmt: skip


RULES: tuple[Rule, ...] = (
    train_mode, float_sanity, preprocessing, accumulators, file_differs, unlike, ranges, uneven, biased, width,
    float_operations, nothing,
)  # fmt: skip
