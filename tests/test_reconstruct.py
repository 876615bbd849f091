"""Layer after layer: what reconstruction promises whatever the solver is, and that descent keeps its word on whole networks."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.affine import fake_quantize
from halfbyte.calibrate import whole_biases
from halfbyte.errors import DataError, StoreError
from halfbyte.graph import blocks, layers, weight_of
from halfbyte.local import LayerSolver, Problem, Solution
from halfbyte.model import Inputs, value_name
from halfbyte.reconstruct import split
from halfbyte.targets import GENERIC


class Residual(nn.Module):
    """A convolution, a separable convolution around which its input is added, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(), nn.Conv2d(12, 12, 1))
        self.end = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.end((y + self.deep(y)).mean((2, 3)))


class Decoder(nn.Module):
    """Down and up again, with a transposed convolution and a bridge."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.end = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.up(torch.relu(self.down(x))))) + x


class Twice(nn.Module):
    """A module that is called twice shares its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((3, 8), (8, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.both(torch.relu(self.first(x))))
        return self.last(torch.relu(self.both(y)))


NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "decoder": Decoder, "twice": Twice}


def pictures(samples: int, seed: int) -> Tensor:
    """Pictures whose neighbouring pixels and colours are alike, as those of photographs are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 12, 12, generator=g)
    return x + x.roll(1, 2) + x.roll(1, 3) + x.mean(1, keepdim=True)


def batches(count: int = 3, samples: int = 32) -> list[Inputs]:
    return [(pictures(samples, 10 + i),) for i in range(count)]


@functools.cache
def calibrated(name: str = "residual", bits: int = 3, activation_bits: int = 8, middle: int | None = None) -> hb.QModel:
    """A network with grids, biases as they were; middle: another width of the layer in the middle."""
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad():
        net.train()(pictures(64, 1))
    m = hb.fold_batchnorm(hb.capture(net.eval(), pictures(2, 0)))
    overrides = {} if middle is None else {"deep.0.weight": hb.Format(middle)}
    m = hb.place(m, GENERIC, weight_bits=bits, activation_bits=activation_bits, overrides=overrides)
    return hb.calibrate(m, batches(), correct=False)


def names(m: hb.QModel) -> list[str]:
    return [value_name(n) for n in layers(m.graph)]


def weight(m: hb.QModel, layer: str) -> str:
    return next(str(n.args[1].target) for n in layers(m.graph) if value_name(n) == layer)  # type: ignore[union-attr]


def error(m: hb.QModel, data: list[Inputs]) -> float:
    """Squared difference from float at the outputs."""
    tap = hb.simulate(m)
    off = [hb.run(m, b, tap)[0] - hb.run(m.as_float(), b)[0] for b in data]
    return float(torch.cat(off).double().square().mean())


def told(m: hb.QModel) -> dict[str | None, hb.LogEntry]:
    return {e.value: e for e in m.log if e.stage == "reconstruct"}


def assert_same(a: hb.QModel, b: hb.QModel) -> None:
    assert a.tuned.keys() == b.tuned.keys() != set()
    assert all(torch.equal(t, b.tuned[n]) for n, t in a.tuned.items())
    assert a.grids.keys() == b.grids.keys()
    assert all(torch.equal(g.scale, b.grids[n].scale) for n, g in a.grids.items())


def nearest(p: Problem) -> Solution:
    return Solution(fake_quantize(p.weight, p.grid), p.grid, p.bias)


@dataclass(frozen=True)
class Own:
    """A solver of one's own; it notes the problems it has seen and does something at one of them."""

    work: Callable[[Problem], Solution] = field(default=nearest, repr=False)
    at: Callable[[int], None] = field(default=lambda _: None, repr=False)
    seen: list[Problem] = field(default_factory=list, repr=False)
    residual: bool = False
    unrounded: bool = False
    iterations: int = 0
    name: str = "own"

    def solve(self, p: Problem) -> Solution:
        self.seen.append(p)
        self.at(len(self.seen))
        return self.work(p)


def as_solver(own: Own) -> LayerSolver:
    return own


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize("name", NETS)
def test_descent_brings_the_outputs_nearer_to_float(name: str, activation_bits: int) -> None:
    m = calibrated(name, activation_bits=activation_bits)
    found = hb.reconstruct(m, batches(), hb.Descent())
    fresh = [(pictures(64, 90),)]
    assert error(found, fresh) < (0.8 if activation_bits == 8 else 1.0) * error(m, fresh)
    assert set(told(found)) == set(names(m))
    for layer in layers(found.graph):
        node = weight_of(layer)
        grid = None if node is None else found.grid(value_name(node))
        assert node is not None
        assert grid is not None
        assert int(grid.hi.max()) <= 3
        if str(node.target) in found.tuned:
            w = found.parameters[str(node.target)]
            assert torch.equal(fake_quantize(w, grid), w)
            assert told(found)[value_name(layer)].figures["kept"]
    assert all(torch.equal(t, calibrated(name, activation_bits=activation_bits).params[n]) for n, t in m.params.items())


