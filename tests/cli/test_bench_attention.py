"""``glowflow bench attention`` as a command: the table, the files, and the run in the experiment ``benchmarks``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glowflow.cli.main import run


def measured(kind: str, backend: str, which: str, length: int, ms: float) -> dict[str, Any]:
    decode = which == "decode"
    return {
        **{"kind": kind, "backend": backend, "chosen": True, "pass": which, "length": length, "reason": None},
        **{"advice": "", "ms": ms, "rounds": [ms, ms], "tflops": 0.01, "speed_relative_to_dense": 2.0},
        **{"peak_bytes": length * 1024, "cache_bytes": 4096 if decode else None},
    }


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """What a GPU box without MLflow would have printed."""
    rows = [
        measured(kind, backend, which, length, ms * length / 64)
        for kind, backend, ms in (("dense", "sdpa", 2.0), ("linear", "chunk", 1.0))
        for which in ("forward", "backward", "decode")
        for length in (64, 128)
    ]
    lacking = {"ms": None, "rounds": [], "tflops": None, "speed_relative_to_dense": None, "peak_bytes": None}
    rows.append({**measured("linear", "fla", "forward", 64, 1.0), **lacking, "reason": "the package is not installed"})
    shape = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "window": 8, "dtype": "bfloat16", "device": "cuda"}
    grown = {"pass": "forward", "kind": "linear", "backend": "chunk", "from": 64, "to": 128, "exponent": 1.0}
    whole = {
        "benchmark": "attention",
        "grid": {"shape": shape, "kinds": ["dense", "linear"], "repeat": 2},
        "rows": rows,
        "growth": [{**grown, "steps": [1.0], "spread": 0.3}],
        "dense_up_to": {"cuda": 128},
        "environment": {"device": "some GPU", "torch": "2.13.0", "threads": 1},
    }
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(whole))
    return path


def test_a_document_from_elsewhere_is_shown_drawn_and_kept(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, storage = tmp_path / "out", tmp_path / "runs"
    assert run(["bench", "attention", "--read", str(document), "--out", str(out), "--storage", str(storage)]) == 0
    shown = capsys.readouterr().out
    assert "linear, fla (forward 64): the package is not installed" in shown
    assert "dense_up_to on cuda: 128" in shown
    assert {path.name for path in out.iterdir()} == {"attention.json", "attention.png", "attention.txt"}
    with Image.open(out / "attention.png") as image:
        assert image.size[0] > 1000 and len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert json.loads((out / "attention.json").read_text()) == json.loads(document.read_text())
    (name,) = [line.removeprefix("kept as ") for line in shown.splitlines() if line.startswith("kept as ")]
    check_run(storage, name)


def check_run(storage: Path, name: str) -> None:
    """The MLflow run: a curve over the length for each case, the grid as params, the files as artifacts."""
    from mlflow.tracking import MlflowClient

    from glowflow.tracking.client import default_uri

    client = MlflowClient(default_uri(storage, None))
    experiment = client.get_experiment_by_name("benchmarks")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.run_name == name and kept.info.status == "FINISHED"
    assert kept.data.params["shape.head_dim"] == "8" and kept.data.tags["environment.device"] == "some GPU"
    history = client.get_metric_history(kept.info.run_id, "linear.chunk/backward_ms")
    assert [(point.step, point.value) for point in history] == [(64, 1.0), (128, 2.0)]
    assert client.get_metric_history(kept.info.run_id, "dense.sdpa/forward_peak_mib")[0].value == 64 / 1024
    assert {file.path for file in client.list_artifacts(kept.info.run_id, "benchmark")} == {
        f"benchmark/attention.{ending}" for ending in ("json", "png", "txt")
    }
    assert json.loads((storage / name / "benchmark.json").read_text())["benchmark"] == "attention"


def test_json_is_one_document_with_the_name_of_the_run(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "attention", "--read", str(document), "--storage", str(tmp_path / "runs"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (tmp_path / "runs" / printed.pop("run")).is_dir()
    assert printed == json.loads(document.read_text())


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ('{"benchmark": "train"}', "must be what `glowflow bench attention --json` wrote")],
)
def test_a_file_that_is_no_such_document_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    assert run(["bench", "attention", "--read", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_wrong_options_are_told_together_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "attention", "--kinds", "round", "--lengths", "many", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--kinds" in error and "--lengths" in error


def test_the_result_of_bench_train_is_kept_too(tmp_path: Path) -> None:
    from glowflow.orchestration.bench import record_train
    from glowflow.tracking.runrecord import RunRecord

    document = {
        "benchmark": "train",
        "config": {"model": {"dim": 8}},
        "environment": {"torch": "2.13.0"},
        "variants": {
            "bare": {
                "step_ms": 2.0,
                "tokens_per_second": 10.0,
                "speed_relative_to_bare": 1.0,
                "data_wait_share": None,
                "seconds_to_first_step": 0.5,
            }
        },
    }
    name = record_train(document, tmp_path)
    record = RunRecord.load(tmp_path / name)
    assert name.startswith("bench-train-") and record.status == "FINISHED"
    assert record.final == {
        "bare/step_ms": 2.0, "bare/tokens_per_second": 10.0, "bare/speed_relative_to_bare": 1.0,
        "bare/seconds_to_first_step": 0.5,
    }  # fmt: skip
