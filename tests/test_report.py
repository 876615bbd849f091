"""The report page, in a real browser: what it says, what it does, and what hostile names cannot do to it."""

import copy
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from halfbyte.errors import StoreError
from halfbyte.report import render, write

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<svg onload=alert(2)>{{7*7}}$x_1$"
MINIMAL: dict[str, Any] = {
    "schema": 1,
    "tool": {"name": "halfbyte", "version": "0.1.0"},
    "created": "2026-11-21T01:30:00+00:00",
    "command": "halfbyte quantize net.py:build",
    "network": "net.py:build",
    "configuration": {},
    "seed": 0,
    "versions": {},
    "machine": {"instruction_set": "AVX2", "cores": 2},
    "target": "onnxruntime",
    "bits": "W8A8",
    **dict.fromkeys(("inputs", "outputs", "layers", "values", "float_left", "stages", "log")),
    **dict.fromkeys(("preprocess", "size", "macs", "bit_operations", "parity", "benchmark", "evaluation")),
}


def histogram(draw: random.Random, low: float, high: float) -> dict[str, Any]:
    """A bell of 64 counts, and the same pressed onto every fourth step."""
    counts = [int(4000 * math.exp(-(((i - 24 - draw.random()) / 9) ** 2))) for i in range(64)]
    return {
        "low": low,
        "high": high,
        "float": counts,
        "quantized": [sum(counts[i : i + 2]) * (i % 2) for i in range(64)],
    }


