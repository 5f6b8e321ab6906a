"""Each callback on its own."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glowflow.config.errors import ConfigError
from glowflow.config.schema import TrainingConfig
from glowflow.core.batch import StepBatches
from glowflow.training.callbacks import (
    BestTracker,
    CheckpointHook,
    Goodput,
    LogRecord,
    PointSink,
    ProgressLog,
    SampleLog,
    Throughput,
    monitored_metric,
    read_samples,
)


def record(step: int = 4, metrics: dict[str, float] | None = None, **more: Any) -> LogRecord:
    steps = range(step - 1, step + 1)
    values = {
        "metrics": {"train_loss": 1.5, "tokens": 80.0} if metrics is None else metrics,
        "curve": {"train_loss": [(s, float(s)) for s in steps]},
        "step_seconds": [0.5, 0.25],
        "wait_seconds": 0.075,
        "tokens": 40,
        **more,
    }
    return LogRecord(step, **values)  # type: ignore[arg-type]


def batches(step: int, *ids: list[int]) -> StepBatches:
    return StepBatches(step, [SimpleNamespace(sample_ids=torch.tensor(part)) for part in ids], 1.0)  # type: ignore[misc]


class TestSamples:
    def test_ranks_are_joined_in_global_order(self, tmp_path: Path) -> None:
        logs = [SampleLog(tmp_path, rank, 2) for rank in range(2)]
        for step in range(2):
            logs[0].on_step_end(batches(step, [10 * step], [10 * step + 1]))
            logs[1].on_step_end(batches(step, [10 * step + 2], [10 * step + 3]))
        for log in logs:
            log.close()
        assert read_samples(tmp_path) == {0: [0, 1, 2, 3], 1: [10, 11, 12, 13]}

    def test_replayed_steps_replace_their_entries_also_with_another_number_of_ranks(self, tmp_path: Path) -> None:
        for rank, ids in enumerate(([1], [2])):
            log = SampleLog(tmp_path, rank, 2)
            log.on_step_end(batches(0, ids))
            log.on_step_end(batches(1, [-1]))  # lost in a crash
            log.close()
        alone = SampleLog(tmp_path, 0, 1)
        alone.on_step_end(batches(1, [3, 4]))
        alone.close()
        assert read_samples(tmp_path) == {0: [1, 2], 1: [3, 4]}

    def test_a_step_that_one_rank_lacks_is_left_out(self, tmp_path: Path) -> None:
        log = SampleLog(tmp_path, 0, 2)
        log.on_step_end(batches(0, [1]))
        log.close()
        assert read_samples(tmp_path) == {}

    def test_a_line_torn_by_a_kill_is_passed_over(self, tmp_path: Path) -> None:
        log = SampleLog(tmp_path, 0, 1)
        log.on_step_end(batches(0, [1]))
        log.close()
        with log.path.open("a") as file:
            file.write('{"step":1,"ids":[2')
        again = SampleLog(tmp_path, 0, 1)
        again.on_step_end(batches(1, [2, 3]))
        again.close()
        assert read_samples(tmp_path) == {0: [1], 1: [2, 3]}


class TestPoints:
    def test_every_step_of_the_curve_and_each_metric_once(self) -> None:
        sent: list[Any] = []
        before = time.time() * 1000
        PointSink(sent.extend).on_log(record())
        assert [(m, s, v) for m, s, v, _ in sent] == [
            ("train_loss", 3, 3.0),
            ("train_loss", 4, 4.0),
            ("tokens", 4, 80.0),
        ]
        first, second, single = (point[3] for point in sent)
        assert second - first == pytest.approx(250, abs=2) and second == single
        assert before - 1 <= second <= time.time() * 1000 + 1
        assert all(type(point[3]) is int for point in sent)

    def test_what_is_not_finite_is_left_out(self) -> None:
        sent: list[Any] = []
        sink = PointSink(sent.extend)
        sink.on_log(record(metrics={"grad_norm": math.inf}, curve={"train_loss": [(3, math.nan), (4, 2.0)]}))
        sink.on_validation(4, {"perplexity": math.inf, "val_loss": 800.0})
        assert [point[:3] for point in sent] == [("train_loss", 4, 2.0), ("val_loss", 4, 800.0)]


class TestBest:
    def test_smallest_by_default_with_all_metrics_of_that_step(self) -> None:
        best = BestTracker(TrainingConfig())
        for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, math.nan)):
            best.on_log(record(step, {"train_loss": loss + 1, "grad_norm": math.nan}))
            best.on_validation(step, {"val_loss": loss})
        assert best.best == {"step": 2, "train_loss": 3.0, "val_loss": 2.0}

    def test_the_largest_of_another_metric_and_its_state(self) -> None:
        training = TrainingConfig(monitor_metrics=["grad_norm", "perplexity", "val_loss"], monitor_mode="max")
        assert monitored_metric(training) == "perplexity"
        best = BestTracker(training)
        best.on_validation(1, {"perplexity": 5.0})
        again = BestTracker(training)
        again.load_state_dict(json.loads(json.dumps(best.state_dict())))
        again.on_validation(2, {"perplexity": 4.0})
        assert again.best["step"] == 1
        again.on_validation(3, {"perplexity": 6.0})
        assert again.best["step"] == 3

    @pytest.mark.parametrize(
        ("task", "metric"), [("classification", "val_accuracy"), ("contrastive", "val_recall_at_1")]
    )
    def test_a_share_of_right_answers_is_best_when_largest(self, task: str, metric: str) -> None:
        training = TrainingConfig(monitor_metrics=["perplexity", metric], monitor_mode="max")
        best = BestTracker(training, task)
        for step, value in ((1, 0.5), (2, 0.7), (3, 0.6)):
            best.on_validation(step, {"val_loss": 1.0, metric: value})
        assert best.best["step"] == 2
        assert monitored_metric(training) == "perplexity", "a language model has no such share"
        with pytest.raises(ConfigError, match=f"must be max for {metric}"):
            monitored_metric(TrainingConfig(monitor_metrics=[metric]), task)


class TestThroughput:
    def test_median_over_steady_steps(self) -> None:
        meter = Throughput()
        meter._tokens_per_step = 20.0
        meter.on_log(record(step_seconds=[10.0] * 5 + [0.1, 0.2, 0.4]))
        assert meter.steady_tokens_per_second == pytest.approx(20 / 0.2)

    def test_a_short_run_counts_all_its_steps(self) -> None:
        meter = Throughput()
        meter._tokens_per_step = 20.0
        assert meter.steady_tokens_per_second is None
        meter.on_log(record(step_seconds=[0.5, 0.25, 0.5]))
        assert meter.steady_tokens_per_second == pytest.approx(40)

    def test_the_mean_of_what_was_counted_where_samples_differ(self) -> None:
        meter = Throughput()
        strategy = SimpleNamespace(world_size=1, device=torch.device("cpu"))
        meter.on_train_start(SimpleNamespace(counts=SimpleNamespace(tokens_per_step=None), strategy=strategy))  # type: ignore[arg-type]
        for tokens in (30, 50):
            meter.on_log(record(step_seconds=[0.5, 0.5], tokens=tokens))
        assert meter.steady_tokens_per_second == pytest.approx(20 / 0.5)

    def test_what_is_added_to_the_record(self) -> None:
        seen = record()
        Throughput().on_log(seen)
        assert seen.metrics["tokens_per_second"] == pytest.approx(40 / 0.75)
        assert seen.metrics["step_time_ms"] == pytest.approx(375)
        assert seen.metrics["data_wait_share"] == pytest.approx(0.1)
        assert "mfu" not in seen.metrics


class TestGoodput:
    def test_lost_steps_do_not_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [1000.0]
        monkeypatch.setattr(time, "time", lambda: now[0])
        first = Goodput(tmp_path, rank=0)
        now[0] = 1010.0
        first.on_log(record(step_seconds=[8.0]))
        saved = first.state_dict()
        assert first.goodput == pytest.approx(0.8)
        now[0] = 1020.0
        first.on_log(record(step_seconds=[10.0]))  # lost: not in the checkpoint
        now[0] = 1030.0
        second = Goodput(tmp_path, rank=0)
        second.load_state_dict(saved)
        now[0] = 1040.0
        replay = record(step_seconds=[10.0])
        second.on_log(replay)
        assert replay.metrics["goodput"] == pytest.approx(18 / 40)

    def test_the_first_start_is_remembered_without_a_checkpoint(self, tmp_path: Path) -> None:
        first = Goodput(tmp_path, rank=0).started_at
        assert Goodput(tmp_path, rank=0).started_at == first
        assert Goodput(tmp_path, rank=1).started_at == first
        assert json.loads((tmp_path / "progress.json").read_text()) == {"started_at": first}


def test_checkpoint_hook(tmp_path: Path) -> None:
    seen: list[Any] = []
    CheckpointHook(lambda *args: seen.append(args)).on_checkpoint(3, tmp_path, {"val_loss": 1.0})
    assert seen == [(3, str(tmp_path), {"val_loss": 1.0})]


def test_progress_shows_the_monitored_metrics(caplog: pytest.LogCaptureFixture) -> None:
    progress = ProgressLog(50, ["grad_norm", "perplexity"])
    with caplog.at_level(logging.INFO):
        progress.on_log(record(4, {"train_loss": 1.23456, "grad_norm": 0.5, "other": 1.0}))
        progress.on_validation(4, {"perplexity": 9.0})
    assert caplog.messages == ["step 4/50  train_loss 1.235  grad_norm 0.5", "step 4/50  perplexity 9.0000"]