def test_what_was_reconstructed_runs_in_integers() -> None:
    m = hb.reconstruct(calibrated(), batches(), hb.Descent())
    x = (pictures(4, 7),)
    assert torch.equal(hb.run_integer(hb.lower(m), x)[0], hb.predict(m, x)[0])


def test_figures_say_how_far_weights_have_moved() -> None:
    m = calibrated()
    for entry in told(hb.reconstruct(m, batches(), hb.Descent())).values():
        figures = entry.figures
        assert figures["method"] == "descent"
        assert figures["after"] <= figures["before"]
        assert entry.message.startswith(("descent (damping ", "descent (W* = W"))
        assert "noise-to-signal on held-out samples" in entry.message
        size = m.params[weight(m, str(entry.value))].numel()
        assert sum(figures["moved"].values()) == size


def test_layers_that_cannot_be_solved_are_named() -> None:
    m = calibrated("twice")
    own = Own()
    found = hb.reconstruct(m, batches(), as_solver(own))
    assert [value_name(p.layer) for p in own.seen] == ["first", "last"]
    shared = [e for e in told(found).values() if "its parameters are shared" in e.message]
    assert [e.value for e in shared] == [n for n in names(m) if n.startswith("both")]
    assert all(e.message.startswith("left as it is: ") for e in shared)
    plain = hb.capture(Residual().eval(), pictures(2, 0))
    kept = hb.place(hb.fold_batchnorm(plain), GENERIC, weight_bits=4, overrides={"end": None})
    kept = hb.calibrate(kept, batches(), correct=False)
    assert "its weight is not quantized" in told(hb.reconstruct(kept, batches(), as_solver(Own())))["end"].message


def garbage(p: Problem) -> Solution:
    return Solution(fake_quantize(-3 * p.weight.flip(0), p.grid), p.grid, p.bias)


def assert_left(found: hb.QModel, m: hb.QModel) -> None:
    """Nothing is chosen anew; biases are as integer kernels hold them."""
    whole = whole_biases(m, layers(m.graph)).tuned
    assert whole and found.tuned.keys() == whole.keys()
    assert all(torch.equal(t, found.tuned[n]) for n, t in whole.items())


def test_a_solution_that_does_worse_is_undone() -> None:
    m = calibrated()
    found = hb.reconstruct(m, batches(), as_solver(Own(garbage)))
    assert_left(found, m)
    assert all(torch.equal(g.scale, found.grids[n].scale) for n, g in m.grids.items())
    for entry in told(found).values():
        assert entry.message.startswith("left as it is, for own does worse")
        assert not entry.figures["kept"]
        assert entry.figures["after"] > entry.figures["before"]


def test_a_solution_that_is_no_number_is_undone() -> None:
    m = calibrated()

    def nan(p: Problem) -> Solution:
        return Solution(torch.full_like(p.weight, float("nan")), p.grid, p.bias)

    assert_left(hb.reconstruct(m, batches(), as_solver(Own(nan))), m)


def test_solvers_see_the_network_so_far() -> None:
    m, data = calibrated(), batches()
    own = Own()
    hb.reconstruct(m, data, as_solver(own))
    assert [value_name(p.layer) for p in own.seen] == names(m)
    fit, held = split(data)
    assert [len(b[0]) for b in fit] == [28, 28, 28]
    assert [len(b[0]) for b in held] == [12]
    first, last = own.seen[0], own.seen[-1]
    assert first.input_grid is not None
    assert torch.equal(first.inputs[1], fake_quantize(fit[1][0], first.input_grid))
    assert torch.equal(last.targets[0], hb.run(m.as_float(), fit[0])[0])
    assert torch.equal(last.held_out.outputs[0], hb.run(m.as_float(), held[0])[0])
    clamped = [p.following is not None for p in own.seen]
    assert clamped == [True, True, False, False]
    assert len({p.seed for p in own.seen}) == len(own.seen)