def layer(draw: random.Random, place: int) -> dict[str, Any]:
    """One of the network's layers; the last two stay in float."""
    fan, name = 16 * (1 + place // 8), f"blocks.{place // 3}.{('expand', 'depthwise', 'project')[place % 3]}.conv"
    integer = place < 58
    return {
        **{
            "name": name,
            "op": "Conv",
            "weight": f"{name}.weight",
            "shape": [fan, fan, 3, 3],
            "granularity": "per channel",
        },
        **{"weight_bits": 8 if integer else None, "activation_bits": 8 if integer else None, "integer": integer},
        **{
            "macs": int(2e7 * draw.random() ** 2),
            "bit_operations": int(1e9 * draw.random()),
            "parameters": fan * fan * 9,
        },
        **{
            "bytes": fan * fan * (9 if integer else 36),
            "logical_bits": fan * fan * 72,
            "sqnr_weight": 34 + 8 * draw.random(),
        },
        **{"sqnr_output": 18 + 20 * draw.random() if integer else None, "accumulator_headroom_bits": 3.2},
        **{
            "kernel": "QLinearConv" if integer else None,
            "reason": None if integer else "kept by the option --keep-float",
        },
    }


def value(draw: random.Random, place: int) -> dict[str, Any]:
    """Weights and activations by turns."""
    weights, high = place % 5 in (0, 2), 0.5 + 5 * draw.random()
    low = -high if weights else 0.0
    return {
        "name": f"blocks.{place // 7}.{'weight' if weights else 'conv_output'}_{place}",
        "op": "Conv",
        "kind": "weight" if weights else "activation",
        "format": "int8 symmetric per channel" if weights else "uint8 asymmetric",
        **{"scale": None if weights else high * 0.9 / 255, "zero_point": None if weights else 0},
        **{"lo": -127 if weights else 0, "hi": 127 if weights else 255, "minimum": low, "maximum": high},
        **{"sqnr": 22 + 22 * draw.random(), "dead_channels": 0, "reason": None},
        "tied_to": "blocks.0.conv_output_1" if place % 11 == 3 else None,
        "histogram": histogram(draw, low, high),
    }


def full() -> dict[str, Any]:
    """What a run on a network like EfficientNet-Lite leaves behind."""
    draw = random.Random(0)
    layers = [layer(draw, place) for place in range(60)]
    layers[17]["sqnr_output"] = 11.1
    parity = {
        **{"proven": True, "engine": "ONNX Runtime", "engine_version": "1.31.1", "provider": "CPUExecutionProvider"},
        **{"instruction_set": "AVX2", "samples": 32, "integer_values": 83, "integer_elements": 123_456_789},
        **{"integer_mismatches": 0, "float_values": 2, "float_max_steps": 1, "output_max_difference": 0.0},
        **{"simulation": {"top1_agreement": 0.998, "max_difference": 0.02}, "first_difference": None},
        **{"kernels": {"QLinearConv": 49, "QLinearAdd": 10, "QGemm": 1}, "saturation_free": True},
        "float_nodes": [{"op": "Conv", "name": "blocks.19.depthwise.conv"}, {"op": "Conv", "name": "head.conv"}],
    }
    rate = {"float": 0.885, "simulation": 0.881, "file": 0.881}
    evaluation = {
        **{"metric": "top-1", "samples": 800, **rate, "top5": {"float": 0.978, "simulation": 0.977, "file": 0.977}},
        **{"difference": {"points": -0.3, "low": -0.7, "high": 0.1}, "agreement": {"file_simulation": 1.0}},
        "disagreements": [{"index": 17 * place, "margin": 0.01 * place} for place in range(12)],
    }
    speed = {
        "engine": "ONNX Runtime 1.31.1",
        "threads": 2,
        "batch": 1,
        "rounds": 50,
        "float_ms": 18.4,
        "quantized_ms": 9.7,
    }
    stages = ("capture", "fold", "calibrate", "equalize", "round", "export", "prove", "benchmark")
    return MINIMAL | {
        "command": "halfbyte quantize net.py:build --calibrate calibration/ --evaluate photos/ --output out/",
        "configuration": {
            "calibration_samples": 256,
            "method": "mse",
            "equalize": True,
            "per_channel": True,
            "skip": None,
        },
        "versions": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "onnx": "1.22.0",
            "onnxruntime": "1.31.1",
            "numpy": "2.3.0",
        },
        "inputs": [{"name": "image", "shape": ["N", 3, 224, 224], "dtype": "float32"}],
        "outputs": [{"name": "logits", "shape": ["N", 1000], "dtype": "float32"}],
        "preprocess": {"resize": 256, "crop": 224, "mean": [0.5, 0.5, 0.5]},
        **{"layers": layers, "values": [value(draw, place) for place in range(150)]},
        "float_left": [{key: layers[place][key] for key in ("name", "op", "reason")} for place in (58, 59)],
        "size": {
            "float_bytes": 18_600_000,
            "file_bytes": 4_900_000,
            "weight_bytes": 4_700_000,
            "logical_bits": 37_300_000,
        },
        **{"macs": 385_000_000, "bit_operations": 24_600_000_000, "parity": parity, "evaluation": evaluation},
        "stages": [{"name": s, "seconds": 0.3 + 9 * draw.random(), "peak_memory_bytes": 612_000_000} for s in stages],
        "benchmark": {**speed, "ratio": 1.9, "ratio_low": 1.84, "ratio_high": 1.95},
        "log": [
            {"stage": "fold", "value": f"blocks.{i}.bn", "message": "folded into the convolution"} for i in range(40)
        ],
    }


def chromium() -> str:
    """The browser of this machine; a machine without one cannot vouch for the page."""
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if mac.exists():
        return str(mac)
    pytest.fail("No Chromium: install chromium (Debian: apt-get install chromium) to test the report page.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield launched
        launched.close()


class Opened:
    """A page and everything about it that must stay empty."""

    def __init__(self, browser: Browser, folder: Path, summary: dict[str, Any], **context: Any) -> None:
        self.path = folder / "report.html"
        write(summary, self.path)
        self.page: Page = browser.new_context(**context).new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.trouble.append(request.url) if request.url != self.url else None)
        self.page.goto(self.url)

    @property
    def url(self) -> str:
        return self.path.as_uri()

    def close(self) -> None:
        trouble = [entry for entry in self.trouble if not entry.startswith("data:")]
        self.page.context.close()
        assert trouble == []


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    page = Opened(browser, tmp_path, full())
    yield page
    page.close()


def names(page: Page, table: str) -> list[str]:
    return page.locator(f"#{table} > tbody:visible td.name button").all_inner_texts()


