"""How many CPUs workers get, what is refused before Ray starts, and which address is meant."""

from __future__ import annotations

import math
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.data import ray_items
from glowflow.orchestration import cluster


def config(workers: int = 1, **resources: object) -> GlowFlowConfig:
    return load_config({"training": {"batch_size": workers}, "resources": {"workers": workers, **resources}})


def test_map_cpus_are_those_that_the_stream_reserves() -> None:
    assert cluster.MAP_CPUS == ray_items._TASK_CPUS


@given(workers=st.integers(1, 64), cpus=st.integers(1, 256))
def test_auto_always_leaves_cpus_for_every_workers_maps(workers: int, cpus: int) -> None:
    asked = config(workers)
    problem = cluster.cpu_problem(asked, cpus)
    if problem is not None:
        assert workers * 0.5 > cpus
        return
    each = cluster.cpus_per_worker(asked, cpus)
    assert 0.25 <= each <= 1.0
    assert workers * each + workers * cluster.MAP_CPUS <= cpus + 1e-9


@pytest.mark.parametrize(
    ("workers", "cpus", "each"), [(2, 2, 0.75), (1, 1, 0.75), (1, 2, 1.0), (4, 2, 0.25), (3, 4, 1.0)]
)
def test_auto_values(workers: int, cpus: int, each: float) -> None:
    assert cluster.cpus_per_worker(config(workers), cpus) == pytest.approx(each)


def test_two_workers_of_a_whole_cpu_on_two_cpus_are_refused_since_the_maps_would_starve() -> None:
    problem = cluster.cpu_problem(config(2, cpus_per_worker=1.0), 2)
    assert problem is not None
    assert problem.key == "resources.cpus_per_worker"
    assert "2.5" in problem.rule and "hang" in problem.rule
    assert "0.75" in problem.hint
    assert cluster.cpu_problem(config(2, cpus_per_worker=0.75), 2) is None


def test_sixty_four_workers_on_two_cores_are_refused_with_what_would_fit() -> None:
    problem = cluster.cpu_problem(config(64), 2)
    assert problem is not None
    assert problem.key == "resources.workers" and problem.value == 64
    assert "at most 4 workers" in problem.hint
    assert cluster.cpu_problem(config(4), 2) is None


def test_logical_cpus_follow_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, expected in [(None, 8), (2.5, 2), (0.5, 1), (64.0, 8)]:
        monkeypatch.setattr(cluster, "_cgroup_quota", lambda quota=quota: quota)
        assert cluster.logical_cpus() == expected


@pytest.mark.parametrize(
    "address", ["nonsense", "host:", ":6379", "host:0", "host:99999", "ray://host:10001", "http://h:1"]
)
def test_malformed_addresses_are_named(address: str) -> None:
    problem = cluster.address_problem(address)
    assert problem is not None and problem.key == "resources.address" and problem.value == address


def test_a_port_where_nobody_listens_is_found_out_and_a_listening_one_passes() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        problem = cluster.address_problem(f"127.0.0.1:{port}", timeout=1.0)
        assert problem is not None and "no Ray cluster answers" in problem.rule
        listener.listen()
        assert cluster.address_problem(f"127.0.0.1:{port}", timeout=1.0) is None


def test_the_address_comes_from_the_config_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.ray_address(config()) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.ray_address(config()) == "10.0.0.1:6379"
    assert cluster.ray_address(config(address="10.0.0.2:6379")) == "10.0.0.2:6379"
    assert cluster.ray_address(config(address="local")) is None


def test_the_object_store_is_bounded_and_as_configured() -> None:
    assert cluster.object_store_bytes(config(object_store_gib=0.5)) == 2**29
    assert 80 * 2**20 <= cluster.object_store_bytes(config()) <= 2 * 2**30


def test_a_users_environment_wins_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.delenv("RAY_TRAIN_V2_ENABLED", raising=False)
    cluster.set_environment()
    import os

    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
    assert math.isfinite(float(os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]))
