"""The wish for an MLflow run, kept in RUN/.mlflow.json, and its fulfilment, now or when the tracker comes back.

The file holds all that the run is made from, so that the driver, the background thread or ``glowflow runs sync``
can make it, whoever reaches the tracker first; a token in the run's tags keeps them from making it twice.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from glowflow.tracking.client import artifact_root, experiment_id
from glowflow.tracking.files import read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["STATE_NAME", "DatasetRef", "RunRequest", "clean_name", "ensure_run"]

logger = logging.getLogger(__name__)

STATE_NAME = ".mlflow.json"
TOKEN_TAG = "glowflow.token"
_MAX_BATCH, _MAX_PARAM, _MAX_TAG, _MAX_DIGEST, _MAX_KEY = 100, 6000, 8000, 36, 250


class DatasetRef(NamedTuple):
    """A data set as MLflow shows it: the digest is the manifest's fingerprint."""

    name: str
    digest: str
    source: str
    context: str = "training"


@dataclass(frozen=True)
class RunRequest:
    """All that an MLflow run is made from; ``run_id`` is None until it was made."""

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

    def save(self, run_dir: Path) -> None:
        record = asdict(self) | {"datasets": [list(dataset) for dataset in self.datasets]}
        write_json(run_dir / STATE_NAME, record, private=True)  # the URI may hold a password

    @classmethod
    def load(cls, run_dir: Path) -> RunRequest | None:
        record = read_json(run_dir / STATE_NAME)
        if record is None:
            return None
        return cls(**{**record, "datasets": [DatasetRef(*row) for row in record["datasets"]]})


def ensure_run(client: MlflowClient, request: RunRequest, run_dir: Path) -> RunRequest:
    """Make the run unless it exists; every step may be repeated after a failure in its middle.

    Returns:
        The request with ``run_id`` and ``experiment_id``, also saved in the run directory.
    """
    if request.run_id is not None:
        if request.experiment_id is None:
            found = client.get_run(request.run_id).info.experiment_id
            request = replace(request, experiment_id=str(found))
        return request
    experiment = experiment_id(client, request.experiment, artifact_root(request.uri))
    # The answer to an earlier create_run may have been lost on its way.
    earlier = client.search_runs([experiment], f"tags.`{TOKEN_TAG}` = '{request.token}'", max_results=1)
    if earlier:
        run_id = earlier[0].info.run_id
    else:
        tags = {key[:_MAX_KEY]: value[:_MAX_TAG] for key, value in request.tags.items()}
        run = client.create_run(
            experiment, start_time=request.start_ms, tags={**tags, TOKEN_TAG: request.token}, run_name=request.name
        )
        run_id = run.info.run_id
    _describe(client, run_id, request)
    request = replace(request, run_id=run_id, experiment_id=experiment)
    request.save(run_dir)
    return request


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
    """A metric or param name with what MLflow allows (letters, digits and ``_-. :/``)."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)[:_MAX_KEY]
