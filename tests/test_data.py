"""Every source gives the same batches on every pass, and whatever is wrong with the data is said in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from halfbyte.data import Labelled, Samples, calibration, check_inputs, example, labelled
from halfbyte.errors import DataError, UsageError
from halfbyte.preprocess import Preprocess

SMALL = Preprocess(8)


def picture(path: Path, value: int = 0, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path)
    return path


def calib(source: Any, names: tuple[str, ...] = ("x",), **options: Any) -> Samples:
    return calibration(source, **{"preprocess": SMALL, "input_names": names} | options)


def label(source: Any, outputs: int | None = 3, names: tuple[str, ...] = ("x",), **options: Any) -> Labelled:
    return labelled(source, **{"preprocess": SMALL, "input_names": names, "outputs": outputs} | options)


def values(samples: Samples) -> list[float]:
    return [float(v) for batch in samples for v in batch[0].flatten(1)[:, 0]]


def same(first: Samples, second: Samples) -> bool:
    pairs = zip(list(first), list(second), strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(20):
        picture(tmp_path / "p" / f"class{i % 3}" / f"{i:02}.png", i)
    return tmp_path / "p"


# Folders of pictures


def test_folder_is_sampled_by_seed_without_replacement_and_in_order(pictures: Path) -> None:
    first = calib(pictures, samples=7, batch=3, seed=1)
    assert first.count == 7
    assert [len(b[0]) for b in first] == [3, 3, 1]
    assert len(set(values(first))) == 7
    assert values(first) == values(first) == values(calib(str(pictures), samples=7, batch=2, seed=1))
    # In the order of the paths: class by class, and by number in each.
    assert values(first) == sorted(values(first), key=lambda v: (v % 3, v))
    assert values(first) != values(calib(pictures, samples=7, seed=2))


def test_folder_with_fewer_pictures_than_asked_for_is_used_whole(pictures: Path) -> None:
    samples = calib(pictures)
    assert samples.count == 20
    assert sorted(values(samples)) == list(range(20))
    assert "20 of 20" in samples.description


def test_pictures_are_decoded_only_when_their_batch_is_due(pictures: Path) -> None:
    (pictures / "class2" / "zz.png").write_bytes(b"junk")
    batches = iter(calib(pictures, batch=5))
    for _ in range(4):
        next(batches)
    with pytest.raises(DataError, match=r"zz\.png cannot be decoded"):
        next(batches)


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be decoded.*truncated"):
        list(calib(tmp_path))


def test_unusable_picture_is_named(tmp_path: Path) -> None:
    Image.new("F", (8, 8)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif: .*32-bit"):
        list(calib(tmp_path))


@pytest.mark.parametrize("source", ["folder", "labelled"])
def test_empty_folders(tmp_path: Path, source: str) -> None:
    make: Callable[..., object] = calib if source == "folder" else label
    with pytest.raises(DataError, match="holds no files"):
        make(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="1 files but no picture"):
        make(tmp_path)


def test_pictures_need_preprocessing_and_one_input(pictures: Path) -> None:
    with pytest.raises(UsageError, match="set --size, --mean"):
        calib(pictures, preprocess=None)
    with pytest.raises(DataError, match=r"takes 2 \(x, y\)"):
        calib(pictures, names=("x", "y"))


# Arrays


def test_npy_is_sampled_and_keeps_its_type(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(40).reshape(20, 2))
    samples = calib(tmp_path / "ids.npy", samples=5, batch=2)
    assert samples.count == 5
    assert {b[0].dtype for b in samples} == {torch.int64}
    assert values(samples) == sorted(values(samples)) == values(samples)


def test_float64_becomes_float32_and_byte_order_does_not_matter(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4, dtype=">f8").reshape(4, 1))
    (batch,) = calib(tmp_path / "a.npy")
    assert batch[0].dtype == torch.float32
    assert batch[0].flatten().tolist() == [0, 1, 2, 3]


def test_npz_gives_the_inputs_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mask=np.ones((4, 1), bool), ids=np.arange(4).reshape(4, 1), target=np.zeros(4))
    (batch,) = calib(tmp_path / "a.npz", names=("ids", "mask"))
    assert [t.dtype for t in batch] == [torch.int64, torch.bool]
    np.savez(tmp_path / "b.npz", whatever=np.ones((4, 1)), target=np.zeros(4))
    assert len(list(calib(tmp_path / "b.npz"))) == 1


def test_npz_without_the_names_says_which(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(4), b=np.ones(4))
    with pytest.raises(DataError, match=r"no array for the inputs 'x', 'y' \(it holds 'a', 'b'\)"):
        calib(tmp_path / "a.npz", names=("x", "y"))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "pickle"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a.{suffix}"
    array = np.array([{}, {}], dtype=object) if damage == "pickle" else np.ones((50, 3))
    np.savez(path, x=array) if suffix == "npz" else np.save(path, array)
    if damage != "pickle":
        path.write_bytes({"text": b"hello world", "empty": b"", "truncated": path.read_bytes()[:-700]}[damage])
    with pytest.raises(DataError, match=rf"a\.{suffix} cannot be read"):
        calib(path)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.ones((0, 3)), "y": np.ones((0, 3))}, "'x' of .* is empty"),
        ({"x": np.ones((3, 0)), "y": np.ones((3, 1))}, "'x' of .* is empty"),
        ({"x": np.ones(()), "y": np.ones(3)}, "'x' of .* is a single number"),
        ({"x": np.ones((4, 2)), "y": np.ones((3, 2))}, "'y' of .* has 3 samples but 'x' has 4"),
        ({"x": np.array(["a", "b"]), "y": np.ones(2)}, "'x' of .* has the type <U1"),
        ({"x": np.array([1.0, np.nan]), "y": np.ones(2)}, "'x' of batch 0 of .* holds NaN"),
        ({"x": np.ones(2), "y": np.array([1.0, 1e300])}, "'y' of batch 0 of .* holds infinity"),
    ],
)
def test_unusable_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    for source in (tmp_path / "a.npz", arrays):
        with pytest.raises(DataError, match=words):
            list(calib(source, names=("x", "y")))


def test_tensor_array_and_mapping_in_python() -> None:
    tensor = torch.arange(10.0).reshape(10, 1).requires_grad_()
    samples = calib(tensor, batch=4)
    assert [len(b[0]) for b in samples] == [4, 4, 2]
    assert not any(b[0].requires_grad for b in samples)
    assert same(samples, calib(tensor.detach().numpy(), batch=4))
    assert same(samples, calib({"x": tensor}, batch=4))
    with pytest.raises(DataError, match="'x' of the dict given is a list"):
        calib({"x": [1, 2]})


# Code and iterables


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_callable_is_started_for_each_pass(tmp_path: Path) -> None:
    code = "import numpy as np\ndef f():\n for i in range(9):\n  yield np.full((4, 2), i, np.float32)\n"
    spec = write(tmp_path / "c.py", code) + ":f"
    samples = calib(spec, samples=10)
    assert values(samples) == values(samples) == [0] * 4 + [1] * 4 + [2] * 2
    assert spec in samples.description


@pytest.mark.parametrize(
    "item",
    [
        lambda x, y, t: (x, y, t),
        lambda x, y, t: [x, y, t],
        lambda x, y, t: ((x, y), t),
        lambda x, y, t: [[x, y], t],
        lambda x, y, t: ({"y": y, "x": x}, t),
        lambda x, y, t: {"y": y, "x": x, "target": t},
    ],
)
def test_a_target_beside_the_inputs_is_left_alone_and_serves_evaluation(item: Any) -> None:
    x, y, t = torch.ones(2, 3), torch.zeros(2, 1), torch.tensor([2, 0])
    (batch,) = calib([item(x, y, t)], names=("x", "y"))
    assert [b.tolist() for b in batch] == [x.tolist(), y.tolist()]
    ((inputs, target),) = label([item(x, y, t)], names=("x", "y"))
    assert [b.tolist() for b in inputs] == [x.tolist(), y.tolist()]
    assert target.tolist() == [2, 0]


def test_a_target_may_be_anything_where_none_is_needed() -> None:
    boxes = [{"boxes": torch.ones(1, 4)}, {}]
    assert [len(b) for b in calib([(torch.ones(2, 3), boxes)])] == [1]
    assert [len(b) for b in calib([(torch.ones(2, 3), torch.ones(2, 9, 9))])] == [1]


def test_a_dataset_is_sampled_as_a_folder_is() -> None:
    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) // 20)
    first = calib(data, samples=7, seed=1)
    assert first.count == 7 and "7 of 40 samples of the TensorDataset given" in first.description
    assert values(first) == values(first) == sorted(set(values(first)))
    assert values(first) != values(calib(data, samples=7, seed=2))
    spread = label(data, limit=4)
    assert spread.count == 4
    assert [t for _, target in spread for t in target.tolist()] == [0, 0, 1, 1]
    assert [len(t) for _, t in label(data, batch=32)] == [32, 8]
    assert [len(b[0]) for b in calib(data, batch=40)] == [40]


class Columns:
    """As a dataset of Hugging Face: rows of Python lists until a format is asked for, with columns that no network takes."""

    def __init__(self, kind: str | None = None) -> None:
        self.format = {"type": kind}

    def with_format(self, kind: str) -> "Columns":
        return Columns(kind)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: list[int] = [i, i]
        return {"x": torch.tensor(row) if self.format["type"] else row, "text": "words", "label": i // 20}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        return [self[i] for i in rows]


class Stream(IterableDataset[Any]):
    """The same as it comes."""

    def __init__(self, held: Columns) -> None:
        self.held, self.format = held, held.format

    def with_format(self, kind: str) -> "Stream":
        return Stream(self.held.with_format(kind))

    def __iter__(self) -> Any:
        return (self.held[i] for i in range(40))


@pytest.mark.parametrize("data", [Columns(), Columns("custom"), Stream(Columns())])
def test_a_dataset_of_columns(data: Any) -> None:
    found = calib(data, samples=8)
    assert sum(len(b[0]) for b in found) == 8
    assert all(b[0].shape[1:] == (2,) and torch.equal(b[0][:, 0], b[0][:, 1]) for b in found)
    assert sum((target for _, t in label(data) for target in t.tolist())) == 20
    assert example(lambda x: x, data)["x"].shape == (2, 2)  # type: ignore[call-overload]


def test_items_of_every_form() -> None:
    x, y = torch.ones(2, 3), np.zeros((2, 1), np.int64)
    for item in ((x, y), [x, y], {"y": y, "x": x, "target": 0}):
        (batch,) = calib([item], names=("x", "y"))
        assert [t.dtype for t in batch] == [torch.float32, torch.int64]
    assert [b[0].tolist() for b in calib(lambda: x)] == [x.tolist()]


@pytest.mark.parametrize(
    ("items", "names", "words"),
    [
        ([], ("x",), "gives no batches"),
        ([torch.ones(0, 3)], ("x",), "'x' of batch 0 of the list given is empty"),
        ([torch.ones(())], ("x",), "single number"),
        ([torch.ones(2), torch.tensor([1.0, float("inf")])], ("x",), "'x' of batch 1 .* holds infinity"),
        ([(torch.ones(2),) * 3], ("x",), r"3 tensors but the network takes 1 \(x\)"),
        ([torch.ones(2)], ("x", "y"), r"1 tensors but the network takes 2 \(x, y\)"),
        ([{"x": torch.ones(2)}], ("x", "y"), "no array for the input 'y'"),
        ([(torch.ones(2), torch.ones(3))], ("x", "y"), "'y' of batch 0 .* has 3 samples but 'x' has 2"),
        (["a"], ("x",), "is a str; give a tensor"),
        (5, ("x",), "TypeError"),
    ],
)
def test_unusable_batches(items: Any, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(calib(items, names=names))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere/at/all", "there is no file or folder"),
        ("x.txt", "is no source"),
        ("x.py", r"name its function: .*x\.py:"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("x.txt"), "")
    write(Path("x.py"), "")
    with pytest.raises(DataError, match=words):
        calib(source)


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch": -1}])
def test_counts_must_be_positive(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="give at least 1"):
        calib(torch.ones(3), **options)


# Labelled data


def targets(data: Labelled) -> list[int]:
    return [int(t) for _, target in data for t in target]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat", "dog", "eel")):
        for j in range(4):
            picture(tmp_path / "l" / name / f"{j}.png", 10 * i + j)
    return tmp_path / "l"


def test_pictures_come_with_the_class_of_their_folder(classes: Path, tmp_path: Path) -> None:
    data = label(classes, batch=5)
    assert data.count == 12
    assert targets(data) == targets(data) == [0] * 4 + [1] * 4 + [2] * 4
    for (batch,), target in data:
        assert target.dtype == torch.int64
        assert torch.equal(torch.div(batch[:, 0, 0, 0], 10, rounding_mode="floor").long(), target)
    path = write(tmp_path / "names.txt", "eel\ndog\ncat")
    assert targets(label(classes, classes=path)) == [2] * 4 + [1] * 4 + [0] * 4


def test_limit_is_spread_over_the_classes(classes: Path) -> None:
    assert targets(label(classes, limit=6)) == [0, 0, 1, 1, 2, 2]
    assert label(classes, limit=100).count == 12


def test_class_file_is_for_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="applies to a folder"):
        label({"x": np.ones(2), "target": np.zeros(2, int)}, classes=tmp_path / "c.txt")


def test_npz_with_target(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(6.0), target=np.array([0, 1, 2, 0, 1, 2], np.uint8))
    data = label(tmp_path / "a.npz", batch=4)
    assert [(len(b[0]), t.dtype, len(t)) for b, t in data] == [(4, torch.int64, 4), (2, torch.int64, 2)]
    assert targets(label(tmp_path / "a.npz", limit=3)) == [0, 2, 1]
    assert targets(label({"x": torch.arange(2), "target": torch.tensor([2, 0])})) == [2, 0]


BAD_TARGETS = [
    (np.array([0, 3]), "holds the class index 3; valid are 0 to 2"),
    (np.array([0, -1]), "holds the class index -1"),
    (np.array([0.0, 1.0]), "is torch.float32; give class indices"),
    (np.array([0]), r"has shape \[1\]; give one class index a sample: \[2\]"),
    (np.array([[0], [1]]), r"has shape \[2, 1\]"),
]


@pytest.mark.parametrize(("target", "words"), BAD_TARGETS)
def test_unusable_targets(target: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        label({"x": np.ones(2), "target": target})
    with pytest.raises(DataError, match=words):
        list(label([(np.ones(2), target)]))


def test_missing_target() -> None:
    with pytest.raises(DataError, match="no array 'target'"):
        label(torch.ones(3))
    with pytest.raises(DataError, match=r"is not \(inputs, target\), with inputs x"):
        list(label([torch.ones(3)]))


def test_labelled_code(tmp_path: Path) -> None:
    code = "import torch\ndef f():\n for i in range(3):\n  yield {'x': torch.ones(4, 2)}, torch.full((4,), i)\n"
    data = label(write(tmp_path / "c.py", code) + ":f", limit=6)
    assert data.count is None
    assert targets(data) == targets(data) == [0, 0, 0, 0, 1, 1]
    assert [b[0].shape for b, _ in data] == [(4, 2), (2, 2)]


# The inputs of the network

PICTURES = ("x", ["batch", 3, 224, 224], torch.float32)
IDS = ("ids", ["batch", "seq"], torch.int64)


def test_fitting_batches_pass() -> None:
    check_inputs((torch.ones(5, 3, 224, 224), torch.ones(5, 9, dtype=torch.int64)), [PICTURES, IDS], "batch 0")


@pytest.mark.parametrize(
    ("tensor", "expected", "words"),
    [
        (torch.ones(2, 3, 256, 256), PICTURES, "x' of calibration batch 0 has shape [2, 3, 256, 256] but the network "),
        (torch.ones(2, 3, 256, 256), PICTURES, "takes [batch, 3, 224, 224]: set --size 224"),
        (torch.ones(2, 3, 8, 8), ("x", ["n", 3, 16, 8], torch.float32), "set --size 16x8"),
        (torch.ones(2, 224, 224, 3), PICTURES, "data is NHWC and the network takes NCHW"),
        (torch.ones(2, 3, 8, 8), ("x", ["n", 8, 8, 3], torch.float32), "data is NCHW and the network takes NHWC"),
        (torch.ones(2, 1, 224, 224), PICTURES, "set --color rgb"),
        (torch.ones(2, 3, 8, 8), ("x", ["n", 1, 8, 8], torch.float32), "set --color gray"),
        (torch.ones(3, 224, 224), PICTURES, "add the batch axis"),
        (torch.ones(2, 3), PICTURES, "give 4 axes instead of 2"),
        (torch.ones(2, 3), ("x", [1, 3], torch.float32), "set --batch 1"),
        (torch.ones(2, 3), ("x", ["n", 4], torch.float32), "give 4 instead of 3 along axis 1"),
        (torch.ones(2, 3, dtype=torch.int64), ("ids", ["n", 5], torch.int64), "pad or cut every sample to 5"),
        (torch.ones(2, 3), IDS, "'ids' of calibration batch 0 is float32 but the network takes int64: give the ids"),
        (torch.ones(2, 3, dtype=torch.int32), IDS, "is int32 but the network takes int64: convert the data to int64"),
        (torch.ones(2, 3, 224, 224, dtype=torch.uint8), PICTURES, "is uint8 .* apply the mean"),
    ],
)
def test_mismatches_say_what_to_do(tensor: torch.Tensor, expected: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        check_inputs((tensor,), [expected], "calibration batch 0")
    first, _, last = words.partition(" .* ")
    assert first in str(caught.value)
    assert last in str(caught.value)


def test_number_of_inputs() -> None:
    with pytest.raises(DataError, match="batch 3 has 1 tensors but the network takes 2 inputs: 'x', 'ids'"):
        check_inputs((torch.ones(1),), [PICTURES, IDS], "batch 3")


def by_defaults(ids: Any = None, mask: Any = None, size: int = 3, labels: Any = None, extra: Any = None) -> None:
    """Parameters as transformers have them."""


def requiring(x: Any, mask: Any = None) -> None:
    """One input is required."""


def any_number(*x: Any) -> None:
    """However many."""


WORDS, MASK, CLASSES = torch.arange(12).reshape(4, 3), torch.ones(4, 3), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("forward", "source", "expected"),
    [
        (by_defaults, WORDS, [WORDS]),
        (by_defaults, [(WORDS, MASK)], [WORDS, MASK]),
        (by_defaults, [{"mask": MASK, "labels": CLASSES, "ids": WORDS, "size": 4}], {"ids": WORDS, "mask": MASK}),
        (by_defaults, {"extra": MASK, "ids": WORDS.numpy(), "labels": CLASSES}, {"ids": WORDS, "extra": MASK}),
        (by_defaults, lambda: iter([[WORDS]]), [WORDS]),
        (requiring, [WORDS], [WORDS]),
        (requiring, [{"x": MASK, "y": WORDS}], {"x": MASK}),
        (requiring, [{"mask": MASK, "x": WORDS}], {"x": WORDS, "mask": MASK}),
        (any_number, [(WORDS, MASK, MASK)], [WORDS, MASK, MASK]),
        (requiring, [(WORDS, CLASSES)], [WORDS]),  # beside a target
        (requiring, [(WORDS, MASK)], [WORDS, MASK]),
        (by_defaults, [(WORDS, MASK, CLASSES)], [WORDS, MASK]),
        (by_defaults, [((WORDS, MASK), CLASSES)], [WORDS, MASK]),
        (by_defaults, [({"ids": WORDS}, CLASSES)], {"ids": WORDS}),
        (any_number, [(WORDS, MASK, CLASSES)], [WORDS, MASK]),
        (by_defaults, TensorDataset(WORDS, MASK, CLASSES), [WORDS, MASK]),
    ],
)
def test_an_example_is_what_the_data_hold(forward: Any, source: Any, expected: Any) -> None:
    found = example(forward, source)
    assert isinstance(found, dict) == isinstance(expected, dict)
    got, wanted = (list(t.values()) if isinstance(t, dict) else t for t in (found, expected))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and len(a) == 2
        assert all(any(torch.equal(row, known) for known in b) for row in a)
    assert not isinstance(found, dict) or list(found) == list(expected)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_example_from_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "npy":
        np.save(path, WORDS.numpy())
    else:
        np.savez(path, mask=MASK.numpy(), ids=WORDS.numpy(), labels=CLASSES.numpy())
    found = example(by_defaults, path)
    names = list(found) if isinstance(found, dict) else len(found)
    assert names == (["ids", "mask"] if suffix == "npz" else 1)


@pytest.mark.parametrize(
    ("forward", "source", "words"),
    [
        (requiring, [{"mask": MASK}], "no array for the input 'x'"),
        (by_defaults, [], "gives no batches"),
        (by_defaults, [{"other": MASK}], r"holds none of the inputs that the network takes \(ids, mask, extra\)"),
        (by_defaults, {"other": MASK, "labels": CLASSES}, "holds none of the inputs"),
    ],
)
def test_no_example(forward: Any, source: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        example(forward, source)


@pytest.mark.parametrize("label", ["target", "targets", "label", "labels"])
def test_classes_beside_the_inputs(label: str) -> None:
    for source in ({"ids": WORDS, label: CLASSES}, [{label: CLASSES, "ids": WORDS}]):
        data = labelled(source, preprocess=None, input_names=["ids"], outputs=2)
        ((inputs, target),) = data
        assert torch.equal(inputs[0], WORDS) and torch.equal(target, CLASSES)
