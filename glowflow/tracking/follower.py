"""A daemon thread that reads the spool behind its writer and brings MLflow level, about every two seconds.

The spool on disk is the queue: nothing piles up in memory however long the tracker is away, and a new process goes
on where the last one was. A tracker that is down is asked again later and later (up to a minute); nothing raises.
Several runs of one process, the trials of a sweep, have a thread each and share a ``Link`` to their store.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from glowflow.tracking.base import RunStatus
from glowflow.tracking.client import connect, is_permanent, sqlite_path
from glowflow.tracking.curves import SUMMARY_TAG, encode_summary
from glowflow.tracking.files import read_json, write_json
from glowflow.tracking.jsonl import beat
from glowflow.tracking.request import RunRequest, change_request, ensure_run, send_late_tags
from glowflow.tracking.sender import CheckpointSender, send_points
from glowflow.tracking.spool import CHECKPOINTS_NAME, METRICS_NAME, SpoolTail, read_checkpoints, read_points

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from glowflow.tracking.base import Point

__all__ = ["SENT_NAME", "Link", "MlflowFollower", "send_artifacts", "terminate"]

logger = logging.getLogger(__name__)

SENT_NAME = ".mlflow-sent.json"
_AWAY = f"MLflow does not answer, training goes on and metrics wait in {METRICS_NAME}"


class Link:
    """What the followers of one store share: one of them writes at a time to a SQLite file, one speaks for all.

    Args:
        uri: of the store.
    """

    def __init__(self, uri: str = "") -> None:
        is_file = sqlite_path(uri) is not None
        self.turn: contextlib.AbstractContextManager[object] = threading.Lock() if is_file else contextlib.nullcontext()
        self._away = threading.Event()

    @property
    def away(self) -> bool:
        """Whether the tracker did not answer when it was asked last."""
        return self._away.is_set()

    def lost(self, error: BaseException, text: str = _AWAY) -> None:
        """The tracker does not answer; said once until it does."""
        if not self.away:
            logger.warning("%s: %s", text, error)
        self._away.set()

    def found(self) -> None:
        """The tracker answers."""
        if self.away:
            logger.warning("MLflow answers again (%s)", time.strftime("%H:%M:%S"))
        self._away.clear()


class MlflowFollower:
    """Follows RUN/metrics.jsonl and RUN/checkpoints.jsonl, whoever writes them, in this process or another.

    Late tags and artifacts that somebody adds to the request in the run directory are sent as well.

    Args:
        run_dir: the run directory, with the request that ``create_run`` left there.
        interval: seconds between batches while the tracker answers.
        max_backoff: longest wait in seconds while it does not.
        link: shared with other followers of the same store; None: this one is alone.
    """

    def __init__(
        self, run_dir: str | Path, *, interval: float = 2.0, max_backoff: float = 60.0, link: Link | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self._link = link or Link()
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
        self._checkpoints_mtime = 0
        self._tags: dict[str, str] | None = None
        self._artifacts_tried: set[tuple[str, str]] = set()
        self._thread = threading.Thread(target=self._run, name="glowflow-mlflow", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None as long as the tracker could not be reached."""
        return self._request.run_id if self._request is not None else None

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to send now."""
        self._wake.set()

    def finish(self, status: RunStatus, timeout: float = 15.0, *, quiet: bool = False) -> bool:
        """Send the rest and set the run's status.

        Args:
            status: how the run ended.
            timeout: seconds to wait at most.
            quiet: somebody else says what was not sent.

        Returns:
            False where that did not end within ``timeout`` seconds; ``sync`` makes up for it later.
        """
        if not self._thread.is_alive():
            return self._done.is_set()
        self._final = status
        self._wake.set()
        ended = self._done.wait(timeout)
        if not ended and not quiet:
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
            # Read before the round looks at the disk: whatever was written before `finish` must be sent with the end.
            final = self._final
            try:
                with self._link.turn:
                    self._round(final)
            except Exception as error:
                if not self._survives(error):
                    return
            else:
                self._failures = 0
                self._link.found()
                if final is not None:
                    self._done.set()
                    return

    def _delay(self) -> float:
        if self._final is not None:  # the driver is waiting: try again soon
            return 0.5
        return min(self._interval * 2.0**self._failures, max(self._max_backoff, self._interval))

    def _round(self, final: RunStatus | None) -> None:
        """Everything new, once; whatever raises leaves the rest for the next round."""
        self._request = RunRequest.load(self.run_dir) or self._request
        if self._request is None:
            raise FileNotFoundError(f"{self.run_dir} holds no request for an MLflow run")
        if self._client is None:
            self._client = connect(self._request.uri)
        self._request = request = ensure_run(self._client, self._request, self.run_dir)
        assert request.run_id is not None and request.experiment_id is not None
        self._send_points(self._client, request.run_id)
        self._send_tags(self._client, request)
        if self._checkpoints is None:
            self._checkpoints = CheckpointSender(self._client, request.run_id, request.experiment_id, request.name)
        self._send_checkpoints(self._checkpoints, final)
        self._send_artifacts(self._client, request, final)
        if final is not None:
            assert self._tail is not None
            terminate(self._client, request, self.run_dir, final, self._tail.offset)

    def _send_tags(self, client: MlflowClient, request: RunRequest) -> None:
        if not request.late_tags:
            return
        if self._tags is None:
            self._tags = dict(client.get_run(str(request.run_id)).data.tags)
        self._tags |= send_late_tags(client, request, self._tags)

    def _send_artifacts(self, client: MlflowClient, request: RunRequest, final: RunStatus | None) -> None:
        """Each folder once, and again at the end where that did not work: an artifact store holds nobody else up."""
        waiting = set(request.artifacts.items())
        if waiting - self._artifacts_tried or (waiting and final is not None):
            self._artifacts_tried |= waiting
            try:
                send_artifacts(client, request, self.run_dir)
            except Exception as error:
                text = "the files for MLflow stay in %s (`glowflow runs sync %s` tries again): %s"
                logger.warning(text, self.run_dir, self.run_dir.name, error)

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

    def _send_checkpoints(self, sender: CheckpointSender, final: RunStatus | None) -> None:
        path = self.run_dir / CHECKPOINTS_NAME
        try:
            modified = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if modified != self._checkpoints_mtime or final is not None:
            events = read_checkpoints(path)
            sender.send(events)
            if final is not None:
                sender.mark_pruned(events)
            self._checkpoints_mtime = modified

    def _survives(self, error: Exception) -> bool:
        """Say once what is wrong; False where trying again is useless."""
        if is_permanent(error):
            logger.warning("MLflow gets no more of this run (its metrics stay in %s): %s", METRICS_NAME, error)
            return False
        self._failures = min(self._failures + 1, 10)
        self._link.lost(error)
        if not isinstance(error, ConnectionError):
            self._client, self._checkpoints = None, None  # reconnect: a server may have come back elsewhere
        return True


def send_artifacts(client: MlflowClient, request: RunRequest, run_dir: Path) -> None:
    """Send the files that wait, and note that they do not wait any more; files sent before are replaced."""
    for sent in request.artifacts.items():
        path, folder = sent
        client.log_artifacts(str(request.run_id), str(run_dir / folder), path)
        change_request(run_dir, functools.partial(_without, sent=sent))


def _without(request: RunRequest, sent: tuple[str, str]) -> RunRequest:
    return replace(
        request, artifacts={key: folder for key, folder in request.artifacts.items() if (key, folder) != sent}
    )


def terminate(client: MlflowClient, request: RunRequest, run_dir: Path, status: RunStatus, offset: int) -> None:
    """All of the spool up to ``offset`` was sent: say what the curves came to, and set the run's status."""
    assert request.run_id is not None
    points = read_points(run_dir / METRICS_NAME)
    if points:
        client.set_tag(request.run_id, SUMMARY_TAG, encode_summary(points))
    client.set_terminated(request.run_id, status, end_time=request.ended_ms)
    write_json(run_dir / SENT_NAME, {"run_id": request.run_id, "offset": offset})
    change_request(run_dir, lambda latest: replace(latest, told=status))
