"""``GlowFlowModel``: a recipe (config, tokenizer) that becomes parameters when somebody touches them.

The pipeline ships the recipe, or a checkpoint if weights were touched, never a pickled module. A single-file
checkpoint (.pt or .safetensors) holds everything that using the model needs: config, tokenizer, step and weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from glowflow.config.architectures import DecoderConfig
from glowflow.config.errors import CheckpointError, ConfigError, GlowFlowError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.registry import ARCHITECTURES, load_object
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.initialization import initialize

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from glowflow.core.generation import Completion, Hypothesis, SamplingOptions

__all__ = [
    "FORMAT",
    "GlowFlowModel",
    "architecture_class",
    "build_module",
    "read_single_file",
    "require_same_tokenizer",
    "state_dict_problems",
    "write_single_file",
]

logger = logging.getLogger(__name__)

FORMAT = "glowflow-model-1"
_IMPORT = "`glowflow import` reads weights of llama2.c and Hugging Face"


def architecture_class(arch: str) -> type[BaseArchitecture]:
    """The class that ``model.arch`` names: a registered name, or ``module:Class``.

    Raises:
        ConfigError: the name is not registered, cannot be imported, or is no architecture.
    """
    entry = None if ":" in arch else ARCHITECTURES.get(arch)
    if entry is None and ":" not in arch:
        registered = ", ".join(ARCHITECTURES.names())
        raise ConfigError(Problem("model.arch", f"is not a registered architecture; registered: {registered}", arch))
    target = load_object(arch) if entry is None else entry.target()
    if not (isinstance(target, type) and issubclass(target, BaseArchitecture)):
        hint = "derive it from glowflow.core.architectures.base.BaseArchitecture"
        raise ConfigError(Problem("model.arch", "must name a subclass of glowflow's BaseArchitecture", arch, hint))
    return target


def build_module(config: GlowFlowConfig, device: torch.device | str = "meta") -> BaseArchitecture:
    """Construct the architecture that ``config.model`` names, uninitialised, on a device.

    Raises:
        ConfigError: the name is not registered, or the vocabulary size is not known.
    """
    target, section = architecture_class(config.model.arch), config.model
    if isinstance(section, MultimodalConfig):
        section = section.reading(image=config.data.image.channels, audio=config.data.audio.mels)
    with torch.device(device):
        return target(section)


class StreamOptions(TypedDict, total=False):
    """What :meth:`GlowFlowModel.stream` takes by keyword alone."""

    min_p: float | None
    repetition_penalty: float
    draft: GlowFlowModel | None
    draft_tokens: int
    truncate_prompt: bool


class GlowFlowModel:
    """One model: its whole config, its tokenizer's description and, once touched, its parameters.

    Args:
        config: the experiment; use :meth:`from_config` for a file or mapping.
        tokenizer_spec: plain description of the tokenizer; it gives the vocabulary size if the config leaves it out.
    """

    def __init__(self, config: GlowFlowConfig, tokenizer_spec: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.step = 0
        self._module: BaseArchitecture | None = None
        self.tokenizer_spec: dict[str, Any] | None = None
        if tokenizer_spec is not None:
            self.set_tokenizer(tokenizer_spec)

    @classmethod
    def from_config(
        cls, source: str | Path | dict[str, Any] | GlowFlowConfig | None, overrides: Sequence[str] = ()
    ) -> GlowFlowModel:
        """A model from a YAML file, a mapping or a config, with ``key=value`` overrides.

        Raises:
            ConfigError: everything that is wrong with the config.
        """
        from glowflow.config.loader import apply_overrides, load_config

        if isinstance(source, GlowFlowConfig):
            return cls(apply_overrides(source, overrides) if overrides else source)
        return cls(load_config(source, overrides))

    def set_tokenizer(self, spec: Mapping[str, Any]) -> None:
        """Attach a tokenizer's description; its ``vocab_size`` becomes the model's where the config names none.

        Raises:
            ConfigError: the vocabulary does not fit the model's.
        """
        vocab_size = spec.get("vocab_size")
        if vocab_size is not None and self.config.model.vocab_size is None:
            section = self.config.model.model_copy(update={"vocab_size": int(vocab_size)})
            self.config = self.config.model_copy(update={"model": section})
        elif vocab_size is not None and int(vocab_size) > (self.config.model.vocab_size or 0):
            raise ConfigError(
                Problem(
                    "model.vocab_size", f"must hold the tokenizer's {vocab_size} tokens", self.config.model.vocab_size
                )
            )
        self.tokenizer_spec = dict(spec)

    def __repr__(self) -> str:
        state = "touched" if self.touched else "recipe"
        return f"GlowFlowModel(arch={self.config.model.arch!r}, vocab_size={self.config.model.vocab_size}, {state})"

    def __getstate__(self) -> dict[str, Any]:
        if self.touched:
            raise GlowFlowError("a model with parameters is not pickled: save it to a file, or ship its config")
        return dict(vars(self))

    @property
    def touched(self) -> bool:
        """True once parameters exist here: training must then start from them and not from the seed."""
        return self._module is not None

    @property
    def module(self) -> BaseArchitecture:
        """The parameters on the CPU in fp32; drawn from ``training.seed`` at the first use."""
        if self._module is None:
            module = build_module(self.config, "meta").to_empty(device="cpu")
            initialize(module, self.config.training.seed)
            self._module = module
        return self._module

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of parameters, counted without allocating any; ``embedding=False`` leaves out a looked-up table."""
        module = self._module or build_module(self.config, "meta")
        return module.num_parameters() - (0 if embedding else module.num_embedding_parameters())

    def flops_per_token(self, context: int | None = None) -> float:
        """Floating-point operations of one training token at ``data.context`` or the given context."""
        module = self._module or build_module(self.config, "meta")
        return module.flops_per_token(context or self.config.data.context)

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_id: int | None = None,
        **more: Unpack[StreamOptions],
    ) -> list[int]:
        """New token ids after the prompt; the arguments are those of :meth:`stream`."""
        return list(self.stream(prompt_ids, max_new_tokens, temperature, top_k, top_p, seed, eos_id, **more))

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_id: int | None = None,
        *,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        draft: GlowFlowModel | None = None,
        draft_tokens: int = 4,
        truncate_prompt: bool = False,
    ) -> Iterator[int]:
        """New token ids after the prompt, one at a time; see :class:`glowflow.core.generation.SamplingOptions`.

        Args:
            draft: a smaller model with the same tokenizer, which proposes ``draft_tokens`` tokens at a time; the ids
                are distributed as without it (:func:`glowflow.core.generation.speculate`).
            truncate_prompt: read only the end of a prompt that is longer than the context.

        Raises:
            ConfigError: a prompt or option that cannot be used (at once, not at the first ``next``).
        """
        from glowflow.core.generation import SamplingOptions, generate, speculate

        options = SamplingOptions(temperature, top_k, top_p, seed, eos_id, min_p, repetition_penalty)
        text, context, cut = (prompt_ids, max_new_tokens), self.config.data.context, truncate_prompt
        if draft is None:
            return generate(self.module, *text, context, options, truncate_prompt=cut)
        require_same_tokenizer(self, draft)
        models, context = (self.module, draft.module), min(context, draft.config.data.context)
        return speculate(*models, *text, context, options, draft_tokens=draft_tokens, truncate_prompt=cut)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions | None = None,
        *,
        batch_size: int = 16,
        log_probs: int | None = None,
        truncate_prompt: bool = False,
    ) -> list[Completion]:
        """Completions of many prompts, in their order; see :func:`glowflow.core.generation.generate_batch`."""
        from glowflow.core.generation import generate_batch

        return generate_batch(
            self.module,
            prompts,
            max_new_tokens,
            self.config.data.context,
            options,
            batch_size=batch_size,
            log_probs=log_probs,
            truncate_prompt=truncate_prompt,
        )

    def beam_search(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        num_beams: int,
        *,
        length_penalty: float = 1.0,
        num_results: int = 1,
        eos_id: int | None = None,
        truncate_prompt: bool = False,
    ) -> list[Hypothesis]:
        """The likeliest texts after the prompt, best first; see :func:`glowflow.core.generation.beam_search`."""
        from glowflow.core.generation import beam_search

        return beam_search(
            self.module,
            prompt_ids,
            max_new_tokens,
            self.config.data.context,
            num_beams,
            length_penalty=length_penalty,
            num_results=num_results,
            eos_id=eos_id,
            truncate_prompt=truncate_prompt,
        )

    def load_state_dict(self, state: Mapping[str, Tensor], source: str = "state_dict") -> None:
        """Take over weights by name.

        Raises:
            CheckpointError: names or shapes are not exactly those of the config.
        """
        module = build_module(self.config, "meta")
        problems = state_dict_problems(module, state, source)
        if problems:
            raise CheckpointError(problems, title="The weights do not fit the config's architecture")
        module.to_empty(device="cpu")
        module.load_state_dict(dict(state))
        module.reset_buffers()
        self._module = module

    def load_weights(self, path: str | Path) -> None:
        """Take over the weights of a single-file checkpoint of the same architecture; the config stays.

        Raises:
            CheckpointError: unreadable, or of another architecture or parametrisation.
        """
        content = read_single_file(path)
        theirs = content["config"].get("model", {}).get("arch")
        if theirs != self.config.model.arch:
            raise CheckpointError(Problem(str(path), f"must hold the architecture {self.config.model.arch!r}", theirs))
        require_parametrization(self.config, content["config"], str(path))
        self.load_state_dict(content["state_dict"], str(path))
        self.step = content["step"]

    def save(self, path: str | Path, step: int | None = None) -> None:
        """Write one file: ``.pt`` (loads with ``weights_only=True``) or ``.safetensors``.

        Raises:
            CheckpointError: another suffix, or safetensors is not installed.
        """
        step = self.step if step is None else step
        write_single_file(path, self.config, self.tokenizer_spec, self.module.state_dict(), step)

    @classmethod
    def load(cls, path: str | Path) -> GlowFlowModel:
        """A model from a file that :meth:`save` or an export wrote.

        Raises:
            CheckpointError: missing, corrupt, not GlowFlow's, or its weights do not fit its config.
        """
        from glowflow.config.loader import load_config

        content = read_single_file(path)
        try:
            model = cls(load_config(content["config"]), content["tokenizer"])
        except ConfigError as error:
            problems = [Problem(f"{path}: {p.key}", p.rule, p.value, p.hint) for p in error.problems]
            raise CheckpointError(problems or str(error), title="The checkpoint's config cannot be used") from error
        model.load_state_dict(content["state_dict"], str(path))
        model.step = content["step"]
        return model