def test_a_layer_makes_up_for_the_other_operand_if_the_solver_asks() -> None:
    m, data = calibrated(), batches(1)
    plain, residual = Own(), Own(residual=True)
    for own in (plain, residual):
        hb.reconstruct(m, data, as_solver(own))
    (index,) = [i for i, n in enumerate(names(m)) if n == "deep.2"]
    for i, (a, b) in enumerate(zip(plain.seen, residual.seen, strict=True)):
        assert torch.equal(a.targets[0], b.targets[0]) == (i != index)
    fit, _ = split(data)
    stem = value_name(layers(m.graph)[1].args[0])  # type: ignore[arg-type]
    off = hb.run(m.as_float(), fit[0], stop=stem)[0] - residual.seen[1].inputs[0]
    wanted = plain.seen[index].targets[0] + off
    assert torch.allclose(residual.seen[index].targets[0], wanted, atol=1e-6)


def test_float_inputs_make_layers_independent() -> None:
    a, b = calibrated(), calibrated(middle=8)

    def solved(m: hb.QModel, inputs: Literal["quantized", "float"]) -> hb.QModel:
        return hb.reconstruct(m, batches(), hb.Descent(), inputs=inputs)

    (with_a, with_b), last = (solved(m, "float") for m in (a, b)), "deep.2"
    assert torch.equal(with_a.parameters[weight(a, last)], with_b.parameters[weight(b, last)])
    assert not torch.equal(with_a.parameters[weight(a, "deep.0")], with_b.parameters[weight(b, "deep.0")])
    (with_a, with_b) = (solved(m, "quantized") for m in (a, b))
    assert not torch.equal(with_a.parameters[weight(a, last)], with_b.parameters[weight(b, last)])


def test_running_values_may_stay_in_float_meanwhile() -> None:
    m, data = calibrated(activation_bits=4), batches(1)
    own = Own()
    found = hb.reconstruct(m, data, as_solver(own), activations=False)
    fit, _ = split(data)
    assert torch.equal(own.seen[0].inputs[0], fit[0][0])
    assert found.grids.keys() == m.grids.keys()
    rounded = replace(m, grids={k: g for k, g in m.grids.items() if k.endswith("weight")})
    second = value_name(own.seen[1].layer.args[0])  # type: ignore[arg-type]
    seen = hb.run(rounded, fit[0], hb.simulate(rounded), stop=second)[0]
    assert torch.allclose(own.seen[1].inputs[0], seen, atol=1e-5)


def test_biases_fit_also_where_running_values_stay_in_float() -> None:
    """The grids of the running values decide how large a bias is in integers, whether they are in use meanwhile or not."""
    with_grids, without = Own(), Own()
    hb.reconstruct(calibrated(), batches(1), as_solver(with_grids))
    hb.reconstruct(calibrated(), batches(1), as_solver(without), activations=False)
    for a, b in zip(with_grids.seen, without.seen, strict=True):
        assert a.floor is not None
        assert b.floor is not None
        assert torch.equal(a.floor, b.floor)


def test_a_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    original = torch.from_file

    def counted(*args: object, **kwargs: object) -> Tensor:
        files.append(args)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "from_file", counted)
    m = calibrated()
    without = hb.reconstruct(m, batches(), hb.Descent())
    assert not files
    assert_same(without, hb.reconstruct(m, batches(), hb.Descent(), budget=0))
    assert files


def test_the_same_seed_gives_the_same_bits() -> None:
    m, state = calibrated(), torch.get_rng_state()
    first, second = (hb.reconstruct(m, batches(), hb.Descent(), seed=5) for _ in range(2))
    assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def descent(p: Problem) -> Solution:
    return hb.Descent().solve(p)


def interrupted(at: int, raised: Callable[[], None]) -> Callable[[int], None]:
    def check(count: int) -> None:
        if count == at:
            raised()

    return check


def stop() -> None:
    raise KeyboardInterrupt


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="sends a signal to this process")
@pytest.mark.parametrize(("how", "kept"), [(stop, 2), (ctrl_c, 3)])  # Ctrl-C lets the layer at work end
@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, how: Callable[[], None], kept: int, inputs: Literal["quantized", "float"]
) -> None:
    m, handler = calibrated(), signal.getsignal(signal.SIGINT)
    whole = hb.reconstruct(m, batches(), as_solver(Own(descent)), inputs=inputs)
    with pytest.raises(KeyboardInterrupt):
        hb.reconstruct(m, batches(), as_solver(Own(descent, interrupted(3, how))), inputs=inputs, kept=tmp_path / "k")
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(list((tmp_path / "k").iterdir())) == kept
    rest = Own(descent)
    found = hb.reconstruct(m, batches(), as_solver(rest), inputs=inputs, kept=tmp_path / "k")
    assert [value_name(p.layer) for p in rest.seen] == names(m)[kept:]
    assert_same(found, whole)
    assert found.log == whole.log
    assert len(list((tmp_path / "k").iterdir())) == len(names(m))


