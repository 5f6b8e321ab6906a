"""The pipeline's arguments, its promises about what is written, and whole runs in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow import GlowFlowModel, TrainingPipeline
from glowflow.config.errors import CheckpointError, ConfigError, DataError, PreflightError, RunError
from glowflow.core.model import read_single_file
from glowflow.orchestration import local as local_module
from glowflow.orchestration.job import TrainingFailed
from tests.journeys.support import environment, loss_curve, write_config

SHORT = {"training__max_steps": 4, "training__val_interval": 4, "training__log_interval": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, built once."""
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_arguments_are_config_keys(tmp_path: Path) -> None:
    pipeline = TrainingPipeline(
        {"model": {"dim": 32, "heads": 2}, "data": {"sources": [{"dataset": "a"}]}},
        dataset="wikitext-2",
        accelerator="cpu",
        precision="bf16",
        training={"lr": 0.5},
        **{"training.seed": 3, "resources.workers": 2},
    )
    config = pipeline.config
    assert (config.data.dataset, config.data.sources) == ("wikitext-2", [])
    assert (config.resources.accelerator, config.resources.workers) == ("cpu", 2)
    assert (config.training.precision, config.training.lr, config.training.seed) == ("bf16", 0.5, 3)
    assert config.model.dim == 32


def test_everything_wrong_with_the_arguments_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingPipeline({}, accelerator="tpu", precision="fp8", training={"learning_rate": 1.0, "batch_size": 0})
    assert sorted(problem.key for problem in caught.value.problems) == [
        "resources.accelerator",
        "training.batch_size",
        "training.learning_rate",
        "training.precision",
    ]


def test_the_api_of_the_first_description_runs_in_small(home: Path) -> None:
    model = GlowFlowModel.from_config(write_config(home, training__max_steps=1000))
    trainer = TrainingPipeline(model=model, dataset=str(home / "corpus"), accelerator="cpu", precision="fp32")
    record = trainer.fit(
        max_steps=4, checkpoint_interval=2, monitor_metrics=["perplexity", "grad_norm"], local=True, progress=False
    )
    run_dir = home / "runs" / record.run
    assert record.status == "FINISHED" and record.steps == 4 and record.tokens == 4 * 16 * 64
    assert {"train_loss", "val_loss", "perplexity", "grad_norm"} <= record.final.keys()
    assert record.config["training"]["monitor_metrics"] == ["perplexity", "grad_norm"]
    assert [checkpoint["step"] for checkpoint in record.checkpoints] == [2, 4]
    assert record.to_dict() == json.loads((run_dir / "run.json").read_text())
    assert set(record.fingerprints) == {"config", "data", "code"} and record.device == "1 x cpu"
    # The recipe that was given stays one; the pipeline's model is the trained one, from the single-file checkpoint.
    assert not model.touched
    content = read_single_file(run_dir / "checkpoints" / "model-4.pt")
    assert content["step"] == 4 and trainer.model.step == 4
    trained = trainer.model.module.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in content["state_dict"].items())


def test_touched_weights_are_what_training_starts_from(home: Path) -> None:
    config = write_config(home, **SHORT, training__lr=1e-12, training__warmup_steps=0, model__vocab_size=257)
    model = GlowFlowModel.from_config(config)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    trainer = TrainingPipeline(model)
    record = trainer.fit(local=True, progress=False)
    assert (home / "runs" / record.run / "initial.pt").is_file()
    after = trainer.model.module.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    plain = TrainingPipeline(config)
    plain.fit(local=True, progress=False)
    assert any(not torch.allclose(plain.model.module.state_dict()[name], before[name]) for name in before)


def test_touched_weights_of_another_shape_are_refused_before_anything_is_written(home: Path) -> None:
    model = GlowFlowModel.from_config(write_config(home, **SHORT, model__vocab_size=257))
    assert model.module is not None
    pipeline = TrainingPipeline(model, **{"model.dim": 64, "tracking.run": "other-shape"})
    with pytest.raises(CheckpointError, match="shape"):
        pipeline.fit(local=True, progress=False)
    assert not (home / "runs" / "other-shape").exists()


def test_a_gpu_that_is_not_there_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for local in (True, False):
        with pytest.raises(PreflightError, match="this machine has none"):
            TrainingPipeline(write_config(home), accelerator="gpu").fit(local=local, progress=False)


def test_a_run_name_is_used_once(home: Path) -> None:
    config = write_config(home, **SHORT, tracking__run="once")
    TrainingPipeline(config).fit(local=True, progress=False)
    with pytest.raises(PreflightError, match="--resume once"):
        TrainingPipeline(config).fit(local=True, progress=False)


