"""What runs in each Ray Train worker: plain settings in, ``training.session.run_worker``, a plain summary out.

Ray restarts the whole group when a worker fails; each time this function finds our newest complete checkpoint by
itself. An error that no retry can mend (a wrong config, damaged data) is told to the monitor; the driver then ends
the run.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glowflow.config.errors import GlowFlowError
from glowflow.orchestration.job import make_tracker
from glowflow.orchestration.monitor import MonitorLink
from glowflow.tracking.base import Point, Tracker
from glowflow.training.markers import latest_complete, read_info
from glowflow.training.session import AUTO, WorkerArgs, run_worker

__all__ = ["train_loop"]

logger = logging.getLogger(__name__)


def train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker of the group.

    Args:
        settings: ``args`` (``WorkerArgs.to_dict``), ``monitor`` (name and namespace of the actor), ``tracker``
            (arguments of ``make_tracker`` where rank 0 tracks, else None), ``gpu``, ``sequence`` (number of the newest
            checkpoint when the run was started), ``report`` (whether the driver answers reports).

    Returns:
        The summary of ``run_worker``.
    """
    import ray
    import ray.train

    context = ray.train.get_context()
    rank = context.get_world_rank()
    args = WorkerArgs.from_dict(settings["args"])
    _log_to_file(Path(args.run_dir), rank)
    link = MonitorLink(ray.get_actor(*settings["monitor"]), rank=rank)
    tracker = make_tracker(*settings["tracker"]) if rank == 0 and settings["tracker"] is not None else None
    try:
        earlier = link.call("fatal_error")
        if earlier is not None:
            raise earlier
        args.resume, step = _resume_from(args, settings["sequence"])
        if rank == 0:
            link.call("started", step)
        summary = _train(args, settings, link, tracker)
        # Ray keeps a pointer; the checkpoints are ours, and a restart looks for the newest complete one itself.
        ray.train.report({"step": summary["steps"], "checkpoint": (summary["checkpoints"] or [""])[-1]})
        return summary
    except GlowFlowError as error:
        logger.exception("not retried")
        link.call("fatal", error)
        raise
    except Exception as error:
        logger.exception("worker %d failed", rank)
        link.call("failed", rank, f"{type(error).__name__}: {str(error).strip()}", traceback.format_exc())
        raise
    finally:
        link.close()
        if tracker is not None:
            tracker.close()


def _train(args: WorkerArgs, settings: Mapping[str, Any], link: MonitorLink, tracker: Tracker | None) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    from glowflow.config.schema import DataConfig
    from glowflow.data.stream import local_stream, ray_stream

    context = ray.train.get_context()
    rank = context.get_world_rank()
    data = DataConfig(**args.config["data"])

    def sink(points: Sequence[Any]) -> None:
        typed = [Point(*point) for point in points]
        if tracker is not None:
            tracker.log_points(typed)
        link.points(typed)

    def on_checkpoint(step: int, path: str, metrics: dict[str, float]) -> None:
        if rank != 0:
            return
        if tracker is not None:
            tracker.log_checkpoint(step, path, metrics)
        link.checkpoint(step, path, metrics)

    stream = functools.partial(
        ray_stream,
        steps_per_item=data.steps_per_item,
        prefetch_items=data.prefetch_items,
        parallel_items=data.parallel_items,
    )
    return run_worker(
        args,
        open_stream=stream,
        # A pass over a few batches is over before Ray Data's executor would have started.
        open_eval_stream=local_stream,
        rank=rank,
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        device=ray.train.torch.get_device() if settings["gpu"] else "cpu",
        sink=sink,
        stop_requested=link.stop_requested,
        on_checkpoint=on_checkpoint,
        on_report=link.report if settings["report"] else None,
    )


def _resume_from(args: WorkerArgs, sequence: int) -> tuple[str, int]:
    """(what ``WorkerArgs.resume`` shall be, the step there)

    What the driver chose counts until this part of the run has written a checkpoint of its own.
    """
    newest = latest_complete(Path(args.run_dir))
    info = read_info(newest) if newest is not None else None
    if args.resume is not None and (info is None or info.sequence <= sequence):
        chosen = read_info(Path(args.resume))
        return args.resume, chosen.step if chosen is not None else 0
    return AUTO, info.step if info is not None else 0


def _log_to_file(run_dir: Path, rank: int) -> None:
    """GlowFlow's own log of this worker, in RUN/logs, where the user looks (not in Ray's session directory)."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"worker-{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("glowflow")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
