"""The loop on a tiny real transformer: exact accumulation, exact resume, skipped steps, no waiting for the device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glowflow.config.errors import CheckpointError, RunError
from glowflow.training.callbacks import Exporter, SampleLog, read_samples
from glowflow.training.checkpoint import list_checkpoints, read_extra
from glowflow.training.markers import checkpoint_path
from glowflow.training.precision import LossScaler
from tests.training.small_run import make_loop, make_rows, optimizer_state, small_config, stream, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_of_first_step(config: Any, run_dir: Path) -> tuple[list[torch.Tensor], float]:
    loop, _ = make_loop(config, run_dir)
    loss = loop._forward_backward(next(stream(config, 0, 1)))
    return [parameter.grad for parameter in loop.module.parameters()], float(loss)


class TestAccumulation:
    def test_four_micro_batches_equal_one_in_float64(self, tmp_path: Path, float64: None) -> None:
        whole, loss_whole = gradients_of_first_step(small_config(), tmp_path)
        parts, loss_parts = gradients_of_first_step(small_config(training__micro_batch_size=2), tmp_path)
        assert whole[0].dtype == torch.float64
        assert loss_parts == pytest.approx(loss_whole, rel=1e-14)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)

    def test_four_micro_batches_equal_one_after_training_in_fp32(self, tmp_path: Path) -> None:
        short = {"training__max_steps": 6, "training__schedule": "constant"}
        _, one, loop_one = train(small_config(**short), tmp_path / "1", validate=False)
        _, four, loop_four = train(small_config(**short, training__micro_batch_size=2), tmp_path / "4", validate=False)
        assert list(four.curve["train_loss"].values()) == pytest.approx(
            list(one.curve["train_loss"].values()), rel=1e-5
        )
        for a, b in zip(weights(loop_one).values(), weights(loop_four).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_loss_is_the_mean_over_all_targets(self, tmp_path: Path) -> None:
        """Against a plain computation; the mean of the micro-batches' means would be something else."""
        config = small_config(training__micro_batch_size=2)
        loop, _ = make_loop(config, tmp_path)
        batch = make_rows(0, config)
        with torch.no_grad():
            scores = loop.module.logits(loop.module(batch)[0].hidden)  # type: ignore[operator]
        nll = (
            torch.nn.functional.cross_entropy(scores.transpose(1, 2), batch.targets, reduction="none")
            * batch.loss_weights
        )
        mean_of_means = torch.stack(
            [part.sum() / weight.sum() for part, weight in zip(nll.split(2), batch.loss_weights.split(2), strict=True)]
        ).mean()
        expected = float(nll.sum() / batch.loss_weights.sum())
        loss = float(loop._forward_backward(next(stream(config, 0, 1))))
        assert loss == pytest.approx(expected, rel=1e-6)
        assert abs(float(mean_of_means) - expected) > 1e-5