def test_bad_data_is_refused_before_a_run_directory_exists(home: Path) -> None:
    empty = home / "empty"
    empty.mkdir(exist_ok=True)
    pipeline = TrainingPipeline(write_config(home, "bad-data", data__dataset=str(empty), tracking__run="bad-data"))
    with pytest.raises(DataError):
        pipeline.fit(local=True, progress=False)
    assert not (home / "runs" / "bad-data").exists()


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_before_a_run_directory_exists(home: Path) -> None:
    config = write_config(home, "vocabulary", model__vocab_size=100, tracking__run="vocabulary")
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        TrainingPipeline(config).fit(local=True, progress=False)
    assert not (home / "runs" / "vocabulary").exists()


def test_a_stopped_run_goes_on_and_keeps_what_decides_its_numbers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(home, training__max_steps=20, training__checkpoint_interval=5, tracking__run="stopped")

    def stop_at_five(job: Any) -> dict[str, Any]:
        def update(step: int, *_: Any) -> None:
            if step >= 5 and not job.interrupts.stop_requested:
                os.kill(os.getpid(), signal.SIGINT)

        job.progress.update = update
        return local_module.run_local(job)

    monkeypatch.setattr("glowflow.orchestration.pipeline._runner", lambda local: stop_at_five)
    stopped = TrainingPipeline(config).fit(local=True, progress=_Silence())
    assert stopped.status == "KILLED" and 5 <= stopped.steps < 20
    assert json.loads((home / "runs" / "stopped" / "run.json").read_text())["status"] == "KILLED"
    monkeypatch.undo()

    with pytest.raises(ConfigError, match=r"training\.lr"):
        TrainingPipeline.resume(home / "runs" / "stopped", ["training.lr=0.1"], local=True, progress=False)
    record = TrainingPipeline(config).fit(resume="stopped", local=True, progress=False)
    assert record.status == "FINISHED" and record.steps == 20 and record.run == "stopped"
    assert list(loss_curve(home / "runs" / "stopped")) == list(range(1, 21))
    with pytest.raises(RunError, match=r"training\.max_steps"):
        TrainingPipeline.resume(home / "runs" / "stopped", local=True, progress=False)
    longer = TrainingPipeline.resume(home / "runs" / "stopped", ["training.max_steps=22"], local=True, progress=False)
    assert longer.steps == 22
    assert json.loads((home / "runs" / "stopped" / "run.json").read_text())["config"]["training"]["max_steps"] == 22


class _Silence:
    def phase(self, text: str) -> None: ...

    def update(self, step: int, max_steps: int, metrics: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def test_resuming_says_which_checkpoint_and_survives_another_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(home)
    config = write_config(home, **SHORT, tracking__run="moved-on", data__dataset="corpus", tracking__storage="runs")
    TrainingPipeline(config).fit(local=True, progress=False)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    record = TrainingPipeline.resume(home / "runs" / "moved-on", ["training.max_steps=6"], local=True)
    assert record.steps == 6
    assert "going on from the newest complete checkpoint, step-4" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_run_is_refused(home: Path) -> None:
    with pytest.raises(RunError, match="is not known"):
        TrainingPipeline.resume("nowhere", [f"tracking.storage={home / 'runs'}"], local=True)


@pytest.mark.parametrize("kind", [DataError, RuntimeError])
def test_a_run_that_breaks_off_is_recorded_as_failed(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    name = f"broken-{kind.__name__}"

    def broken(job: Any) -> dict[str, Any]:
        raise kind("the disk is on fire\nand more")

    monkeypatch.setattr("glowflow.orchestration.pipeline._runner", lambda local: broken)
    expected = DataError if kind is DataError else TrainingFailed
    with pytest.raises(expected, match="the disk is on fire") as caught:
        TrainingPipeline(write_config(home, **SHORT, tracking__run=name)).fit(local=True, progress=False)
    written = json.loads((home / "runs" / name / "run.json").read_text())
    assert written["status"] == "FAILED" and "the disk is on fire" in written["error"]
    trace = home / "runs" / name / "logs" / "error.txt"
    if kind is RuntimeError:
        assert isinstance(caught.value, TrainingFailed) and caught.value.exit_code == 1
        assert str(trace) in str(caught.value) and "\n" not in str(caught.value)
        assert "RuntimeError: the disk is on fire" in trace.read_text()
    else:
        assert not trace.exists()


def test_local_training_imports_no_ray(home: Path) -> None:
    program = (
        "import sys; from glowflow import TrainingPipeline\n"
        "record = TrainingPipeline(sys.argv[1]).fit(local=True, progress=False)\n"
        "print(record.status, sorted(name for name in sys.modules if name == 'ray' or name.startswith('ray.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(write_config(home, **SHORT))],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "FINISHED []", done.stderr