@pytest.mark.skipif(os.name == "nt", reason="sends a signal to this process")
def test_ctrl_c_at_the_last_layer_keeps_it(tmp_path: Path) -> None:
    m = calibrated()
    with pytest.raises(KeyboardInterrupt):
        hb.reconstruct(m, batches(1), as_solver(Own(at=interrupted(len(names(m)), ctrl_c))), kept=tmp_path)
    rest = Own()
    hb.reconstruct(m, batches(1), as_solver(rest), kept=tmp_path)
    assert not rest.seen


def test_layers_left_as_they_are_are_kept_as_well(tmp_path: Path) -> None:
    m = calibrated()
    first, again = Own(garbage), Own(garbage)
    a = hb.reconstruct(m, batches(1), as_solver(first), kept=tmp_path)
    b = hb.reconstruct(m, batches(1), as_solver(again), kept=tmp_path)
    assert (len(first.seen), len(again.seen)) == (len(names(m)), 0)
    assert a.log == b.log


def test_layers_kept_by_another_method_are_solved_again(tmp_path: Path) -> None:
    m = calibrated()
    hb.reconstruct(m, batches(1), as_solver(Own()), kept=tmp_path)
    others: tuple[tuple[Own, Literal["quantized", "float"], int, bool], ...] = (
        (Own(name="other"), "quantized", 0, True),
        (Own(), "float", 0, True),
        (Own(), "float", 1, True),
        (Own(), "float", 1, False),
    )
    for own, inputs, seed, activations in others:
        hb.reconstruct(m, batches(1), own, inputs=inputs, seed=seed, activations=activations, kept=tmp_path)
        assert len(own.seen) == len(names(m))


def test_learned_input_grids_are_kept(tmp_path: Path) -> None:
    """What a method has learned besides the weight counts after an interruption, too."""

    def finer(p: Problem) -> Solution:
        if p.raw_inputs is None:
            return descent(p)
        assert p.input_grid is not None
        assert torch.equal(fake_quantize(p.raw_inputs[0], p.input_grid), p.inputs[0])
        return replace(descent(p), input_grid=replace(p.input_grid, scale=p.input_grid.scale * 0.9375))

    m = calibrated()
    whole = hb.reconstruct(m, batches(1), as_solver(Own(finer, unrounded=True)))
    assert any(not torch.equal(g.scale, whole.grids[n].scale) for n, g in m.grids.items() if "weight" not in n)
    with pytest.raises(KeyboardInterrupt):
        hb.reconstruct(m, batches(1), as_solver(Own(finer, interrupted(3, stop), unrounded=True)), kept=tmp_path)
    assert_same(whole, hb.reconstruct(m, batches(1), as_solver(Own(finer, unrounded=True)), kept=tmp_path))


@pytest.mark.parametrize("how", ["cut", "empty", "text", "no description", "no scale"])
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    m = calibrated()
    hb.reconstruct(m, batches(1), as_solver(Own(descent)), kept=tmp_path)
    file = sorted(tmp_path.iterdir())[1]
    data = file.read_bytes()
    if how == "no description":
        save_file({"weight": torch.zeros(1)}, file)
    elif how == "no scale":
        file.write_bytes(data.replace(b'"scale"', b'"skale"'))
    else:
        file.write_bytes({"cut": data[:-20], "empty": b"", "text": b"not a tensor in here"}[how])
    with pytest.raises(StoreError, match=r"0001\.safetensors' is damaged: delete it"):
        hb.reconstruct(m, batches(1), as_solver(Own(descent)), kept=tmp_path)
    file.unlink()
    rest = Own(descent)
    hb.reconstruct(m, batches(1), as_solver(rest), kept=tmp_path)
    assert [value_name(p.layer) for p in rest.seen] == [names(m)[1]]


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot keep a solved layer in"):
        hb.reconstruct(calibrated(), batches(1), as_solver(Own()), kept=tmp_path / "file" / "folder")


def test_nothing_half_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        hb.reconstruct(calibrated(), batches(1), as_solver(Own()), kept=tmp_path)
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Learned:
    """Does nothing, for a while."""

    iterations: int = 1000
    asked: list[int] = field(default_factory=list, repr=False)
    residual: bool = False
    unrounded: bool = False
    name: str = "learned"

    def solve(self, p: Problem) -> Solution:
        self.asked.append(self.iterations)
        time.sleep(self.iterations * 1e-4)
        return nearest(p)


