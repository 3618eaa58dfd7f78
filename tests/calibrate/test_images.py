"""Image folders: the presets do what they say, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qpass.calibrate.images import IMAGENET_MEAN, IMAGENET_STD
from qpass.calibrate.inputs import InputSpec
from qpass.calibrate.samples import open_samples
from qpass.errors import RecipeError, SampleError


def spec(*shape, dtype=np.float32):
    return (InputSpec(name="pixels", dtype=np.dtype(dtype), shape=shape),)


@pytest.fixture
def folder(tmp_path):
    """Three pictures: one colour, a gradient in grey, one in a sub-folder."""
    Image.new("RGB", (40, 30), (255, 128, 0)).save(tmp_path / "b.png")
    ramp = np.tile(np.arange(60, dtype=np.uint8), (60, 1))
    Image.fromarray(ramp).save(tmp_path / "c.bmp")
    (tmp_path / "a").mkdir()
    Image.new("RGB", (60, 90), (0, 0, 255)).save(tmp_path / "a" / "z.webp", lossless=True)
    return tmp_path


def test_imagenet_normalizes_and_finds_all_images_in_order(folder):
    samples = open_samples(folder, spec(None, 3, 28, 28), preprocess="imagenet")
    found = [feeds["pixels"] for feeds in samples]
    assert [array.shape for array in found] == [(1, 3, 28, 28)] * 3
    colours = np.array([[0, 0, 255], [255, 128, 0]]) / 255
    for array, colour in zip(found, colours, strict=False):
        wanted = (colour - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        # Values of up to 3 after at most four float32 roundings of 2**-24, relative to 3.
        np.testing.assert_allclose(
            array[0].reshape(3, -1).T, np.tile(wanted, (784, 1)), rtol=0.0, atol=12 * 2.0**-24
        )
    # 60 wide, resized to 32 = 28 * 256 / 224, then columns 2 to 29: the middle is kept.
    ramp = found[2][0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    # The resized picture has whole levels, so a mean is off by 0.5 at most; a column further it
    # would be off by 60 / 32.
    np.testing.assert_allclose(ramp.mean() * 255, 29.5, rtol=0.0, atol=0.5)
    np.testing.assert_allclose(np.diff(ramp).mean() * 255, 60 / 32, rtol=0.02)


def test_imagenet_follows_the_layout_of_the_input(folder):
    samples = open_samples(folder, spec(1, 20, 24, 3), preprocess="imagenet")
    assert next(iter(samples))["pixels"].shape == (1, 20, 24, 3)


def test_files_of_steps(folder):
    steps = folder / "steps.toml"
    steps.write_text(
        "resize = [4, 6]\ncrop = [2, 2]\nmean = [1, 2, 3]\nstd = [2, 2, 2]\nscale = 1.0\n"
        'layout = "NHWC"\nchannels = "BGR"\ninterpolation = "nearest"\n'
    )
    samples = open_samples(folder, spec(None, 2, 2, 3), preprocess=steps)
    _, second, _ = (feeds["pixels"] for feeds in samples)
    np.testing.assert_array_equal(second[0, 0, 0], [(0 - 1) / 2, (128 - 2) / 2, (255 - 3) / 2])
    steps.write_text("resize = 10\ncrop = 8\nscale = 1.0")
    grey = open_samples(folder, spec(None, 1, 8, 8, dtype=np.uint8), preprocess=steps)
    assert {feeds["pixels"].dtype for feeds in grey} == {np.dtype(np.uint8)}


def test_preprocessing_is_part_of_the_fingerprint(folder):
    one = open_samples(folder, spec(None, 3, 28, 28), preprocess="imagenet")
    two = open_samples(folder, spec(None, 3, 20, 20), preprocess="imagenet")
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size = 3", "size"),
        ("std = [0.0]", "std"),
        ('layout = "CHW"', "layout"),
        ("resize = ", "not TOML"),
        ("crop = -1", "crop"),
    ],
)
def test_wrong_steps_name_the_key(folder, text, message):
    (folder / "steps.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        open_samples(folder, spec(None, 3, 8, 8), preprocess=folder / "steps.toml")


def test_damaged_and_small_images_are_named(folder):
    steps = folder / "steps.toml"
    steps.write_text("crop = 50")
    with pytest.raises(SampleError, match=r"b\.png: it is 30 x 40 pixels"):
        list(open_samples(folder, spec(None, 3, 50, 50), preprocess=steps))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    with pytest.raises(SampleError, match=r"b\.png"):
        list(open_samples(folder, spec(None, 3, 28, 28), preprocess="imagenet"))


def test_folders_and_models_that_do_not_fit(folder, tmp_path_factory):
    with pytest.raises(SampleError, match="--preprocess imagenet"):
        open_samples(folder, spec(None, 3, 28, 28))
    with pytest.raises(RecipeError, match="imagenet needs"):
        open_samples(folder, spec(None, 1, 28, 28), preprocess="imagenet")
    with pytest.raises(SampleError, match="one input of rank 4"):
        open_samples(folder, spec(None, 28), preprocess="imagenet")
    with pytest.raises(RecipeError, match="no preprocessing imagnet"):
        open_samples(folder, spec(None, 3, 28, 28), preprocess="imagnet")
    with pytest.raises(SampleError, match="no images"):
        open_samples(tmp_path_factory.mktemp("empty"), spec(None, 3, 28, 28), preprocess="imagenet")
