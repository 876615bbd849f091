"""The report page: one self-contained HTML file made from the contents of ``summary.json``.

Nothing is loaded from anywhere, so the page can be mailed or archived. Everything in the summary is untrusted text
(layer names come from the network's author): the template escapes it, and a content security policy that names the
page's only script by its hash keeps anything that slipped through from running.
"""

import base64
import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import matplotlib as mpl
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from halfbyte.errors import StoreError
from halfbyte.shown import scaled

__all__ = ["render", "write"]

_MINUS, _TIMES, _DASH, _DOTS = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{HORIZONTAL ELLIPSIS}"
# Matplotlib knows only fixed colours; these stand-ins become the page's own, so that a plot follows the theme.
_INK, _RULE, _ACCENT, _BAD = "#010203", "#010204", "#010205", "#010206"
_THEME = {_INK: "var(--soft)", _RULE: "var(--rule)", _ACCENT: "var(--accent)", _BAD: "var(--bad)"}
_STYLE: Any = {
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _INK),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "font.size"), 8.5),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "legend.frameon": False},
    **{"axes.edgecolor": _RULE, "grid.color": _RULE, "grid.linewidth": 0.6, "lines.linewidth": 0.8},
    **{"lines.markersize": 3.5, "lines.markeredgewidth": 0.8, "svg.fonttype": "none", "svg.hashsalt": "halfbyte"},
}
_CALIBRATION_KEYS = ("calibration_samples", "calibration_images", "calibration_count", "samples")


