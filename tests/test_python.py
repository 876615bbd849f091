"""The same in Python as on the command line: a function for each command, with its options by the same names."""

import inspect
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.cli import main
from halfbyte.errors import CaptureError, DataError, StoreError, UsageError
from halfbyte.overrides import parse_overrides
from tiny import array, files, halfbyte, network, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``out``, and samples with the labels that the float network gives."""
    place = tmp_path_factory.mktemp("python")
    quantized(place)
    noise = np.random.default_rng(5)
    x = (noise.standard_normal((256, 3, 1, 1)) + noise.standard_normal((256, 3, 8, 8))).astype(np.float32)
    (y,) = hb.predict(hb.load(place / "out" / "checkpoint").as_float(), (torch.from_numpy(x),))
    np.savez(place / "labelled.npz", x=x, target=y.argmax(1).numpy())
    np.save(place / "more.npy", x)
    return place


def grids(m: hb.QModel) -> dict[str, list[float]]:
    return {name: g.scale.flatten().tolist() for name, g in m.grids.items()}


def test_quantize_is_the_command(folder: Path, tmp_path: Path) -> None:
    """Whatever form the network and the widths have."""
    out = quantized(
        tmp_path, "--bits", "W4A8", "--set", "last=W4A8", "--weight-range", "min-max", "--rounding", "nearest"
    )
    expected = grids(hb.load(out / "checkpoint"))
    data, net = array(tmp_path / "x.npy"), network(tmp_path, "pair")
    options = {"sets": ["last=W4A8"], "rounding": "nearest"}
    assert grids(hb.quantize(net, data, bits="W4A8", weight_range="min-max", **options)) == expected
    overrides = parse_overrides((), ("last=W4A8",))
    captured = hb.capture(nn.Module.eval(_module(net)), torch.zeros(1, 3, 8, 8))
    m = hb.quantize(
        captured, np.load(data), weight_bits=4, weight_range=hb.MinMax(), overrides=overrides, rounding="nearest"
    )
    assert grids(m) == expected
    assert grids(hb.quantize(_module(net), data, bits=hb.bits(4, 8), weight_range="min-max", **options)) == expected
    again = grids(hb.quantize(out, bits="W4A8", weight_range="min-max", **options))
    assert again == grids(hb.load(halfbyte_again(out, tmp_path) / "checkpoint"))


def halfbyte_again(out: Path, folder: Path) -> Path:
    """The command on an earlier result; what was folded and equalized before stays so."""
    options = ("--bits", "W4A8", "--set", "last=W4A8", "--weight-range", "min-max", "--rounding", "nearest")
    assert halfbyte("quantize", out, "-o", folder / "again", "-q", "--threads", 1, *options).exit_code == 0
    return folder / "again"


def _module(net: str) -> nn.Module:
    from halfbyte.loading import load_callable

    module: nn.Module = load_callable(net)()[0]
    return module.eval()


def test_limit_on_the_drop(folder: Path, tmp_path: Path) -> None:
    """``max_drop`` searches as the command does, to the same model and the same verdict."""
    options = ("--max-drop", 3, "--samples", 64, "--threads", 1)
    net = network(folder, "pair")
    result = halfbyte("quantize", net, "--calibration", folder / "more.npy", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    by_command = hb.load(tmp_path / "out" / "checkpoint")
    m = hb.quantize(net, folder / "more.npy", max_drop=3, samples=64)
    assert grids(m) == grids(by_command)
    verdict = m.log[-1].message
    assert verdict in result.output
    assert f"verdict: {verdict}" in str(m)
    judged = hb.quantize(net, folder / "more.npy", max_drop=3, samples=64, validation=folder / "labelled.npz")
    assert "points lost on 256 held-out samples" in judged.log[-1].message
    # the data are in the provenance: those that it was fitted to and those held out, read once
    digests = [e.figures["calibration"] for e in m.log if "calibration" in e.figures]
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(digests) == 1 and digests[0] in [e["figures"].get("calibration") for e in stored["log"]]


def test_quantize_refuses(folder: Path) -> None:
    net, data = network(folder, "pair"), folder / "x.npy"
    module = _module(net)
    for words, arguments in {
        "use one form": {"bits": "W4A8", "weight_bits": 4},
        "contradict": {"data_free": True},
        "--validation is for --max-drop": {"validation": data},
        "leave --rounding out": {"max_drop": 1, "rounding": "descent"},
        "is not a time": {"time_limit": "soon", "rounding": "descent", "recipe": "low-bit"},
    }.items():
        with pytest.raises(UsageError, match=words):
            hb.quantize(net, data, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs --calibration"):
        hb.quantize(net, max_drop=1)
    for source in (None, iter([torch.zeros(2, 3, 8, 8)])):
        with pytest.raises(UsageError, match=r"capture it first with hb\.capture"):
            hb.quantize(module, source)


class Doubled(nn.Module):
    """A network that takes pictures of any size, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(image)))
        return y


