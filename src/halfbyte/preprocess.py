"""From a picture on disk to what the network receives: resize, crop, channel order, mean and standard deviation."""

import dataclasses
import difflib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from halfbyte.errors import DataError, UsageError

Crop = Literal["center", "none"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Color = Literal["rgb", "bgr", "gray"]

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes one input sample; calling it gives a float32 tensor ``[C, H, W]``.

    size: height and width in pixels of what the network receives; one number for a square.
    resize: length in pixels of the short side before the crop; None means 256/224 of ``size``, rounded.
    crop: "center" resizes the short side and cuts the middle out; "none" resizes straight to ``size``.
    color: order of the channels; "gray" gives one channel.
    mean, std: on the 0..255 scale, one number for all channels or one for each: ``(pixel - mean) / std``.

    A picture that already has the wanted geometry is not resampled. Transparency and the EXIF orientation are
    ignored, as the usual training pipelines ignore them. Raises UsageError for a value that makes no sense.
    """

    size: int | tuple[int, int] = 224
    resize: int | None = None
    crop: Crop = "center"
    interpolation: Interpolation = "bilinear"
    color: Color = "rgb"
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        # Lists come from JSON and integers from people; one form for each value makes equal settings compare equal.
        object.__setattr__(self, "size", _valid_size(self.size))
        for name, kinds in (("crop", Crop), ("interpolation", Interpolation), ("color", Color)):
            _valid_choice(name, getattr(self, name), get_args(kinds))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _valid_statistic(name, getattr(self, name), self.channels, self.color))
        self._check_resize()
        self._check_scale()

    def _check_scale(self) -> None:
        if all(abs(mean) <= 1 and std < 1 for mean, std in self.statistics):
            mean, std = (",".join(f"{255 * v:.6g}" for v in each) for each in zip(*self.statistics, strict=True))
            raise UsageError(
                f"preprocess: mean {self.mean} and std {self.std} are for pixels of 0..1, but they are 0..255: multiply both by 255 "
                f"(mean {mean} and std {std})"
            )

    def _check_resize(self) -> None:
        if self.resize is None:
            return
        if not _is_pixels(self.resize):
            raise UsageError(f"preprocess: resize is {self.resize!r}; give a positive number of pixels")
        if self.crop == "none":
            raise UsageError(
                f"preprocess: resize={self.resize} has no effect with crop 'none'; leave it out or use crop 'center'"
            )
        if self.resize < max(self.shape):
            raise UsageError(
                f"preprocess: resize={self.resize} is smaller than the crop of {_times(self.shape)} pixels; "
                f"give at least {max(self.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def channels(self) -> int:
        """Number of channels of the result: 1 for gray, else 3."""
        return 1 if self.color == "gray" else 3

    @property
    def statistics(self) -> list[tuple[float, float]]:
        """Mean and std of each channel, on the 0..255 scale."""

        def each(value: float | tuple[float, ...]) -> tuple[float, ...]:
            values = value if isinstance(value, tuple) else (value,)
            return values * self.channels if len(values) == 1 else values

        return list(zip(each(self.mean), each(self.std), strict=True))

    @property
    def short_side(self) -> int:
        """Length in pixels of the short side before the centre crop."""
        # Whole numbers: (x + 1/2) rounded down, so that no platform rounds a half the other way.
        return self.resize if self.resize is not None else (max(self.shape) * 512 + 224) // 448

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The float32 tensor ``[C, H, W]`` of one picture; DataError if the picture cannot be brought to that form."""
        try:
            pixels = np.asarray(self._framed(_eight_bit(image, self.channels)), dtype=np.float32)
        except (MemoryError, OSError, ValueError) as error:
            size = _times((image.height, image.width))
            raise DataError(
                f"a picture of {size} pixels (mode {image.mode}) cannot be resized ({error}); leave it out"
            ) from error
        pixels = pixels.reshape(*self.shape, self.channels)
        if self.color == "bgr":
            pixels = pixels[:, :, ::-1]
        scaled = (pixels - np.asarray(self.mean, dtype=np.float32)) / np.asarray(self.std, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))

    def _framed(self, image: Image.Image) -> Image.Image:
        height, width = self.shape
        resampling = _RESAMPLING[self.interpolation]
        if image.size == (width, height):
            return image
        if self.crop == "none":
            return image.resize((width, height), resampling)
        short = min(image.size)
        if short != self.short_side:
            # The long side is rounded down, as torchvision does.
            wide, high = (side * self.short_side // short for side in image.size)
            if wide * high > 1 << 28:  # a strip would take all memory before the crop
                raise ValueError(f"it would become {_times((high, wide))} before the crop")
            image = image.resize((wide, high), resampling)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The inverse of ``to_dict``; what is left out keeps its default. UsageError names an unknown key."""
        valid = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in valid:
                near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
                raise UsageError(f"preprocess: unknown key {key!r}; did you mean {near!r}? (valid: {', '.join(valid)})")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Preprocess":
        """Reads a .json or .toml file with the keys of this class; UsageError names the file and what is wrong."""
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".json", ".toml"):
            raise UsageError(f"{path}: a preprocess file is .json or .toml, not {suffix or 'a file without an ending'}")
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise UsageError(f"{path}: the preprocess file cannot be read ({error.strerror})") from error
        except ValueError as error:  # of JSON, TOML and UTF-8
            raise UsageError(f"{path}: not valid {suffix[1:].upper()} ({error})") from error
        if not isinstance(values, dict):
            raise UsageError(f'{path}: a preprocess file holds one object such as {{"size": 224}}')
        try:
            return cls.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


def parse_triple(text: str) -> float | tuple[float, ...]:
    """``"127"`` or ``"123.7,116.3,103.5"`` as one number or a tuple of three; UsageError for anything else."""
    parts = text.split(",")
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(math.isfinite(v) for v in values):
        raise UsageError(f"{text!r} is not one number or three separated by commas, such as 127 or 123.7,116.3,103.5")
    return values[0] if len(values) == 1 else values


def parse_size(text: str) -> int | tuple[int, int]:
    """``"224"``, or ``"256x192"`` for height x width, in pixels; UsageError for anything else."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.strip().isascii() and p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise UsageError(f"{text!r} is not a size in pixels, such as 224 or 256x192 (height x width)")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def find_pictures(folder: Path) -> list[Path]:
    """All pictures below ``folder``, in the same order on every system; DataError where there are none."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    # Hidden names are thumbnails and resource forks ("._photo.jpg"), which have a picture's ending but are none.
    names = sorted(n for n, p in found.items() if p.suffix.lower() in _SUFFIXES and "/." not in f"/{n}")
    if not names:
        held = f"{len(found)} files but no picture" if found else "no files"
        raise DataError(f"{folder} holds {held}; give a folder with {', '.join(sorted(_SUFFIXES))} files")
    return [found[name] for name in names]


def read_picture(path: Path) -> Image.Image:
    """The picture, fully decoded, with the file closed; DataError names a file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.copy()
    except Exception as error:  # PIL's decoders raise nearly every kind of exception on damaged files.
        # PIL's text repeats the path for a file of no known format.
        reason = "not a picture" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise DataError(f"{path} cannot be decoded as a picture ({reason}): replace or remove it") from error


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    if not all(image.size):
        raise DataError("a picture without pixels cannot be used; leave it out")
    if image.mode in ("I", "F"):
        raise DataError(f"a picture of mode {image.mode} has 32-bit pixels of unknown range; save it with 8 bits")
    if image.mode.startswith("I;16"):
        # PIL would clip at 255, which leaves a white picture.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _is_pixels(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _valid_size(value: object) -> int | tuple[int, int]:
    if isinstance(value, int) and _is_pixels(value):
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(_is_pixels(v) for v in value):
        return (value[0], value[1])
    raise UsageError(f"preprocess: size is {value!r}; give positive pixels, such as 224 or (height, width)")


def _valid_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UsageError(f"preprocess: {name} is {value!r}; valid are {', '.join(valid)}")


def _valid_statistic(name: str, value: object, channels: int, color: str) -> float | tuple[float, ...]:
    many = isinstance(value, list | tuple)
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise UsageError(f"preprocess: {name} is {value!r}; give a finite number or one for each channel")
    if many and len(values) not in (1, channels):
        raise UsageError(
            f"preprocess: {name} has {len(values)} values but color {color!r} has {channels} "
            f"channel{'s' * (channels > 1)}; give one value or {channels}"
        )
    # Below the smallest normal float32 the division would give infinities.
    if name == "std" and not all(v >= float(np.finfo(np.float32).tiny) for v in values):
        raise UsageError(f"preprocess: std is {value!r}; it must be above zero (pixels are 0..255: try 1 or 255)")
    return tuple(float(v) for v in values) if many else float(values[0])