def test_a_time_limit_shortens_learned_methods() -> None:
    m = calibrated()
    learned = Learned()
    start = time.monotonic()
    found = hb.reconstruct(m, batches(1), learned, time_limit=0.1)
    assert time.monotonic() - start < 3
    counts = [n for n in learned.asked if n != 10]
    assert all(10 <= n < 1000 for n in learned.asked)
    entries = [e for e in found.log if "instead of 1000 iterations" in e.message]
    assert [e.value for e in entries] == names(m)
    assert counts
    assert entries[0].message.startswith(f"{counts[0]} instead of 1000")
    assert learned.iterations == 1000


def test_enough_time_changes_nothing() -> None:
    m = calibrated()
    for limit, probes in ((None, 0), (1e6, 1)):
        learned = Learned(iterations=20)
        found = hb.reconstruct(m, batches(1), learned, time_limit=limit)
        assert learned.asked == ([10] * probes + [20]) * len(names(m))
        assert not any("instead of" in e.message for e in found.log)


def test_a_time_limit_never_lengthens() -> None:
    learned = Learned(iterations=3)
    hb.reconstruct(calibrated(), batches(1), learned, time_limit=1e-6)
    assert max(learned.asked) <= 3


def test_methods_in_closed_form_need_no_probe() -> None:
    own = Own()
    hb.reconstruct(calibrated(), batches(1), as_solver(own), time_limit=1e-6)
    assert len(own.seen) == len(names(calibrated()))


def test_progress_counts_layers() -> None:
    said: list[tuple[str, int, int | None]] = []
    m = calibrated()
    hb.reconstruct(m, batches(1), as_solver(Own()), progress=lambda *a: said.append(a))
    assert said == [("reconstruct", i + 1, len(names(m))) for i in range(len(names(m)))]


def test_grids_and_data_are_needed() -> None:
    m = calibrated()
    with pytest.raises(hb.UsageError, match="place and calibrate before reconstruct"):
        hb.reconstruct(m.as_float(), batches(1), hb.Descent())
    with pytest.raises(hb.UsageError, match="place and calibrate before reconstruct"):
        hb.reconstruct(replace(m, grids={}), batches(1), hb.Descent())
    with pytest.raises(DataError, match="no data"):
        hb.reconstruct(m, [], hb.Descent())


@pytest.mark.parametrize(
    ("sizes", "fit", "held"),
    [((16, 8), [14, 7], 3), ((4, 4, 4), [4, 4], 4), ((1,) * 17, [1] * 15, 2), ((3,), [3], 3), ((32, 3), [28, 3], 4)],
)
def test_some_samples_decide(sizes: tuple[int, ...], fit: list[int], held: int) -> None:
    data = [(torch.arange(float(n)),) for n in sizes]
    a, b = split(data)
    assert [len(t[0]) for t in a] == fit
    assert [len(t[0]) for t in b] == [held]


def test_small_batches_do_as_well() -> None:
    m = calibrated()
    singles = [(t,) for (batch,) in batches(1, 24) for t in batch.split(1)]
    found = hb.reconstruct(m, singles, hb.Descent())
    fresh = [(pictures(64, 90),)]
    assert error(found, fresh) < error(m, fresh)


def flat(p: Problem) -> Tensor:
    """The weight, [groups, outputs, K]."""
    return blocks(p.layer, p.weight).flatten(2)


def test_losses_are_those_of_the_layer() -> None:
    own = Own()
    hb.reconstruct(calibrated("decoder"), batches(1), as_solver(own))
    for p in own.seen:
        wanted = p.apply(p.inputs[0], p.weight, p.bias)
        assert wanted.shape == p.targets[0].shape
        assert p.loss(p.weight, p.bias) >= 0
        off = torch.ones_like(p.held_out.outputs[:, 0]).flatten()
        exact = replace(p, held_out=replace(p.held_out, outputs=p.held_out.inputs @ flat(p).transpose(1, 2)))
        assert exact.loss(p.weight, None) == pytest.approx(0, abs=1e-6)
        assert exact.loss(p.weight, off) == pytest.approx(len(off), rel=1e-4)


def test_a_long_method_says_so_after_its_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["halfbyte.reconstruct"], "_LONG", 0.0)  # the function has the module's name
    with pytest.warns(UserWarning, match=r"learned: about .* hours for 4 layers.*--time-limit"):
        hb.reconstruct(calibrated(), batches(), Learned())
