"""The typed experiment file: model, data, training, tracking, resources.

Every key has its type, default and meaning here; the JSON Schema and docs/config.md are generated from it. The
sections ``model`` and ``training.optimizer`` are checked against the schema of the name they select, which
``config/registry.py`` knows without importing the code behind it.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.base import StrictModel
from glowflow.config.errors import Problem, RuleError
from glowflow.config.media import MODALITIES, AudioConfig, ImageConfig, ModalityWeights
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.optimizers import OptimizerConfig
from glowflow.config.selection import select_architecture, select_optimizer

__all__ = ["DataConfig", "GlowFlowConfig", "ResourcesConfig", "SourceConfig", "TrackingConfig", "TrainingConfig"]

Precision = Literal["fp32", "bf16", "fp16"]
Accelerator = Literal["auto", "cpu", "gpu"]
_TOKENIZERS = ("auto", "bytes", "chars", "words", "bpe")


def _unchecked(value: dict[str, str]) -> Any:
    """A default that the field's own validator turns into the selected schema."""
    return value


class SourceConfig(StrictModel):
    """One of several weighted sources."""

    dataset: str = Field(description="Catalogue name or path, as in `data.dataset`.")
    weight: float = Field(1.0, gt=0, description="Share of the sequences, relative to the other sources.")


class ColumnsConfig(StrictModel):
    """Names of the columns (Parquet, CSV, TSV, JSONL) or file suffixes (WebDataset) of a sample's parts."""

    text: str | None = Field(
        None, description="Text or conversation; default: `text`, `caption`, `txt`, `messages` ..."
    )
    image: str | None = Field(None, description="Picture or list of pictures; default: `image`, `images`, `jpg` ...")
    audio: str | None = Field(None, description="Recording or list of them; default: `audio`, `wav` ...")
    label: str | None = Field(None, description="Class of the sample; default: `label`.")
    group: str | None = Field(
        None, description="What samples belong together (a speaker, a recording): intervals resample whole groups."
    )


