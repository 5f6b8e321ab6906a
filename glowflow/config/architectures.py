"""Schemas of the registered architectures: the keys under ``model:``. No torch here."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from glowflow.config.attention import AttentionConfig
from glowflow.config.base import StrictModel
from glowflow.config.errors import ConfigError, Problem, RuleError

__all__ = [
    "ArchitectureConfig",
    "DecoderConfig",
    "MoeConfig",
    "RopeScalingConfig",
    "TransformerConfig",
    "TransformerXLConfig",
]

_BASE_DIM = 128


class ArchitectureConfig(StrictModel):
    """Keys that every architecture has; a custom architecture's `config_class` derives from this."""

    arch: str = Field(description="Registered name, or `module:Class` of a custom architecture.")
    vocab_size: int | None = Field(
        None, ge=2, description="Size of the vocabulary; taken from the tokenizer when left out."
    )

    @property
    def layout(self) -> Literal["packed", "lanes", "bucketed"]:
        """What `data.layout` is by default; an architecture that needs `lanes` carries memory between sequences."""
        return "packed"

    @property
    def longest_context(self) -> int | None:
        """The longest `data.context`; None: there is no limit."""
        return None


class MoeConfig(StrictModel):
    """Mixture of experts instead of one feed-forward: each token goes through `active` of `experts` (dropless)."""

    experts: int = Field(ge=2, description="Number of routed experts per layer.")
    active: int = Field(
        2,
        ge=1,
        description="Experts that each token goes through; their gates sum to 1 (a lone one's is its affinity).",
    )
    shared: int = Field(0, ge=0, description="Experts that every token goes through besides (arXiv:2401.06066).")
    ffn_dim: int | None = Field(None, ge=1, description="Hidden width of one expert; default: that of the model.")
    every: int = Field(1, ge=1, description="Every n-th layer is a mixture, the last one among them.")
    balance: float = Field(
        1e-2, ge=0, description="Weight of the balance loss of each sequence (arXiv:2412.19437, eq. 17 to 20)."
    )

    @model_validator(mode="after")
    def _fewer_active(self) -> MoeConfig:
        if self.active > self.experts:
            rule = f"must be at most model.moe.experts ({self.experts})"
            raise RuleError(Problem("active", rule, self.active, related=("experts",)))
        return self


class RopeScalingConfig(StrictModel):
    """Stretches RoPE to contexts longer than those the model was trained on."""

    method: Literal["linear", "ntk", "yarn"] = Field(
        "yarn",
        description=(
            "`linear`: positions divided by the factor (arXiv:2306.15595); `ntk`: a larger base; `yarn`: by frequency, "
            "with a warmer softmax (arXiv:2309.00071)."
        ),
    )
    factor: float = Field(ge=1, description="New context over the one of training.")
    original_context: int = Field(ge=1, description="Context that the model was trained on.")


