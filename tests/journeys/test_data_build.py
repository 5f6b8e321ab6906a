"""`data build` as a Ray Data job: the same bytes as in one process, and a killed job that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glowflow.config.errors import DataError
from glowflow.config.schema import DataConfig
from glowflow.data.build import BuildOptions, build
from glowflow.data.manifest import Manifest
from tests.data.media_sets import png

pytestmark = pytest.mark.journey
REPOSITORY = Path(__file__).parents[2]
LINE = "def area(width, height): return width * height  # naïve – 戦場 🙂\n"
SCRIPT = (
    "import sys\n"
    "from glowflow.data.build import BuildOptions, build\n"
    "build(sys.argv[1], sys.argv[2], 'bpe:300', options=BuildOptions(unit_bytes=60_000))\n"
)


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"file {number}\n" + LINE * 300 * (number % 4 + 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One small cluster for the tests that do not start their own."""
    ray = pytest.importorskip("ray")
    already = ray.is_initialized()
    if not already:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=120_000_000
        )
    yield
    if not already:
        ray.shutdown()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("index_only", [False, True])
def test_ray_and_one_process_write_the_same_bytes(cluster: None, tmp_path: Path, index_only: bool) -> None:
    if index_only:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (tmp_path / "in").mkdir()
        for split in ("train", "validation"):
            rows = [f"{split} {n} {LINE * (n % 9)}" for n in range(50)]
            pq.write_table(pa.table({"text": rows}), tmp_path / "in" / f"{split}.parquet", row_group_size=11)
        source = tmp_path / "in"
    else:
        source = write_corpus(tmp_path / "in")
    options = BuildOptions(unit_bytes=60_000, index_only=index_only)
    seen: list[tuple[int, int, int]] = []
    ours = build(
        str(source), tmp_path / "ray", "bpe:300", options=options, progress=lambda *counts: seen.append(counts)
    )
    alone = build(str(source), tmp_path / "alone", "bpe:300", options=options, use_ray=False)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
    assert ours.fingerprint == alone.fingerprint and ours.check("hash") == []
    tokens = sum(info.tokens for info in ours.splits.values())
    assert seen[0] == (0, seen[0][1], 0) and seen[-1] == (seen[0][1], seen[0][1], tokens)


def test_bad_rows_are_reported_from_the_workers(cluster: None, tmp_path: Path) -> None:
    lines = ['{"text": "row"}'] * 400
    lines[17] = lines[311] = "{no json"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        build(str(tmp_path / "a.jsonl"), tmp_path / "out", "bytes")
    assert len(caught.value.problems) == 2 and not (tmp_path / "out").exists()


def test_samples_with_media_are_the_same_bytes_on_ray(cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(40):
        (folder / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        content = png(seed=number) if number != 7 else b"no picture"
        (folder / f"{number % 2}" / f"{number}.png").write_bytes(content)
    config, options = DataConfig(on_bad_sample="skip"), BuildOptions(unit_bytes=1)
    ours = build(str(folder), tmp_path / "ray", "bytes", config=config, options=options)
    build(str(folder), tmp_path / "alone", "bytes", config=config, options=options, use_ray=False)
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
    assert ours.media["bad"]["counts"] == {"image_header": 1} and ours.media["images"] == 39
    with pytest.raises(DataError, match=r"1/7\.png: image_header"):
        build(str(folder), tmp_path / "refused", "bytes", options=options)
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_killed_ray_build_goes_on(tmp_path: Path) -> None:
    """The job starts its own cluster, is killed with everything it started, and runs again."""
    source, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", SCRIPT, str(source), str(out)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(out.glob(".building/unit-*.json")):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError):
        Manifest.load(out)
    subprocess.run(command, env=environment, check=True, timeout=300)
    fresh = build(str(source), tmp_path / "fresh", "bpe:300", options=BuildOptions(unit_bytes=60_000), use_ray=False)
    assert files(out) == files(tmp_path / "fresh")
    assert fresh.check("hash") == []
