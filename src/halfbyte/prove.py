"""Repeat the proof of an exported file on another machine: stored inputs, expected integers, numpy and ONNX Runtime.

Nothing else of Halfbyte or of PyTorch is needed, so that a device that only runs the file can say whether it computes what was
simulated: ``halfbyte prove FOLDER``, or ``python -m halfbyte.prove FOLDER``. ``proof.npz`` holds some inputs and, for every
quantized value, a digest of the codes that each sample has to give and some of the codes themselves.
"""

import hashlib
import io
import json
import platform
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from halfbyte.errors import HalfbyteError, ParityError, StoreError, UsageError
from halfbyte.sessions import PROVIDER, session
from halfbyte.shown import Shown

MODEL, PROOF, VERSION = "model.onnx", "proof.npz", 1
FLOAT_TOLERANCE = 1e-4  # of outputs that float operations compute, relative to the largest
_SUFFIX = ":codes"
_SEEN = ":codes:seen"  # what a copy of them is called
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, repr=False)
class Proof(Shown):
    """What was compared, and the verdict.

    equal: nothing differs that has to be equal. values: of integers that integer kernels write, which have to be equal. behind:
    of integers that are rounded behind float operations, and are equal, too; rounded: that are not equal, but within one step.
    unjudged: values and outputs behind these, which cannot be compared exactly. difference: the first value that differs, in the
    order of computation, as a sentence.
    """

    equal: bool
    samples: int
    values: int
    rounded: int
    unjudged: int
    engine: str
    made_on: str
    difference: str | None = None
    behind: int = 0

    def __str__(self) -> str:
        if not self.equal:
            return f"not proven on {self.engine}: {self.difference} (proven on {self.made_on})"
        more = f" and {self.behind} behind float operations" if self.behind else ""
        text = (
            f"equal on {self.engine}: {self.values} integer values{more} on {self.samples} samples, "
            f"as proven on {self.made_on}"
        )
        if self.rounded:
            text += (
                f"; {self.rounded} values behind float operations differ by a step at ties, and {self.unjudged} values "
                "behind these could not be compared"
            )
        return text


def prove(folder: str | Path) -> Proof:
    """Run a file on the inputs stored beside it, and compare every value with what the simulation expects.

    folder: holds ``model.onnx`` and ``proof.npz``, as ``halfbyte quantize`` leaves them; or the path of such a file. Values
    that integer kernels write have to be equal in every element; those behind a float operation may differ by one step of
    their grid. Raises :class:`StoreError` where one of the files is missing or damaged.
    """
    if not isinstance(folder, str | Path):
        raise UsageError("a proof is repeated from files: write the model with hb.export(model, 'out'), and give 'out'")
    path = Path(folder)
    model, stored = (path / MODEL, path / PROOF) if path.is_dir() else (path, path.with_name(PROOF))
    described, arrays = read(stored)
    try:
        data = model.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read '{model}': {error.strerror or error}") from error
    engine = f"ONNX Runtime {ort.__version__} ({PROVIDER}, {platform.system()} {platform.machine()})"
    made_on = f"{described['engine']} ({described['instruction_set']})"
    if hashlib.sha256(data).hexdigest() != described["model"]:
        text = f"'{model}' is not the file that '{stored}' was made for"
        return Proof(False, 0, 0, 0, 0, engine, made_on, text)
    try:
        return _compared(data, described, arrays, engine, made_on)
    except (KeyError, IndexError, TypeError) as error:
        raise StoreError(f"'{stored}' is damaged: {type(error).__name__} {error}") from error


def is_proven_file(file: Path) -> bool:
    """Whether a file is, byte for byte, the one that the ``proof.npz`` beside it was made for; where there is none, nobody can tell."""
    stored = file.with_name(PROOF)
    return not stored.exists() or hashlib.sha256(file.read_bytes()).hexdigest() == read(stored)[0]["model"]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Description and arrays of a ``proof.npz``. Raises :class:`StoreError`."""
    try:
        arrays = dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
        described = json.loads(bytes(arrays.pop("description")))
    except OSError as error:
        raise StoreError(f"cannot read '{path}': {error.strerror or error}; 'halfbyte quantize' writes it") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"'{path}' is damaged: {type(error).__name__} {error}") from error
    if not isinstance(described, dict) or described.get("version") != VERSION:
        raise StoreError(f"'{path}' was written by another version of halfbyte: quantize again")
    return described, arrays


def exposed(model: bytes, values: list[str]) -> bytes:
    """An ONNX file with copies of the codes of these values as further outputs.

    Copies, because the engine arranges the dimensions of an output as the file says, and would order sums behind it differently.
    Serialized messages of protocol buffers merge when they are put one behind the other: repeated fields are appended. So nodes
    (field 1 of the graph, which is field 7 of the model) with an input, an output and a type (fields 1, 2 and 4), and outputs
    (field 12) with a name (field 1) can be added without a parser.
    """

    def copy(value: str) -> bytes:
        codes, seen = f"{value}{_SUFFIX}".encode(), seen_name(value).encode()
        return field(1, field(1, codes) + field(2, seen) + field(4, b"Identity")) + field(12, field(1, seen))

    return model + field(7, b"".join(map(copy, values)))


def seen_name(value: str) -> str:
    """What the copy of a value's codes is called among the outputs."""
    return value + _SEEN


