"""Memory of processes that prepare very large pictures: the limit is read from headers, decoding reduces first."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import glowflow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")

ROOT = Path(glowflow.__file__).resolve().parents[1]
COUNT, HUGE = 2000, 5

_MEMORY = """
import sys
from pathlib import Path
from glowflow.config.media import ImageConfig
from glowflow.data.processors.image import ImageProcessor, check_image
data = open(sys.argv[1], "rb").read()
config = ImageConfig(size=224)
assert check_image(data, config) == (12_000, 12_000)
assert ImageProcessor(config).pixels(data, None).shape == (224, 224, 3)
# Not ru_maxrss, in which a process inherits the peak of the one that started it.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def run_python(code: str, *arguments: str) -> str:
    """The last line that a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def peak_of(path: Path) -> int:
    """Largest resident memory in MiB of a process that checks and prepares a picture."""
    return int(run_python(_MEMORY, str(path)))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def plain_png(height: int, width: int, row: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of equal rows, written without a picture in memory."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(b"\0" + row) for _ in range(height)] + [packer.flush()]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_png_of_144_megapixels_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(plain_png(12_000, 12_000, bytes(range(250)) * 144))
    assert peak_of(path) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("colour", [6, 4, 0])  # with transparency, grey with transparency, 16-bit grey
def test_other_modes_of_144_megapixels_in_little_memory(colour: int, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    row = bytes(range(240)) * (12_000 * {6: 4, 4: 2, 0: 2}[colour] // 240)
    path.write_bytes(plain_png(12_000, 12_000, row, 16 if colour == 0 else 8, colour))
    assert peak_of(path) < 1000


_LARGE_JPEG = """
import sys
from PIL import Image
picture = Image.linear_gradient("L").resize((12_000, 12_000))
Image.merge("RGB", [picture] * 3).save(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("JPEG", {}, 600),
        ("JPEG", {"progressive": True, "subsampling": 0}, 1500),
        ("TIFF", {"compression": "tiff_lzw"}, 1500),
        ("BMP", {}, 1500),
    ],
)
def test_other_formats_of_144_megapixels_in_little_memory(kind: str, options: dict, most: int, tmp_path: Path) -> None:
    path = tmp_path / "large"
    run_python(_LARGE_JPEG, str(path), kind, repr(options))
    assert peak_of(path) < most


_STREAM = """
import json, sys, threading
from dataclasses import replace
import psutil, ray
from glowflow.config.loader import load_config
from glowflow.data.build import build
from glowflow.data.plan import plan
from glowflow.data.samples.view import media_view
from glowflow.data.stream import ray_stream

peak, done = {}, threading.Event()

def watch():
    while not done.wait(0.02):
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                memory, name = process.memory_info(), process.name()
            except psutil.Error:
                continue
            peak[name] = max(peak.get(name, 0), memory.rss - memory.shared)

folder, out = sys.argv[1:]
threading.Thread(target=watch, daemon=True).start()
manifest = build(folder, out, "bytes", use_ray=False)
data = {"context": 64, "layout": "bucketed", "image": {"size": 64}}
model = {"arch": "multimodal", "dim": 32, "depth": 1, "heads": 2, "image": {"encoder": "conv", "channels": [8, 8]}}
view = replace(media_view(load_config({"model": model, "data": data}), training=True), places=False)
made = plan([(manifest, 1.0)], seed=0, context=64, global_batch=20, layout="bucketed", view=view)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
shapes = set()
for step in ray_stream(made, 0, -(-made.sequences_per_epoch // 20)):
    media = step.micro_batches[0].modalities["image"]
    shapes.add(tuple(media.features.shape[1:]))
    assert media.present.all() and not step.bad_samples
ray.shutdown()
done.set()
print(json.dumps({"peak": peak, "shapes": sorted(shapes), "images": manifest.media["images"]}))
"""


def write_mixed_sizes(folder: Path, count: int, huge: int) -> None:
    """PNG files of 64 to 4,000 pixels a side, evenly on a logarithmic scale, and some of 12,000 x 12,000."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(64), np.log(4000), (count, 2))).astype(int)
    sides[:: count // huge] = 12_000  # the last tenth is for validation and test
    for number, (height, width) in enumerate(sides.tolist()):
        row = (rng.bytes(300) * (width // 100 + 1))[: 3 * width]
        (folder / f"{number}.png").write_bytes(plain_png(height, width, row))
    lines = [f'{{"file_name": "{number}.png", "text": "picture {number}"}}\n' for number in range(count)]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.mark.slow
def test_two_thousand_pictures_of_mixed_sizes_stream_in_little_memory(tmp_path: Path) -> None:
    """Built and streamed through Ray Data; of every process what is its own alone is watched."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_mixed_sizes(folder, COUNT, HUGE)
    found = json.loads(run_python(_STREAM, str(folder), str(tmp_path / "built")))
    assert found["images"] == COUNT
    assert found["shapes"] == [[3, 64, 64]]
    tasks = [most for name, most in found["peak"].items() if name.startswith("ray::MapBatches")]
    assert 500_000_000 < max(tasks)  # the large ones were decoded, and watched
    assert max(found["peak"].values()) < 2 << 30, found["peak"]
