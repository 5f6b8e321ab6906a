"""Pictures and recordings through Ray Data beside a plain torch DataLoader with two workers, over the same files.

    GLOWFLOW_DATA=DIR python benchmarks/media_throughput.py [--samples 24000] [--rounds 5] [--only image]

Photographs of Flickr8k become 64 x 64 pixels, recordings of FSDD 40 log-mels; both sides end with normalised float32
batches in the consumer. The plain side opens each file with Pillow or soundfile, resizes, or makes the spectrogram
with torch, in two worker processes; ours streams a built data set in layout ``bucketed``, as training does. The sides
take turns, each round the other way round. The clock runs from the first fifth of the samples on, when queues are as
full as they stay (less than 20,000 samples are too few for that); the time to the first batch is told apart. A table
of the medians goes to stderr, with what each stage of ours takes for a sample in one process; one JSON document goes
to stdout.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glowflow.config.loader import load_config
from glowflow.data.build import build
from glowflow.data.manifest import Manifest
from glowflow.data.plan import plan
from glowflow.data.samples.collate import collate
from glowflow.data.samples.payload import pack_samples, unpack_samples
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.view import media_view
from glowflow.data.stream import ray_stream

BATCH, SIDE, WARM_SHARE = 64, 64, 0.2
RATE, N_FFT, HOP, MELS = 8000, 256, 80, 40
MODEL = {"arch": "multimodal", "fusion": "prefix", "dim": 32, "depth": 1, "heads": 2}
ENCODER = {"encoder": "conv", "channels": [8, 8, 8]}
DATA: dict[str, dict[str, Any]] = {
    "image": {"image": {"size": SIDE}},
    "audio": {"audio": {"rate": RATE, "n_fft": N_FFT, "hop": HOP, "mels": MELS, "max_seconds": 1.0}},
}


@dataclass
class Case:
    """A kind of media: its files, and the data set built from them."""

    modality: str
    files: list[Path]
    plan: SamplePlan


class Pictures(Dataset[torch.Tensor]):
    """Files to float32 (3, H, W), as a tutorial would write it."""

    def __init__(self, files: list[Path], length: int) -> None:
        self.files, self.length = files, length
        self.order = np.random.default_rng(0).integers(len(files), size=length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.files[self.order[index]]) as picture:
            small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)


class Recordings(Dataset[torch.Tensor]):
    """Files to log-mels, float32 (F, M)."""

    def __init__(self, files: list[Path], length: int) -> None:
        from glowflow.data.processors.mel import mel_bank

        self.files, self.length = files, length
        self.order = np.random.default_rng(0).integers(len(files), size=length)
        self.bank = torch.from_numpy(mel_bank(RATE, N_FFT, MELS, 0.0, None))
        self.window = torch.hann_window(N_FFT)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        import soundfile

        samples, rate = soundfile.read(self.files[self.order[index]], dtype="float32")
        assert rate == RATE
        spectrum = torch.stft(torch.from_numpy(samples[:RATE]), N_FFT, HOP, window=self.window, return_complex=True)
        levels = (self.bank @ spectrum[:, :-1].abs().square()).clamp_(min=1e-10).log10()
        return ((torch.maximum(levels, levels.max() - 8) + 4) / 4).T


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """Spectrograms of one batch, (B, F, M)."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def media_set(modality: str, root: Path, work: Path, most: int | None) -> Case:
    """Unpack the files of a modality, and build a data set of them."""
    folder = work / modality
    folder.mkdir()
    if modality == "image":
        with zipfile.ZipFile(root / "flickr8k" / "images_112.zip") as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:most]
            for name in names:
                (folder / Path(name).name).write_bytes(archive.read(name))
    else:
        for path in sorted((root / "fsdd" / "recordings").glob("*.wav"))[:most]:
            shutil.copy(path, folder)
    files = sorted(folder.iterdir())
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["file_name", "text"])
        writer.writerows([path.name, path.stem] for path in files)
    manifest = build(str(folder), work / f"{modality}-built", "bytes", use_ray=False)
    return Case(modality, files, planned(manifest, modality))


def planned(manifest: Manifest, modality: str) -> SamplePlan:
    """The plan of a training that reads the modality."""
    data = {"context": 512, "layout": "bucketed", **DATA[modality]}
    config = load_config({"model": {**MODEL, modality: ENCODER}, "data": data})
    view = media_view(config, training=False)
    made = plan([(manifest, 1.0)], seed=0, context=512, global_batch=BATCH, layout="bucketed", view=view)
    assert isinstance(made, SamplePlan)
    return made


def steady(batches: Iterator[Any], steps: int) -> dict[str, float]:
    """Samples per second once a fifth of the steps is done, and seconds to the first batch."""
    began, first, warm = time.perf_counter(), 0.0, 0.0
    skipped = max(1, int(steps * WARM_SHARE))
    count = 0
    for count, _ in enumerate(batches, 1):
        if count == 1:
            first = time.perf_counter() - began
        if count == skipped:
            warm = time.perf_counter()
    assert count == steps
    return {"samples_per_second": (steps - skipped) * BATCH / (time.perf_counter() - warm), "first_batch": first}


