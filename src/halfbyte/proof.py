"""Write ``proof.npz``: inputs and the integers that the simulation expects, for ``prove`` to repeat the proof elsewhere."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, fx

from halfbyte import engine
from halfbyte.errors import ParityError
from halfbyte.export_onnx import lowered
from halfbyte.graph import output_values
from halfbyte.integer import run_integer
from halfbyte.model import QModel, value_name
from halfbyte.ops import CLIP_CODES, QUANTIZE
from halfbyte.parity import coded_values, from_integers, integer_written
from halfbyte.ports import Ports
from halfbyte.prove import VERSION, Array, Engine, digest
from halfbyte.run import filled, fixed_batch
from halfbyte.store import write_whole

SAMPLES = 4
_INPUT_BYTES, _VALUE_BYTES = 4 << 20, 2 << 20  # what inputs and elements of values may take before compression
_FEWEST = 64  # elements of each value


def write_proof(m: QModel, file: Path, path: Path, ports: Ports | None = None) -> None:
    """Store what a proven file, exported with such ports, has to compute on up to four of the model's samples.

    Values that integer kernels write are stored as the integer simulation computes them, those behind float operations as
    the engine does: there, rounding may differ elsewhere. The size is bounded: of each value a digest and some elements.
    Raises :class:`StoreError`.
    """
    ports = ports or Ports()
    low, samples = lowered(m, ports)
    data = file.read_bytes()
    rows = ports.static_batch or (1 if low.dynamic else fixed_batch(low) or len(samples[0]))
    samples = filled(samples, rows)  # there may be fewer than the file takes at once
    each = sum(t[:rows].numel() * t.element_size() for t in samples)
    count = max(1, min(SAMPLES, len(samples[0]) // rows, _INPUT_BYTES // max(each, 1)))
    records = _records(low, coded_values(data))
    runner = Engine(data, [r["name"] for r in records if not r["output"]])
    most = max(_FEWEST, _VALUE_BYTES // (4 * count * max(1, len(records))))
    arrays: dict[str, Array] = {f"input{i}": t[: count * rows].cpu().numpy() for i, t in enumerate(samples)}
    kept: dict[int, list[Array]] = {i: [] for i in range(len(records))}
    for s in range(count):
        batch = tuple(t[s * rows : (s + 1) * rows].cpu() for t in samples)
        for i, expected in enumerate(_expected(low, records, runner, batch)):
            step = -(-max(1, expected.size) // most)
            records[i] |= {"shape": list(expected.shape), "step": step}
            records[i]["digests"].append(digest(expected))
            kept[i].append(expected.reshape(-1)[::step])
    arrays |= {f"value{i}": np.stack(parts) for i, parts in kept.items()}
    described = {
        "version": VERSION,
        "model": hashlib.sha256(data).hexdigest(),
        "engine": f"ONNX Runtime {ort.__version__}",
        "instruction_set": engine.instruction_set(),
        "narrow_products": bool(m.target and m.target.narrow_products),
        "samples": count,
        "rows": rows,
        "inputs": len(samples),
        "values": records,
    }
    text = np.frombuffer(json.dumps(described).encode(), np.uint8)
    packed = io.BytesIO()
    np.savez_compressed(packed, description=text, **arrays)  # type: ignore[arg-type]
    write_whole(path, packed.getvalue())


def _expected(low: QModel, records: list[dict[str, Any]], runner: Engine, batch: tuple[Tensor, ...]) -> list[Array]:
    """What each record has to be, in the type that the engine has it in."""
    outputs, codes = runner.run([t.numpy() for t in batch])
    exact = {r["name"] for r in records if r["exact"] and not r["output"]}
    simulated: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        if name not in codes:
            return x
        if name in exact:
            simulated[name] = x
        return torch.from_numpy(codes[name].astype(np.float32))

    results = run_integer(low, batch, tap)
    found, position = [], 0
    for r in records:
        if not r["output"]:
            got = codes[r["name"]]
            expected = simulated[r["name"]].numpy().astype(got.dtype) if r["name"] in simulated else got
            if not np.array_equal(expected, got):
                raise ParityError(f"value '{r['name']}' differs where the proof is stored", value=r["name"])
            found.append(expected)
            continue
        got = outputs[position]
        found.append(results[position].numpy().astype(got.dtype) if r["exact"] else got)
        position += 1
    return found


def _records(low: QModel, names: list[str]) -> list[dict[str, Any]]:
    """A row for each value in the order of computation, then for each output.

    exact: an integer kernel writes it. behind: rows that are not exact and that this one is computed from.
    """
    written, known = integer_written(low), set(names)
    behind: dict[fx.Node, frozenset[int]] = {}
    rows: list[dict[str, Any]] = []
    for node in low.graph.nodes:
        above = frozenset[int]().union(*(behind[n] for n in node.all_input_nodes))
        name = _coded(node)
        if name in known:
            exact = name.removesuffix(":unclipped") in written
            rows.append({"name": name, "output": False, "exact": exact, "behind": sorted(above), "digests": []})
            above |= frozenset() if exact else {len(rows) - 1}
        behind[node] = above
    for node, name in zip(output_values(low.graph), low.outputs, strict=True):
        exact = from_integers(node)
        rows.append({"name": name, "output": True, "exact": exact, "behind": sorted(behind[node]), "digests": []})
    return rows


def _coded(node: fx.Node) -> str | None:
    """The value whose codes a node of a lowered graph gives."""
    if node.target is QUANTIZE:
        return str(node.args[4])
    return value_name(node) if node.target is CLIP_CODES else None
