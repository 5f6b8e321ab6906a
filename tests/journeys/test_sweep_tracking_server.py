"""A sweep and a real MLflow server that is late, dies in the middle and comes back: one family, each step once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glowflow.tracking.client import connect
from glowflow.tracking.family import sync_sweep
from tests.journeys.test_tracking_server import Server, history, wait_for
from tests.tracking.test_family import family, loss, open_sweep, open_trial, threads, train

pytestmark = pytest.mark.journey


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    yield server
    server.kill()


def test_a_server_that_is_late_and_dies_in_between_gets_one_family(server: Server, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    storage.mkdir()
    tracking = open_sweep(storage, server.uri)
    first = open_trial(tracking, "000")
    train(first, 0, 30)
    assert tracking.run_id is None
    assert not tracking.close_trial(first, "FINISHED")  # it ends before anybody answers
    second = open_trial(tracking, "001")
    train(second, 0, 10, status=None)
    server.start()
    assert wait_for(lambda: tracking.run_id is not None, 240)
    third = open_trial(tracking, "002")
    train(third, 0, 20)
    assert tracking.close_trial(third, "FINISHED", timeout=240)
    (parent,), children = family(server.uri)
    assert {"002"} <= {run.info.run_name for run in children} and parent.info.run_id == tracking.run_id
    server.kill()
    train(second, 5, 40)
    tracking.close_trial(second, "FINISHED", timeout=3)
    tracking.log_sweep_metrics({"best": 1.0})
    assert not tracking.close("FINISHED", timeout=3)
    assert threads() == 0 or wait_for(lambda: threads() == 0, 60), threading.enumerate()
    server.start()
    sync_sweep(storage / "lr")
    (parent,), children = family(server.uri)
    assert [run.info.status for run in [parent, *children]] == ["FINISHED"] * 4
    for run, stop in zip(children, (30, 40, 20), strict=True):
        assert history(server.uri, run.info.run_id) == [(step, loss(step)) for step in range(stop)]
    assert len(connect(server.uri).get_metric_history(parent.info.run_id, "best")) == 1
    assert [report.sent for report in sync_sweep(storage / "lr")] == [0] * 4