def require_same_tokenizer(model: GlowFlowModel, draft: GlowFlowModel, key: str = "draft") -> None:
    """Check that the tokens of both models mean the same, as far as their tokenizers are known.

    Raises:
        ConfigError: they do not.
    """
    own, other = model.tokenizer_spec, draft.tokenizer_spec
    if own is not None and other is not None and own != other:
        kinds = f"{other.get('kind')} of {other.get('vocab_size', draft.config.model.vocab_size)} tokens"
        rule = f"must have the model's tokenizer ({own.get('kind')}); the draft's is another one"
        raise ConfigError(Problem(key, rule, kinds, "train both models on data sets of one tokenizer"))


def require_parametrization(config: GlowFlowConfig, theirs: Mapping[str, Any], source: str) -> None:
    """Refuse weights from under another parametrisation (``model.mup``): in this model they would compute other scores.

    Args:
        config: of the model that shall take the weights.
        theirs: the whole config, as plain values, that they were trained with.
        source: where they come from.

    Raises:
        CheckpointError: the same model would multiply its scores by something else.
    """
    mine, section = config.model, theirs.get("model", {})
    if not isinstance(mine, DecoderConfig) or section.get("dim") != mine.dim:
        return  # without maximal-update parametrisation, or of other shapes, which is told by name
    keys = ("dim", "heads", "mup", "base_dim", "base_head_dim")
    other = DecoderConfig.model_construct(**{key: section[key] for key in keys if key in section})
    if (other.width_ratio, other.attention_scale) != (mine.width_ratio, mine.attention_scale):
        rule = f"are from under {_parametrization(other)}, this model is under {_parametrization(mine)}"
        hint = "train on with the model.mup, model.base_dim and model.base_head_dim that they were trained with"
        raise CheckpointError(Problem(f"weights of {source}", rule, hint=hint))