def field(number: int, content: bytes) -> bytes:
    """One length-delimited field of a message of protocol buffers."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def digest(a: Array) -> str:
    """Of an array's shape, type and elements; a zero has no sign."""
    a = np.ascontiguousarray(a + 0.0 if a.dtype.kind == "f" else a)
    told = f"{a.dtype.newbyteorder('<').str}{a.shape}".encode()
    return hashlib.sha256(told + a.astype(a.dtype.newbyteorder("<")).tobytes()).hexdigest()[:32]


class Engine:
    """A file in the engine as it is, and once more with the codes of its quantized values as outputs."""

    def __init__(self, model: bytes, values: list[str]) -> None:
        self.plain, self.looking = session(model), session(exposed(model, values))

    def run(self, inputs: list[Array]) -> tuple[list[Array], dict[str, Array]]:
        """Outputs of the file, and the codes by value. Raises :class:`ParityError` if looking changes what is computed."""
        feed = {i.name: a for i, a in zip(self.plain.get_inputs(), inputs, strict=True)}
        outputs = list(self.plain.run(None, feed))
        names = [o.name for o in self.looking.get_outputs()]
        found = dict(zip(names, self.looking.run(None, feed), strict=True))
        for o, a in zip(self.plain.get_outputs(), outputs, strict=True):
            if not np.array_equal(found[o.name], a):
                raise ParityError(f"output '{o.name}' changes where intermediate values are looked at", value=o.name)
        return outputs, {n.removesuffix(_SEEN): a for n, a in found.items() if n.endswith(_SEEN)}


def _compared(data: bytes, described: dict[str, Any], arrays: dict[str, Array], engine: str, made_on: str) -> Proof:
    records = described["values"]
    runner = Engine(data, [r["name"] for r in records if not r["output"]])
    rounded: set[int] = set()
    unjudged: set[int] = set()
    count, rows = described["samples"], described["rows"]
    for sample in range(count):
        inputs = [arrays[f"input{i}"][sample * rows : (sample + 1) * rows] for i in range(described["inputs"])]
        outputs, codes = runner.run(inputs)
        results, off = (
            iter(outputs),
            set[int](),
        )  # off: differs within what is allowed, so what follows may differ by more
        for i, record in enumerate(records):
            got = next(results) if record["output"] else codes[record["name"]]
            if off & set(record["behind"]):
                unjudged.add(i)
                continue
            if digest(got) == record["digests"][sample]:
                continue
            wrong = _difference(record, arrays[f"value{i}"][sample], got)
            if wrong is not None:
                text = f"{wrong}, in sample {sample}{_hint(described)}"
                return Proof(False, sample + 1, _exact(records), len(rounded), len(unjudged), engine, made_on, text)
            off.add(i)
        rounded |= off
    judged = [r for i, r in enumerate(records) if i not in unjudged | rounded and not r["output"]]
    exact = sum(r["exact"] for r in judged)
    return Proof(True, count, exact, len(rounded), len(unjudged), engine, made_on, behind=len(judged) - exact)


def _exact(records: list[dict[str, Any]]) -> int:
    return sum(r["exact"] and not r["output"] for r in records)


def _difference(record: dict[str, Any], expected: Array, got: Array) -> str | None:
    """What is wrong with a value whose digest is another; None where that is within what is allowed."""
    what = f"{'output' if record['output'] else 'value'} '{record['name']}'"
    if list(got.shape) != record["shape"]:
        return f"{what} has shape {list(got.shape)} instead of {record['shape']}"
    some = got.reshape(-1)[:: record["step"]]
    distance = np.abs(some.astype(np.float64) - expected.astype(np.float64))
    tolerance = FLOAT_TOLERANCE * float(np.abs(expected).max(initial=1e-6)) if record["output"] else 1.0
    allowed = 0.0 if record["exact"] else tolerance
    wrong = np.flatnonzero(~(distance <= allowed))
    if len(wrong):
        at = int(wrong[0])
        where = at * record["step"]
        return f"{what} differs at element {where}: expected {expected[at]:g}, the engine computed {some[at]:g}"
    return f"{what} differs, in elements whose digest alone is stored" if record["exact"] else None


def _hint(described: dict[str, Any]) -> str:
    if described["narrow_products"]:
        return ""
    return "; if this CPU adds pairs of 8-bit products in 16 bits (x86 without VNNI), use the target that ends in -avx2"


if __name__ == "__main__":
    try:
        found = prove(sys.argv[1] if len(sys.argv) > 1 else ".")
    except HalfbyteError as error:
        sys.exit(f"halfbyte: {error}")
    sys.stdout.write(f"{found}\n")
    sys.exit(0 if found.equal else ParityError.exit_code)