class DataConfig(StrictModel):
    """What the model reads."""

    dataset: str = Field(
        "python-stdlib",
        description=(
            "Catalogue name, built data directory (with manifest.json), path to text, pictures, recordings, JSONL, "
            "Parquet or WebDataset, or hf://datasets/OWNER/NAME."
        ),
    )
    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="Several weighted sources instead of `dataset`; the first gives the validation split.",
    )
    tokenizer: str = Field(
        "auto",
        description=(
            "`auto` (the dataset's own), `bytes`, `chars`, `words`, `words:VOCAB_SIZE`, `bpe`, `bpe:VOCAB_SIZE`, or "
            "the path of a tokenizer.json, or of llama2.c's tokenizer.bin."
        ),
    )
    context: int = Field(256, ge=2, description="Sequence length in tokens.")
    layout: Literal["packed", "lanes", "bucketed"] | None = Field(
        None,
        description=(
            "`packed`: shuffled documents cut into sequences; `lanes`: contiguous streams, one per sequence of the "
            "batch, for architectures with memory; `bucketed`: one sample per sequence, those of similar length and "
            "modalities together, for data with media. Default: what the architecture needs."
        ),
    )
    columns: ColumnsConfig = Field(
        default_factory=lambda: ColumnsConfig(), description="Where a sample's parts are found in the source's files."
    )
    prompt: str | None = Field(
        None,
        description=(
            "Text before the sample's text, on which there is no loss: `<image> {question}`. `{name}` stands for a "
            "column; `<image>` and `<audio>` for media, in their order. Default: one placeholder per medium."
        ),
    )
    template: str | None = Field(
        None, description="The sample's text, as in `prompt`: `{answer}`. Default: the text column as it is."
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="How pictures are prepared.")
    audio: AudioConfig = Field(default_factory=AudioConfig, description="How recordings are prepared.")
    on_bad_sample: Literal["error", "skip", "blank"] = Field(
        "error",
        description=(
            "A picture or recording that cannot be used: `error` stops, naming it; `skip` leaves the sample out when "
            "the data set is built; `blank` keeps its place with weight 0. One that fails only later becomes a blank "
            "with both."
        ),
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Stop when a larger share of the samples is bad (beyond the first ten)."
    )
    on_long_sample: Literal["error", "truncate"] = Field(
        "error", description="A sample longer than `context`: stop, naming the length, or cut off its end."
    )
    loss_weights: ModalityWeights = Field(
        default_factory=ModalityWeights, description="Weights of the loss by what is predicted."
    )
    prompt_loss: bool = Field(False, description="Count the loss of `prompt` too.")
    modality_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="In training, probability that a sample loses a modality, drawn from (seed, epoch, sample).",
    )
    without: list[Literal["image", "audio"]] = Field(
        default_factory=list, description="Modalities that are left out of every sample, in training and evaluation."
    )
    pairing: Literal["matched", "shuffled"] = Field(
        "matched", description="`shuffled`: each sample gets the media of another one, for controls."
    )
    window_tokens: int = Field(
        4_194_304,
        ge=1,
        description="Documents are shuffled inside windows of row groups of about this many tokens.",
    )
    document_mask: bool = Field(
        True,
        description="Attention does not cross document boundaries inside a packed sequence.",
    )
    train_split: str = Field("train", description="Split to train on.")
    val_split: str = Field("validation", description="Split for validation inside the loop and for `glowflow eval`.")
    cache_dir: str = Field("~/.cache/glowflow", description="Where built shards of catalogue data sets are kept.")
    on_bad_file: Literal["refuse", "skip"] = Field(
        "refuse",
        description="Binary or undecodable files among text: refuse (naming them) or skip (naming them).",
    )
    steps_per_item: int = Field(32, ge=1, description="Optimiser steps of batches that one Ray Data item carries.")
    prefetch_items: int = Field(2, ge=1, description="Items that Ray Data keeps ready per worker.")
    parallel_items: int | None = Field(
        None,
        ge=1,
        description="Items that a worker's Ray tasks prepare at once; default: 1, with media 2 over the workers.",
    )
    verify: Literal["size", "hash"] = Field(
        "hash",
        description="How shards are checked against the manifest before training.",
    )

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer(cls, value: str) -> str:
        kind, colon, size = value.partition(":")
        if kind == "words" and colon:
            if not size.isdecimal() or int(size) < 2:
                raise ValueError("`words:VOCAB_SIZE` needs a whole number of at least 2, as in words:4000")
        elif kind == "bpe" and colon:
            # 256 bytes and <|endoftext|> are always there.
            if not size.isdecimal() or int(size) < 257:
                raise ValueError("`bpe:VOCAB_SIZE` needs a whole number of at least 257, as in bpe:4096")
        elif value not in _TOKENIZERS and not value.endswith((".json", ".bin")):
            close = difflib.get_close_matches(kind, _TOKENIZERS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"must be one of {', '.join(_TOKENIZERS)}, bpe:VOCAB_SIZE, or a tokenizer.json{hint}")
        return value


