"""Single-file exports RUN/checkpoints/model-{step}.pt: every ``training.export_interval`` steps and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glowflow.core.batch import StepBatches
from glowflow.core.model import write_single_file
from glowflow.training.callbacks.base import Callback

if TYPE_CHECKING:
    from glowflow.training.loop import LoopResult, TrainLoop

__all__ = ["Exporter"]


class Exporter(Callback):
    """Gathers the full weights (every rank takes part) and lets rank 0 write them."""

    def __init__(self, run_dir: Path, interval: int | None) -> None:
        self.folder = run_dir / "checkpoints"
        self.interval = interval
        self.exported: list[Path] = []
        self._loop: TrainLoop | None = None

    def on_train_start(self, loop: TrainLoop) -> None:
        self._loop = loop

    def on_step_end(self, batches: StepBatches) -> None:
        step = batches.step + 1
        if self.interval is not None and step % self.interval == 0:
            self._export(step)

    def on_train_end(self, result: LoopResult) -> None:
        if result.status == "FINISHED":
            self._export(result.step)
        result.exports = [str(path) for path in self.exported]

    def _export(self, step: int) -> None:
        path = self.folder / f"model-{step}.pt"
        loop = self._loop
        if loop is None or path in self.exported:
            return
        state = loop.strategy.full_state_dict(loop.module)
        if loop.strategy.rank == 0:
            write_single_file(path, loop.config, loop.inputs.tokenizer_spec, state, step)
        self.exported.append(path)