class TestResume:
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_stopped_at_25_and_resumed_equals_60_in_one_go(self, tmp_path: Path, dropout: float) -> None:
        config = small_config(model__dropout=dropout, training__micro_batch_size=4)
        straight, all_steps, loop_straight = train(config, tmp_path / "straight")
        stopped, first, _ = train(config, tmp_path / "parts", stop_at=25)
        assert (stopped.status, stopped.step) == ("KILLED", 25)
        torch.manual_seed(999)  # whatever the global generator holds must not matter
        resumed, second, loop_resumed = train(config, tmp_path / "parts", checkpoint_path(tmp_path / "parts", 25))
        assert (straight.status, resumed.status, resumed.step) == ("FINISHED", "FINISHED", 60)
        for metric in ("train_loss", "grad_norm", "lr"):
            assert {**first.curve[metric], **second.curve[metric]} == all_steps.curve[metric]
            assert sorted(all_steps.curve[metric]) == list(range(1, 61))
        assert {**first.validations, **second.validations} == all_steps.validations
        for a, b in zip(weights(loop_straight).values(), weights(loop_resumed).values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(optimizer_state(loop_straight), optimizer_state(loop_resumed), strict=True):
            assert torch.equal(a, b)
        assert read_samples(tmp_path / "straight") == read_samples(tmp_path / "parts")
        assert list(read_samples(tmp_path / "parts")) == list(range(60))
        same = ("step", "val_loss", "train_loss")
        assert [straight.best[key] for key in same] == [resumed.best[key] for key in same]

    def test_replays_from_an_older_checkpoint_equal_the_first_pass(self, tmp_path: Path) -> None:
        config = small_config(model__dropout=0.1, training__max_steps=50)
        _, first, _ = train(config, tmp_path, stop_at=35)
        _, second, _ = train(config, tmp_path, checkpoint_path(tmp_path, 20))
        replayed = {step: value for step, value in second.curve["train_loss"].items() if step <= 35}
        assert len(replayed) == 15
        assert replayed == {step: first.curve["train_loss"][step] for step in replayed}
        assert read_samples(tmp_path)[30] == list(range(240, 248))

    def test_a_changed_learning_rate_of_the_config_is_used(self, tmp_path: Path) -> None:
        train(small_config(training__max_steps=5), tmp_path, stop_at=3)
        _, after, _ = train(
            small_config(training__max_steps=5, training__lr=0.5), tmp_path, checkpoint_path(tmp_path, 3)
        )
        assert after.curve["lr"][4] == pytest.approx(0.5 * 4 / 6)

    def test_another_plan_is_refused(self, tmp_path: Path) -> None:
        train(small_config(training__max_steps=3), tmp_path)
        with pytest.raises(CheckpointError, match=r"another data plan.*training\.seed"):
            train(small_config(training__max_steps=5), tmp_path, checkpoint_path(tmp_path, 3), fingerprint="plan-2")

    def test_resume_at_the_end_does_nothing(self, tmp_path: Path) -> None:
        config = small_config(training__max_steps=4)
        train(config, tmp_path)
        result, recorder, _ = train(config, tmp_path, checkpoint_path(tmp_path, 4))
        assert (result.status, result.step, recorder.curve) == ("FINISHED", 4, {})

    def test_threads_and_everything_else_is_in_the_checkpoint(self, tmp_path: Path) -> None:
        config = small_config(training__max_steps=3)
        train(config, tmp_path)
        extra = read_extra(checkpoint_path(tmp_path, 3))
        assert extra["threads"] == 1
        assert extra["cursor"] == {"epoch": 0, "step": 3, "fingerprint": "plan-1"}
        assert extra["config"]["training"]["seed"] == 7
        assert extra["tokenizer"] == {"kind": "bytes"}
        assert extra["tokens"] == 3 * 8 * 12
        json.dumps(extra, allow_nan=False)


class TestSeeds:
    def test_same_seed_same_run_other_seed_other_run(self, tmp_path: Path) -> None:
        def losses(seed: int, name: str) -> list[float]:
            config = small_config(model__dropout=0.1, training__max_steps=8, training__seed=seed)
            return list(train(config, tmp_path / name, validate=False)[1].curve["train_loss"].values())

        first = losses(7, "a")
        assert first == losses(7, "b")
        assert all(a != b for a, b in zip(first, losses(8, "c"), strict=True))

    def test_dropout_differs_between_steps_and_micro_batches(self, tmp_path: Path) -> None:
        loop, _ = make_loop(small_config(model__dropout=0.5, training__micro_batch_size=4), tmp_path)
        seen: list[torch.Tensor] = []
        first_block = loop.strategy.unwrap(loop.module).shard_units()[0]
        first_block.register_forward_hook(lambda _, args, __: seen.append((args[0] == 0).detach()))
        for step in range(2):
            loop.step = step
            loop._forward_backward(next(stream(loop.config, step, step + 1)))
        assert len(seen) == 4
        assert len({mask.numpy().tobytes() for mask in seen}) == 4


class TestNonFinite:
    constant: ClassVar[dict[str, Any]] = {"training__schedule": "constant", "training__warmup_steps": 0}

    def test_a_poisoned_step_changes_nothing(self, tmp_path: Path) -> None:
        _, _, loop_good = train(small_config(training__max_steps=2, **self.constant), tmp_path / "good")
        result, bad, loop_bad = train(
            small_config(training__max_steps=3, **self.constant), tmp_path / "bad", poison=frozenset({2})
        )
        assert result.status == "FINISHED"
        assert result.final["nonfinite_steps"] == 1
        assert "train_loss" not in result.final or math.isfinite(result.final["train_loss"])
        assert not math.isfinite(bad.curve["train_loss"][3])
        for a, b in zip(weights(loop_good).values(), weights(loop_bad).values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(optimizer_state(loop_good), optimizer_state(loop_bad), strict=True):
            assert torch.equal(a, b)  # the step counters of the bias correction too

    def test_training_goes_on_after_it(self, tmp_path: Path) -> None:
        _, recorder, _ = train(small_config(training__max_steps=12), tmp_path, poison=frozenset({4, 6}))
        finite = {step for step, loss in recorder.curve["train_loss"].items() if math.isfinite(loss)}
        assert finite == set(range(1, 13)) - {5, 7}
        assert recorder.curve["train_loss"][12] < recorder.curve["train_loss"][1]

    def test_too_many_stop_the_run_with_an_explanation(self, tmp_path: Path) -> None:
        config = small_config(training__max_nonfinite_steps=2, training__log_interval=5)
        loop, recorder = make_loop(config, tmp_path, poison=frozenset({3, 11, 12}))
        with pytest.raises(RunError) as caught:
            loop.run()
        text = str(caught.value)
        assert "step 15" in text and "12, 13" in text and "learning rate" in text and "fp32" in text
        assert "training.max_nonfinite_steps" in text and "training.lr" in text
        assert recorder.closed
        assert [step for step, _ in recorder.records] == [5, 10, 15]

    def test_the_count_survives_a_restart(self, tmp_path: Path) -> None:
        config = small_config(training__max_nonfinite_steps=1, training__max_steps=12)
        train(config, tmp_path, stop_at=6, poison=frozenset({2}))
        with pytest.raises(RunError, match="2 steps had a loss"):
            train(config, tmp_path, checkpoint_path(tmp_path, 6), poison=frozenset({8}))


class FailOnSync(TorchDispatchMode):
    """Raises where an operation needs a number on the host."""

    forbidden: ClassVar[set[str]] = {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::item",
        "aten::equal",
        "aten::nonzero",
    }

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func.name().split(".")[0] in self.forbidden:
            raise AssertionError(f"{func.name()} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


class TestHostSync:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize("strategy", ["single", "fsdp"])
    def test_nothing_between_log_steps_reads_the_device(self, tmp_path: Path, precision: str, strategy: str) -> None:
        config = small_config(
            training__max_steps=6, training__micro_batch_size=4, model__dropout=0.1, training__log_interval=3,
            training__precision=precision, training__strategy=strategy, training__checkpoint_interval=6,
        )  # fmt: skip
        loop, recorder = make_loop(config, tmp_path, callbacks=(SampleLog(tmp_path / "more", 0, 1),), validate=False)
        mode = FailOnSync()
        step, boundary = loop._train_step, loop._boundary

        def watched_step(batches: Any) -> None:
            with mode:
                step(batches)

        def watched_boundary() -> bool:
            if loop.step % 3 == 0:
                return boundary()
            with mode:
                return boundary()

        loop._train_step, loop._boundary = watched_step, watched_boundary  # type: ignore[method-assign]
        assert loop.run().status == "FINISHED"
        assert mode.operations > 500
        assert sorted(recorder.curve["train_loss"]) == [1, 2, 3, 4, 5, 6]

    def test_the_proof_can_fail(self) -> None:
        with pytest.raises(AssertionError, match="_local_scalar_dense"), FailOnSync():
            float(torch.ones(()) * 2)


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_follows_fp32(self, tmp_path: Path, precision: str) -> None:
        short = {"training__max_steps": 30, "training__lr": 1e-2}
        _, full, _ = train(small_config(**short), tmp_path / "fp32")
        result, half, loop = train(small_config(**short, training__precision=precision), tmp_path / precision)
        assert half.curve["train_loss"][30] == pytest.approx(full.curve["train_loss"][30], rel=0.05)
        assert half.curve["train_loss"] != full.curve["train_loss"]
        assert half.curve["train_loss"][30] < 0.9 * half.curve["train_loss"][1]
        assert half.curve["grad_norm"][1] == pytest.approx(full.curve["grad_norm"][1], rel=0.05)
        assert result.final["nonfinite_steps"] == 0
        assert all(parameter.dtype == torch.float32 for parameter in loop.module.parameters())

    def test_fp16_overflow_halves_the_scale_and_is_not_counted(self, tmp_path: Path) -> None:
        config = small_config(training__max_steps=8, training__precision="fp16", training__log_interval=1)
        loop, recorder = make_loop(config, tmp_path)
        loop.scaler.scale.fill_(2.0**30)  # gradients of any size overflow fp16 there
        loop.run()
        scales = [metrics["loss_scale"] for _, metrics in recorder.records]
        assert scales[0] == 2.0**29 and scales[-1] < scales[0]
        assert recorder.records[-1][1]["nonfinite_steps"] == 0

    def test_fp16_scale_is_restored(self, tmp_path: Path) -> None:
        config = small_config(training__max_steps=6, training__precision="fp16")
        loop, _ = make_loop(config, tmp_path, stop_at=3)
        loop.scaler.load_state_dict({"scale": 512.0, "good_steps": 41.0})
        loop.run()
        again, _ = make_loop(config, tmp_path)
        again.run(checkpoint_path(tmp_path, 3))
        assert again.scaler.state_dict() == {"scale": 512.0, "good_steps": 41.0 + 6}


class TestScaler:
    def test_growth_and_backoff(self) -> None:
        scaler = LossScaler(torch.device("cpu"), enabled=True)
        good, bad = torch.zeros(()), torch.ones(())
        for _ in range(scaler.growth_interval - 1):
            scaler.update(good)
        assert float(scaler.scale) == 65536
        scaler.update(good)
        assert float(scaler.scale) == 131072
        assert float(scaler.update(bad)) == 0
        assert float(scaler.scale) == 65536
        scaler.update(good)
        assert scaler.state_dict() == {"scale": 65536.0, "good_steps": 1.0}

    def test_at_scale_one_the_gradient_is_to_blame(self) -> None:
        scaler = LossScaler(torch.device("cpu"), enabled=True)
        scaler.scale.fill_(2.0)
        assert float(scaler.update(torch.ones(()))) == 0
        assert float(scaler.update(torch.ones(()))) == 1
        assert float(scaler.scale) == 1.0


class TestBoundaries:
    def test_what_is_logged_saved_and_validated_when(self, tmp_path: Path) -> None:
        result, recorder, _ = train(small_config(training__max_steps=45, training__keep_checkpoints=1), tmp_path)
        assert [step for step, _ in recorder.records] == [10, 20, 30, 40, 45]
        assert list(recorder.validations) == [30, 45]
        assert recorder.checkpoints == [20, 40, 45]
        assert [info.step for info in list_checkpoints(tmp_path) if info.complete] == [45]
        assert result.checkpoints == [str(checkpoint_path(tmp_path, 45))]
        assert result.tokens == 45 * 96
        metrics = recorder.records[-1][1]
        assert set(metrics) >= {
            "train_loss", "grad_norm", "lr", "tokens", "epoch", "memory_mib", "nonfinite_steps",
            "tokens_per_second", "step_time_ms", "data_wait_share", "goodput",
        }  # fmt: skip
        assert metrics["epoch"] == 0.45
        assert "mfu" not in metrics and "loss_scale" not in metrics

    def test_validation_numbers(self, tmp_path: Path) -> None:
        result, recorder, loop = train(small_config(training__max_steps=5), tmp_path)
        total = weight = 0.0
        with torch.no_grad():
            loop.module.eval()
            for batches in stream(loop.config, 10_000, 10_003):
                output, _ = loop.module(batches.micro_batches[0])
                total, weight = total + float(output.loss_sum), weight + float(output.weight_sum)
        measured = recorder.validations[5]
        assert measured["val_loss"] == pytest.approx(total / weight, rel=1e-6)
        assert measured["perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-6)
        assert measured["val_bits_per_byte"] == pytest.approx(total / weight / math.log(2) / 2.0, rel=1e-6)
        assert result.final["val_loss"] == result.best["val_loss"] == measured["val_loss"]

    def test_exports_load_with_weights_only(self, tmp_path: Path) -> None:
        exporter = Exporter(tmp_path, interval=2)
        result, _, loop = train(small_config(training__max_steps=5), tmp_path, callbacks=(exporter,))
        assert [Path(path).name for path in result.exports] == ["model-2.pt", "model-4.pt", "model-5.pt"]
        content = torch.load(result.exports[-1], weights_only=True)
        assert (content["step"], content["tokenizer"]) == (5, {"kind": "bytes"})
        for name, value in weights(loop).items():
            assert torch.equal(content["state_dict"][name], value)

    def test_a_stopped_run_is_not_exported(self, tmp_path: Path) -> None:
        result, _, _ = train(small_config(), tmp_path, stop_at=3, callbacks=(Exporter(tmp_path, None),))
        assert (result.status, result.exports) == ("KILLED", [])

    def test_a_stream_that_ends_early_is_an_error(self, tmp_path: Path) -> None:
        loop, recorder = make_loop(small_config(), tmp_path)
        loop.inputs.open_stream = lambda start, stop: stream(loop.config, start, 4)
        with pytest.raises(RunError, match="step 4 was due"):
            loop.run()
        assert recorder.closed

    def test_initial_weights_are_used(self, tmp_path: Path) -> None:
        _, _, source = train(small_config(training__max_steps=2), tmp_path / "a")
        loop, _ = make_loop(small_config(training__seed=99), tmp_path / "b")
        before = weights(loop)
        loop.inputs.initial_state = weights(source)
        again = type(loop)(loop.config, run_dir=tmp_path / "c", strategy=loop.strategy, inputs=loop.inputs)
        for name, value in weights(source).items():
            assert torch.equal(weights(again)[name], value)
        assert not torch.equal(before["embedding.weight"], weights(source)["embedding.weight"])