def test_an_exported_program_is_quantized_like_a_module() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net = Doubled().eval()
    expected = grids(hb.quantize(net, [x]))
    for inputs, named in (((x[:2],), None), ((), {"image": x[:2]})):
        program = torch.export.export(net, inputs, named, dynamic_shapes={"image": {0: torch.export.Dim.AUTO}})
        assert grids(hb.quantize(program, [x])) == expected
    bare = torch.export.export(net, (x[:2],))
    bare.example_inputs = None
    with pytest.raises(UsageError, match="has kept no example inputs"):
        hb.quantize(bare, [x])
    with pytest.raises(CaptureError, match="a function is no network"):
        hb.quantize(lambda image: image, [x])  # type: ignore[arg-type]


def test_a_traced_module_is_refused_in_one_sentence(tmp_path: Path) -> None:
    code = "import torch\nbuild = lambda: torch.jit.trace(torch.nn.Conv2d(3, 2, 3), torch.zeros(2, 3, 8, 8))\n"
    (tmp_path / "traced.py").write_text(code + "data = lambda: [torch.zeros(4, 3, 8, 8)]\n")
    spec = tmp_path / "traced.py"
    module = torch.jit.trace(nn.Conv2d(3, 2, 3), torch.zeros(2, 3, 8, 8))
    for net in (module, torch.jit.script(nn.Conv2d(3, 2, 3)), f"{spec}:build"):
        with pytest.raises(CaptureError, match="a scripted or traced module cannot be captured"):
            hb.quantize(net, f"{spec}:data")