def _parametrization(model: DecoderConfig) -> str:
    if not model.mup:
        return "the standard parametrisation"
    heads = "" if model.base_head_dim is None else f", model.base_head_dim {model.base_head_dim}"
    return f"maximal-update parametrisation with model.base_dim {model.base_dim}{heads}"


def state_dict_problems(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> list[Problem]:
    """Every name and shape in which a state dict differs from the module's."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    problems = [Problem(source, f"lacks the parameter {name} {wanted[name]}") for name in wanted.keys() - given.keys()]
    problems += [Problem(source, f"holds an unknown parameter {name}") for name in given.keys() - wanted.keys()]
    problems += [
        Problem(source, f"parameter {name} must have the shape {wanted[name]}", given[name])
        for name in wanted.keys() & given.keys()
        if wanted[name] != given[name]
    ]
    return sorted(problems, key=str)


def write_single_file(
    path: str | Path,
    config: GlowFlowConfig,
    tokenizer_spec: Mapping[str, Any] | None,
    state: Mapping[str, Tensor],
    step: int,
) -> None:
    """Write a single-file checkpoint atomically; parent folders are made.

    Raises:
        CheckpointError: unknown suffix, safetensors missing, or the place is not writable.
    """
    from glowflow.config.loader import to_dict

    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise CheckpointError(Problem(str(path), "must end in .pt or .safetensors", path.suffix))
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
    digest = _digest(tensors)
    tokenizer = None if tokenizer_spec is None else dict(tokenizer_spec)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        if path.suffix == ".pt":
            content = {"format": FORMAT, "config": to_dict(config), "tokenizer": tokenizer, "step": step}
            torch.save({**content, "digest": digest, "state_dict": tensors}, partial)
        else:
            header = {"format": FORMAT, "config": json.dumps(to_dict(config)), "tokenizer": json.dumps(tokenizer)}
            metadata = {**header, "step": str(step), "digest": digest}
            _safetensors().torch.save_file(tensors, str(partial), metadata=metadata)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be written: {error.strerror or error}")) from error
    finally:
        if partial.is_file():
            partial.unlink()


def read_single_file(path: str | Path) -> dict[str, Any]:
    """The content of a single-file checkpoint: config and tokenizer (dicts), step, state_dict.

    Raises:
        CheckpointError: missing, corrupt, or not GlowFlow's.
    """
    path = Path(path)
    if path.is_dir():
        hint = "`glowflow export` turns a checkpoint directory into a file"
        raise CheckpointError(Problem(str(path), "is a directory, not a single-file checkpoint", hint=hint))
    if not path.is_file():
        raise CheckpointError(Problem(str(path), "does not exist"))
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    wanted: dict[str, Any] = {"config": dict, "step": int, "state_dict": dict, "tokenizer": (dict, type(None))}
    if content.get("format") != FORMAT or not all(isinstance(content.get(k), t) for k, t in wanted.items()):
        raise CheckpointError(
            Problem(str(path), f"is not a GlowFlow model file of format {FORMAT}", content.get("format"), _IMPORT)
        )
    if _digest(content["state_dict"]) != content.get("digest"):
        raise CheckpointError(Problem(str(path), "is corrupt: the weights do not match the digest stored with them"))
    return content


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: neither file format notices a flipped bit by itself."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_pt(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message recommends to load it without `weights_only`
        rule = "is corrupt or no model file: it holds something other than tensors and plain values, or is cut off"
        raise CheckpointError(Problem(str(path), rule, hint=_IMPORT)) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(Problem(str(path), f"is corrupt or no model file: {reason}")) from error
    return content if isinstance(content, dict) else {}


def _read_safetensors(path: Path) -> dict[str, Any]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        if header.get("format") != FORMAT:
            return {"format": header.get("format")}
        decoded = {key: json.loads(header[key]) for key in ("config", "tokenizer", "step")}
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(Problem(str(path), f"is corrupt or no model file: {error}")) from error
    return {"format": FORMAT, "digest": header.get("digest"), **decoded, "state_dict": state}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        hint = "`pip install safetensors`, or use a .pt file"
        raise CheckpointError(Problem("safetensors", "is not installed", hint=hint)) from error
    return safetensors
