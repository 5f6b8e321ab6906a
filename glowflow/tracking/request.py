"""The wish for an MLflow run, kept in RUN/.mlflow.json, and its fulfilment, now or when the tracker comes back.

The file holds all that the run is made from, so that the driver, the background thread or ``glowflow runs sync``
can make it, whoever reaches the tracker first; a token in the run's tags keeps them from making it twice. The run of
a trial is the child of its sweep's, whose wish lies in the directory above: it is made first, by whoever needs it.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glowflow.tracking.base import RunStatus
from glowflow.tracking.client import artifact_root, experiment_id
from glowflow.tracking.files import read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "KIND_TAG",
    "PARENT_TAG",
    "STATE_NAME",
    "SWEEP_TAG",
    "TOKEN_TAG",
    "DatasetRef",
    "RunRequest",
    "change_request",
    "check_parent",
    "clean_name",
    "ensure_run",
    "send_late_tags",
]

logger = logging.getLogger(__name__)

STATE_NAME = ".mlflow.json"
TOKEN_TAG = "glowflow.token"
PARENT_TAG = "mlflow.parentRunId"
KIND_TAG = "glowflow.kind"  # "sweep" or "trial"; runs of their own have none
SWEEP_TAG = "glowflow.sweep.name"
_MAX_BATCH, _MAX_PARAM, _MAX_TAG, _MAX_DIGEST, _MAX_KEY = 100, 6000, 8000, 36, 250

# Threads of one process share the files: a change is read, made and written under this lock.
_changing = threading.RLock()
# Another one for what waits for the tracker: every follower of a trial may be the one that makes the parent.
_making = threading.RLock()


class DatasetRef(NamedTuple):
    """A data set as MLflow shows it: the digest is the manifest's fingerprint."""

    name: str
    digest: str
    source: str
    context: str = "training"


@dataclass(frozen=True)
class RunRequest:
    """All that an MLflow run is made from; ``run_id`` is None until it was made.

    Args:
        late_tags: tags that came after the run was asked for; who sends the curves sends them too.
        parent: the directory with the request of the parent run, relative to this one.
        process: who owns the run where that is not the process in run.json (``this_process``): a sweep's driver.
        status: how its owner says that it ended, None while it has not.
        ended_ms: when it ended, Unix time in milliseconds.
        told: the status that MLflow has, once everything before it was sent; None while something may lack.
        artifacts: artifact path -> folder in the run directory whose files are still to be sent.
    """

    uri: str
    experiment: str
    name: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[DatasetRef] = ()
    config_yaml: str | None = None
    start_ms: int | None = None
    run_id: str | None = None
    experiment_id: str | None = None
    late_tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    process: Mapping[str, Any] | None = None
    status: RunStatus | None = None
    ended_ms: int | None = None
    told: RunStatus | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)

    def save(self, run_dir: Path) -> None:
        record = asdict(self) | {"datasets": [list(dataset) for dataset in self.datasets]}
        with _changing:
            write_json(run_dir / STATE_NAME, record, private=True)  # the URI may hold a password

    @classmethod
    def load(cls, run_dir: Path) -> RunRequest | None:
        record = read_json(run_dir / STATE_NAME)
        if record is None:
            return None
        known = {f.name for f in fields(cls)}
        content = {key: value for key, value in record.items() if key in known}
        return cls(**{**content, "datasets": [DatasetRef(*row) for row in record["datasets"]]})

    def at(self, uri: str) -> RunRequest:
        """The same wish for another store, which knows nothing of the run in the first one."""
        return self if uri == self.uri else replace(self, uri=uri, run_id=None, experiment_id=None)


def change_request(run_dir: Path, change: Callable[[RunRequest], RunRequest]) -> RunRequest | None:
    """Change the request that lies in a directory, whatever other threads write there; None where there is none."""
    with _changing:
        request = RunRequest.load(run_dir)
        if request is None:
            return None
        changed = change(request)
        if changed != request:
            changed.save(run_dir)
        return changed


