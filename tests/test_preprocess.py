"""Pictures become the tensor that the network was trained on; wrong settings are refused in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from halfbyte.errors import DataError, UsageError
from halfbyte.preprocess import Preprocess, find_pictures, parse_size, parse_triple, read_picture

numbers = st.floats(-1e4, 1e4, allow_nan=False)
positive = st.floats(1e-3, 1e4)


@st.composite
def settings(draw: st.DrawFn) -> Preprocess:
    size = draw(st.integers(1, 512) | st.tuples(st.integers(1, 512), st.integers(1, 512)))
    crop = draw(st.sampled_from(["center", "none"]))
    largest = size if isinstance(size, int) else max(size)
    resize = draw(st.none() | st.integers(largest, 2 * largest)) if crop == "center" else None
    color = draw(st.sampled_from(["rgb", "bgr", "gray"]))
    channels = 1 if color == "gray" else 3
    mean, std = (draw(some | st.tuples(*[some] * channels)) for some in (numbers, positive))
    assume(
        max(map(abs, mean if isinstance(mean, tuple) else [mean])) > 1
        or max(std if isinstance(std, tuple) else [std]) >= 1
    )
    return Preprocess(
        size,
        resize,
        crop,
        draw(st.sampled_from(["bilinear", "bicubic", "nearest"])),
        color,
        mean,
        std,
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())


@given(settings())
def test_dict_round_trip_through_json(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_centre_crop_of_the_resized_geometry_is_a_slice() -> None:
    pixels = noise(256, 301)
    result = Preprocess(224)(Image.fromarray(pixels))
    assert result.dtype == torch.float32
    assert torch.equal(result, chw(pixels[16:240, 38:262]))


def test_picture_of_exactly_the_size_is_used_as_it_is() -> None:
    pixels = noise(48, 32)
    assert torch.equal(Preprocess((48, 32))(Image.fromarray(pixels)), chw(pixels))


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (13, 40), (32, 500)])
def test_other_geometries_are_resampled_on_the_short_side(height: int, width: int) -> None:
    image = Image.fromarray(noise(height, width))
    result = Preprocess(28, resize=32)(image)
    scale = (width * 32 // min(height, width), height * 32 // min(height, width))
    resized = np.asarray(image.resize(scale, Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - 28) // 2, (resized.shape[1] - 28) // 2
    assert torch.equal(result, chw(resized[top : top + 28, left : left + 28]))


def test_crop_none_distorts_to_the_size() -> None:
    image = Image.fromarray(noise(60, 100))
    expected = np.asarray(image.resize((24, 16), Image.Resampling.NEAREST))
    assert torch.equal(Preprocess((16, 24), crop="none", interpolation="nearest")(image), chw(expected))


def test_default_resize_is_256_over_224() -> None:
    assert [Preprocess(s).short_side for s in (224, 192, 28, 7, (96, 224))] == [256, 219, 32, 8, 256]


def test_mean_and_std_apply_for_each_channel_in_the_order_of_the_network() -> None:
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    result = Preprocess(8, color="bgr", mean=(30, 0, 10), std=(1, 2, 0.5))(image)
    assert result[:, 0, 0].tolist() == [0.0, 10.0, 0.0]
    assert Preprocess(8, mean=127, std=128)(image)[0, 0, 0].item() == pytest.approx(-117 / 128)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "RGB"])
def test_every_common_mode_gives_the_channels_asked_for(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert Preprocess(8)(image).shape == (3, 8, 8)
    assert Preprocess(8, color="gray", mean=(5.0,))(image).tolist() == [[[250.0] * 8] * 8]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    image = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert Preprocess(8, color="gray")(image)[0, 0, 0].item() == 128.0


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(DataError, match="32-bit"):
        Preprocess(8)(Image.new("F", (8, 8)))
    with pytest.raises(DataError, match="without pixels"):
        Preprocess(8)(Image.new("RGB", (0, 8)))
    with pytest.raises(DataError, match=r"100000x1 pixels .* would become 25600000x256 before the crop"):
        Preprocess(224)(Image.new("L", (1, 100000)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": -3}, "size is -3"),
        ({"size": (3, 4, 5)}, "size is"),
        ({"size": True}, "size is True"),
        ({"size": "224"}, "size is '224'"),
        ({"resize": -1}, "resize is -1"),
        ({"resize": 100}, "smaller than the crop of 224x224"),
        ({"resize": 256, "crop": "none"}, "no effect with crop 'none'"),
        ({"crop": "centre"}, "valid are center, none"),
        ({"interpolation": "lanczos"}, "'lanczos'; valid are bilinear, bicubic, nearest"),
        ({"color": "hsv"}, "valid are rgb, bgr, gray"),
        ({"std": 0}, "std is 0; it must be above zero"),
        ({"std": (1, 0, 1)}, "above zero"),
        ({"std": -2.0}, "above zero"),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, "multiply both by 255"),
        ({"mean": float("nan")}, "finite"),
        ({"mean": "127"}, "finite number"),
        ({"mean": (1, 2, 3), "color": "gray"}, "mean has 3 values but color 'gray' has 1 channel;"),
        ({"mean": (1, 2)}, "mean has 2 values but color 'rgb' has 3 channels"),
        ({"sise": 224}, "'sise'; did you mean 'size'"),
        ({"men": 1}, "did you mean 'mean'"),
    ],
)
def test_senseless_values_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match="preprocess: ") as caught:
        Preprocess.from_dict(values)
    assert words in str(caught.value)


def test_files_of_both_kinds(tmp_path: Path) -> None:
    expected = Preprocess((256, 192), 288, mean=(1.0, 2.0, 3.0), std=2.0)
    (tmp_path / "p.json").write_text(json.dumps(expected.to_dict()))
    (tmp_path / "p.toml").write_text("size = [256, 192]\nresize = 288\nmean = [1, 2, 3]\nstd = 2\n")
    assert Preprocess.from_file(tmp_path / "p.json") == expected
    assert Preprocess.from_file(str(tmp_path / "p.toml")) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.toml", b"size = ", "not valid TOML"),
        ("a.json", b"\xff\xfe\xff", "not valid JSON"),
        ("a.json", b"[1]", "one object"),
        ("a.json", b'{"stdd": 1}', "did you mean 'std'"),
        ("a.yaml", b"size: 1", "is .json or .toml"),
        ("a.json", None, "cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Preprocess.from_file(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_parsers() -> None:
    assert parse_triple("127") == 127.0
    assert parse_triple("123.7, 116.3,103.5") == (123.7, 116.3, 103.5)
    assert parse_size("224") == 224
    assert parse_size("256x192") == parse_size("256X192") == (256, 192)


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a", "1,,2", "nan", "inf,1,1"])
def test_parse_triple_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not one number or three"):
        parse_triple(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1x", "x1", "1x2x3", "2.5", "²", "big"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not a size in pixels"):
        parse_size(text)


def test_pictures_are_found_in_one_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.jpg", "._a.jpg", ".thumbs/x.png", "notes.txt", "c.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_pictures(tmp_path)] == ["a/1.jpg", "b/2.PNG", "c.tiff"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "gif"])
def test_picture_is_readable_after_its_file_is_gone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise(9, 7)).save(path)
    image = read_picture(path)
    path.unlink()
    assert image.convert("RGB").size == (7, 9)
