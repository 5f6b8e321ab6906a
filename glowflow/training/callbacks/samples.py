"""Which sequences each step saw: RUN/samples/rank-R.jsonl, one line per step and rank.

Lines are ``{"step", "ids", "world_size"}`` with the plan's step (from 0) and the ids in this rank's order. Steps
that are replayed after a restart are appended again; the reader keeps the last entry and joins the ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from glowflow.core.batch import StepBatches
from glowflow.training.callbacks.base import Callback

__all__ = ["SampleLog", "read_samples"]


class SampleLog(Callback):
    """Appends to this rank's file and flushes each step, so that a killed process loses nothing."""

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        self.path = run_dir / "samples" / f"rank-{rank}.jsonl"
        self.world_size = world_size
        self._file: IO[str] | None = None

    def on_step_end(self, batches: StepBatches) -> None:
        # The stream hands out host tensors: this reads no device.
        ids = [sample for batch in batches.micro_batches for sample in batch.sample_ids.tolist()]
        line = {"step": batches.step, "ids": ids, "world_size": self.world_size}
        self._file = self._file or self._open()
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()

    def _open(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = _ends_torn(self.path)
        file = self.path.open("a", encoding="utf-8")
        if torn:
            file.write("\n")
        return file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _ends_torn(path: Path) -> bool:
    """Whether the last line was cut off by a kill."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _last_entries(path: Path) -> dict[int, dict[str, Any]]:
    entries: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a kill in the middle of a write; the step was replayed
                continue
            entries[entry["step"]] = entry
    return entries


def read_samples(run_dir: Path) -> dict[int, list[int]]:
    """Sample ids of every step in global order, {plan step: [ids of rank 0, rank 1, ...]}.

    A step counts for the number of workers that rank 0 ran it with last; steps that some rank has not logged are
    left out (the run was killed in the middle of them).
    """
    folder = run_dir / "samples"
    by_rank: dict[int, dict[int, dict[str, Any]]] = {}
    for path in folder.glob("rank-*.jsonl"):
        by_rank[int(path.stem.removeprefix("rank-"))] = _last_entries(path)
    merged: dict[int, list[int]] = {}
    for step, first in sorted(by_rank.get(0, {}).items()):
        world_size = first["world_size"]
        parts = [by_rank.get(rank, {}).get(step) for rank in range(world_size)]
        if all(part is not None and part["world_size"] == world_size for part in parts):
            merged[step] = [sample for part in parts if part is not None for sample in part["ids"]]
    return merged
