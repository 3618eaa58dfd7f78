"""Samples from a folder of images: decode, resize, crop, scale, normalize.

The preset ``imagenet`` is the usual evaluation of ImageNet classifiers: the shorter side becomes
256/224 of the input's longer one, the centre is cut out, divided by 255 and normalized.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpass.calibrate.inputs import InputSpec
from qpass.errors import RecipeError, SampleError

Array = NDArray[Any]

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
FREE_SIDE: Final = 224  # where the model leaves height and width free

Pixels = Annotated[int, Field(gt=0)]
Size = Pixels | tuple[Pixels, Pixels]


class Preprocess(BaseModel):
    """Steps from picture to input, in this order; also the keys of a preprocessing file.

    Sizes are (height, width); one number means the shorter side for `resize`, a square for `crop`.
    Values become ``(pixel * scale - mean) / std`` with one mean and std, or one per channel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: Size | None = None
    crop: Size | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    scale: float = 1 / 255
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] = "bilinear"

    def describe(self) -> str:
        """Return the steps as text that is equal for equal steps."""
        return self.model_dump_json()

    def apply(self, picture: Image.Image) -> Array:
        """Return the picture as a batch of one, float32 [1, C, H, W] or [1, H, W, C].

        Raises:
            ValueError: the crop is larger than the resized picture.
        """
        if self.resize is not None:
            filter_ = Image.Resampling[self.interpolation.upper()]
            picture = picture.resize(_resized(picture.size, self.resize), filter_)
        if self.crop is not None:
            height, width = _pair(self.crop)
            if height > picture.height or width > picture.width:
                found = f"{picture.height} x {picture.width}"
                raise ValueError(f"it is {found} pixels, smaller than the crop {height} x {width}")
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        pixels = np.asarray(picture, np.float32)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if self.channels == "BGR":
            pixels = pixels[:, :, ::-1]
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        values = (pixels * np.float32(self.scale) - mean) / std
        values = values.transpose(2, 0, 1) if self.layout == "NCHW" else values
        return np.ascontiguousarray(values[None], np.float32)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resized(present: tuple[int, int], wanted: Size) -> tuple[int, int]:
    """Return the (width, height) of pillow."""
    if isinstance(wanted, int):
        return (
            round(present[0] * wanted / min(present)),
            round(present[1] * wanted / min(present)),
        )
    return wanted[1], wanted[0]


def read_preprocess(source: str | Path, spec: InputSpec) -> Preprocess:
    """Return the preset ``imagenet`` for this input, or read a TOML file.

    Raises:
        RecipeError: no such file or preset, unknown key, wrong value.
    """
    if str(source) == "imagenet":
        return _imagenet(spec)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"there is no preprocessing {source}", fix="imagenet, or a TOML file")
    try:
        return Preprocess.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"this is not TOML: {error}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"key {key}: {first['msg']}",
            where=str(path),
            fix=f"known keys: {', '.join(Preprocess.model_fields)}",
        ) from error


def _imagenet(spec: InputSpec) -> Preprocess:
    shape = spec.shape
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise RecipeError(
            f"imagenet needs an input [N, 3, H, W] or [N, H, W, 3], not {spec.describe()}",
            fix="write a preprocessing file",
        )
    first = shape[1] == 3
    height, width = ((side or FREE_SIDE) for side in (shape[2:] if first else shape[1:3]))
    return Preprocess(
        resize=round(max(height, width) * 256 / 224),
        crop=(height, width),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        layout="NCHW" if first else "NHWC",
    )


def find_images(folder: Path) -> list[Path]:
    """Return the pictures below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def image_input(inputs: Sequence[InputSpec]) -> InputSpec:
    """Return the one input, which takes pictures.

    Raises:
        SampleError: several inputs, or not of rank 4.
    """
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        found = "; ".join(f"{spec.name} {spec.describe()}" for spec in inputs)
        raise SampleError(
            f"a folder of images needs a model with one input of rank 4, this one has: {found}",
            fix="store the inputs in an .npz file, or give module:callable",
        )
    return inputs[0]


def read_image(path: Path, steps: Preprocess, spec: InputSpec) -> Array:
    """Return one picture as the model takes it.

    Raises:
        SampleError: the file is damaged, or the steps do not fit it.
    """
    channels = spec.shape[1] if steps.layout == "NCHW" else spec.shape[3]
    try:
        with Image.open(path) as picture:
            values = steps.apply(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(
            f"cannot read image {path.name}: {error}", where=str(path), fix="replace or remove it"
        ) from error
    if spec.dtype.kind in "iu":  # models that take pixels
        return np.rint(values).astype(np.int64)
    return values
