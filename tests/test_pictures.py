"""Pictures by number, class indices by folder and class file, and hints for shapes that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfbyte.errors import DataError, UsageError
from halfbyte.pictures import class_indices, fits, layout_hint, reader
from halfbyte.preprocess import Preprocess, find_pictures


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)
    return path


def indices(folder: Path, outputs: int | None = 3, classes: Path | None = None) -> list[int]:
    found: list[int] = class_indices(folder, find_pictures(folder), outputs, classes).tolist()
    return found


# Pictures by number


def test_pictures_are_read_by_number(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(5)]
    batch = reader(tmp_path, paths, Preprocess(8), ["x"])(np.array([3, 1]))
    assert batch.shape == (2, 3, 8, 8)
    assert batch[:, 0, 0, 0].tolist() == [3, 1]


def test_reader_needs_preprocessing_and_one_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set --size, --mean"):
        reader(tmp_path, [], None, ["x"])
    with pytest.raises(DataError, match=r"takes 2 \(x, y\)"):
        reader(tmp_path, [], Preprocess(8), ["x", "y"])


# Classes


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat", "dog", "eel")):
        for j in range(4):
            picture(tmp_path / name / f"{j}.png", 10 * i + j)
    return tmp_path


def test_names_count_in_sorted_order_with_empty_folders(classes: Path) -> None:
    assert indices(classes) == [0] * 4 + [1] * 4 + [2] * 4
    (classes / "ant").mkdir()
    assert indices(classes, 4) == [1] * 4 + [2] * 4 + [3] * 4


def test_numbers_are_indices(tmp_path: Path) -> None:
    for name in ("2", "10", "007"):
        picture(tmp_path / name / "a" / "x.png")
    assert indices(tmp_path, 11) == [7, 10, 2]
    assert indices(tmp_path, None) == [7, 10, 2]
    with pytest.raises(DataError, match="10 is class 10 but the network has 10 outputs"):
        indices(tmp_path, 10)


@pytest.mark.parametrize("outputs", [4, None])
def test_names_that_do_not_match_the_outputs_need_a_class_file(classes: Path, outputs: int | None) -> None:
    with pytest.raises(DataError, match=r"3 class folders \(cat, \.\.\.\).*give a class file"):
        indices(classes, outputs)


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_class_file_gives_the_index(classes: Path, tmp_path: Path, kind: str) -> None:
    names = ["eel", "fox", "dog", "cat"]
    text = json.dumps({n: i for i, n in enumerate(names)}) if kind == "json" else "\n".join(names) + "\n\n"
    path = tmp_path / f"names.{kind}"
    path.write_text(text)
    assert indices(classes, 4, path) == [3] * 4 + [2] * 4 + [0] * 4
    with pytest.raises(DataError, match="cat is class 3 but the network has 3 outputs"):
        indices(classes, 3, path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.txt", "cats\ndog\neel", r"folder 'cat' is not in the class file .* \(near are cats\)"),
        ("c.txt", "cat\ndog\ncat", "holds 'cat' twice"),
        ("c.json", "{", "is not valid"),
        ("c.json", '["cat"]', "one object of names and indices"),
        ("c.json", '{"cat": "0"}', "one object of names and indices"),
        ("c.json", '{"cat": -1, "dog": 0, "eel": 1}', "cat is class -1"),
        ("c.json", None, "cannot be read"),
    ],
)
def test_unusable_class_files(classes: Path, tmp_path: Path, name: str, text: str | None, words: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words):
        indices(classes, 3, path)


def test_picture_outside_the_class_folders_is_named(classes: Path) -> None:
    picture(classes / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png lies in no class folder"):
        indices(classes)


# Shapes


def test_free_dimensions_fit_anything() -> None:
    assert fits([5, 3], ["batch", 3])
    assert not fits([5, 3], ["batch", 4])
    assert not fits([5, 3], ["batch"])


def test_shape_that_differs_in_the_batch_alone_has_no_layout_hint() -> None:
    assert layout_hint([2, 3, 8, 8], [1, 3, 8, 8]) is None
    assert layout_hint([2, 8, 8, 3], ["batch", 3, 8, 8]) is not None
