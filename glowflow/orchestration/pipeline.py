"""``TrainingPipeline``: from a model's recipe and a few arguments to a trained, tracked run, on Ray or in this process.

Every argument is a config key and goes through the same checks as YAML. Then, in order: preflight (nothing written),
Ray, data, run directory, MLflow run, training, and the end written down. A model whose weights were touched is shipped
as a single-file checkpoint, any other as its recipe; no module is ever pickled.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from glowflow.config.errors import CheckpointError, Problem, RunError
from glowflow.config.loader import apply_overrides, load_config, to_dict, warnings
from glowflow.config.schema import GlowFlowConfig
from glowflow.orchestration import cluster, preflight
from glowflow.orchestration.interrupts import Interrupts
from glowflow.orchestration.progress import Progress, make_progress
from glowflow.orchestration.rundir import ResumePoint, locate, lock_run, resume_config, store_sources, stored_sources

if TYPE_CHECKING:
    from glowflow.core.model import GlowFlowModel
    from glowflow.data.manifest import Manifest
    from glowflow.data.processors.text import Tokenizer
    from glowflow.tracking.runrecord import RunRecord

__all__ = ["TrainingPipeline", "sized_config"]

logger = logging.getLogger(__name__)

_INITIAL_NAME = "initial.pt"


class TrainingPipeline:
    """Trains one model.

    Args:
        model: a ``GlowFlowModel``, or what one is made from: a YAML file, a mapping, a config.
        dataset: ``data.dataset``.
        accelerator: ``resources.accelerator``: "auto", "cpu" or "gpu".
        precision: ``training.precision``: "fp32", "bf16" or "fp16".
        verbose: let Ray and the workers write to the terminal.
        overrides: more config keys: sections with a mapping (``training={"lr": 1e-3}``) or dotted keys
            (``**{"training.lr": 1e-3}``).

    Raises:
        ConfigError: everything that is wrong with the config and the arguments.
    """

    def __init__(
        self,
        model: GlowFlowModel | GlowFlowConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        dataset: str | None = None,
        accelerator: str | None = None,
        precision: str | None = None,
        *,
        verbose: bool = False,
        **overrides: Any,
    ) -> None:
        self._given: GlowFlowModel | None = model if _is_model(model) else None
        source: Any = self._given.config if self._given is not None else model
        self._stem = Path(source).stem if isinstance(source, (str, os.PathLike)) else None
        given: dict[str, Any] = {
            "data.dataset": dataset,
            # One data set instead of the config's mixture.
            "data.sources": None if dataset is None else [],
            "resources.accelerator": accelerator,
            "training.precision": precision,
        }
        self.config = load_config(source, _named({**given, **_flat(overrides)}))
        self.verbose = verbose
        self.record: RunRecord | None = None
        self._trained: Path | None = None
        self._loaded: GlowFlowModel | None = None

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), *, verbose: bool = False
    ) -> TrainingPipeline:
        """A pipeline from a YAML file and ``key=value`` overrides; runs get the file's name."""
        pipeline = cls(load_config(path, overrides), verbose=verbose)
        pipeline._stem = Path(path).stem
        return pipeline

    @classmethod
    def from_weights(
        cls,
        weights: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        *,
        verbose: bool = False,
    ) -> TrainingPipeline:
        """A pipeline that starts from a trained (or imported) model's weights instead of the seed's.

        Args:
            weights: a run, a checkpoint, or an exported or imported file.
            config: a YAML file for everything but ``model`` and ``data.tokenizer``, which are those of the weights, as
                is ``data.context`` where the file names none; without a file, data and training are the weights' too.
            overrides: ``key=value`` texts.
            verbose: as for the class.

        Raises:
            RunError, CheckpointError: there are no such weights. ConfigError: as for the class.
        """
        from glowflow.core.model import GlowFlowModel, require_parametrization
        from glowflow.evaluation.load import load_target

        target = load_target(Path(weights), preflight.storage_dir(load_config(None, _only_storage(overrides))))
        theirs = to_dict(target.config)
        values = theirs if config is None else load_config(config).model_dump(mode="json", exclude_unset=True)
        # Where and under which name the weights were trained is not where this run is to be.
        names = ("training",) if config is None else ("training", "tracking", "resources")
        sections = {name: values[name] for name in names if name in values}
        data = {"context": target.config.data.context, **values.get("data", {})}
        data["tokenizer"] = target.config.data.tokenizer
        if config is not None and "model" in values:
            logger.warning("%s: its section model is not used, the model is that of %s", config, target.path)
        merged = load_config({"model": theirs["model"], "data": data, **sections}, overrides)
        require_parametrization(merged, theirs, str(target.path))
        model = GlowFlowModel(merged, target.tokenizer_spec)
        model.load_state_dict(target.module.state_dict(), str(target.path))
        pipeline = cls(model, verbose=verbose)
        pipeline._stem = Path(config or weights).stem
        return pipeline

    @property
    def model(self) -> GlowFlowModel:
        """The model: the trained one after ``fit``, read from its export at the first use; before, the recipe."""
        from glowflow.core.model import GlowFlowModel

        if self._loaded is None and self._trained is not None:
            self._loaded = GlowFlowModel.load(self._trained)
        return self._loaded or self._given or GlowFlowModel(self.config)

    def fit(
        self,
        max_steps: int | None = None,
        checkpoint_interval: int | None = None,
        monitor_metrics: Sequence[str] | None = None,
        *,
        local: bool = False,
        resume: str | os.PathLike[str] | None = None,
        progress: Any = None,
    ) -> RunRecord:
        """Train to the end, or until the user stops it.

        Args:
            max_steps: ``training.max_steps``.
            checkpoint_interval: ``training.checkpoint_interval``, in steps.
            monitor_metrics: ``training.monitor_metrics``.
            local: train in this process, without Ray.
            resume: name or directory of a run to go on with (or one of its checkpoints) instead of a new run. Its own
                config counts, with the arguments given here as changes.
            progress: None shows one line on stderr, False nothing; or an object like ``Progress``.

        Returns:
            What RUN/run.json holds; its status is FINISHED, or KILLED when the user stopped it.

        Raises:
            GlowFlowError: something that the user can mend; nothing is written if it is found before training.
            TrainingFailed: training broke off otherwise.
        """
        arguments = _named(
            {
                "training.max_steps": max_steps,
                "training.checkpoint_interval": checkpoint_interval,
                "training.monitor_metrics": None if monitor_metrics is None else list(monitor_metrics),
            }
        )
        if resume is not None:
            point = locate(Path(resume), preflight.storage_dir(self.config))
            return self._run(resume_config(point.run_dir, arguments), point, local, progress)
        return self._run(apply_overrides(self.config, arguments), None, local, progress)

    @classmethod
    def resume(
        cls,
        run: str | os.PathLike[str],
        overrides: Sequence[str] | Mapping[str, Any] = (),
        *,
        local: bool = False,
        verbose: bool = False,
        progress: Any = None,
    ) -> RunRecord:
        """Go on with a run exactly where it stopped, also with another number of workers.

        Args:
            run: its name, its directory, or one of its checkpoints (which must be complete and undamaged); of a run
                the newest complete checkpoint is taken.
            overrides: config keys that change; those that decide the numbers must not.

        Other arguments, result and errors as for ``fit``.
        """
        # Overrides may say where the run is; whether they are right is checked against the run's own config.
        storage = preflight.storage_dir(load_config(None, _only_storage(overrides)))
        point = locate(Path(run), storage)
        pipeline = cls(resume_config(point.run_dir, overrides), verbose=verbose)
        return pipeline._run(pipeline.config, point, local, progress)

    # -- one run ------------------------------------------------------------------------------------------------------

    def _run(self, config: GlowFlowConfig, point: ResumePoint | None, local: bool, progress: Any) -> RunRecord:
        from glowflow.training.plans import training_plan

        if local:
            config = apply_overrides(config, {"resources.workers": 1})
        config = apply_overrides(config, {key: str(path) for key, path in preflight.encoder_files(config).items()})
        display = make_progress(progress, config.training.monitor_metrics)
        if point is not None:
            _refuse_live(point.run_dir)
        for warning in [*warnings(config), *preflight.preflight(config, local=local, new_run=point is None)]:
            display.note(f"warning: {warning}")
        with contextlib.ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts())
            if not local:
                display.phase("starting Ray ...")
                stack.enter_context(cluster.connected(config, verbose=self.verbose))
                interrupts.reinstall()
                if cluster.ray_address(config) is not None:
                    preflight.check_cluster(config)
            display.phase("preparing the data ...")
            sources = _prepare(config, local, display, point, self._tokenizer())
            config = self._with_sizes(config, [manifest for manifest, _ in sources])
            training_plan(config, sources)  # whose checks are those of the workers
            return self._train(config, point, local, display, interrupts, sources)

    def _train(
        self,
        config: GlowFlowConfig,
        point: ResumePoint | None,
        local: bool,
        display: Progress,
        interrupts: Interrupts,
        sources: list[tuple[Manifest, float]],
    ) -> RunRecord:
        from glowflow.orchestration.job import Job, execute

        joined = not local and cluster.ray_address(config) is not None
        accelerator = preflight.resolve_accelerator(config, joined=joined)
        checkpoint = None if point is None else _checkpoint_of(point, config, display)
        run_dir = self._new_run_dir(config) if point is None else point.run_dir
        config = apply_overrides(config, {"tracking.run": run_dir.name, "tracking.storage": str(run_dir.parent)})
        with lock_run(run_dir):
            store_sources(run_dir, sources)
            if point is None and self._given is not None and self._given.touched:
                self._given.save(run_dir / _INITIAL_NAME)
            initial = run_dir / _INITIAL_NAME
            job = Job(
                config=config,
                run_dir=run_dir,
                sources=sources,
                local=local,
                accelerator=accelerator,
                progress=display,
                interrupts=interrupts,
                resume_from=checkpoint,
                initial_weights=initial if initial.exists() else None,
                tracking_uri=_tracking_uri(config),
                verbose=self.verbose,
            )
            display.note(f"run {run_dir.name} in {run_dir}")
            self.record = execute(job, _runner(local))
        self._remember(run_dir)
        return self.record

    def _new_run_dir(self, config: GlowFlowConfig) -> Path:
        from glowflow.tracking.runrecord import create_run_dir, new_run_name

        name = config.tracking.run or new_run_name(self._stem or config.data.dataset)
        return create_run_dir(preflight.storage_dir(config), name)

    def _with_sizes(self, config: GlowFlowConfig, manifests: Sequence[Manifest]) -> GlowFlowConfig:
        """The config with the sizes that the data give, checked against a model that already has weights."""
        from glowflow.core.model import build_module, state_dict_problems

        sized = sized_config(config, *manifests)
        if self._given is not None and self._given.touched:
            problems = state_dict_problems(build_module(sized), self._given.module.state_dict(), "model")
            if problems:
                raise CheckpointError(problems, title="The model's weights do not fit the config and the tokenizer")
        return sized

    def _tokenizer(self) -> Tokenizer | None:
        """The tokenizer whose ids the given weights know; None where training starts from the seed."""
        from glowflow.data.processors.text import tokenizer_from_spec

        if self._given is None or not self._given.touched or self._given.tokenizer_spec is None:
            return None
        return tokenizer_from_spec(self._given.tokenizer_spec)

    def _remember(self, run_dir: Path) -> None:
        """Where the trained weights are, for ``model``."""
        assert self.record is not None
        export = run_dir / "checkpoints" / f"model-{self.record.steps}.pt"
        if export.is_file():
            self._trained, self._loaded = export, None