class TrainingConfig(StrictModel):
    """How it is trained. Everything that `TrainingPipeline()` and `fit()` take is a key here or in another section."""

    max_steps: int = Field(1000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(
        32,
        ge=1,
        description="Global batch: sequences per optimiser step, over all workers and accumulation steps.",
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences per worker and forward pass; default: no accumulation.",
    )
    optimizer: SerializeAsAny[OptimizerConfig] = Field(
        default_factory=lambda: _unchecked({"name": "adamw"}),
        description="Registered name, or a mapping with `name` and the optimiser's own keys.",
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_lr: float | None = Field(None, ge=0, description="Final learning rate of decaying schedules; default lr/10.")
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        "cosine",
        description="Learning-rate schedule after the warm-up, a pure function of the step.",
    )
    warmup_steps: int = Field(100, ge=0, description="Linear warm-up steps.")
    decay_fraction: float = Field(
        0.2,
        gt=0,
        le=1,
        description="`wsd`: the last part of the steps in which the rate decays.",
    )
    grad_clip: float | None = Field(1.0, gt=0, description="Largest global gradient norm; null: no clipping.")
    precision: Precision = Field(
        "fp32",
        description="Compute precision; weights and optimiser state stay fp32. `fp16` scales the loss dynamically.",
    )
    strategy: Literal["auto", "single", "ddp", "fsdp"] = Field(
        "auto",
        description="`auto`: fsdp with several workers, single with one.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Recompute each block's activations in the backward pass.",
    )
    compile: bool = Field(False, description="torch.compile each block.")
    seed: int = Field(0, ge=0, description="Seed of initialisation, data order and dropout.")
    checkpoint_interval: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints; default: max_steps/10, at least 1. The last step is always saved.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many recent checkpoints are kept, besides the best.")
    export_interval: int | None = Field(
        None,
        ge=1,
        description="Steps between single-file exports checkpoints/model-{step}.pt; default: only the last step.",
    )
    log_interval: int = Field(10, ge=1, description="Steps between reads of the metrics from the device.")
    val_interval: int | None = Field(
        None,
        ge=1,
        description=(
            "Steps between validations; default: max_steps/10, at least 1. The last step is always validated."
        ),
    )
    val_batches: int | None = Field(
        20,
        ge=1,
        description="Global batches per validation inside the loop; null: the whole validation split.",
    )
    monitor_metrics: list[str] = Field(
        default_factory=lambda: ["val_loss"],
        description=(
            "Metrics shown in the progress display; the first that validation measures chooses the best checkpoint."
        ),
    )
    monitor_mode: Literal["min", "max"] = Field(
        "min",
        description="Whether the best checkpoint has the smallest or largest monitored metric.",
    )
    max_nonfinite_steps: int = Field(
        5,
        ge=0,
        description="Steps with a non-finite loss or gradient that are skipped before the run is stopped.",
    )
    max_failures: int = Field(3, ge=0, description="Worker failures that are retried from the last checkpoint.")
    threads: int | None = Field(
        None,
        ge=1,
        description="Intra-op CPU threads per worker; default: the cores over the workers on the node.",
    )
    log_samples: bool = Field(False, description="Write the sample ids of every step to RUN/samples/.")

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer(cls, value: Any) -> Any:
        return select_optimizer(value)

    @model_validator(mode="after")
    def _rates(self) -> TrainingConfig:
        if self.min_lr is not None and self.min_lr > self.lr:
            rule = f"must not be greater than training.lr, which is {self.lr:g}"
            raise RuleError(Problem("min_lr", rule, self.min_lr, related=("lr",)))
        return self


class TrackingConfig(StrictModel):
    """Where runs and their metrics are kept."""

    storage: str = Field(
        "runs",
        description="Directory of the run directories; on a cluster, a path that all nodes share.",
    )
    run: str | None = Field(None, description="Name of the run; default: made from the config's name and the time.")
    uri: str | None = Field(
        None,
        description="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in `storage`.",
    )
    experiment: str = Field("glowflow", description="MLflow experiment.")
    backend: Literal["mlflow", "jsonl"] = Field("mlflow", description="`jsonl`: metrics only in the run directory.")
    system_metrics: bool = Field(True, description="Record CPU, memory, disk and network use.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of the MLflow run.")


class ResourcesConfig(StrictModel):
    """What it runs on."""

    workers: int = Field(1, ge=1, description="Training workers (processes; one GPU each on GPUs).")
    accelerator: Accelerator = Field("auto", description="`auto` takes a GPU where there is one.")
    cpus_per_worker: float | Literal["auto"] = Field(
        "auto",
        description="Logical CPUs that Ray reserves per worker; `auto` always leaves CPU for the data maps.",
    )
    address: str | None = Field(
        None,
        description="Ray cluster to join (`auto` or host:port); default: RAY_ADDRESS, else a private local cluster.",
    )
    object_store_gib: float | None = Field(
        None,
        gt=0,
        description="Object store of a private local cluster in GiB; default: at most 2.",
    )

    @field_validator("cpus_per_worker")
    @classmethod
    def _positive(cls, value: float | Literal["auto"]) -> float | Literal["auto"]:
        if isinstance(value, float) and value <= 0:
            raise ValueError("must be greater than 0, or 'auto'")
        return value


class GlowFlowConfig(StrictModel):
    """One experiment."""

    model: SerializeAsAny[ArchitectureConfig] = Field(
        default_factory=lambda: _unchecked({"arch": "transformer"}),
        description="The architecture and its keys.",
    )
    data: DataConfig = Field(default_factory=DataConfig, description="What the model reads.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How it is trained.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Where runs and metrics are kept.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="What it runs on.")

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        return select_architecture(value)

    @model_validator(mode="after")
    def _sections_agree(self) -> GlowFlowConfig:
        problems = []
        workers, batch, micro = self.resources.workers, self.training.batch_size, self.training.micro_batch_size
        if batch % workers:
            rule = f"must be a multiple of resources.workers: {batch} % {workers} = {batch % workers}"
            problems.append(Problem("training.batch_size", rule, batch, related=("resources.workers",)))
        elif micro is not None and (batch // workers) % micro:
            rule = (
                "must divide training.batch_size / resources.workers: "
                f"{batch // workers} % {micro} = {batch // workers % micro}"
            )
            problems.append(
                Problem(
                    "training.micro_batch_size",
                    rule,
                    micro,
                    related=("training.batch_size", "resources.workers"),
                )
            )
        if self.training.strategy == "single" and workers > 1:
            rule = f"`single` runs on one worker, but resources.workers is {workers}"
            hint = "use auto, ddp or fsdp"
            problems.append(Problem("training.strategy", rule, "single", hint, related=("resources.workers",)))
        if self.data.layout == "packed" and self.model.layout == "lanes":
            rule = (
                f"must be lanes: {self.model.arch} carries memory from one sequence of a row to the next, and packed "
            )
            rule += "sequences do not go on where the one before ended"
            without = "set model.memory=0" if hasattr(self.model, "memory") else "take an architecture without memory"
            problems.append(
                Problem("data.layout", rule, "packed", f"leave it out, or {without}", related=("model.arch",))
            )
        problems += self._media_problems()
        longest = self.model.longest_context
        if longest is not None and self.data.context > longest:
            rule = f"must be at most {longest}: the model has no more positions"
            hint, related = "shorten it, or raise model.max_positions", ("model.position", "model.max_positions")
            problems.append(Problem("data.context", rule, self.data.context, hint, related=related))
        if problems:
            raise RuleError(problems)
        return self

    def _media_problems(self) -> list[Problem]:
        """What the model's modalities and the data section say of each other."""
        if not isinstance(self.model, MultimodalConfig):
            return []
        problems = []
        if self.data.layout not in (None, "bucketed"):
            rule = "must be bucketed for arch multimodal: a sample with its media is one sequence"
            problems.append(Problem("data.layout", rule, self.data.layout, "leave it out", related=("model.arch",)))
        for name in MODALITIES:
            weighted = getattr(self.data.loss_weights, name) > 0
            if weighted and (self.model.task != "language_modelling" or name not in self.model.modalities):
                rule = f"has no effect: the model predicts no {name} placeholders"
                problems.append(Problem(f"data.loss_weights.{name}", rule, getattr(self.data.loss_weights, name)))
        return problems

    @property
    def layout(self) -> Literal["packed", "lanes", "bucketed"]:
        """How the data are cut into rows: `data.layout`, or what the architecture needs."""
        return self.data.layout or self.model.layout

    @property
    def micro_batch_size(self) -> int:
        """Sequences per worker and forward pass."""
        return self.training.micro_batch_size or self.training.batch_size // self.resources.workers

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes per optimiser step."""
        return self.training.batch_size // self.resources.workers // self.micro_batch_size

    def interval(self, name: Literal["checkpoint_interval", "val_interval"]) -> int:
        """A given interval, or a tenth of the run."""
        return getattr(self.training, name) or max(1, self.training.max_steps // 10)