def ensure_run(client: MlflowClient, request: RunRequest, run_dir: Path) -> RunRequest:
    """Make the run unless it exists; every step may be repeated after a failure in its middle.

    Returns:
        The request with ``run_id`` and ``experiment_id``, also saved in the run directory.
    """
    if request.run_id is not None:
        if request.experiment_id is None:
            found = client.get_run(request.run_id).info.experiment_id
            request = replace(request, experiment_id=str(found))
            change_request(run_dir, lambda latest: replace(latest, experiment_id=str(found)))
        return request
    with _making:
        known = _known(request, run_dir)
        if known is not None and known.run_id is not None:
            return known  # another thread was faster
        experiment = experiment_id(client, request.experiment, artifact_root(request.uri))
        run_id = _find(client, experiment, request.token) or _make(client, experiment, request, run_dir)
        _describe(client, run_id, request)
        with _changing:
            latest = _known(request, run_dir) or request
            made = replace(latest, run_id=run_id, experiment_id=experiment)
            made.save(run_dir)
        return made


def _known(request: RunRequest, run_dir: Path) -> RunRequest | None:
    """The same request as it lies in the directory by now, for the store that this one is for."""
    found = RunRequest.load(run_dir)
    return found.at(request.uri) if found is not None and found.token == request.token else None


def _find(client: MlflowClient, experiment: str, token: str) -> str | None:
    """The answer to an earlier create_run may have been lost on its way."""
    earlier = client.search_runs([experiment], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
    return str(earlier[0].info.run_id) if earlier else None


def _make(client: MlflowClient, experiment: str, request: RunRequest, run_dir: Path) -> str:
    tags = {**request.tags, **request.late_tags}
    tags = {clean_name(key): value[:_MAX_TAG] for key, value in tags.items()} | {TOKEN_TAG: request.token}
    parent = _parent_id(client, request, run_dir)
    tags |= {PARENT_TAG: parent} if parent else {}
    # MLflow's pages cut names off on the right: trials must not all begin with their sweep's name.
    sweep, _, name = request.name.rpartition("/")
    tags |= {KIND_TAG: "trial", SWEEP_TAG: sweep} if sweep else {}
    run = client.create_run(experiment, start_time=request.start_ms, tags=tags, run_name=name)
    return str(run.info.run_id)


def check_parent(client: MlflowClient, request: RunRequest, run_dir: Path, have: Mapping[str, str]) -> None:
    """Put a run that exists under its parent, which may be another one than when it was made (``have``: its tags)."""
    parent = _parent_id(client, request, run_dir)
    if parent is not None and have.get(PARENT_TAG) != parent:
        client.set_tag(str(request.run_id), PARENT_TAG, parent)


def _parent_id(client: MlflowClient, request: RunRequest, run_dir: Path) -> str | None:
    """The MLflow run of which this one is a child, made now if it could not be made before."""
    if request.parent is None:
        return None
    folder = run_dir / request.parent
    parent = RunRequest.load(folder)
    return None if parent is None else ensure_run(client, parent.at(request.uri), folder).run_id


def send_late_tags(client: MlflowClient, request: RunRequest, have: Mapping[str, str]) -> dict[str, str]:
    """Set those of the late tags that the run has not; returns them."""
    from mlflow.entities import RunTag

    wanted = {clean_name(key): value[:_MAX_TAG] for key, value in request.late_tags.items()}
    lacking = {key: value for key, value in wanted.items() if have.get(key) != value}
    tags = [RunTag(key, value) for key, value in lacking.items()]
    for start in range(0, len(tags), _MAX_BATCH):
        client.log_batch(str(request.run_id), tags=tags[start : start + _MAX_BATCH])
    return lacking


def _describe(client: MlflowClient, run_id: str, request: RunRequest) -> None:
    """Params, data sets and the config file: all of them can be sent again without harm."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [Param(clean_name(key), value[:_MAX_PARAM]) for key, value in request.params.items()]
    for start in range(0, len(params), _MAX_BATCH):
        client.log_batch(run_id, params=params[start : start + _MAX_BATCH])
    inputs = [
        DatasetInput(
            Dataset(d.name[:500], d.digest[:_MAX_DIGEST], "local", json.dumps({"uri": d.source})),
            [InputTag("mlflow.data.context", d.context), InputTag("fingerprint", d.digest)],
        )
        for d in request.datasets
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
    if request.config_yaml is not None:
        try:
            client.log_text(run_id, request.config_yaml, "config.yaml")
        except Exception as error:  # an artifact store may be missing where metrics are taken
            logger.warning("config.yaml is not in MLflow: %s", error)


def clean_name(name: str) -> str:
    """A metric, param or tag name with what MLflow allows (letters, digits and ``_-. :/``)."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)[:_MAX_KEY]
