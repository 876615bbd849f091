"""Where an exported file comes from, in the file itself: version, recipe, configuration, digests of weights and data, proof."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.data import Samples
from halfbyte.loading import Batch
from halfbyte.model import LogEntry, QModel
from halfbyte.parity import Parity
from halfbyte.prove import field as message_field
from halfbyte.store import write_whole

_STAGE = "provenance"
_WEIGHTS, _DATA = "weights", "calibration"


def note_weights(m: QModel) -> QModel:
    """The captured network, with the SHA-256 of its names, types, shapes and parameters in the log, unless one is there."""
    if only_weights(m).log:
        return m
    digest = hashlib.sha256()
    for name in sorted(m.params):
        t = m.params[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {list(t.shape)};".encode())
        digest.update(t.numpy().tobytes())
    return m.logged(_entry(_WEIGHTS, digest.hexdigest()))


def only_weights(m: QModel) -> QModel:
    """The model with nothing in its log but the digest of the weights that it was captured with."""
    return replace(m, log=tuple(e for e in m.log if e.stage == _STAGE and _WEIGHTS in e.figures))


def note_data(m: QModel, data: "Hashed | None") -> QModel:
    """The model with the digest of the samples in its log, if there were any and all were read."""
    return m if data is None or data.digest is None else m.logged(_entry(_DATA, data.digest))


def _entry(what: str, digest: str) -> LogEntry:
    return LogEntry(_STAGE, None, f"SHA-256 of the {what} {digest}", {what: digest})


@dataclass
class Hashed:
    """Samples whose first whole pass leaves the digest of all of them, so that none is needed for it."""

    source: Samples
    digest: str | None = field(default=None, init=False)

    def samples(self) -> Samples:
        """The same samples, watched."""
        return replace(self.source, _start=self._watched)

    def _watched(self) -> Iterator[Batch]:
        digest = hashlib.sha256()
        for batch in self.source:
            if self.digest is None:
                for t in batch:
                    digest.update(f"{t.dtype} {list(t.shape)};".encode())
                    digest.update(t.contiguous().numpy().tobytes())
            yield batch
        self.digest = self.digest or digest.hexdigest()


def metadata(m: QModel, configuration: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """Entries under ``halfbyte.*`` that are known before the file is proven. The same job gives the same text."""
    found = {
        "version": halfbyte.__version__,
        "target": m.target.name if m.target else "",
        "recipe": json.dumps(recipe),
        "configuration": json.dumps(configuration),
    }
    if configuration.get("preprocess") is not None:
        found["preprocess"] = json.dumps(configuration["preprocess"])
    for entry in m.log:
        if entry.stage == _STAGE:
            found |= {f"{what}.sha256": digest for what, digest in entry.figures.items()}
    return found


def note_proof(file: Path, parity: Parity) -> None:
    """Add to a file what it was proven on; its graph keeps every byte. Raises :class:`StoreError`."""
    told = {
        "engine": f"{parity.engine_name} {parity.engine_version}",
        "provider": parity.provider,
        "instruction_set": parity.instruction_set,
        "samples": parity.samples,
        "integer_values": parity.integer_values,
        "integer_elements": parity.integer_elements,
    }
    # metadata_props is field 14 of the model, a list of keys (field 1) and values (field 2)
    entry = message_field(1, b"halfbyte.proof") + message_field(2, json.dumps(told).encode())
    write_whole(file, file.read_bytes() + message_field(14, entry))
