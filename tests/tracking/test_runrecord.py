"""run.json, run directories, names, and telling a live run from a dead one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from glowflow.config.errors import PreflightError, RunError
from glowflow.tracking.files import write_json
from glowflow.tracking.runrecord import (
    RunRecord,
    create_run_dir,
    display_status,
    find_run,
    is_alive,
    iter_runs,
    new_run_name,
    now_iso,
)
from glowflow.tracking.versions import code_fingerprint, git_commit, versions

ISSUE_KEYS = {
    "run", "status", "config", "fingerprints", "steps", "tokens", "final", "best", "tokens_per_second", "goodput",
    "checkpoints", "mlflow_run_id", "versions", "device",
}  # fmt: skip


def test_record_has_the_promised_keys_and_round_trips(tmp_path: Path) -> None:
    final = {"val_loss": 1.25, "perplexity": math.inf}
    record = RunRecord("one", final=final, steps=3, checkpoints=[tmp_path / "step-3"])
    record.save(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    assert ISSUE_KEYS <= content.keys()
    assert content["final"] == {"val_loss": 1.25, "perplexity": None}  # JSON has no infinity
    assert content["checkpoints"] == [str(tmp_path / "step-3")]
    loaded = RunRecord.load(tmp_path)
    assert loaded.to_dict() == content and loaded.process["pid"] == os.getpid()


def test_keys_of_another_version_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run": "one", "colour": "blue", "steps": 4}')
    record = RunRecord.load(tmp_path)
    assert (record.run, record.steps, record.status) == ("one", 4, "RUNNING")
    assert not is_alive(record, tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]", '{"status": "FINISHED"}', '{"run": "one"'])
def test_a_missing_or_broken_record_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        RunRecord.load(tmp_path)


def test_writing_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        loop: dict[str, object] = {}
        loop["self"] = _Unprintable()
        write_json(path, loop)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


class _Unprintable:
    def __str__(self) -> str:
        raise ValueError("Circular")


def test_a_password_in_the_uri_is_not_written(tmp_path: Path) -> None:
    RunRecord("one", mlflow_uri="http://me:secret@host").save(tmp_path)
    assert "secret" not in (tmp_path / "run.json").read_text()


def test_liveness_by_process(tmp_path: Path) -> None:
    here = RunRecord("one")
    assert is_alive(here, tmp_path) and display_status(here, tmp_path) == "RUNNING"
    assert not is_alive(replace(here, status="FINISHED"), tmp_path)
    other_start = replace(here, process={**here.process, "started": "1"})  # the id was given to another process
    assert display_status(other_start, tmp_path) == "DEAD"
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert display_status(replace(here, process={**here.process, "pid": child.pid}), tmp_path) == "DEAD"


def test_liveness_by_heartbeat_of_another_machine(tmp_path: Path) -> None:
    record = RunRecord("one", process={"host": "elsewhere", "pid": 1, "started": "1"})
    assert display_status(record, tmp_path) == "DEAD"
    (tmp_path / ".heartbeat").touch()
    assert display_status(record, tmp_path) == "RUNNING"
    os.utime(tmp_path / ".heartbeat", (time.time() - 3600,) * 2)
    assert display_status(record, tmp_path) == "DEAD"


def test_names_are_new_and_usable(tmp_path: Path) -> None:
    names = {new_run_name("configs/my config.yaml") for _ in range(50)}
    assert len(names) > 40
    for name in names:
        assert name.startswith("my-config-")
        create_run_dir(tmp_path, name)
    assert create_run_dir(tmp_path, new_run_name("///")).is_dir()


def test_reuse_of_a_name_is_refused(tmp_path: Path) -> None:
    run_dir = create_run_dir(tmp_path / "runs", "one")
    assert run_dir.is_absolute() and run_dir.is_dir()
    with pytest.raises(RunError, match=r"exists.*--resume one"):
        create_run_dir(tmp_path / "runs", "one")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 200, "a b"])
def test_unusable_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"tracking\.run"):
        create_run_dir(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for storage in (file, file / "below", Path("/proc/glowflow")):
        with pytest.raises(PreflightError, match=r"tracking\.storage"):
            create_run_dir(storage, "one")


def test_runs_are_found_by_name_and_path_with_a_hint_for_unknown_ones(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no runs"):
        find_run(tmp_path, "quick")
    run_dir = create_run_dir(tmp_path, "quickstart-1")
    RunRecord("quickstart-1").save(run_dir)
    (tmp_path / "mlartifacts").mkdir()
    assert find_run(tmp_path, "quickstart-1") == find_run("elsewhere", run_dir) == run_dir
    assert iter_runs(tmp_path) == [run_dir]
    with pytest.raises(RunError, match="did you mean 'quickstart-1'"):
        find_run(tmp_path, "quikstart-1")
    with pytest.raises(RunError, match="1 runs are in"):
        find_run(tmp_path, "zzz")


def test_code_fingerprint_depends_on_names_and_contents_of_python_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert code_fingerprint(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = code_fingerprint(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, changed, code_fingerprint(tmp_path)}) == 3
    assert code_fingerprint() == code_fingerprint() and len(code_fingerprint()) == 64


def test_git_commit_is_that_of_the_repository_that_tracks_the_package(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert git_commit(package) is None
    git("init", "-q")
    assert git_commit(package) is None  # lies in a repository, but is not tracked by it
    git("add", "package")
    git("commit", "-q", "-m", "x")
    assert git_commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True\n")
    assert git_commit(package) == git("rev-parse", "HEAD") + "-dirty"


def test_versions_name_what_is_installed() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "pydantic"} <= found.keys()


def test_now_is_utc_iso() -> None:
    assert now_iso().endswith("+00:00")
    assert RunRecord("one", ended="1970-01-01T00:00:01.500+00:00").ended_ms() == 1500