class DecoderConfig(ArchitectureConfig):
    """What the decoder-only architectures share: widths, feed-forward, norms, attention."""

    dim: int = Field(256, ge=1, description="Width of the residual stream.")
    depth: int = Field(4, ge=1, description="Number of blocks.")
    heads: int = Field(4, ge=1, description="Number of query heads; must divide `dim`.")
    kv_heads: int | None = Field(
        None, ge=1, description="Number of key/value heads; must divide `heads`. Default: `heads`."
    )
    ffn: Literal["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu"] = Field(
        "swiglu",
        description=(
            "Feed-forward: gated (`swiglu`, `geglu`, `reglu`; arXiv:2002.05202) or plain (`gelu`, `relu`, and "
            "`gelu_tanh`, GPT-2's approximation of GELU)."
        ),
    )
    ffn_dim: int | None = Field(
        None,
        ge=1,
        description=(
            "Hidden width of the feed-forward; default 8/3 of `dim` for a gated one, 4 times `dim` for a plain one, "
            "rounded up to a multiple of 8."
        ),
    )
    moe: MoeConfig | None = Field(None, description="Mixture of experts in place of the feed-forward.")
    tie_embeddings: bool = Field(True, description="Use the token embedding as the output projection too.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the embedding and on both residual branches.")
    norm_placement: Literal["pre", "post", "sandwich"] = Field(
        "pre",
        description=(
            "`pre`: x + f(norm(x)); `post`: norm(x + f(x)) as in arXiv:1706.03762; `sandwich`: x + norm(f(norm(x)))."
        ),
    )
    parallel_block: bool = Field(
        False, description="Attention and feed-forward read the same normalised input and are added (arXiv:2204.02311)."
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Norm of blocks and output: `rmsnorm` (arXiv:1910.07467) or `layernorm`."
    )
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys per head before RoPE (arXiv:2302.05442).")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of the norms.")
    bias: bool | Literal["attention", "qkv"] = Field(
        False,
        description=(
            "Biases: `true` on every projection of the blocks and in every LayerNorm (GPT-2), `attention` on the "
            "projections of attention alone, `qkv` on queries, keys and values alone (Qwen2)."
        ),
    )
    logit_softcap: float | None = Field(
        None, gt=0, description="Scores of the vocabulary s become softcap * tanh(s / softcap) (arXiv:2408.00118)."
    )
    init_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of the initial weights; output projections are divided by sqrt(2*depth).",
    )
    mup: bool = Field(
        False,
        description=(
            "Maximal-update parametrisation (arXiv:2203.03466): initial weights, learning rates and scores depend on "
            "`dim` such that hyper-parameters tuned at one width serve another."
        ),
    )
    base_dim: int = Field(
        _BASE_DIM, ge=1, description="With `mup`, the `dim` at which it is the standard parametrisation."
    )
    base_head_dim: int | None = Field(
        None,
        ge=1,
        description=(
            "With `mup`, the width of a head at `base_dim`; attention scores are multiplied by "
            "sqrt(base_head_dim) / head_dim. Default: that of this model, whose number of heads grows with `dim`."
        ),
    )
    attention: AttentionConfig = Field(default_factory=AttentionConfig, description="Attention kind and backend.")

    @model_validator(mode="after")
    def _divisibility(self) -> DecoderConfig:
        problems = []
        if self.dim % self.heads:
            rule = f"must divide model.dim: {self.dim} % {self.heads} = {self.dim % self.heads}"
            problems.append(Problem("heads", rule, self.heads, related=("dim",)))
        elif (self.dim // self.heads) % 2 and self._needs_even_heads:
            rule = f"model.dim / model.heads must be even for RoPE, it is {self.dim // self.heads}"
            problems.append(Problem("heads", rule, self.heads, related=("dim",)))
        if self.kv_heads is not None and self.heads % self.kv_heads:
            rule = f"must divide model.heads: {self.heads} % {self.kv_heads} = {self.heads % self.kv_heads}"
            problems.append(Problem("kv_heads", rule, self.kv_heads, related=("heads",)))
        if self.parallel_block and self.norm_placement == "post":
            rule = "needs norm_placement pre or sandwich: with post there is no norm before the branches"
            problems.append(Problem("parallel_block", rule, True, related=("norm_placement",)))
        if self.bias is True and self.moe is not None:
            hint = "take attention or qkv"
            problems.append(Problem("bias", "cannot be true with model.moe: experts have none", True, hint, ("moe",)))
        if self.bias and self.attention.layer_kinds() & {"linear", "gated"}:
            rule = "has no effect on layers of linear attention"
            problems.append(Problem("bias", rule, self.bias, related=("attention",)))
        if not self.mup:
            for key, default in (("base_dim", _BASE_DIM), ("base_head_dim", None)):
                if getattr(self, key) != default:
                    rule, hint = "has no effect without model.mup", "set model.mup: true, or leave it out"
                    problems.append(Problem(key, rule, getattr(self, key), hint, related=("mup",)))
        if problems:
            raise RuleError(problems)
        return self

    @property
    def _needs_even_heads(self) -> bool:
        """Whether the channels of a head are turned in pairs, or hold sines and cosines."""
        return True

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: given, or one per query head."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def gated_ffn(self) -> bool:
        """Whether the feed-forward has a gate beside its hidden layer."""
        return self.ffn.endswith("glu")

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: given, or the default of its sort, rounded up to a multiple of 8."""
        return self.ffn_dim or (-(-8 * self.dim // 24) * 8 if self.gated_ffn else -(-4 * self.dim // 8) * 8)

    @property
    def width_ratio(self) -> float:
        """Under maximal-update parametrisation `dim` over `base_dim`; else 1."""
        return self.dim / self.base_dim if self.mup else 1.0

    @property
    def attention_scale(self) -> float | None:
        """Factor on the scores of attention; None: 1 / sqrt(head_dim)."""
        if not self.mup or self.base_head_dim in (None, self.head_dim):
            return None
        return math.sqrt(self.base_head_dim) / self.head_dim

    def at_width(self, dim: int) -> dict[str, int]:
        """The keys of `model` that differ in the same model at another width, by dotted name within the section.

        Heads keep their width and grow in number; key/value heads and given widths of the feed-forward in proportion.

        Raises:
            ConfigError: heads cannot be so many.
        """
        if dim < 1 or dim % self.head_dim:
            rule = f"must be a multiple of the width of a head, {self.head_dim} (model.dim / model.heads)"
            raise ConfigError(Problem("model.dim", rule, dim))
        keys = {"dim": dim, "heads": dim // self.head_dim}
        if self.kv_heads is not None:
            if dim * self.kv_heads % self.dim:
                rule = f"gives no whole number of key/value heads: {self.kv_heads} at {self.dim} are in proportion"
                raise ConfigError(Problem("model.dim", rule, dim, "leave out model.kv_heads, or take other widths"))
            keys["kv_heads"] = dim * self.kv_heads // self.dim
        if self.ffn_dim is not None:
            keys["ffn_dim"] = max(1, round(self.ffn_dim * dim / self.dim))
        if self.moe is not None and self.moe.ffn_dim is not None:
            keys["moe.ffn_dim"] = max(1, round(self.moe.ffn_dim * dim / self.dim))
        return keys

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return self.moe is not None and (self.depth - 1 - layer) % self.moe.every == 0


class TransformerConfig(DecoderConfig):
    """Decoder-only transformer: any positions, norms and feed-forward, grouped-query attention of any kind."""

    arch: str = Field("transformer", description="Registered name, or `module:Class` of a custom architecture.")
    position: Literal["rope", "alibi", "learned", "none"] = Field(
        "rope",
        description=(
            "How attention learns of order: `rope` turns queries and keys (arXiv:2104.09864), `alibi` lowers the score "
            "of far keys (arXiv:2108.12409), `learned` adds a vector per position to the token's (GPT-2). Linear "
            "layers know the order by themselves."
        ),
    )
    max_positions: int | None = Field(
        None, ge=2, description="Positions that `learned` has vectors for, the longest `data.context`; default 1024."
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies (arXiv:2104.09864).")
    rope_scaling: RopeScalingConfig | None = Field(None, description="RoPE for contexts longer than in training.")

    @model_validator(mode="after")
    def _positions(self) -> TransformerConfig:
        if self.rope_scaling is not None and self.position != "rope":
            rule = f"has no effect with position {self.position}"
            raise RuleError(Problem("rope_scaling", rule, related=("position",)))
        if self.max_positions is not None and self.position != "learned":
            rule = f"has no effect with position {self.position}"
            raise RuleError(Problem("max_positions", rule, self.max_positions, related=("position",)))
        return self

    @property
    def longest_context(self) -> int | None:
        return (self.max_positions or 1024) if self.position == "learned" else None

    @property
    def _needs_even_heads(self) -> bool:
        linear = self.attention.linear.variant == "retention"
        return self.position == "rope" or linear


class TransformerXLConfig(DecoderConfig):
    """Transformer-XL (arXiv:1901.02860): segment recurrence, relative positions; blocks as in `transformer`."""

    arch: str = Field("transformer-xl", description="Registered name, or `module:Class` of a custom architecture.")
    memory: int = Field(512, ge=0, description="Positions before the sequence that each layer remembers in training.")
    eval_memory: int | None = Field(
        None, ge=0, description="The same in evaluation and generation, often longer; default: `memory`."
    )
    clamp_distance: int | None = Field(
        None, ge=1, description="Larger distances count as this one (evaluation with a longer memory than in training)."
    )

    @model_validator(mode="after")
    def _dense_alone(self) -> TransformerXLConfig:
        if self.attention.kind != "dense":
            rule = "must be dense: relative positions with memory are defined for it alone"
            raise RuleError(Problem("attention.kind", rule, self.attention.kind))
        if self.bias:
            rule = "must be false: relative attention has biases of its own for queries, and no others"
            raise RuleError(Problem("bias", rule, self.bias))
        if self.attention.backend not in ("auto", "sdpa", "reference"):
            rule = "must be auto, sdpa or reference: no other kernel adds scores of relative positions"
            raise RuleError(Problem("attention.backend", rule, self.attention.backend))
        return self

    @property
    def evaluation_memory(self) -> int:
        """Positions that each layer remembers in evaluation and generation."""
        return self.memory if self.eval_memory is None else self.eval_memory

    @property
    def layout(self) -> Literal["packed", "lanes", "bucketed"]:
        """Memory is of use only where a sequence goes on where the one before it ended."""
        return "lanes" if max(self.memory, self.evaluation_memory) else "packed"
