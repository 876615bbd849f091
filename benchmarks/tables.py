"""BENCHMARKS.md from the files in benchmarks/results: ``python benchmarks/tables.py``."""

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MMSE = "kernel-wise MMSE"
# Measured elsewhere on 800 other photos (CIFAR: first 2,000 test images), newest releases of November 2026, on a CPU with VNNI:
# float accuracy there, and the best and ONNX Runtime's W8A8 per channel. Compare drops, not levels.
ANCHORS = {
    "efficientnet_lite0": (88.5, "88.25 (torchao, Intel NC)", 87.9),
    "mobilenet_v2": (85.25, "83.63 (NNCF)", 80.12),
    "resnet50": (91.25, "91.37 (NNCF)", 90.75),
    "resnet20_cifar10": (91.65, "91.8 (Sony MCT)", 91.7),
}
# The same for fewer bits: float accuracy there, and top-1 by widths and tool. Every layer has the widths, first and last too.
LOW_BIT_ANCHORS: dict[str, tuple[float, dict[str, dict[str, float]]]] = {
    "efficientnet_lite0": (88.5, {"W4A8": {"AIMET sequential MSE": 57.75, "ONNX Runtime": 16.0}}),
    "mobilenet_v2": (85.25, {"W4A8": {"ONNX Runtime": 0.63}}),
    "resnet50": (91.25, {"W4A8": {"ONNX Runtime": 62.63}}),
    "resnet20_cifar10": (
        91.65,
        {
            "W4A8": {
                "AIMET sequential MSE": 91.65,
                "AIMET AdaRound": 91.6,
                "Sony MCT": 91.05,
                "Brevitas": 88.55,
                "ONNX Runtime": 87.8,
            },
            "W4A8 per tensor": {"AIMET": 86.2},
            "W4A4": {"Sony MCT": 82.25, "AIMET sequential MSE": 75.4, "ONNX Runtime": 67.5},
        },
    ),
}


def read(pattern: str, folder: Path = HERE / "results") -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob(pattern))]


def percent(x: float) -> str:
    return f"{100 * x:.2f}"