def render(summary: Mapping[str, Any]) -> str:
    """Return the page for ``summary``; parts that are missing or null are left out and named as unknown."""
    data = _clean(dict(summary))
    layers = [dict(layer, position=place) for place, layer in enumerate(data.get("layers") or [], 1)]
    values = [dict(value, position=place) for place, value in enumerate(data.get("values") or [], 1)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True)
    environment.filters.update(
        size=lambda number: _scaled(number, "B"),
        count=_scaled,
        number=_number,
        percent=lambda share: _DASH if not _known(share) else f"{100 * share:.1f} %",
        shape=lambda sizes: _TIMES.join(str(size) for size in sizes or []) or _DASH,
        digest=lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    template = environment.from_string(resources.files("halfbyte").joinpath("report.html.j2").read_text("utf-8"))
    histograms = {value["position"]: _drawable(value) for value in values if value.get("histogram")}
    return template.render(
        s=data,
        layers=sorted(layers, key=lambda layer: _or_infinite(layer.get("sqnr_output"))),
        values=values,
        sentence=_sentence(data),
        trouble=_trouble(data.get("parity")),
        uncovered=_uncovered(data),
        plots=[plot for plot in (_signal_plot(values), _load_plot(layers)) if plot],
        range_plots=[_range_plot(c) for c in (data.get("diagnosis") or {}).get("channels") or [] if c.get("low")],
        histograms=htmlsafe_json_dumps(histograms, separators=(",", ":")),
    )


def write(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page to ``path``, whole or not at all; raises `StoreError` where that folder cannot be written."""
    page = render(summary).encode("utf-8")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(page)
        os.replace(partial, path)  # the one call documented as atomic on every platform
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"The report {path} cannot be written ({error.strerror}); choose another folder.") from error


def _clean(part: Any) -> Any:
    """``part`` without what no page can hold: numbers that are not finite and halves of surrogate pairs."""
    if isinstance(part, Mapping):
        return {_clean(str(key)): _clean(entry) for key, entry in part.items()}
    if isinstance(part, (list, tuple)):
        return [_clean(entry) for entry in part]
    if isinstance(part, float) and not math.isfinite(part):
        return None
    return part.encode("utf-8", "replace").decode() if isinstance(part, str) else part


# Numbers as people read them ------------------------------------------------------------------------------------


def _known(number: Any) -> TypeGuard[float]:
    return isinstance(number, (int, float)) and not isinstance(number, bool)


def _or_infinite(number: Any) -> float:
    return number if _known(number) else math.inf


def _scaled(number: Any, unit: str = "") -> str:
    return scaled(number, unit).replace("-", _MINUS) if _known(number) else _DASH


def _number(number: Any, digits: int | None = None) -> str:
    """``number`` with so many decimals, or else with four significant digits."""
    if not _known(number):
        return _DASH
    whole = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    text = whole if digits is None else f"{number:,.{digits}f}"
    return (text.lstrip("-") if text.strip("-0.") == "" else text).replace("-", _MINUS)


def _samples(summary: Mapping[str, Any], count: Any) -> str:
    """So many images, where the network looks at images."""
    shapes = [entry.get("shape") or [] for entry in summary.get("inputs") or []]
    images = bool(summary.get("preprocess")) or any(len(shape) == 4 for shape in shapes)
    return f"{_number(count)} {'image' if images else 'sample'}{'' if count == 1 else 's'}"


# What the page says ---------------------------------------------------------------------------------------------


def _sentence(summary: Mapping[str, Any]) -> str:
    """The verdict, made of what is known; what is not proven is left to `_trouble`."""
    parts = []
    size = summary.get("size") or {}
    if size.get("file_bytes") and size.get("float_bytes"):
        now, before = _scaled(size["file_bytes"], "B"), _scaled(size["float_bytes"], "B")
        same_unit = now.split()[-1] == before.split()[-1]
        parts.append(f"{now} instead of {before.split()[0] if same_unit else before}")
    speed = summary.get("benchmark") or {}
    if _known(ratio := speed.get("ratio")):
        certain = not speed.get("ratio_low") or not speed["ratio_low"] <= 1 <= _or_infinite(speed.get("ratio_high"))
        parts.append(f"{_number(ratio, 1 if ratio >= 1.1 else 2)} times as fast" if certain else "about as fast")
    evaluation = summary.get("evaluation") or {}
    difference = evaluation.get("difference") or {}
    if _known(points := difference.get("points")):
        low, high = difference.get("low"), difference.get("high")
        spread = f" ± {_number((high - low) / 2, 1)}" if _known(low) and _known(high) else ""
        where = "from" if round(points, 1) == 0 else "below" if points < 0 else "above"
        count = evaluation.get("samples")
        seen = "" if not _known(count) else f" on {_samples(summary, count)}"
        parts.append(f"{_number(abs(points), 1)}{spread} points {where} float{seen}")
    parity = summary.get("parity") or {}
    if parity.get("proven") is True:
        steps = parity.get("integer_max_steps")
        parts.append(f"proven {f'within {steps} step' if steps else 'equal'} on {_engine(parity)}")
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _engine(parity: Mapping[str, Any]) -> str:
    version = ".".join(str(parity.get("engine_version") or "").split(".")[:2])
    instructions = f"({parity['instruction_set']})" if parity.get("instruction_set") else ""
    return " ".join(str(part) for part in (parity.get("engine") or "the engine", version, instructions) if part)


def _trouble(parity: Mapping[str, Any] | None) -> str:
    """Why the file is not proven; empty where it is."""
    if not parity:
        return "Not proven: nobody has compared this file with the simulation."
    if parity.get("proven") is True:
        return ""
    counted = _known(parity.get("integer_mismatches")) and _known(parity.get("integer_elements"))
    extent = f"{parity['integer_mismatches']:,} of {parity['integer_elements']:,} integers differ" if counted else ""
    text = f"Not proven: on {_engine(parity)} {extent or 'the file does not compute what was simulated'}"
    if first := parity.get("first_difference"):
        expected, got = (str(first.get(key))[:60] for key in ("expected", "got"))
        text += f", first in {first.get('value')} (expected {expected}, got {got})"
    return f"{text}."


def _uncovered(summary: Mapping[str, Any]) -> list[str]:
    """What the verdict says nothing about, most important first."""
    notes = []
    reasons: dict[str, list[str]] = {}
    for left in summary.get("float_left") or []:
        reasons.setdefault(str(left.get("reason") or "no reason recorded"), []).append(str(left.get("name")))
    for reason, names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        stay = "1 layer stays" if len(names) == 1 else f"{len(names)} layers stay"
        notes.append(f"{stay} in float: {', '.join(names[:4])}{more} ({reason}).")
    evaluation, benchmark, parity = (summary.get(key) or {} for key in ("evaluation", "benchmark", "parity"))
    if not evaluation:
        notes.append("No labelled data was seen: how often the file is right is unknown.")
    if not benchmark:
        notes.append("No benchmark was run: how fast the file is on any machine is unknown.")
    if parity:
        seen = f" and {_samples(summary, parity['samples'])}" if _known(parity.get("samples")) else ""
        notes.append(f"Parity was checked with {_engine(parity)}{seen}; other engines and processors may differ.")
    if parity.get("float_values"):
        many, steps = _number(parity["float_values"]), _number(parity.get("float_max_steps"))
        plural = "values" if parity["float_values"] != 1 else "value"
        if parity.get("float_max_steps"):
            notes.append(f"{many} {plural} behind float operations may differ by {steps} step of the grid.")
    if nodes := parity.get("float_nodes"):
        notes.append(f"The engine computes {len(nodes)} node{'s' * (len(nodes) > 1)} of the file in float.")
    if parity.get("saturation_free") is False:
        notes.append("Intermediate sums can saturate on this instruction set; other inputs may differ.")
    configuration = summary.get("configuration") or {}
    if count := next((configuration[key] for key in _CALIBRATION_KEYS if _known(configuration.get(key))), None):
        notes.append(f"Ranges were calibrated on {_samples(summary, count)}; inputs unlike them may be clipped.")
    return notes


def _drawable(value: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script needs to draw one histogram: the counts, and the limits of the number format."""
    scale, low, high = (value.get(key) for key in ("scale", "lo", "hi"))
    if scale is None or low is None or high is None:
        return {**value["histogram"], "range": None}
    return {**value["histogram"], "range": [(end - (value.get("zero_point") or 0)) * scale for end in (low, high)]}


# Plots ----------------------------------------------------------------------------------------------------------


@mpl.rc_context(_STYLE)
def _signal_plot(values: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Signal-to-noise of every value, from the network's inputs to its outputs, the worst ones named."""
    known = [value for value in values if _known(value.get("sqnr"))]
    if not known:
        return None
    figure = Figure(figsize=(10.4, 3.1), layout="constrained")
    axes = figure.add_subplot(ylabel="dB", xlabel="value, in the order of the network")
    tips: list[str] = []
    for weights, colour, look in ((True, _INK, "s"), (False, _ACCENT, "o-")):
        same = [value for value in known if (value.get("kind") == "weight") is weights]
        label = "weights" if weights else "activations"
        face = "none" if weights else colour
        axes.plot([], [], look, color=colour, mfc=face, label=label)
        if not weights:
            axes.plot([v["position"] for v in same], [v["sqnr"] for v in same], color=colour, alpha=0.5)
        for value in same:  # one by one, for a tooltip each
            mark = axes.plot(value["position"], value["sqnr"], look[0], color=colour, mfc=face, clip_on=False)
            mark[0].set_gid(f"tip-{len(tips)}")
            tips.append(f"{value.get('name')}: {value['sqnr']:.1f} dB")
    named: list[int] = []
    for value in sorted(known, key=lambda value: float(value["sqnr"]))[:3]:
        place = value["position"]
        if all(abs(place - other) > len(values) / 3 for other in named):
            named.append(place)
            side = {0: "left", 4: "right"}.get(5 * place // (len(values) + 1), "center")
            axes.text(place, value["sqnr"] - 1, str(value.get("name"))[-32:], ha=side, va="top", parse_math=False)
    axes.margins(x=0.01, y=0.16)
    figure.legend(loc="outside upper right", ncols=2)
    return _inline(figure, "Signal to quantization noise of every value, in decibels (higher is better)", tips)


@mpl.rc_context(_STYLE)
def _load_plot(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Where the work and the bytes are; what stays in float stands out."""
    if not layers:
        return None
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    colours = [_BAD if layer.get("integer") is False else _ACCENT for layer in layers]
    tips: list[str] = []
    for row, key, label, unit in ((1, "macs", "MACs", ""), (2, "bytes", "bytes", "B")):
        axes = figure.add_subplot(2, 1, row, ylabel=label)
        heights = [layer.get(key) or 0 for layer in layers]
        bars = axes.bar([layer["position"] for layer in layers], heights, color=colours, width=0.72)
        for bar, layer, height in zip(bars, layers, heights, strict=True):
            bar.set_gid(f"tip-{len(tips)}")
            tips.append(f"{layer.get('name')}: {_scaled(height, unit)}")
        axes.yaxis.set_major_formatter(EngFormatter(unit=unit))
        axes.margins(x=0.01)
    axes.set_xlabel("layer, in the order of the network")
    return _inline(figure, "Work and stored bytes by layer (red: stays in float)", tips)


@mpl.rc_context(_STYLE)
def _range_plot(channels: Mapping[str, Any]) -> Markup:
    """The range of each channel of a value, the widest first, between the ends of its grid."""
    spans = sorted(zip(channels["low"], channels["high"], strict=False), key=lambda s: -max(abs(s[0]), abs(s[1])))
    figure = Figure(figsize=(10.4, 1.9), layout="constrained")
    axes = figure.add_subplot(ylabel="range", xlabel="channel, the widest first")
    axes.bar(range(len(spans)), [high - low for low, high in spans], bottom=[low for low, _ in spans], color=_ACCENT)
    for end in ("grid_low", "grid_high"):
        axes.axhline(channels.get(end) or 0.0, color=_BAD, linestyle="--")
    axes.margins(x=0.01)
    return _inline(figure, f"{channels.get('value')} (dashed: the ends of its grid)", [])


def _inline(figure: Figure, title: str, tips: Sequence[str]) -> Markup:
    """The figure as an SVG element that takes the page's colours and shows a tooltip on every mark."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that only the browser's fonts have
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub("|".join(_THEME), lambda match: _THEME[match[0]], text)
    text = re.sub(r'<g id="tip-(\d+)">', lambda match: f"<g><title>{escape(tips[int(match[1])])}</title>", text)
    text = re.sub(r' id="[a-z]+[\w.]*_\d+"', "", text)  # never referred to, and the same in every figure
    return Markup('<figure class="plot"><figcaption>{}</figcaption><div class="scroll">{}</div></figure>').format(
        title,
        Markup(text.replace("<svg ", '<svg role="img" ', 1)),  # noqa: S704 - Matplotlib has escaped its texts
    )
