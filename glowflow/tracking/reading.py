"""Runs as an MLflow store has them: found in one search, with the curves of chosen metrics where those are needed.

Only MLflow's public client is used. It reads one curve at a time: against a server that means waiting, and threads
help; in a SQLite file it means searching, and statistics help, which a copy gets for the purpose.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import gc
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.tracking.base import Point
from glowflow.tracking.client import connect, redact, sqlite_path
from glowflow.tracking.curves import Curve
from glowflow.tracking.request import KIND_TAG, SWEEP_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["TRIAL_STATUS_TAG", "MlflowRun", "StoreReader", "collector_off", "find_runs", "parse_param"]

logger = logging.getLogger(__name__)

TRIAL_STATUS_TAG = "glowflow.sweep.status"  # MLflow has no word for a trial that was stopped early
_PAGE = 1000
_SERVER_THREADS = 16
_MANY = 24  # histories for which a copy of a SQLite file is made, if the file is not larger than so much for each
_BYTES_PER_HISTORY = 8 * 2**20

_TOKENS_PER_STEP = ("training.batch_size", "data.context")

Wanted = tuple[str, str]  # run id, metric


@dataclass(frozen=True)
class MlflowRun:
    """One run; ``params`` are values again, ``metrics`` the last one of each, times Unix milliseconds."""

    run_id: str
    name: str
    status: str
    started_ms: int | None
    ended_ms: int | None
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def steps(self) -> int | None:
        """How far it trained, from the tokens of its last log step; None where steps differ in their tokens."""
        if self.params.get("model.arch") == "multimodal":
            return None
        tokens, batch, context = self.metrics.get("tokens"), *map(self.params.get, _TOKENS_PER_STEP)
        return round(tokens / (batch * context)) if tokens is not None and batch and context else None


@functools.lru_cache(maxsize=65536)
def parse_param(text: str) -> Any:
    """The value that was written as a param by ``str``: a number, None, True, a list, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


class StoreReader:
    """Reads one store.

    Args:
        uri: the store.

    Raises:
        RunError: it cannot be reached or is not there.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        path = sqlite_path(uri)
        if path is not None and not path.is_file():  # asking must not make it
            hint = "name the storage or the URI"
            raise RunError(Problem("tracking.uri", "no MLflow store is there", redact(uri), hint))
        with self._asking():
            self._client = connect(uri)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            with collector_off():
                yield
        except GlowFlowError:
            raise
        except Exception as error:
            raise RunError(Problem("tracking.uri", f"MLflow does not answer: {error}", redact(self._uri))) from error

    def runs(self, experiment: str | None, condition: str = "") -> list[MlflowRun]:
        """The runs of an experiment (None: of all), newest first.

        Args:
            experiment: its name.
            condition: in MLflow's search syntax.

        Raises:
            RunError: the store does not answer, or it has no such experiment.
        """
        with self._asking():
            names = sorted(str(found.name) for found in self._client.search_experiments())
            runs = find_runs(self._client, experiment, condition)
        if experiment is not None and experiment not in names:
            close = difflib.get_close_matches(experiment, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise RunError(Problem("experiment", "is not in MLflow", experiment, hint))
        return runs

    def histories(self, wanted: Sequence[Wanted]) -> dict[Wanted, Curve]:
        """Whole curves, point by point.

        Args:
            wanted: (run id, metric).

        Raises:
            RunError: the store does not answer.
        """
        with self._asking():
            if sqlite_path(self._uri) is None:
                with ThreadPoolExecutor(_SERVER_THREADS) as pool:
                    found = list(pool.map(functools.partial(_history, self._client), wanted))
            elif _worth_a_copy(self._uri, len(wanted)):
                found = self._from_copy(wanted)
            else:
                found = [_history(self._client, key) for key in wanted]
        return dict(zip(wanted, found, strict=True))

    def _from_copy(self, wanted: Sequence[Wanted]) -> list[Curve]:
        with tempfile.TemporaryDirectory(prefix="glowflow-") as folder:
            copy = _analysed_copy(self._uri, folder)
            client = self._client if copy is None else connect(copy)
            try:
                return [_history(client, key) for key in wanted]
            finally:
                for path in filter(Path.is_file, Path(folder).iterdir()):
                    os.truncate(path, 0)  # MLflow keeps its connection: a file that is only unlinked would stay


def find_runs(client: MlflowClient, experiment: str | None, condition: str = "") -> list[MlflowRun]:
    """As ``search_runs``, with a client; whatever the client raises passes through."""
    experiments = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
    runs: list[MlflowRun] = []
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, condition, max_results=_PAGE, page_token=token)
        runs.extend(map(_mlflow_run, page))
        token = page.token
        if not token:
            break
    return runs


def _mlflow_run(run: Any) -> MlflowRun:
    info, data = run.info, run.data
    sweep = data.tags.get(SWEEP_TAG) if data.tags.get(KIND_TAG) == "trial" else None
    stopped = info.status == "KILLED" and data.tags.get(TRIAL_STATUS_TAG) == "STOPPED"
    return MlflowRun(
        run_id=info.run_id,
        name=f"{sweep}/{info.run_name}" if sweep else info.run_name,
        status="STOPPED" if stopped else info.status,
        started_ms=info.start_time,
        ended_ms=info.end_time or None,
        params={key: parse_param(value) for key, value in data.params.items()},
        metrics=data.metrics,
        tags=data.tags,
    )


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection: hundreds of thousands of rows are no garbage, and looking at them takes half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _history(client: MlflowClient, key: Wanted) -> Curve:
    first: dict[int, Point] = {}
    for row in client.get_metric_history(*key):  # by time
        first.setdefault(row.step, Point(key[1], row.step, row.value, row.timestamp))
    return Curve([first[step] for step in sorted(first)])


def _analysed_copy(uri: str, folder: str) -> str | None:
    """A copy of a SQLite store for reading, with statistics; None where it cannot be made.

    Without statistics SQLite reads each curve by going through that metric of all runs: the time grows with the square
    of the number of runs. The user's file is not ours to write them into.
    """
    path = sqlite_path(uri)
    assert path is not None
    copy = Path(folder) / path.name
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source:
            with contextlib.closing(sqlite3.connect(copy)) as target:
                target.execute("PRAGMA synchronous = OFF")
                source.backup(target)
                target.execute("ANALYZE")
    except sqlite3.Error as error:
        logger.info("no copy of %s, reading it as it is: %s", path, error)
        return None
    return f"sqlite:///{copy}"


def _worth_a_copy(uri: str, num_histories: int) -> bool:
    path = sqlite_path(uri)
    if path is None or num_histories < _MANY:
        return False
    size = path.stat().st_size
    return size < num_histories * _BYTES_PER_HISTORY and shutil.disk_usage(tempfile.gettempdir()).free > 4 * size