def ours(case: Case, steps: int) -> dict[str, float]:
    """The Ray Data path."""
    stream = ray_stream(case.plan, 0, steps)
    return steady((step.micro_batches[0].modalities[case.modality] for step in stream), steps)


def theirs(case: Case, steps: int, workers: int) -> dict[str, float]:
    """The plain loader. Its processes are started afresh, since Ray's threads do not survive a fork."""
    kind = Pictures if case.modality == "image" else Recordings
    loader: DataLoader[torch.Tensor] = DataLoader(
        kind(case.files, steps * BATCH),
        BATCH,
        num_workers=workers,
        multiprocessing_context="forkserver",
        collate_fn=None if case.modality == "image" else padded,
    )
    return steady(iter(loader), steps)


def stages(case: Case, steps: int) -> dict[str, float]:
    """Seconds per sample of each stage of ours, in this process alone."""
    from glowflow.data.processors.audio import AudioProcessor
    from glowflow.data.processors.image import ImageProcessor

    def clocked(call: Callable[[], Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        found = call()
        return (time.perf_counter() - began) / (steps * BATCH), found

    view = case.plan.view
    picked = np.random.default_rng(0).integers(len(case.files), size=steps * BATCH)
    contents = [case.files[index].read_bytes() for index in picked]
    prepare = ImageProcessor(view.image).pixels if case.modality == "image" else AudioProcessor(view.audio).features
    prepare(contents[0], None)
    case.plan.step_weights(range(steps))  # the window is read: training does so once in thousands of samples
    decode, _ = clocked(lambda: [prepare(content, None) for content in contents])
    made, samples = clocked(lambda: list(case.plan.samples(range(steps))))
    pack, payload = clocked(lambda: pack_samples(samples, case.plan.step_weights(range(steps))))
    unpack, rows = clocked(lambda: list(unpack_samples(payload)))
    joined, _ = clocked(lambda: [collate(step, view) for step, _ in rows])
    return {"decode": decode, "read and arrange": made - decode, "pack": pack, "unpack": unpack, "collate": joined}


def measure(case: Case, steps: int, rounds: int, workers: int) -> dict[str, Any]:
    """Both sides, alternated."""
    sides = {"glowflow": lambda: ours(case, steps), "dataloader": lambda: theirs(case, steps, workers)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(sides[name]())
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in found.items()
    }
    ratios = [
        one["samples_per_second"] / other["samples_per_second"]
        for one, other in zip(found["glowflow"], found["dataloader"], strict=True)
    ]
    per_sample = stages(case, max(4, min(16, steps)))
    # Two tasks prepare side by side: what a sample takes of the wall, twice, is what the stages must explain.
    wall = 2 / medians["glowflow"]["samples_per_second"]
    in_tasks = per_sample["decode"] + per_sample["read and arrange"] + per_sample["pack"]
    per_sample["transfer and waiting"] = max(0.0, wall - in_tasks - per_sample["unpack"] - per_sample["collate"])
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **medians,
        "stages_ms": {name: 1000 * seconds for name, seconds in per_sample.items()},
    }


def show(modality: str, found: dict[str, Any]) -> None:
    """A small table on stderr."""
    out = io.StringIO()
    print(f"\n{modality}: {found['ratio']:.2f} x the DataLoader (rounds: ", end="", file=out)
    print(", ".join(f"{ratio:.2f}" for ratio in found["ratios"]) + ")", file=out)
    for name in ("glowflow", "dataloader"):
        side = found[name]
        rate = f"{side['samples_per_second']:10,.0f} samples/s"
        print(f"  {name:22}{rate}, first batch after {side['first_batch']:.1f} s", file=out)
    total = sum(found["stages_ms"].values())
    for name, taken in found["stages_ms"].items():
        print(f"  {name:22}{taken:10.3f} ms a sample {taken / total:6.0%}", file=out)
    print(out.getvalue(), end="", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24_000, help="in each turn of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--files", type=int, default=None, help="use only so many (default: all)")
    parser.add_argument("--only", choices=("image", "audio"), default=None)
    given = parser.parse_args()
    if not os.environ.get("GLOWFLOW_DATA"):
        parser.error("GLOWFLOW_DATA must name the folder that holds flickr8k and fsdd")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray reads it when it is imported
    import ray

    root, steps = Path(os.environ["GLOWFLOW_DATA"]), max(2, given.samples // BATCH)
    torch.set_num_threads(1)
    document: dict[str, Any] = {
        "samples": steps * BATCH,
        "rounds": given.rounds,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "ray", "pillow", "soundfile", "numpy")},
    }
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for modality in ("image", "audio") if given.only is None else (given.only,):
                case = media_set(modality, root, Path(folder), given.files)
                document[modality] = measure(case, steps, given.rounds, given.workers)
                show(modality, document[modality])
    finally:
        ray.shutdown()
    json.dump(document, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