def sized_config(config: GlowFlowConfig, *manifests: Manifest) -> GlowFlowConfig:
    """The config with the vocabulary of the data's tokenizer and, for a classifier, the number of the data's labels.

    Raises:
        ConfigError: the model cannot read these data.
    """
    from glowflow.training.data_sizes import with_data_sizes

    return with_data_sizes(config, manifests)


def _is_model(value: Any) -> TypeGuard[GlowFlowModel]:
    # Without importing torch for a path or a config.
    return hasattr(value, "touched") and hasattr(value, "config")


def _named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that were given; None stands for not given."""
    return {key: value for key, value in arguments.items() if value is not None}


def _flat(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sections given as mappings become dotted keys, so that the keys beside them keep their values."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in GlowFlowConfig.model_fields and isinstance(value, Mapping):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    return flat


def _only_storage(overrides: Sequence[str] | Mapping[str, Any]) -> list[str] | dict[str, Any]:
    if isinstance(overrides, Mapping):
        return {key: value for key, value in overrides.items() if key == "tracking.storage"}
    return [text for text in overrides if text.partition("=")[0].strip() == "tracking.storage"]


def _refuse_live(run_dir: Path) -> None:
    """A run that a living process drives cannot be resumed beside it."""
    from glowflow.tracking.runrecord import RECORD_NAME, RunRecord, is_alive

    if not (run_dir / RECORD_NAME).is_file():
        return
    record = RunRecord.load(run_dir)
    if is_alive(record, run_dir):
        owner = f"process {record.process.get('pid')} on {record.process.get('host')}"
        hint = "wait for it, or stop it with Ctrl-C there"
        raise RunError(Problem("resume", f"the run is still running: {owner}", run_dir.name, hint))


def _prepare(
    config: GlowFlowConfig, local: bool, display: Progress, point: ResumePoint | None, tokenizer: Tokenizer | None
) -> list[tuple[Manifest, float]]:
    """Built data sets.

    Raises:
        DataError: what is built already has another tokenizer than the weights to start from.
    """
    from glowflow.data.prepare import ensure_built

    def building(done: int, total: int, tokens: int) -> None:
        display.phase(f"building the data: {done}/{total} shards, {tokens:,} tokens")

    # A run goes on with the shards that it began with, wherever the command is typed and whatever became of the texts.
    sources = None if point is None else stored_sources(point.run_dir, config.data.verify)
    if sources is None:
        sources = ensure_built(config.data, use_ray=not local, progress=building, tokenizer=tokenizer)
        if tokenizer is not None:
            _require_tokenizer(sources, tokenizer)
    return sources


def _require_tokenizer(sources: list[tuple[Manifest, float]], tokenizer: Tokenizer) -> None:
    from glowflow.evaluation.analyzer import check_tokenizer

    for manifest, _ in sources:
        check_tokenizer(tokenizer.spec(), manifest)


def _checkpoint_of(point: ResumePoint, config: GlowFlowConfig, display: Progress) -> Path | None:
    """The checkpoint to go on from; says which.

    Raises:
        RunError: there is nothing left to train.
    """
    from glowflow.training.markers import latest_complete, read_info

    path = point.checkpoint or latest_complete(point.run_dir, check=True)
    info = read_info(path) if path is not None else None
    if path is None or info is None:
        display.note(f"{point.run_dir.name} has no complete checkpoint yet: starting at step 0")
        return None
    if info.step >= config.training.max_steps:
        hint = f"to train longer: training.max_steps={2 * info.step}"
        rule = f"must be greater than the {info.step} steps that {point.run_dir.name} has done"
        raise RunError(Problem("training.max_steps", rule, config.training.max_steps, hint))
    which = "the checkpoint that you named" if point.checkpoint is not None else "the newest complete checkpoint"
    display.note(f"going on from {which}, {path.name}")
    return path


def _tracking_uri(config: GlowFlowConfig) -> str | None:
    if config.tracking.backend != "mlflow":
        return None
    from glowflow.tracking.client import default_uri

    return default_uri(config.tracking.storage, config.tracking.uri)


def _runner(local: bool) -> Any:
    if local:
        from glowflow.orchestration.local import run_local

        return run_local
    from glowflow.orchestration.remote import run_on_ray

    return run_on_ray
