"""Decisions sample by sample, of the float network and of the exported file: what limits and comparisons are judged on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import tee
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import engine, engines
from halfbyte.calibrate import Progress, silent
from halfbyte.data import Labelled, Samples, Source, calibration, check_inputs, labelled
from halfbyte.errors import DataError, UsageError
from halfbyte.graph import output_values
from halfbyte.integer import predict
from halfbyte.model import Inputs, QModel
from halfbyte.ports import input_codes
from halfbyte.preprocess import Preprocess
from halfbyte.run import expected_inputs

_EVERY = 2**31 - 1  # a limit that no data set reaches


@dataclass(frozen=True)
class Decisions:
    """Share of right decisions for each sample, [N] in 0..1 (float64).

    float, file: of the two ways to run the network. With labels, right means the label; without, what the float network
    decides, which is then right by definition. agreement: share of a sample's decisions on which the two agree, [N].
    """

    float: Tensor
    file: Tensor
    agreement: Tensor
    labels: bool

    @property
    def metric(self) -> str:
        """What the numbers mean."""
        return "top-1" if self.labels else "agreement with float"


def open_data(
    m: QModel,
    data: Source | None,
    unlabelled: Source | None,
    *,
    preprocess: Preprocess | None,
    limit: int | None,
    batch: int,
    classes: str | PathLike[str] | None = None,
) -> Labelled | Samples | None:
    """Labelled or unlabelled samples for a network, or None. Raises :class:`UsageError` if both are given."""
    if data is not None and unlabelled is not None:
        raise UsageError("--data and --unlabelled were both given: choose data with labels or without")
    names = [str(n.target) for n in m.inputs]
    if data is not None:
        shape = output_values(m.graph)[0].meta["shape"]
        outputs = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
        return labelled(
            data, preprocess=preprocess, input_names=names, outputs=outputs, batch=batch, limit=limit, classes=classes
        )
    if unlabelled is None:
        return None
    return calibration(unlabelled, preprocess=preprocess, input_names=names, samples=limit or _EVERY, batch=batch)


def labelled_or_not(
    m: QModel,
    data: Source,
    *,
    preprocess: Preprocess | None,
    samples: int,
    classes: str | PathLike[str] | None = None,
) -> list[tuple[Inputs, Tensor | None]]:
    """The first samples with their labels, or, where there are none and nobody names classes, without."""
    once, again = tee(data) if isinstance(data, Iterator) else (data, data)
    options: dict[str, Any] = {"preprocess": preprocess, "limit": samples, "batch": samples}
    try:
        found: Any = list(open_data(m, once, None, classes=classes, **options) or ())
    except DataError:
        if classes is not None:
            raise
        found = [(x, None) for x in open_data(m, None, again, **options) or ()]
    expected = expected_inputs(m)
    for i, (x, _) in enumerate(found):
        check_inputs(x, expected, f"batch {i} of the data")
    return found  # type: ignore[no-any-return]


@torch.inference_mode()
def decisions(
    m: QModel, file: Path, data: Labelled | Samples, *, threads: int | None = None, progress: Progress = silent
) -> Decisions:
    """Run the float network and the file on the data, and keep no more than the decisions.

    A decision is the largest of dimension 1 of the first output; where there are further dimensions (pixels), a sample has
    many. Raises :class:`DataError` for no data, :class:`UsageError` for a network that does not decide.
    """
    reference, session = m.as_float(), engines.opened(engines.engine_of(m), file, threads=threads)
    codes = partial(input_codes, m) if engines.takes_bytes(session) else tuple
    rows: dict[str, list[Tensor]] = {"float": [], "file": [], "agreement": []}
    labels, expected = isinstance(data, Labelled), expected_inputs(m)
    for i, item in enumerate(data):
        x, target = (item[0], item[1]) if labels else (item, None)
        check_inputs(x, expected, f"batch {i} of {data.description}")  # type: ignore[arg-type]
        decided = _decided(reference, session, x, codes(x))  # type: ignore[arg-type]
        right = target if isinstance(target, Tensor) else decided["float"]
        if right.shape != decided["float"].shape:
            raise UsageError("the network decides for each pixel, and labels are one for each sample: use --unlabelled")
        for way, d in decided.items():
            rows[way].append(_share(d == right))
        rows["agreement"].append(_share(decided["file"] == decided["float"]))
        progress("evaluate", sum(map(len, rows["file"])), data.count)
    if not rows["file"]:
        raise DataError(f"{data.description}: there is nothing in it")
    return Decisions(**{k: torch.cat(v) for k, v in rows.items()}, labels=labels)


def _decided(reference: QModel, session: object, x: Inputs, fed: Inputs) -> Mapping[str, Tensor]:
    outputs = {"float": predict(reference, x)[0], "file": torch.from_numpy(engine.infer(session, fed)[0])}
    if outputs["float"].ndim < 2 or outputs["float"].shape[1] < 2:
        shape = list(outputs["float"].shape)
        raise UsageError(
            f"the network's first output has shape {shape}, which is no choice between classes: use 'halfbyte evaluate --metric'"
        )
    return {way: y.argmax(1) for way, y in outputs.items()}


def _share(same: Tensor) -> Tensor:
    return same.double().flatten(1).mean(1) if same.ndim > 1 else same.double()
