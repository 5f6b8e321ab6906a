"""Pictures become pixels of the promised size: beside Pillow's own operations, numpy in float64, and by properties."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from glowflow.config.media import ImageAugmentConfig, ImageConfig
from glowflow.data.processors.bad import KINDS, BadSample
from glowflow.data.processors.image import ImageProcessor, check_image, image_facts

LIMIT = 178_956_970
SEED = 7


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A picture without edges: waves of few pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(channels)]
    return np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(pixels: np.ndarray, **options: Any) -> bytes:
    return encode(Image.fromarray(pixels.squeeze()), "PNG", **options)


def prepare(data: bytes, seed: int | None = None, **keys: Any) -> np.ndarray:
    config = ImageConfig(**keys)
    rng = None if seed is None else np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    pixels = ImageProcessor(config).pixels(data, rng)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*config.output_size(*image_facts(data, LIMIT)), config.channels)
    assert pixels.flags.writeable
    return pixels


def far(a: np.ndarray, b: np.ndarray | Image.Image) -> int:
    return int(np.abs(a.astype(int) - np.asarray(b).astype(int).reshape(a.shape)).max())


@pytest.mark.parametrize("size", [(31, 45), (80, 60), (19, 90)])
def test_resize_is_pillows_bicubic(size: tuple[int, int]) -> None:
    pixels = smooth(40, 70)
    expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
    assert far(prepare(png(pixels), size=size), expected) == 0


def test_a_picture_of_the_right_size_is_unchanged() -> None:
    pixels = smooth(28, 28)
    assert far(prepare(png(pixels), size=28), pixels) == 0
    assert far(prepare(png(pixels), size=None), pixels) == 0


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
@pytest.mark.parametrize("size", [(24, 24), (16, 30)])
def test_crop_keeps_the_middle(shape: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = smooth(*shape)
    expected = ImageOps.fit(Image.fromarray(pixels), size[::-1], Image.Resampling.BICUBIC)
    assert far(prepare(png(pixels), size=size, fit="crop"), expected) <= 1


def test_pad_fills_with_the_mean() -> None:
    pixels = smooth(30, 60)
    mean = [0.2, 0.4, 0.6]
    found = prepare(png(pixels), size=(40, 40), fit="pad", mean=mean)
    inside = Image.fromarray(pixels).resize((40, 20), Image.Resampling.BICUBIC)
    assert far(found[10:30], inside) == 0
    border = np.concatenate([found[:10], found[30:]]).reshape(-1, 3)
    assert (border == np.round(np.array(mean) * 255)).all()


def test_own_sizes_up_to_the_longest_in_multiples() -> None:
    keys: dict[str, Any] = {"size": None, "longest": 48, "multiple": 8}
    assert prepare(png(smooth(100, 200)), **keys).shape == (24, 48, 3)
    assert prepare(png(smooth(20, 30)), **keys).shape == (16, 32, 3)
    assert prepare(png(smooth(3, 300)), **keys).shape == (8, 48, 3)


def test_normalize_and_blank() -> None:
    processor = ImageProcessor(ImageConfig(size=8, mean=[0.1, 0.5, 0.9], std=[0.5, 0.25, 1.5]))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    expected = (pixels / 255 - [0.1, 0.5, 0.9]) / [0.5, 0.25, 1.5]
    found = processor.normalize(pixels)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=2e-6)
    assert np.abs(processor.normalize(processor.blank(4, 5)[None])).max() < 0.01
    gray = ImageProcessor(ImageConfig(color="gray"))
    assert gray.blank(2, 3).shape == (2, 3, 1)
    assert gray.normalize(gray.blank(2, 3)[None]).shape == (1, 1, 2, 3)


# Orientation


_UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


def with_orientation(pixels: np.ndarray, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    pixels = smooth(6, 11)
    data = with_orientation(pixels, kind, orientation)
    expected = _UPRIGHT[orientation](pixels)
    assert image_facts(data, LIMIT) == check_image(data, ImageConfig()) == expected.shape[:2]
    assert far(prepare(data, size=None), expected) == 0
    # Cropping and padding see the upright picture.
    for fit in ("crop", "pad"):
        assert far(prepare(data, size=(8, 20), fit=fit), prepare(png(expected), size=(8, 20), fit=fit)) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg_decoded_at_an_eighth(orientation: int) -> None:
    pixels = smooth(400, 640)
    data = with_orientation(pixels, "JPEG", orientation)
    expected = Image.fromarray(_UPRIGHT[orientation](pixels)).resize((24, 16), Image.Resampling.BICUBIC)
    assert far(prepare(data, size=(16, 24)), expected) <= 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0XX*\0\x08\0\0\0\x01\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 99),
    ],
)
def test_damaged_exif_is_ignored(exif: bytes) -> None:
    data = encode(Image.fromarray(smooth(9, 14)), "JPEG", exif=exif)
    assert image_facts(data, LIMIT) == (9, 14)
    assert prepare(data, size=None).shape == (9, 14, 3)


# Colour modes


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., -1:] / 255
    return np.round(rgba[..., :-1] * alpha + 255 * (1 - alpha))


def merged(mode: str, bands: np.ndarray) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(bands[..., band]) for band in range(bands.shape[-1])])


def test_transparency_lies_over_white() -> None:
    rgba, la = smooth(12, 17, 4), smooth(12, 17, 2)
    expected = over_white(rgba)
    assert far(prepare(png(rgba), size=None), expected) <= 1
    assert far(prepare(encode(merged("RGBA", rgba), "WEBP", lossless=True, exact=True), size=None), expected) <= 1
    assert far(prepare(encode(merged("LA", la)), size=None, color="gray"), over_white(la)) <= 1


def test_palettes() -> None:
    picture = Image.fromarray(smooth(20, 20)).quantize(16)
    expected = np.asarray(picture.convert("RGB"))
    assert far(prepare(encode(picture), size=None), expected) == 0
    assert far(prepare(encode(picture, "GIF"), size=None), expected) == 0
    clear = prepare(encode(picture, transparency=3), size=None)
    assert (clear[np.asarray(picture) == 3] == 255).all()
    assert far(clear[np.asarray(picture) != 3], expected[np.asarray(picture) != 3]) == 0


def test_one_bit() -> None:
    bits = smooth(9, 13, 1)[..., 0] > 127
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert far(prepare(encode(Image.fromarray(bits), kind), size=None, color="gray"), bits * 255) == 0


def test_grey_and_colour_into_each_other() -> None:
    grey, colour = smooth(10, 10, 1), smooth(10, 10)
    assert far(prepare(png(grey), size=None), np.repeat(grey, 3, -1)) == 0
    luma = np.round(colour @ [0.299, 0.587, 0.114])
    assert far(prepare(png(colour), size=None, color="gray"), luma[..., None]) <= 1
    # A JPEG holds the brightness by itself: the other channels are not decoded.
    data = encode(Image.fromarray(colour), "JPEG", quality=95)
    assert far(prepare(data, size=None, color="gray"), np.asarray(Image.open(io.BytesIO(data)).convert("L"))) <= 2


def test_cmyk() -> None:
    ink = smooth(16, 16, 4)
    picture = merged("CMYK", ink)
    expected = np.round((255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255)
    assert far(prepare(encode(picture, "TIFF"), size=None), expected) <= 1
    # In JPEG the inks are stored inverted, as Adobe's programs do.
    data = encode(picture, "JPEG", quality=100, subsampling=0)
    assert far(prepare(data, size=None), expected) <= 12
    assert prepare(data, size=8, color="gray").shape == (8, 8, 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits(kind: str) -> None:
    grey = smooth(11, 9, 1)[..., 0].astype(np.uint16) * 257
    data = encode(Image.fromarray(grey), kind)
    assert far(prepare(data, size=None, color="gray"), grey // 257) <= 1
    assert far(prepare(data, size=None), np.repeat((grey // 257)[..., None], 3, -1)) <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-10.0, 0.0, 10.0]], np.float32), [0, 128, 255]),
        (np.array([[5e4, 5e4, 5e4]], np.float32), [0, 0, 0]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-1000, 0, 1_000_000]], np.int32), [0, 0, 255]),
    ],
)
def test_levels_of_deep_pixels(values: np.ndarray, expected: list[int]) -> None:
    found = prepare(encode(Image.fromarray(values), "TIFF"), size=None, color="gray")
    assert far(found[0, :, 0], np.array(expected)) <= 1


def test_pixels_that_are_no_numbers_are_bad() -> None:
    data = encode(Image.fromarray(np.array([[0.5, np.nan, 1.0]], np.float32)), "TIFF")
    for call in (lambda: prepare(data, size=8), lambda: check_image(data, ImageConfig())):
        with pytest.raises(BadSample, match=r"image_decode: .*finite"):
            call()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_animations_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (10, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert far(prepare(data, size=None), np.broadcast_to([255, 0, 0], (8, 10, 3))) <= 3


# Large pictures


def deep_modes() -> dict[str, Image.Image]:
    pixels = Image.fromarray(smooth(130, 210))
    grey = pixels.convert("L")
    return {
        "RGB": pixels,
        "L": grey,
        "P": pixels.quantize(200),
        "RGBA": Image.merge("RGBA", [*pixels.split(), grey]),
        "CMYK": pixels.convert("CMYK"),
        "I;16": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "F": Image.fromarray(np.asarray(grey).astype(np.float32)),
    }


@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("mode", list(deep_modes()))
def test_reduced_in_tiles_it_looks_the_same(mode: str, color: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(deep_modes()[mode], "TIFF")
    module = "glowflow.data.processors.image"
    whole = {size: prepare(data, size=size, color=color) for size in ((13, 21), (120, 200), (17, 5))}
    monkeypatch.setattr(f"{module}._TILE", 64)
    monkeypatch.setattr(f"{module}._LARGEST_FACTOR", 16)
    for size, expected in whole.items():
        assert far(prepare(data, size=size, color=color), expected) <= 3
        assert check_image(data, ImageConfig(color=color)) == (130, 210)


def test_a_reduced_jpeg_looks_the_same() -> None:
    pixels = smooth(700, 900)
    data = encode(Image.fromarray(pixels), "JPEG", quality=95)
    for fit in ("resize", "crop", "pad"):
        assert far(prepare(data, size=40, fit=fit), prepare(png(pixels), size=40, fit=fit)) <= 6


# Changes in training


def test_without_a_generator_nothing_changes() -> None:
    pixels = smooth(20, 20)
    everything = {"flip": 1.0, "rotate": 90, "shift": 0.3, "scale": (0.2, 0.5), "brightness": 0.5, "erase": 1.0}
    assert far(prepare(png(pixels), size=20, augment=everything), pixels) == 0
    assert far(prepare(png(pixels), seed=SEED, size=20), pixels) == 0


def test_flip() -> None:
    pixels = smooth(8, 9)
    assert far(prepare(png(pixels), SEED, size=None, augment={"flip": 1.0}), pixels[:, ::-1]) == 0
    flipped = [far(prepare(png(pixels), seed, size=None, augment={"flip": 0.3}), pixels) > 0 for seed in range(200)]
    assert 35 < sum(flipped) < 85


def test_turns_go_both_ways_about_the_middle() -> None:
    pixels = np.zeros((31, 31, 1), np.uint8)
    pixels[13:18, 26:30] = 255  # a mark at the right
    angles = []
    for seed in range(40):
        found = prepare(png(pixels), seed, size=31, color="gray", mean=[0.0], augment={"rotate": 90})[..., 0]
        y, x = (np.average(axis, weights=found) - 15 for axis in np.mgrid[:31, :31])
        assert np.hypot(y, x) == pytest.approx(12.5, abs=0.3)
        angles.append(np.degrees(np.arctan2(y, x)))
    assert -91 < min(angles) < -60
    assert 60 < max(angles) < 91


def test_shifts_keep_within_their_share_and_fill_with_the_mean() -> None:
    pixels = np.full((40, 20, 1), 255, np.uint8)
    pixels[20, 10] = 0
    moves = []
    for seed in range(60):
        found = prepare(png(pixels), seed, size=(40, 20), color="gray", mean=[1.0], augment={"shift": 0.25})[..., 0]
        assert found[0, 0] == 255
        y, x = (np.average(axis, weights=255.0 - found) for axis in np.mgrid[:40, :20])
        moves.append((y - 20, x - 10))
    down, across = np.abs(moves).max(0)
    assert 8 < down <= 10.01
    assert 4 < across <= 5.01


def test_scale_crops_a_share_of_the_area() -> None:
    y, x = np.mgrid[:100, :100]
    data = png(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    shares = []
    for seed in range(40):
        found = prepare(data, seed, size=50, augment={"scale": (0.25, 0.81)}).astype(float)
        sides = [found[..., 0].max() - found[..., 0].min() + 1, found[..., 1].max() - found[..., 1].min() + 1]
        assert sides[0] == pytest.approx(sides[1], abs=2.1)
        shares.append(sides[0] * sides[1] / 1e4)
    assert 0.2 < min(shares) < 0.36
    assert 0.7 < max(shares) < 0.85


def test_brightness_and_contrast() -> None:
    pixels = smooth(16, 16)
    means = [prepare(png(pixels), seed, size=16, augment={"brightness": 0.5}).mean() for seed in range(40)]
    assert min(means) < 0.7 * pixels.mean() < 1.2 * pixels.mean() < max(means)
    plain, stronger = pixels.astype(float), []
    for seed in range(40):
        found = prepare(png(pixels), seed, size=16, augment={"contrast": 0.5}).astype(float)
        stronger.append(found.std() / plain.std())
        if stronger[-1] < 1:  # nothing is clipped: the mean stays
            assert found.mean() == pytest.approx(plain.mean(), abs=1)
    assert 0.49 < min(stronger) < 0.7
    assert 1.1 < max(stronger)


def test_erase_paints_one_rectangle_grey() -> None:
    pixels = np.dstack([smooth(40, 40, 1), smooth(40, 40, 1) // 2, np.full((40, 40), 9, np.uint8)])
    for seed in range(30):
        changed = prepare(png(pixels), seed, size=40, augment={"erase": 1.0})
        where = np.argwhere((changed != pixels).any(-1))
        (top, left), (bottom, right) = where.min(0), where.max(0) + 1
        patch = changed[top:bottom, left:right].reshape(-1, 3)
        assert len(np.unique(patch)) == 1
        assert 0.01 < len(patch) / 1600 < 0.37


def test_one_change_does_not_alter_the_draws_of_another() -> None:
    pixels = smooth(30, 30)
    brighter = 0
    for seed in range(10):
        erased = prepare(png(pixels), seed, size=30, augment={"erase": 1.0})
        both = prepare(png(pixels), seed, size=30, augment={"erase": 1.0, "brightness": 0.1})
        patch = (erased != pixels).any(-1)
        assert len(np.unique(both[patch])) == 1
        brighter += far(both[~patch], pixels[~patch]) > 0
    assert brighter > 5


augmentations = st.builds(
    ImageAugmentConfig,
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    rotate=st.sampled_from([0.0, 10.0, 180.0]),
    shift=st.sampled_from([0.0, 0.1, 0.9]),
    scale=st.sampled_from([(1.0, 1.0), (0.001, 0.01), (0.3, 1.0)]),
    brightness=st.sampled_from([0.0, 0.9]),
    contrast=st.sampled_from([0.0, 0.9]),
    erase=st.sampled_from([0.0, 1.0]),
)
sizes = st.one_of(
    st.builds(
        lambda size, fit: {"size": size, "fit": fit},
        st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40))),
        st.sampled_from(["resize", "crop", "pad"]),
    ),
    st.builds(
        lambda longest, multiple: {"size": None, "longest": longest, "multiple": multiple},
        st.one_of(st.none(), st.integers(1, 50)),
        st.sampled_from([1, 4, 14]),
    ),
)


@settings(max_examples=80)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    channels=st.sampled_from([1, 3, 4]),
    keys=sizes,
    color=st.sampled_from(["rgb", "gray"]),
    augment=augmentations,
    kind=st.sampled_from(["PNG", "JPEG", "TIFF"]),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_a_pure_function_of_bytes_settings_and_seed(
    height: int,
    width: int,
    channels: int,
    keys: dict,
    color: Any,
    augment: ImageAugmentConfig,
    kind: str,
    orientation: int,
    seed: int,
) -> None:
    picture = Image.fromarray(smooth(height, width, channels, seed % 97).squeeze(-1 if channels == 1 else ()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture.convert("RGB") if kind == "JPEG" else picture, kind, exif=exif)
    assert image_facts(data, LIMIT) == ((height, width) if orientation < 5 else (width, height))
    everything = {"color": color, "augment": augment, **keys}
    first, second = prepare(data, seed, **everything), prepare(bytes(bytearray(data)), seed, **everything)
    assert (first == second).all()


def test_bad_samples_have_one_printable_line_and_cross_processes() -> None:
    bad = BadSample("text", "first line\n\tsecond \x00line " + "x" * 500)
    assert str(bad).startswith("text: first line second ?line xxx")
    assert len(bad.reason) == 200
    assert "\n" not in str(bad)
    rebuilt = type(bad)(*bad.args)
    assert (rebuilt.kind, rebuilt.reason) == (bad.kind, bad.reason)
    assert "image_decode" in KINDS
    with pytest.raises(ValueError, match="no kind"):
        BadSample("other", "x")