def test_every_batch_has_to_fit_the_network() -> None:
    x = torch.randn(16, 3, 8, 8)
    other = r"batch 1 .*has shape \[16, 3, 12, 12\] but the network takes \[batch, 3, 8, 8\]"
    larger = torch.randn(16, 3, 12, 12)
    with pytest.raises(DataError, match=other):
        hb.quantize(Doubled().eval(), [x, larger])
    labels = torch.zeros(16, dtype=torch.long)
    net = nn.Sequential(Doubled(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(DataError, match=other):
        hb.evaluate(hb.quantize(net, [x]), [(x, labels), (larger, labels)])


# What a function leaves out of its command's options, and what to write instead.
PICTURES = {
    "size",
    "resize",
    "crop",
    "interpolation",
    "color",
    "mean",
    "std",
    "preprocess_file",
}  # preprocess=hb.Preprocess
SHELL = {"as_json", "quiet", "config", "print_config"}  # to_dict(), repr; keyword arguments
FILE = {"output", "dry_run", "container", "static_batch", "input_names", "output_names", "input_type", "encodings",
        "resume", "overwrite"}  # hb.export  # fmt: skip
LEFT_OUT = {
    "quantize": {*FILE, "threads", "weights"},  # torch.set_num_threads; --weights is refused by the command, too
    "tradeoff": {"threads"},
    "export": {"threads"},
    "diagnose": {"threads", "no_repairs"},  # repairs=False
    "compare": {"html"},  # to_html()
}
NO_FUNCTION = {"completion", "recipes"}


@pytest.mark.parametrize("name", sorted(set(main.commands) - NO_FUNCTION))
def test_a_function_for_each_command(name: str) -> None:
    """Of the same name, in the list of public names, with the command's options by the same names and the same defaults."""
    assert name in hb.__all__
    parameters = inspect.signature(getattr(hb, name)).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    command = main.commands[name]
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    assert len(positional) >= len(arguments)
    for option in command.params:
        if option in arguments or option.name in LEFT_OUT.get(name, set()) | PICTURES | SHELL:
            continue
        assert option.name in parameters, f"{name} has no {option.name}"
        default = parameters[option.name].default
        if default not in (inspect.Parameter.empty, None, False, ()) and not isinstance(default, tuple):
            assert str(default).replace("_", "-") == str(option.default).replace("_", "-"), option.name
    if PICTURES & {p.name for p in command.params}:
        assert "preprocess" in parameters


def test_results_of_all_functions(folder: Path, tmp_path: Path) -> None:
    """Each is frozen, prints what its command prints, shows tables, and is JSON as the command's ``--json``."""
    out, data = folder / "out", folder / "labelled.npz"
    few = quantized(folder, "--bits", "W4A8", out="few")
    copy = tmp_path / "copy"
    exported = hb.export(out, copy)
    m = hb.load(out)
    assert hb.load(out / "checkpoint").to_dict() == m.to_dict()
    results = {
        "evaluate": (hb.evaluate(out, data, batch=100), ("evaluate", out, "--data", data, "--batch", 100)),
        "inspect": (hb.inspect(out), ("inspect", out)),
        "inspect file": (hb.inspect(out / "model.onnx"), ("inspect", out / "model.onnx")),
        "compare": (hb.compare([few, copy]), ("compare", few, copy)),
        "check": (hb.check(out, max_size="1MB", max_drop=20, data=data),
                  ("check", out, "--max-size", "1MB", "--max-drop", 20, "--data", data)),
        "diagnose": (hb.diagnose(out, repairs=False), ("diagnose", out, "--no-repairs")),
        "prove": (hb.prove(out), ("prove", out)),
        "report": (hb.report(out), ("report", out)),
        "targets": (hb.targets(), ("targets",)),
        "doctor": (hb.doctor(), None),  # free memory changes
        "benchmark": (hb.benchmark(out, rounds=3, threads=1), None),  # so do times
        "export": (exported, None),
        "quantize": (m, None),
    }  # fmt: skip
    for name, (result, command) in results.items():
        told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert "<table>" in result._repr_html_(), name
        assert repr(result) == str(result) and "\x1b" not in str(result) and " object at 0x" not in str(result), name
        with pytest.raises(FrozenInstanceError):
            result.anything = 1  # type: ignore[union-attr]
        if command is not None:
            assert halfbyte(*command).stdout.rstrip() == str(result).rstrip(), name
            assert json.loads(halfbyte(*command, "--json").stdout) == told, name
    stored = json.loads((out / "summary.json").read_text())
    assert stored["evaluation"] == results["evaluate"][0].to_dict()
    assert stored["benchmark"] == results["benchmark"][0].to_dict()
    assert stored["diagnosis"]["cause"]["name"] == results["diagnose"][0].cause.name


def test_a_model_is_written_as_the_command_writes_it(folder: Path, tmp_path: Path) -> None:
    module, x = _module(network(folder, "pair")), np.load(folder / "x.npy")
    m = hb.quantize(module, x)
    exported = hb.export(m, tmp_path / "out")
    assert "proven equal" in str(exported)
    assert exported.summary["bits"] == "W8A8"
    assert set(files(tmp_path / "out")) == set(files(folder / "out"))
    # the same integers as the command's file, and every command can go on from here
    assert grids(hb.load(tmp_path / "out")) == grids(hb.load(folder / "out"))
    compared = hb.compare([folder / "out", tmp_path / "out"], data=folder / "labelled.npz")
    assert not compared.layers and compared.results[0].score == compared.results[1].score
    assert hb.prove(tmp_path / "out").equal
    assert hb.evaluate(tmp_path / "out", folder / "labelled.npz").samples == 256
    assert (
        halfbyte(
            "quantize", tmp_path / "out", "-o", tmp_path / "again", "--calibration", folder / "x.npy", "-q"
        ).exit_code
        == 0
    )
    with pytest.raises(UsageError, match="exists"):
        hb.export(m, tmp_path / "out")
    with pytest.raises(UsageError, match=r"generic does not: quantize again: hb\.quantize\(\.\.\., target='generic'\)"):
        hb.export(m, tmp_path / "other", target="generic")
    with pytest.raises(UsageError, match=r"call hb\.quantize first"):
        hb.export(hb.capture(module, torch.zeros(1, 3, 8, 8)), tmp_path / "float")


def test_a_model_where_a_folder_is_needed(folder: Path) -> None:
    m = hb.load(folder / "out")
    assert hb.evaluate(m, folder / "labelled.npz").scores["top-1"].keys() == {"float", "simulation"}
    assert hb.inspect(m).to_dict() == hb.inspect(folder / "out").to_dict()
    assert hb.diagnose(m, repairs=False).cause.name
    for call in (hb.benchmark, hb.prove, hb.report, lambda x: hb.check(x, max_size=1), lambda x: hb.compare([x, x])):
        with pytest.raises(UsageError, match=r"write (it|the model) with hb\.export\(model, 'out'\), and give 'out'"):
            call(m)


def test_tradeoff_refuses_its_folder_before_the_work(folder: Path) -> None:
    def never() -> None:
        raise AssertionError("the work has begun")

    with pytest.raises(StoreError, match="is a file"):
        hb.tradeoff(network(folder), never, output=folder / "x.npy")
