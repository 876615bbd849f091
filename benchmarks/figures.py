"""Figures from the files in benchmarks/results: ``python benchmarks/figures.py`` draws docs/low-bits.png."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from tables import HERE, read

DRAWN = "W4A8"
COLUMNS = 3
LINEAR = 2.0  # points around float that keep a linear scale where the rest needs a logarithmic one
# Method -> colour (Okabe and Ito's, told apart by the colour-blind) and marker.
LOOKS = {
    "nearest": ("#666666", "o"),
    "descent": ("#d55e00", "s"),
    "adaround": ("#0072b2", "^"),
    "adaquant": ("#009e73", "v"),
    "blocks": ("#cc79a7", "D"),
}
TICKS = (0.0, -0.5, -1.0, -2.0, -5.0, -10.0, -20.0, -50.0, -100.0)


def panel(ax: Axes, network: str, rows: list[dict[str, Any]]) -> None:
    """One network: points lost against float over the time it took."""
    ax.axhline(0, color="#222222", linewidth=0.8, zorder=1)
    for row in rows:
        d, (colour, marker) = row["difference"], LOOKS[row["method"]]
        reach = [[d["points"] - d["low"]], [d["high"] - d["points"]]]
        ax.errorbar(row["ratio"], d["points"], reach, color=colour, marker=marker, markersize=6, linewidth=1, capsize=2)
        ax.annotate(
            row["method"], (row["ratio"], d["points"]), (6, 3), textcoords="offset points", color=colour, fontsize=8
        )
    ratios, lowest = [r["ratio"] for r in rows], min(r["difference"]["low"] for r in rows)
    highest = max(0.0, *(r["difference"]["high"] for r in rows))
    ax.set_xscale("log")
    ax.set_xlim(min(ratios) / 2, max(ratios) * 4)  # room for the labels
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if lowest < -5:  # nearest rounding may lose everything, where the others differ by tenths
        ax.set_yscale("symlog", linthresh=LINEAR)
        ax.yaxis.set_major_locator(FixedLocator([*TICKS, 1.0, 2.0]))
        ax.set_ylim(lowest * 1.3, max(0.7, highest * 1.3))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}" if y else "float"))
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_title(f"{network}, float {100 * rows[0]['float']:.2f} %", fontsize=10)
    ax.set_xlabel("time, in float passes over the calibration images", fontsize=8)
    scale = f" (log scale below {-LINEAR:g})" if ax.get_yscale() == "symlog" else ""
    ax.set_ylabel("top-1 minus float, in points" + scale, fontsize=8)
    ax.tick_params(labelsize=8)


def low_bits(found: list[dict[str, Any]], path: Path) -> None:
    """Points lost over time for every network and method."""
    measured = {
        r["network"]: [w for w in r["rows"] if w["row"] == DRAWN and "top1" in w and not w.get("seed")] for r in found
    }
    measured = {network: rows for network, rows in measured.items() if rows}
    if not measured:
        raise SystemExit(f"nothing measured at {DRAWN} yet: python benchmarks/low_bits.py")
    columns = min(COLUMNS, len(measured))
    lines = -(-len(measured) // columns)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(6.0, 4.4 * columns), 3.4 * lines + 0.4), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax, (network, rows) in zip(axes, measured.items(), strict=False):
            panel(ax, network, rows)
        for ax in axes[len(measured) :]:
            ax.set_visible(False)
        figure.suptitle(f"{DRAWN} by method: accuracy over time, bars are 95 % intervals", fontsize=11)
        figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder with the results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "low-bits.png")
    options = parser.parse_args()
    low_bits(read("low-bits-*.json", options.results), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
