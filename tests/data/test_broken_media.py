"""Whatever the bytes are, a processor gives a result of the promised shape or a bad sample: nothing else, and soon.

The corpus is made here: files cut at every power of two, with flipped bits, false headers, bombs, and random bytes.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from glowflow.config.media import AudioConfig, ImageConfig
from glowflow.data.processors.audio import AudioProcessor, audio_facts, check_audio
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.image import ImageProcessor, check_image, image_facts

# Pillow's words about damaged metadata.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")

IMAGE = ImageProcessor(ImageConfig(size=(12, 10), fit="pad"))
KEPT = ImageProcessor(ImageConfig(size=None, longest=16, color="gray"))
AUDIO = AudioProcessor(AudioConfig(mels=8, trim_db=40.0, max_seconds=0.5))
CUT = AudioProcessor(AudioConfig(rate=8000, mels=8, max_seconds=0.1))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the kind of the bad sample it raises."""
    try:
        return call()
    except BadSample as bad:
        assert bad.reason
        assert bad.reason.isprintable()
        return bad.kind


def settle_image(data: bytes) -> str:
    """How a picture ends: the kind by which it is bad, or ``good``; results have the promised shapes."""
    facts = outcome(lambda: image_facts(data, IMAGE.config.max_pixels))
    checked = outcome(lambda: check_image(data, IMAGE.config))
    ends = []
    for processor in (IMAGE, KEPT):
        found = outcome(partial(processor.pixels, data, None))
        if isinstance(facts, str):
            assert found == checked == facts
        elif not isinstance(found, str):
            assert found.shape == (*processor.config.output_size(*facts), processor.config.channels)
        ends.append(found if isinstance(found, str) else "good")
    return checked if isinstance(checked, str) else max(ends)  # "good" comes before "image_..."


def settle_audio(data: bytes) -> str:
    """As ``settle_image``, for recordings."""
    facts = outcome(lambda: audio_facts(data, AUDIO.config.max_file_seconds))
    checked = outcome(lambda: check_audio(data, AUDIO.config))
    for processor in (AUDIO, CUT):
        found = outcome(partial(processor.features, data, None))
        if isinstance(facts, str):
            assert found == checked == facts
        elif not isinstance(found, str):
            assert found.shape == (processor.config.num_frames(*facts), 8)
            assert np.isfinite(found).all()
        if not isinstance(checked, str):
            assert not isinstance(found, str) or found == "audio_not_finite"
    return checked if isinstance(checked, str) else "good"


@cache
def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


@cache
def recording(kind: str, subtype: str | None = None, length: int = 9000, channels: int = 2) -> bytes:
    stream = io.BytesIO()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (length, channels))
    soundfile.write(stream, samples, 8000, subtype, format=kind)
    return stream.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: picture("JPEG"),
    "progressive": lambda: picture("JPEG", progressive=True),
    "cmyk": lambda: picture("JPEG", "CMYK"),
    "png": lambda: picture("PNG"),
    "palette": lambda: picture("PNG", "P"),
    "transparent": lambda: picture("PNG", "RGBA"),
    "16-bit": lambda: picture("PNG", "I;16"),
    "gif": lambda: picture("GIF"),
    "webp": lambda: picture("WEBP"),
    "lossless": lambda: picture("WEBP", lossless=True),
    "bmp": lambda: picture("BMP"),
    "tiff": lambda: picture("TIFF"),
    "lzw": lambda: picture("TIFF", compression="tiff_lzw"),
    "float": lambda: picture("TIFF", "F"),
    "ppm": lambda: picture("PPM"),
    "bits": lambda: picture("PPM", "1"),
}
RECORDINGS: dict[str, Callable[[], bytes]] = {
    "wav": lambda: recording("WAV", "PCM_16"),
    "wav8": lambda: recording("WAV", "PCM_U8"),
    "wav24": lambda: recording("WAV", "PCM_24"),
    "float": lambda: recording("WAV", "FLOAT"),
    "flac": lambda: recording("FLAC"),
    "ogg": lambda: recording("OGG"),
    "aiff": lambda: recording("AIFF"),
    "au": lambda: recording("AU"),
    "mp3": lambda: recording("MP3"),
}
if "MP3" not in soundfile.available_formats():
    del RECORDINGS["mp3"]