def classification(rows: list[dict[str, Any]]) -> list[str]:
    out = ["| network | images | float | simulation | file | from float (95 %, paired) | file = simulation | `quantize_static` |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        e, rival = r["evaluation"], r["rivals"]["quantize_static"]
        d = e["difference"]
        out.append(
            f"| {r['network']} | {e['samples']} | {percent(e['float'])} | {percent(e['simulation'])} | {percent(e['file'])} "
            f"| {d['points']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}) | {percent(e['agreement']['file_simulation'])} % "
            f"| {percent(rival['top1'])} ({rival['difference']['points']:+.2f}) |"
        )
    return out


def work(rows: list[dict[str, Any]]) -> list[str]:
    out = [
        "| network | float pass over the images | quantize | ratio | peak memory, float | peak memory, quantize |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        c = r["cost"]
        out.append(
            f"| {r['network']} | {c['float_pass_seconds']:.1f} s | {c['quantize_seconds']:.1f} s | {c['ratio']:.1f} "
            f"| {c['float_peak_bytes'] / 1e6:.0f} MB | {c['quantize_peak_bytes'] / 1e6:.0f} MB |"
        )
    return out


def speed(rows: list[dict[str, Any]]) -> list[str]:
    out = ["| network | float | halfbyte | float / halfbyte | per channel / halfbyte | defaults / halfbyte | MB, float | MB |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        s = r["speed"]
        out.append(
            f"| {r['network']} | {s['float_ms']:.2f} ms | {s['halfbyte_ms']:.2f} ms | {s['float_over_halfbyte']:.2f} "
            f"| {s['quantize_static_over_halfbyte']:.2f} | {s['quantize_static_default_over_halfbyte']:.2f} "
            f"| {r['float_bytes'] / 1e6:.1f} | {r['bytes'] / 1e6:.1f} |"
        )
    return out


def tasks(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return ["Not measured yet: `python benchmarks/other_tasks.py`."]
    out = [
        "Scored in ONNX Runtime on the exported file; each file is proven equal to the integer simulation first.",
        "",
        "| network | metric | float | row | file | difference | operations in float in the engine | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return out + [
        f"| {t['network']} | {t['metric']} | {t['float']:.4f} | {r['row']} | {r['file']:.4f} "
        f"| {r['file'] - t['float']:+.4f} | {r['float_nodes']} | {r['bytes'] / 1e6:.1f} |"
        for t in found
        for r in t["rows"]
    ]


def other_engine(found: list[dict[str, Any]]) -> list[str]:
    out = ["## W8A8 in OpenVINO", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/other_engine.py`."]
    out += [
        f"{found[0]['engine']}; batch 1, runs interleaved. *Outputs* are those of the file against those of the integer simulation of",
        "the whole network, image by image. NNCF quantizes the same float file with the same images, with its defaults.",
        "",
        "| network | images | float | halfbyte | NNCF | outputs equal | decisions equal | float / halfbyte | NNCF / halfbyte "
        "| MB | MB, NNCF |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        accuracy, speed = r["accuracy"], r["speed"]
        nncf = accuracy.get("nncf")
        out.append(
            f"| {r['network']} | {r['images']} | {percent(r['float'])} | {_interval(accuracy['halfbyte']['difference'])} "
            f"| {_interval(nncf['difference']) if nncf else ''} | {percent(r['same_outputs'])} % | {percent(r['same_decisions'])} % "
            f"| {speed['float']['over_halfbyte']:.2f} | {_over(speed, '{:.2f}', 'over_halfbyte')} "
            f"| {speed['halfbyte']['mb']:.1f} | {_over(speed, '{:.1f}', 'mb')} |"
        )
    return out


def _over(speed: dict[str, Any], form: str, key: str) -> str:
    return form.format(speed["nncf"][key]) if "nncf" in speed else ""


def low_bits(found: list[dict[str, Any]]) -> list[str]:
    out = ["## Fewer than eight bits", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/low_bits.py`."]
    out += [
        "Recipe `low-bit` with each way to round the weights. The first and the last layer keep 8 bits, except in rows named",
        "*uniform*. Every file is proven equal to the integer simulation and scored in ONNX Runtime; W4A32 is weights alone, by the",
        "fake-quantizing float simulation. *Passes*: seconds over those of a float pass over the calibration images, timed just",
        "before on the same machine by Halfbyte itself (the first row of a network in a process that has just started, where the",
        "pass takes longer). *Gain*: mean over the layers (or blocks) of log10 of the noise on held-out samples after the method",
        "over that before it, kept or not (less is better); *kept*: where the method did better than what was there and was taken.",
        "Memory is the peak of the process, which also holds the labelled images. Measured with one thread while other work ran",
        "on the machine, so seconds and passes are upper bounds. Minutes behind a method are those given to it. Rows marked *",
        "ran on a CPU with VNNI, where the 8-bit weights of the first and the last layer use all their codes; those of Descent,",
        "and of blocks in 5 minutes, with the newest code. At W4A4 the values whose rounding disturbs the outputs most are read",
        "in two parts of 4 bits, for up to 10 % more operations; not where rows are named *uniform*. The others are older, from",
        "a CPU where pairs of 8-bit products saturate, which is why accuracy does not compare between the two; their rows of",
        "blocks let the codes move when the whole network is tuned, are from before blocks that together make the outputs worse",
        "were undone, and read all values in one part. What rounding alone decides moves points as another seed does, which",
        "chooses the positions that layers are solved on. Nothing in Halfbyte was set on EfficientNet-lite1 or ResNet56.",
        "",
        *(["![Difference from float over time](docs/low-bits.png)", ""] if (HERE.parent / "docs/low-bits.png").exists() else []),
    ]  # fmt: skip
    for r in found:
        alike: dict[tuple[float, int, int], list[dict[str, Any]]] = {}
        for row in r["rows"]:
            if not row.get("seed"):
                alike.setdefault((row["float"], row["images"], row["samples"]), []).append(row)
        for (before, images, samples), rows in alike.items():
            out += [
                f"### {r['network']}: float {percent(before)} on {images} images, {samples} calibration images",
                "",
                "| widths | method | top-1 | from float (95 %, paired) | agrees with float | seconds | passes | MB, float pass "
                "| MB | gain | kept |",
                "|---" * 11 + "|",
                *map(_low_bit_row, rows),
                "",
            ]
        out += [*_other_seeds(r["rows"]), *_low_bit_anchors(r["network"]), *_profile(r.get("profile"))]
    return out[:-1]


def _low_bit_row(row: dict[str, Any]) -> str:
    limits = [f"{row['iterations']} iterations"] if row["iterations"] and not row["time_limit"] else []
    limits += [f"{row['time_limit'] / 60:.0f} min"] if row["time_limit"] else []
    newest = " *" if str(row.get("target")).endswith("vnni") else ""
    start = f"| {row['row']}{newest} | {row['method']}{' (' + ', '.join(limits) + ')' if limits else ''} "
    if "impossible" in row:
        return start + f"| not possible: {row['impossible']} " + "| " * 8 + "|"
    d, parts = row["difference"], row["losses"].values()
    gains, kept = [f"{p['log10_gain']:+.2f}" for p in parts], [f"{p['kept']} of {p['all']}" for p in parts]
    return (
        start + f"| {percent(row['top1'])} | {d['points']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}) "
        f"| {percent(row['agreement'])} % | {row['seconds']:.1f} | {row['ratio']:.1f} | {row['float_peak_bytes'] / 1e6:.0f} "
        f"| {row['peak_bytes'] / 1e6:.0f} | {', '.join(gains)} | {', '.join(kept)} |"
    )


def _other_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """Points from float with every seed that was measured, where several were."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == "descent" and "difference" in row:
            found.setdefault(row["row"], []).append(row["difference"]["points"])
    told = [
        f"{kind}: " + ", ".join(f"{p:+.2f}" for p in points) + f" (mean {statistics.fmean(points):+.2f})"
        for kind, points in found.items()
        if len(points) > 1
    ]
    return ["Descent with seed 0 and others, points from float: " + "; ".join(told) + ".", ""] if told else []


def _low_bit_anchors(network: str) -> list[str]:
    """What other tools reach with the same widths."""
    if network not in LOW_BIT_ANCHORS:
        return []
    before, widths = LOW_BIT_ANCHORS[network]
    texts = [
        f"{wide}: " + ", ".join(f"{tool} {top1:.2f} ({top1 - before:+.2f})" for tool, top1 in tools.items())
        for wide, tools in widths.items()
    ]
    images = "the first 2,000 test images" if network.endswith("cifar10") else "800 other photos (compare drops)"
    return [
        f"Other tools with these widths in every layer, as in the rows named *uniform*, on {images}, float {before:.2f}: "
        + "; ".join(texts)
        + ".",
        "",
    ]


def _profile(found: dict[str, Any] | None) -> list[str]:
    """Where the time goes."""
    if not found:
        return []
    return [
        f"Where the time of {found['method']} at {found['row']} goes, by own time under `cProfile` ({found['seconds']:.1f} s):",
        "",
        "| function | seconds | share |",
        "|---|---|---|",
        *(f"| `{name}` | {seconds:.1f} | {percent(share)} % |" for name, seconds, share in found["functions"]),
        "",
    ]


def passes(found: list[dict[str, Any]]) -> list[str]:
    """What Descent costs."""
    out = ["## What Descent alone costs, W4A8", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/passes.py`."]
    return [
        *out,
        f"{found[0]['samples']} calibration images, {found[0]['threads']} threads, a process for each network. A float pass is",
        "that of the PyTorch network itself over the same images, before Descent, when every large tensor still is new pages, and",
        "after it. Equalization, ranges, export and proof come on top.",
        "",
        "| network | Descent, s | float pass before, s | passes | float pass after, s | passes | peak MB |",
        "|---" * 7 + "|",
        *(
            f"| {r['network']} | {r['descent']:.1f} | {r['before']:.2f} | {r['descent'] / r['before']:.1f} | {r['after']:.2f} "
            f"| {r['descent'] / r['after']:.1f} | {r['peak_bytes'] / 1e6:.0f} |"
            for r in found
        ),
    ]


def solvers(found: list[dict[str, Any]]) -> list[str]:
    """Layer solvers on the same problems."""
    out = ["## Layer solvers on the same problems, W4A8", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/solvers.py`."]
    out += [
        "Each layer as Descent's quantized network gives it, to every solver. *Noise*: squared error on held-out samples over the",
        "power of what is expected, before the activation function and, where one follows, behind it in brackets.",
        "",
    ]
    for r in found:
        rows, methods = r["rows"], ("descent", "adaround", "adaquant")
        seconds = {m: sum(row[m]["seconds"] for row in rows) for m in methods}
        out += [
            f"### {r['network']}: {len(rows)} layers, AdaRound {r['adaround']} and AdaQuant {r['adaquant']} iterations",
            "",
            "| layer | shape | nearest | Descent | AdaRound | AdaQuant | seconds: Descent | AdaRound | AdaQuant |",
            "|---" * 9 + "|",
        ]
        for row in rows:
            noise = [_noise(row[m]) for m in ("nearest", *methods)]
            times = [f"{row[m]['seconds']:.1f}" for m in methods]
            out.append(f"| {row['layer']} | {'x'.join(map(str, row['shape']))} | {' | '.join(noise + times)} |")
        for other, called in (("adaround", "AdaRound"), ("adaquant", "AdaQuant")):
            least = [sum(row["descent"][kind] <= row[other][kind] for row in rows) for kind in ("loss", "behind")]
            ratio = seconds[other] / seconds["descent"]
            out += [
                "",
                f"Descent took 1/{ratio:.0f} of {called}'s time; its noise is at most {called}'s in {least[0]} layers, behind the "
                f"activation function in {least[1]}.",
            ]
        out.append("")
    return out[:-1]


def _noise(found: dict[str, float]) -> str:
    behind = "" if found["behind"] == found["loss"] else f" ({found['behind']:.4f})"
    return f"{found['loss']:.4f}{behind}"


def dfq(found: list[dict[str, Any]]) -> list[str]:
    out = ["## Data-free quantization step by step, W8A8 with one scale per weight tensor", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/dfq.py`."]
    out += [
        "The steps of arXiv 1906.04721. Top-1, the paired difference and the other figures are those of the fake-quantizing float",
        "simulation on the labelled images, which is quicker than the exact one in integers. The row *equalized for noise + absorbed +",
        "corrected* with ranges from batch norms is also exported, proven equal to the integer simulation and evaluated in ONNX",
        "Runtime. Ranges of running values come from the batch norms (six deviations) or from calibration images (least squared",
        "error). Equalization and absorption never see an image; weights have the range of least squared error, weighted by the",
        "power of what they meet. *As published* gives both layers the same ranges, *for noise* minimises the expected rounding",
        "noise.",
    ]
    for r in found:
        out += ["", f"### {r['network']}: float {percent(r['float'])} on {r['images']} images, {r['samples']} calibration images", "",
                "| step | ranges from | top-1 | from float (95 %, paired) | agrees with float | logit SNR |",
                "|---|---|---|---|---|---|"]  # fmt: skip
        for row in r["rows"]:
            if "impossible" in row:
                out.append(f"| {row['step']} | {row['ranges']} | not possible: {row['impossible']} | | | |")
                continue
            d = row["difference"]
            out.append(
                f"| {row['step']} | {row['ranges']} | {percent(row['top1'])} "
                f"| {d['points']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}) | {percent(row['agreement'])} % | {row['snr_db']:.1f} dB |"
            )
        c, worst = r["cost"], max(r["float_change"].values())
        out += [
            "",
            f"The whole data-free path takes {c['data_free_seconds']:.1f} s, {c['ratio']:.1f} times a float pass over "
            f"{c['images']} images ({c['float_pass_seconds']:.1f} s). Equalizing and absorbing change the float outputs by at most "
            f"{worst:.1e} of the largest.",
        ]
        if "file" in r:
            f, d = r["file"], r["file"].get("difference")
            interval = f" ({d['low']:+.2f} to {d['high']:+.2f})" if d else ""
            out.append(
                f"The file without data: top-1 {percent(f['file'])}, {100 * (f['file'] - f['float']):+.2f} points from float"
                f"{interval}; it decides as the integer simulation on {percent(f['agreement']['file_simulation'])} % of "
                "the images."
            )
    return out


def chosen_widths(found: list[dict[str, Any]]) -> list[str]:
    out = ["## Widths chosen layer by layer", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/widths.py`."]
    out += [
        "The integer programme's front over weights of 2, 3, 4, 6 and 8 bits (activations 8 bits, first and last layer 8 bits), beside",
        "uniform widths and a greedy choice under the same budget. *Size* is logical bits over those of float; *noise* is the",
        "noise-to-signal ratio at the outputs of whole networks on test images. Candidates by Descent on float inputs, not calibrated",
        "again as mixed. Files are exported, proven and scored in ONNX Runtime, after calibration of the mixture. At equal",
        "sizes the programme is better than greedy by its predictions; measured, it is better by up to 10 % on ResNet20, and",
        "better or worse by up to 2 % on the others. Recipes are fake-quantized, with one thread while other work ran; *kernel-wise",
        "MMSE* is the start of `omse` alone, scales of least squared error. Of ResNet50 not every recipe was measured.",
    ]
    for r in found:
        out += [
            "",
            f"### {r['network']}: float {percent(r['float'])} on {r['images']} images, {r['samples']} calibration images",
        ]
        if "front" in r:
            out += _front(r["front"])
        if "files" in r:
            out += [
                "",
                "| budget | size in the file | logical size | top-1 | from float (95 %, paired) | seconds |",
                "|---" * 6 + "|",
            ]
            out += [_budget_row(row) for row in r["files"]]
        if "recipes" in r:
            out += [
                "",
                "| recipe | widths | noise | top-1 (simulated) | from float (95 %, paired) | passes |",
                "|---" * 6 + "|",
            ]
            out += [
                f"| {row['recipe']} | {row['bits']} | {row['noise']:.4f} | {percent(row['top1'])} | {_interval(row['difference'])} "
                f"| {row['passes']:.1f} |"
                for row in r["recipes"]
            ]
            out += ["", _gap({(row["recipe"], row["bits"]): row for row in r["recipes"]})]
    return out


def _gap(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """How much of what kernel-wise MMSE loses between 8 and 4 bits the whole recipe makes up for."""
    worst, best, found = (rows[k] for k in ((MMSE, "W4A4"), (MMSE, "W8A8"), ("omse", "W4A4")))
    noise = (worst["noise"] - found["noise"]) / (worst["noise"] - best["noise"])
    text = f"Of the gap between kernel-wise MMSE at W4A4 and at W8A8, `omse` closes {100 * noise:.0f} % of the noise"
    return f"{text} and {100 * (found['top1'] - worst['top1']) / (best['top1'] - worst['top1']):.0f} % of the points."


def _front(front: dict[str, Any]) -> list[str]:
    rows = sorted((r for r in front["rows"] if "loss" in r), key=lambda r: (r["share"], r["loss"]))
    out = ["", "| size | kind | noise | predicted increase |", "|---" * 4 + "|"]
    for row in rows:
        kind = row["label"] if row["kind"] == "uniform" else row["kind"]
        predicted = f"{row['predicted']:.5f}" if "predicted" in row else ""
        out.append(f"| {percent(row['share'])} % | {kind} | {row['loss']:.5f} | {predicted} |")
    descents = front["descent_seconds"]
    return [
        *out,
        "",
        f"Rank correlation of predicted and measured noise over the front: {front['rank_correlation']:.2f}. "
        f"{len(descents)} candidates by Descent took {sum(descents.values()):.0f} s, the sensitivity table "
        f"{front['sensitivity_seconds']:.0f} s: {front['allocation_over_descent']:.2f} Descent runs for each width in all.",
    ]


def _interval(d: dict[str, float]) -> str:
    return f"{d['points']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})"


def _budget_row(row: dict[str, Any]) -> str:
    if "impossible" in row:
        return f"| {row['budget']} | not possible: {row['impossible']} | | | | |"
    return (
        f"| {row['budget']} | {percent(row['shares']['size'])} % | {percent(row['shares']['logical_size'])} % | {percent(row['top1'])} "
        f"| {_interval(row['difference'])} | {row['seconds']:.0f} |"
    )


def faults(found: list[dict[str, Any]]) -> list[str]:
    out = ["## Faults planted into real networks", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/faults.py`."]
    out += [
        "Each fault alone, into networks on which nothing in the diagnosis was set; EfficientNet-lite1 and 2 come from PyPI. What",
        "`hb.diagnose` names first, without repairs tried. EfficientNet-lite1, and EfficientNet-lite2 but for its outliers, were",
        "diagnosed before the rule on outliers last changed.",
        "",
        "| fault | " + " | ".join(f["network"] for f in found) + " |",
        "|---" * (1 + len(found)) + "|",
    ]
    named = [{row["fault"]: row for row in f["rows"]} for f in found]
    for fault in dict.fromkeys(k for n in named for k in n):
        cells = [_named(n.get(fault)) for n in named]
        out.append(f"| {fault} | " + " | ".join(cells) + " |")
    rows = [row for f in found for row in f["rows"]]
    right = sum(row["named"] == row["expected"] for row in rows)
    return [
        *out,
        "",
        f"{right} of {len(rows)} named first, {statistics.median(r['seconds'] for r in rows):.0f} s each (median).",
    ]


def limits(found: list[dict[str, Any]]) -> list[str]:
    out = ["## The automatic recipe", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/limits.py`."]
    out += [
        "`--max-drop` without labels: points of decisions that differ from the float network's. *Estimate* and *bound*: what the",
        "search says of its answer, from held-out samples; *unseen*: the same of the file on images that it has not seen (for the",
        "large networks other photos than those it calibrated on), and points of accuracy. *Cost*: over the plain run.",
        "",
        "| network | bits | limit | answer | estimate | bound | unseen | accuracy | cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in found:
        c, u = f["chosen"], f["unseen"]
        answer = f"{'reached' if f['reached'] else 'not shown' if 'not shown' in f['verdict'] else 'not reached'}: {c['name']}"
        figures = f"{c['points']:.2f} | {c['bound']:.2f} | {u['changed']:.2f} of {u['images']} | {-u['lost']:+.2f}"
        cost = f["seconds"] / f["plain_seconds"]
        out.append(f"| {f['network']} | {f['bits']} | {f['limit']:g} | {answer} | {figures} | {cost:.1f} |")
    return out


def _named(row: dict[str, Any] | None) -> str:
    return "" if row is None else "named first" if row["named"] == row["expected"] else f"*{row['named']}*"


def ranges(found: list[dict[str, Any]]) -> list[str]:
    out = ["## Range rules, weights or running values alone", ""]
    if not found:
        return [*out, "Not measured yet: `python benchmarks/ranges.py`."]
    out += [
        "As tables 1 and 2 of arXiv 2106.08295: one side on a grid, the other in float, no bias correction; top-1 of the",
        "fake-quantizing float simulation and, in brackets, the paired difference from float in points. *MSE by input power* weighs",
        "each weight's error by the power of the input it meets. Networks with depthwise layers are equalized as published before",
        "their weights are rounded; their running values are those of the original network. *Batch norms*: no data, six deviations.",
    ]
    for r in found:
        note = ", weights equalized" if r["equalized_for_weights"] else ""
        out += [
            "",
            f"### {r['network']}: float {percent(r['float'])} on {r['images']} images, {r['samples']} calibration images{note}",
        ]
        for what, letter in (("weights", "W"), ("activations", "A")):
            table: dict[str, dict[int, str]] = {}
            for row in r["rows"]:
                if row["what"] == what:
                    kind = {True: ", per channel", False: ", per tensor"}.get(row.get("per_channel"), "")
                    text = (
                        f"{percent(row['top1'])} ({row['difference']['points']:+.2f})"
                        if "top1" in row
                        else "not possible"
                    )
                    table.setdefault(row["rule"] + kind, {})[row["bits"]] = text
            widths = sorted({bits for cells in table.values() for bits in cells}, reverse=True)
            out += [
                "",
                "| rule | " + " | ".join(f"{letter}{b}" for b in widths) + " |",
                "|---" * (len(widths) + 1) + "|",
            ]
            out += [
                f"| {rule} | " + " | ".join(cells.get(b, "") for b in widths) + " |" for rule, cells in table.items()
            ]
    return out


def main() -> None:
    rows, others = read("classification-*.json"), read("task-*.json")
    engine = rows[0]["engine"] if rows else ""
    lines = [
        "# Benchmarks",
        "",
        "Every figure comes from a script in `benchmarks/` and can be measured again:",
        "`HALFBYTE_DATA=... python benchmarks/classification.py`, `low_bits.py`, `passes.py`, `solvers.py`, `widths.py`,",
        "`other_tasks.py`, `other_engine.py`, `limits.py`, `dfq.py`, `ranges.py`, `faults.py`, then `python benchmarks/tables.py`.",
        engine + ".",
        "",
        "## W8A8 on classifiers, 256 unlabelled calibration images",
        "",
        "Every file is proven equal to the integer simulation before it is evaluated. `quantize_static` is ONNX Runtime's own",
        "quantizer on the same network, images and machine: per channel, unsigned activations, with `reduce_range` where the",
        "CPU saturates pairs of products.",
        "",
        *classification(rows),
        "",
        "Measured elsewhere on 800 other photos, on a CPU with VNNI (compare drops): "
        + "; ".join(f"{n}: float {f}, best {best}, ONNX Runtime {o}" for n, (f, best, o) in ANCHORS.items())
        + ".",
        "",
        "## Speed of the result, batch 1, interleaved runs in one process",
        "",
        "*Per channel* and *defaults* are `quantize_static` with the settings above and with its own defaults. One thread, while",
        "other work ran on the machine.",
        "",
        *speed(rows),
        "",
        "## Cost of the work",
        "",
        *work(rows),
        "",
        "## Other tasks",
        "",
        *tasks(others),
        "",
        *other_engine(read("openvino-*.json")),
        "",
        *limits(read("limits-*.json")),
        "",
        *low_bits(read("low-bits-*.json")),
        "",
        *passes(read("passes-*.json")),
        "",
        *solvers(read("solvers-*.json")),
        "",
        *chosen_widths(read("widths-*.json")),
        "",
        *dfq(read("dfq-*.json")),
        "",
        *ranges(read("ranges-*.json")),
        "",
        *faults(read("faults-*.json")),
        "",
    ]
    (HERE.parent / "BENCHMARKS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