def test_verdict_and_key_figures(opened: Opened) -> None:
    expect(opened.page.locator("#verdict")).to_have_text(
        "4.9 MB instead of 18.6, 1.9 times as fast, 0.3 ± 0.4 points below float on 800 images, "
        "proven equal on ONNX Runtime 1.31 (AVX2)."
    )
    uncovered = opened.page.locator("#uncovered").inner_text()
    assert "2 layers stay in float: blocks.19.depthwise.conv, blocks.19.project.conv (kept by the option" in uncovered
    assert "calibrated on 256 images" in uncovered
    assert "2 values behind float operations may differ by 1 step" in uncovered
    assert opened.page.locator(".key dd:not(.detail)").all_inner_texts() == [
        "4.9 MB",
        "1.90\N{MULTIPLICATION SIGN}",
        "88.1 %",
        "Proven",
    ]
    assert opened.page.locator(".trouble").count() == 0


def test_worst_layer_first_and_headers_sort(opened: Opened) -> None:
    page = opened.page
    output = page.get_by_role("columnheader", name="Output, dB")
    expect(output).to_have_attribute("aria-sort", "ascending")
    first = names(page, "layer-table")
    assert first[0] == "blocks.5.project.conv"
    assert set(first[-2:]) == {"blocks.19.depthwise.conv", "blocks.19.project.conv"}
    output.get_by_role("button").press("Enter")
    expect(output).to_have_attribute("aria-sort", "descending")
    assert names(page, "layer-table")[57] == "blocks.5.project.conv"
    assert set(names(page, "layer-table")[-2:]) == set(first[-2:])  # unknown stays last
    macs = page.locator("#layer-table").get_by_role("columnheader", name="MACs")
    macs.get_by_role("button").click()
    expect(output).not_to_have_attribute("aria-sort", "descending")
    keys = [float(cell.get_attribute("data-v") or 0) for cell in page.locator("#layer-table td:nth-child(7)").all()]
    assert keys == sorted(keys)
    page.get_by_role("columnheader", name="Name").first.get_by_role("button").click()
    assert names(page, "layer-table")[:2] == ["blocks.0.depthwise.conv", "blocks.0.expand.conv"]


def test_filter(opened: Opened) -> None:
    opened.page.get_by_placeholder("Filter layers").fill("blocks.5. project")
    assert names(opened.page, "layer-table") == ["blocks.5.project.conv"]
    expect(opened.page.locator("#layers output")).to_have_text("1 of 60")


