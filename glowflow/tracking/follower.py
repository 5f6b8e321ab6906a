"""A daemon thread that reads the spool behind its writer and brings MLflow level, about every two seconds.

The spool on disk is the queue: nothing piles up in memory however long the tracker is away, and a new process goes
on where the last one was. A tracker that is down is asked again later and later (up to a minute); nothing raises.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from glowflow.tracking.base import RunStatus
from glowflow.tracking.client import connect, is_permanent
from glowflow.tracking.files import read_json, write_json
from glowflow.tracking.jsonl import beat
from glowflow.tracking.request import RunRequest, ensure_run
from glowflow.tracking.sender import CheckpointSender, send_points
from glowflow.tracking.spool import CHECKPOINTS_NAME, METRICS_NAME, SpoolTail, read_checkpoints

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from glowflow.tracking.base import Point

__all__ = ["SENT_NAME", "MlflowFollower"]

logger = logging.getLogger(__name__)

SENT_NAME = ".mlflow-sent.json"


class MlflowFollower:
    """Follows RUN/metrics.jsonl and RUN/checkpoints.jsonl, whoever writes them, in this process or another.

    Args:
        run_dir: the run directory, with the request that ``create_run`` left there.
        interval: seconds between batches while the tracker answers.
        max_backoff: longest wait in seconds while it does not.
    """

    def __init__(self, run_dir: str | Path, *, interval: float = 2.0, max_backoff: float = 60.0) -> None:
        self.run_dir = Path(run_dir)
        self._interval, self._max_backoff = interval, max_backoff
        self._wake = threading.Event()
        self._done = threading.Event()
        self._stop = threading.Event()
        self._final: RunStatus | None = None
        self._request = RunRequest.load(self.run_dir)
        self._client: MlflowClient | None = None
        self._checkpoints: CheckpointSender | None = None
        self._tail: SpoolTail | None = None
        self._pending: list[Point] = []
        self._failures = 0
        self._complained = False
        self._checkpoints_mtime = 0
        self._thread = threading.Thread(target=self._run, name="glowflow-mlflow", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None as long as the tracker could not be reached."""
        return self._request.run_id if self._request is not None else None

    def start(self) -> None:
        self._thread.start()

    def finish(self, status: RunStatus, timeout: float = 15.0) -> bool:
        """Send the rest and set the run's status.

        Returns:
            False where that did not end within ``timeout`` seconds; ``sync`` makes up for it later.
        """
        if not self._thread.is_alive():
            return self._done.is_set()
        self._final = status
        self._wake.set()
        ended = self._done.wait(timeout)
        if not ended:
            text = "MLflow did not take everything in time; bring it level with `glowflow runs sync %s`"
            logger.warning(text, self.run_dir.name)
        self.close()
        return ended

    def close(self) -> None:
        """Stop; what was not sent stays in the spool."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._delay())
            self._wake.clear()
            if self._stop.is_set():
                return
            beat(self.run_dir)
            try:
                self._round()
            except Exception as error:
                if not self._survives(error):
                    return
            else:
                self._recovered()
                if self._final is not None:
                    self._done.set()
                    return

    def _delay(self) -> float:
        if self._final is not None:  # the driver is waiting: try again soon
            return 0.5
        return min(self._interval * 2.0**self._failures, max(self._max_backoff, self._interval))

    def _round(self) -> None:
        """Everything new, once; whatever raises leaves the rest for the next round."""
        if self._request is None:
            raise FileNotFoundError(f"{self.run_dir} holds no request for an MLflow run")
        if self._client is None:
            self._client = connect(self._request.uri)
        self._request = request = ensure_run(self._client, self._request, self.run_dir)
        assert request.run_id is not None and request.experiment_id is not None
        self._send_points(self._client, request.run_id)
        if self._checkpoints is None:
            self._checkpoints = CheckpointSender(self._client, request.run_id, request.experiment_id, request.name)
        self._send_checkpoints(self._checkpoints)
        if self._final is not None:
            self._client.set_terminated(request.run_id, self._final)

    def _send_points(self, client: MlflowClient, run_id: str) -> None:
        if self._tail is None:
            self._tail = SpoolTail(self.run_dir / METRICS_NAME, self._sent_offset(run_id))
        while not self._stop.is_set():
            self._pending = self._pending or self._tail.read()
            if not self._pending:
                return
            send_points(client, run_id, self._pending)
            self._pending = []
            # Only a hint: identical rows may be sent again, and `sync` asks the tracker itself.
            write_json(self.run_dir / SENT_NAME, {"run_id": run_id, "offset": self._tail.offset})

    def _sent_offset(self, run_id: str) -> int:
        hint = read_json(self.run_dir / SENT_NAME) or {}
        offset = hint.get("offset")
        return offset if hint.get("run_id") == run_id and isinstance(offset, int) else 0

    def _send_checkpoints(self, sender: CheckpointSender) -> None:
        path = self.run_dir / CHECKPOINTS_NAME
        try:
            modified = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if modified != self._checkpoints_mtime or self._final is not None:
            events = read_checkpoints(path)
            sender.send(events)
            if self._final is not None:
                sender.mark_pruned(events)
            self._checkpoints_mtime = modified

    def _survives(self, error: Exception) -> bool:
        """Say once what is wrong; False where trying again is useless."""
        if is_permanent(error):
            logger.warning("MLflow gets no more of this run (its metrics stay in %s): %s", METRICS_NAME, error)
            return False
        self._failures = min(self._failures + 1, 10)
        if not self._complained:
            logger.warning("MLflow does not answer, training goes on and metrics wait in %s: %s", METRICS_NAME, error)
            self._complained = True
        if not isinstance(error, ConnectionError):
            self._client, self._checkpoints = None, None  # reconnect: a server may have come back elsewhere
        return True

    def _recovered(self) -> None:
        if self._complained:
            logger.warning("MLflow answers again (%s)", time.strftime("%H:%M:%S"))
        self._failures, self._complained = 0, False
