"""The user's code is found by name, its failures are told in one line, and it gives the same batches on every pass."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import DataError, UsageError
from halfbyte.loading import Batch, load_callable, stream


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Functions by name


def test_same_file_is_one_module_and_files_of_one_name_are_two(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        code = "from dataclasses import dataclass\n@dataclass\nclass K:\n  a: int = 0\ndef f(): return K\n"
        spec = write(tmp_path / name / "loader.py", code) + ":f"
        assert load_callable(spec) is load_callable(spec)
        found.append(load_callable(spec)())
    assert found[0] is not found[1]


def test_neighbours_can_be_imported_even_when_called(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_loader.py", "value = 7\n")
    spec = write(tmp_path / "loader.py", "def f():\n import neighbour_of_loader as n\n return n.value\n") + ":f"
    assert load_callable(spec)() == 7


def test_module_of_the_path() -> None:
    assert load_callable("json:dumps") is json.dumps


@pytest.mark.parametrize(
    ("code", "spec", "words"),
    [
        ("", "loader.py", "names no function"),
        ("", "loader.py:", "names no function"),
        ("", "other.py:f", r"there is no file other\.py"),
        ("", "no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("", "json.nothing:f", "there is no module 'json.nothing'"),
        ("a = 1\nb = 1 / 0\n", "loader.py:f", r"ZeroDivisionError: .*\(loader\.py, line 2\)"),
        ("a = 1\nb = (\n", "loader.py:f", r"SyntaxError: .*\(loader\.py, line 2\)"),
        ("import no_such_neighbour\n", "loader.py:f", r"ModuleNotFoundError: .*\(loader\.py, line 1\)"),
        ("import sys\nsys.exit(3)\n", "loader.py:f", r"SystemExit: 3 \(loader\.py, line 2\)"),
        ("def calibrate(): pass\n", "loader.py:calibrat", "has no 'calibrat'; near are calibrate"),
        ("", "loader.py:f", "has no functions"),
        ("f = 3\n", "loader.py:f", "is a int, which cannot be called"),
    ],
)
def test_unusable_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, spec: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "loader.py", code)
    with pytest.raises(UsageError, match=words) as caught:
        load_callable(spec)
    assert "\n" not in str(caught.value)


def test_failed_import_can_be_repaired(tmp_path: Path) -> None:
    path = tmp_path / "loader.py"
    before = set(sys.modules)
    with pytest.raises(UsageError):
        load_callable(write(path, "1 / 0") + ":f")
    assert not {m for m in set(sys.modules) - before if m.startswith("halfbyte_file")}
    write(path, "def f():\n    return 'a longer file'\n")
    assert load_callable(f"{path}:f")() == "a longer file"


# Passes over batches


def passes(source: Any, limit: int | None = None) -> Any:
    def convert(item: object, where: str) -> Batch:
        assert isinstance(item, torch.Tensor), where
        return (item.clone(),)

    return stream(source, "source", limit, convert)


def values(start: Any) -> list[float]:
    return [float(v) for (batch,) in start() for v in batch.flatten(1)[:, 0]]


def test_one_shot_generator_can_be_iterated_twice_though_it_reuses_its_buffer() -> None:
    drawn = []

    def forever() -> Iterator[torch.Tensor]:
        buffer = torch.zeros(4, 1)
        while True:
            drawn.append(1)
            yield buffer
            buffer += 1

    start = passes(forever(), 10)
    assert values(start) == values(start) == [0] * 4 + [1] * 4 + [2] * 2
    assert len(drawn) == 3


class Augmented(torch.utils.data.Dataset[torch.Tensor]):
    """Noise on every sample, from torch's random numbers or from others."""

    def __init__(self, other: bool = False) -> None:
        self.other = other

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.full((1,), random.random()) if self.other else index + torch.rand(1)


def test_passes_of_a_data_loader_are_alike_though_it_shuffles_and_augments() -> None:
    data = torch.arange(64.0).reshape(64, 1)
    still = passes(torch.utils.data.DataLoader(data, batch_size=8), 20)
    assert values(still) == values(still) == list(range(20))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for source in (data, Augmented()):
        shuffled = passes(torch.utils.data.DataLoader(source, batch_size=8, shuffle=True), 20)
        first = values(shuffled)
        assert first == values(shuffled)
        assert first != sorted(first)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_loader_that_other_random_numbers_change_is_noticed() -> None:
    start = passes(torch.utils.data.DataLoader(Augmented(other=True), batch_size=8))
    list(start())
    with pytest.raises(
        DataError, match="batch 0 of source differs from the one of an earlier pass; turn off shuffling"
    ):
        list(start())


def test_a_dataset_gives_single_samples() -> None:
    assert values(passes(lambda: torch.utils.data.Subset(torch.arange(40.0)[:, None], range(40)), 35)) == list(
        range(35)
    )


@pytest.mark.parametrize("lengths", [(2, 1), (1, 2)])
def test_passes_of_different_length_are_noticed(lengths: tuple[int, int]) -> None:
    left = list(lengths)
    start = passes(lambda: [torch.ones(2, 1)] * left.pop(0))
    list(start())
    with pytest.raises(DataError, match=r"batch 1 .* differs"):
        list(start())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_change_inside_a_large_first_batch_is_noticed_behind_an_equal_border(dtype: torch.dtype) -> None:
    first = torch.zeros(4, 3, 64, 64, dtype=dtype)
    second = first.clone()
    second[1:, :, 16:48] = 1
    left = [[first], [second]]
    start = passes(lambda: left.pop(0))
    list(start())
    with pytest.raises(DataError, match="batch 0 of source differs"):
        list(start())


def test_of_later_batches_only_the_shapes_are_compared() -> None:
    first = torch.ones(2, 1)
    left = [[first, first], [first, first + 1], [first, torch.ones(1, 1)]]
    start = passes(lambda: left.pop(0))
    assert values(start) == [1, 1, 1, 1]
    assert values(start) == [1, 1, 2, 2]
    with pytest.raises(DataError, match="batch 1 of source differs"):
        list(start())


def test_pass_that_was_left_early_binds_only_by_what_it_gave() -> None:
    left = [[torch.ones(2, 1)] * 3, [torch.ones(2, 1)] * 2]
    start = passes(lambda: left.pop(0))
    next(iter(start()))
    assert values(start) == [1] * 4


def test_exhausted_source_is_noticed() -> None:
    kept = iter([torch.ones(2, 1)])
    start = passes(lambda: kept)
    list(start())
    with pytest.raises(DataError, match="gives no batches"):
        list(start())


def test_code_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    spec = write(tmp_path / "c.py", "import torch\ndef f():\n yield torch.ones(2)\n torch.ones(-1)\n") + ":f"
    with pytest.raises(DataError, match=r"c\.py:f fails with RuntimeError: .*\(c\.py, line 4\)"):
        list(stream(load_callable(spec), spec, None, lambda item, _: (torch.as_tensor(item),))())