def cuts(data: bytes) -> list[int]:
    """Every power of two below the length, and the whole but its last bytes."""
    return [1 << power for power in range(len(data).bit_length()) if 1 << power < len(data)]


@pytest.mark.parametrize("name", PICTURES)
def test_whole_pictures_are_good(name: str) -> None:
    assert settle_image(PICTURES[name]()) == "good"


@pytest.mark.parametrize("name", RECORDINGS)
def test_whole_recordings_are_good(name: str) -> None:
    assert settle_audio(RECORDINGS[name]()) == "good"


@pytest.mark.parametrize("name", PICTURES)
def test_truncated_pictures_are_bad(name: str) -> None:
    data = PICTURES[name]()
    for length in cuts(data):
        assert settle_image(data[:length]) in ("image_header", "image_decode"), length


@pytest.mark.parametrize("name", RECORDINGS)
def test_truncated_recordings_end_as_they_should(name: str) -> None:
    data = RECORDINGS[name]()
    for length in cuts(data):
        end = settle_audio(data[:length])
        # Streams without a length in their header are shorter recordings.
        streams = ("audio_empty", "good") if name in ("ogg", "mp3", "au", "aiff") else ()
        assert end in ("audio_header", "audio_decode", *streams), length


@pytest.mark.parametrize("settle", [settle_image, settle_audio])
def test_empty_and_zero_bytes(settle: Callable[[bytes], str]) -> None:
    assert settle(b"") == "no_data"
    for count in (1, 2, 11, 12, 1000, 100_000):
        assert settle(bytes(count)).endswith("_header")


def test_content_decides_not_the_name() -> None:
    assert settle_image(recording("WAV")) == "image_header"
    assert settle_audio(picture("WEBP")) == "audio_header"  # both are RIFF
    for name in PICTURES:
        assert settle_audio(PICTURES[name]()) == "audio_header"
    for name in RECORDINGS:
        assert settle_image(RECORDINGS[name]()) == "image_header"
    assert settle_image(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "image_header"
    assert settle_image(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "image_header"  # would start a program
    assert settle_audio(b"MATLAB 5.0 MAT-file") == "audio_header"


marks = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"MM\0+",
    b"P6 ",
    b"P3 ",
    b"Pf ",
]
marks += [
    b"RIFF\xff\xff\0\0WEBPVP8X",
    b"RIFF\xff\xff\0\0WEBPVP8L",
    b"RIFF\xff\xff\0\0WEBPVP8 ",
    b"II*\0\x08\0\0\0\x01\0",
]
sounds = [
    b"",
    b"RIFF\xff\xff\0\0WAVE",
    b"RIFF\xff\xff\0\0WAVEfmt \x10\0\0\0\x01\0",
    b"RIFX\0\0\0\0WAVE",
    b"RF64\xff\xff\xff\xffWAVEds64",
]
sounds += [
    b"fLaC",
    b"fLaC\0\0\0\x22",
    b"OggS",
    b"OggS\0\x02",
    b"ID3\x04\0",
    b"\xff\xfb\x90",
    b".snd",
    b"FORM\0\0\xff\xffAIFF",
    b"FORM\0\0\0\0AIFC",
]


@settings(max_examples=200)
@given(mark=st.sampled_from(marks), tail=st.binary(max_size=200))
@example(mark=b"P6 ", tail=b"99999999999999999999 1 255\n")
@example(mark=b"P6 ", tail=b"0 0 255\n")
@example(mark=b"GIF89a", tail=bytes(100))
def test_random_bytes_as_a_picture(mark: bytes, tail: bytes) -> None:
    settle_image(mark + tail)


@settings(max_examples=200)
@given(mark=st.sampled_from(sounds), tail=st.binary(max_size=200))
def test_random_bytes_as_a_recording(mark: bytes, tail: bytes) -> None:
    settle_audio(mark + tail)


def damaged(data: bytes, flips: list[tuple[float, int]], start: float) -> bytes:
    """Bits are flipped: half of them anywhere, half in the header."""
    broken = bytearray(data)
    for index, (place, bit) in enumerate(flips):
        within = len(broken) if index % 2 else min(64, len(broken))
        broken[int(place * within)] ^= 1 << bit
    return bytes(broken[int(start * len(broken)) if start > 0.9 else 0 :])


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=6)