def test_opening_a_value_draws_its_histogram(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#value-table svg.spark").count() == 150
    row = page.locator("#value-table > tbody").nth(1)
    assert row.locator("rect.bar").count() == 0
    row.get_by_role("button").click()
    expect(row.get_by_role("button")).to_have_attribute("aria-expanded", "true")
    counts = full()["values"][1]["histogram"]
    assert row.locator("rect.bar.before").count() == sum(count > 0 for count in counts["float"])
    assert row.locator("rect.bar.after").count() == sum(count > 0 for count in counts["quantized"])
    expect(row.locator("rect.bar").nth(20)).to_be_visible()
    assert row.locator("line.limit").count() == 2
    row.get_by_role("button").click()
    expect(row.locator("svg.histogram")).to_be_hidden()


def test_plots_follow_the_theme(opened: Opened) -> None:
    assert opened.page.locator("figure.plot > div > svg[role=img]").count() == 2
    assert opened.page.locator("figure.plot title").count() == 150 + 2 * 60
    source = opened.path.read_text("utf-8")
    assert "#0102" not in source
    assert "var(--accent)" in source.split("<figure")[1]


def test_narrow_screen_does_not_scroll_sideways(browser: Browser, tmp_path: Path) -> None:
    for width in (380, 768):
        opened = Opened(browser, tmp_path, full(), viewport={"width": width, "height": 800})
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        opened.close()


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    def poisoned(part: Any) -> Any:
        if isinstance(part, dict):
            return {
                (HOSTILE + key if key in ("QGemm", "numpy", "skip", "crop") else key): poisoned(v)
                for key, v in part.items()
            }
        if isinstance(part, list):
            return [poisoned(entry) for entry in part]
        return HOSTILE + part if isinstance(part, str) and part not in ("weight", "activation") else part

    summary = poisoned(full())
    summary["values"][0]["sqnr"] = 1.0  # named in the plot
    summary["values"][2]["name"] = "half a pair \ud800"
    summary["float_left"][0]["reason"] = HOSTILE
    opened = Opened(browser, tmp_path, summary)
    page = opened.page
    assert page.locator("img").count() == 0
    assert page.locator("[onload], [onerror]").count() == 0
    assert page.locator("script").count() == 2
    assert names(page, "value-table")[0].startswith(HOSTILE.split("\u2028", maxsplit=1)[0])
    assert "{{7*7}}$x_1$" in page.locator("figure.plot").first.inner_text()
    page.locator("#value-table > tbody").first.get_by_role("button").click()
    assert page.locator("#value-table > tbody").first.locator("rect.bar").count() > 0
    page.locator("#layer-table > tbody").first.get_by_role("button").click()
    page.locator("details summary").first.click()
    opened.close()


def test_policy_runs_only_the_pages_own_script(browser: Browser, tmp_path: Path) -> None:
    page = Opened(browser, tmp_path, MINIMAL)
    page.page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.ran = 1';
        document.body.append(script);
    }""")
    assert page.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in entry for entry in page.trouble)
    page.page.context.close()


@pytest.mark.parametrize("summary", [MINIMAL, {}], ids=["nulls", "nothing"])
def test_unknown_parts_are_left_out_and_unproven_says_so(
    browser: Browser, tmp_path: Path, summary: dict[str, Any]
) -> None:
    opened = Opened(browser, tmp_path, summary)
    page = opened.page
    expect(page.locator("#verdict.alarm .trouble")).to_have_text(
        "Not proven: nobody has compared this file with the simulation."
    )
    assert page.locator(".trouble").evaluate("e => getComputedStyle(e).color") == "rgb(179, 38, 30)"
    assert "No labelled data was seen" in page.locator("#uncovered").inner_text()
    assert "No benchmark was run" in page.locator("#uncovered").inner_text()
    assert page.locator(".key.unknown").count() == 3
    for word in ("None", "undefined", "Undefined", "NaN"):
        assert word not in page.locator("body").inner_text()
    opened.close()


def test_every_single_part_may_be_missing() -> None:
    whole = full()
    for key in whole:
        assert "<h1" in render(whole | {"values": [], "layers": []} | {key: None})
    for part in ("size", "benchmark", "parity", "evaluation", "machine", "tool"):
        for key in whole[part]:
            short = whole | {"values": [], "layers": [], part: {k: v for k, v in whole[part].items() if k != key}}
            assert "<h1" in render(short)
            assert "<h1" in render(short | {part: whole[part] | {key: None}})
    bare = render(MINIMAL | {"layers": [{"name": "a"}], "values": [{"name": "b"}], "stages": [{"name": "c"}]})
    assert ">b</button>" in bare


def test_a_difference_is_told() -> None:
    summary = copy.deepcopy(full())
    first = {"value": "blocks.3.conv", "expected": 12, "got": 13, "count": 5}
    summary["parity"] |= {"proven": False, "integer_mismatches": 5, "first_difference": first}
    summary["benchmark"] |= {"ratio": 1.01, "ratio_low": 0.97}
    summary["evaluation"]["difference"] = {"points": 0.02, "low": -0.2, "high": 0.2}
    page = render(summary)
    assert "4.9 MB instead of 18.6, about as fast, 0.0 ± 0.2 points from float on 800 images." in page
    assert (
        "Not proven: on ONNX Runtime 1.31 (AVX2) 5 of 123,456,789 integers differ, "
        "first in blocks.3.conv (expected 12, got 13)."
    ) in page
    assert "proven equal" not in page


def test_numbers_that_are_not_finite_are_unknown() -> None:
    summary = full()
    summary["layers"][0] |= {"sqnr_weight": math.inf, "sqnr_output": math.nan}
    summary["values"][0] |= {"sqnr": math.inf, "minimum": -math.inf}
    page = render(summary)
    assert ">nan<" not in page
    assert ">inf<" not in page


def test_small_and_quick() -> None:
    summary = full()
    begin = time.perf_counter()
    page = render(summary)
    seconds = time.perf_counter() - begin
    print(f"{len(page.encode()):,} bytes in {seconds:.2f} s")
    assert len(page.encode()) < 3_000_000
    assert seconds < 20  # about one second on an idle machine; loose, because test machines are shared
    assert "http-equiv" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    write(MINIMAL, path)
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StoreError, match=r"report\.html cannot be written"):
        write(MINIMAL, tmp_path / "missing" / "report.html")