@settings(max_examples=250)
@given(name=st.sampled_from(list(PICTURES)), flips=flips, start=st.floats(0, 1))
def test_flipped_bits_in_pictures(name: str, flips: list[tuple[float, int]], start: float) -> None:
    settle_image(damaged(PICTURES[name](), flips, start))


@settings(max_examples=250)
@given(name=st.sampled_from(list(RECORDINGS)), flips=flips, start=st.floats(0, 1))
def test_flipped_bits_in_recordings(name: str, flips: list[tuple[float, int]], start: float) -> None:
    settle_audio(damaged(RECORDINGS[name](), flips, start))


# Pictures that lie


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def patched(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


def bombs() -> dict[str, bytes]:
    """Small files whose header promises a huge picture."""
    jpeg, tiff, bmp = picture("JPEG"), picture("TIFF"), picture("BMP")
    frame = jpeg.index(b"\xff\xc0")
    for tag, size in ((256, 100_000), (257, 100_000)):  # width and length, each a 32-bit number
        for kind in (3, 4):
            at = tiff.find(struct.pack("<HHI", tag, kind, 1))
            if at >= 0:
                tiff = patched(tiff, at, struct.pack("<HHII", tag, 4, 1, size))
    return {
        "png": png_of(100_000, 100_000),
        "jpeg": patched(jpeg, frame + 5, struct.pack(">HH", 65_000, 65_000)),
        "gif": patched(picture("GIF"), 6, struct.pack("<HH", 65_535, 65_535)),
        "bmp": patched(bmp, 18, struct.pack("<ii", 100_000, 100_000)),
        "tiff": tiff,
        "ppm": b"P6\n100000 100000\n255\n" + bytes(100),
        "plain ppm": b"P3\n100000 100000\n255\n1 2 3",
        "webp": b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\x00" * 2 + bytes(10),
        "webp lossless": patched(picture("WEBP", lossless=True), 21, b"\xff\xff\xff\x0f"),
        "webp lossy": patched(picture("WEBP"), 26, struct.pack("<HH", 0x3FFF, 0x3FFF)),
    }


@pytest.mark.parametrize("name", list(bombs()))
def test_a_bomb_is_refused_by_its_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import WebPImagePlugin

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the picture was decoded")

    data = bombs()[name]
    for owner, attribute in ((ImageFile.ImageFile, "load"), (WebPImagePlugin._webp, "WebPAnimDecoder")):
        monkeypatch.setattr(owner, attribute, refuse)
    monkeypatch.setattr(Image.core, "new", refuse)
    monkeypatch.setattr(Image.core, "fill", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settle_image(data) == "image_too_large"


def test_the_limit_is_the_settings_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow warns above it, and refuses above twice as much
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("JPEG", "PNG", "GIF", "BMP", "PPM"):
            data = picture(kind)
            assert settle_image(data) == "good"
            assert image_facts(data, 40 * 52) == (40, 52)
            with pytest.raises(BadSample, match=r"image_too_large: .* 52 x 40 = 2,080 pixels; at most 2,079"):
                image_facts(data, 40 * 52 - 1)
        # Its TIFF reader looks at its own limit all the same.
        assert settle_image(picture("TIFF")) == "image_too_large"
    assert Image.MAX_IMAGE_PIXELS == 900


def test_comments_and_profiles_are_not_read() -> None:
    """A comment of 100 MB in 100 kB, and a colour profile that is none: the picture is what it would be without."""
    data = picture("PNG")
    packed = zlib.compress(bytes(100_000_000), 9)
    comment = chunk(b"zTXt", b"Comment\0\0" + packed)
    international = chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed)
    profile = chunk(b"iCCP", b"profile\0\0" + packed)
    broken = chunk(b"tEXt", b"")[:-1] + b"!"  # with a false check sum
    header, end = data[:33], data[-12:]
    hostile = header + comment + international + profile + broken + data[33:-12] + comment + end
    assert settle_image(hostile) == "good"
    assert (IMAGE.pixels(hostile) == IMAGE.pixels(data)).all()
    for kind in ("JPEG", "WEBP", "TIFF"):
        with_profile = picture(kind, icc_profile=b"no profile at all" * 100)
        assert (IMAGE.pixels(with_profile) == IMAGE.pixels(picture(kind))).all()


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = picture("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert settle_image(data[:-2] + 3 * data[last:-2] + data[-2:]) in ("good", "image_decode")
    with pytest.raises(BadSample, match=r"image_decode: JPEG of 10\d\d scans"):
        image_facts(data[:-2] + 1000 * data[last:-2] + data[-2:], 10**6)


def test_headers_of_no_size() -> None:
    frame = picture("JPEG").index(b"\xff\xc0")
    for data in (
        png_of(0, 10),
        png_of(10, 0),
        patched(picture("JPEG"), frame + 5, bytes(4)),
        patched(picture("BMP"), 18, bytes(8)),
        b"P6 0 10 255\n",
    ):
        assert settle_image(data) == "image_header"


# Recordings that lie


def wav_at(data: bytes, name: bytes) -> int:
    return data.index(name) + 8


def test_no_samples() -> None:
    for kind in ("WAV", "AIFF", "AU"):
        assert settle_audio(recording(kind, length=0)) == "audio_empty"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_that_are_no_numbers(value: float, subtype: str) -> None:
    samples = np.zeros((3000, 2))
    samples[100, 1] = value
    stream = io.BytesIO()
    soundfile.write(stream, samples, 8000, subtype, format="WAV")
    assert settle_audio(stream.getvalue()) == "audio_not_finite"


@pytest.mark.parametrize("rate", [0, 1, 99, 400_000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_rates_that_can_not_be(rate: int) -> None:
    data = recording("WAV", "PCM_16")
    data = patched(data, wav_at(data, b"fmt ") + 4, struct.pack("<I", rate))
    assert settle_audio(data) == "audio_header"


def test_a_header_that_promises_more_than_there_is() -> None:
    data = recording("WAV", "PCM_16")
    at = wav_at(data, b"data") - 4
    assert int.from_bytes(data[at : at + 4], "little") == 36_000
    for promised in (36_001, 72_000, 0x7FFFFFFF, 0xFFFFFFFE):
        with pytest.raises(BadSample, match=rf"audio_decode: false header: {promised:,} bytes .* 36,000 there"):
            audio_facts(patched(data, at, struct.pack("<I", promised)), 3600)
    # Written into a pipe: the length was not known.
    assert audio_facts(patched(data, at, b"\xff" * 4), 3600) == (9000, 8000)
    # A flac whose header counts more samples than follow, and one that is absurd.
    flac = recording("FLAC")
    count = int.from_bytes(flac[18:26], "big")
    assert count & (1 << 36) - 1 == 9000
    longer = patched(flac, 18, (count + 5000).to_bytes(8, "big"))
    assert settle_audio(longer) == "audio_decode"
    absurd = patched(flac, 18, (count | (1 << 36) - 1).to_bytes(8, "big"))
    assert settle_audio(absurd) == "audio_too_long"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """libsndfile calls back into Python, where errors would be printed and the worker's log filled."""
    rng = np.random.default_rng(0)
    # libmpg123, and libtiff on damaged LZW, write notes of their own.
    for name in (name for name in RECORDINGS if name != "mp3"):
        for _ in range(20):
            flips = [(rng.random(), int(rng.integers(8))) for _ in range(4)]
            settle_audio(damaged(RECORDINGS[name](), flips, 0.0))
    for name in (name for name in PICTURES if name != "lzw"):
        for length in cuts(PICTURES[name]()):
            settle_image(PICTURES[name]()[:length])
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""
