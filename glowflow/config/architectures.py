"""Schemas of the registered architectures: the keys under ``model:``. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glowflow.config.base import StrictModel
from glowflow.config.errors import Problem, RuleError

__all__ = ["ArchitectureConfig", "AttentionConfig", "TransformerConfig"]


class AttentionConfig(StrictModel):
    """What attention computes (kind) and which kernel computes it (backend)."""

    kind: Literal["dense"] = Field("dense", description="What is computed. `dense`: every earlier position.")
    backend: Literal["auto", "reference", "sdpa"] = Field(
        "auto", description="Which kernel computes it; `auto` takes the first that can serve and logs why."
    )


class ArchitectureConfig(StrictModel):
    """Keys that every architecture has; a custom architecture's `config_class` derives from this."""

    arch: str = Field(description="Registered name, or `module:Class` of a custom architecture.")
    vocab_size: int | None = Field(
        None, ge=2, description="Size of the vocabulary; taken from the tokenizer when left out."
    )


class TransformerConfig(ArchitectureConfig):
    """Decoder-only transformer: RoPE, RMSNorm, SwiGLU, grouped-query attention."""

    arch: str = Field("transformer", description="Registered name, or `module:Class` of a custom architecture.")
    dim: int = Field(256, ge=1, description="Width of the residual stream.")
    depth: int = Field(4, ge=1, description="Number of blocks.")
    heads: int = Field(4, ge=1, description="Number of query heads; must divide `dim`.")
    kv_heads: int | None = Field(
        None, ge=1, description="Number of key/value heads; must divide `heads`. Default: `heads`."
    )
    ffn_dim: int | None = Field(
        None,
        ge=1,
        description="Hidden width of the SwiGLU feed-forward; default 8/3 of `dim`, rounded up to a multiple of 8.",
    )
    tie_embeddings: bool = Field(True, description="Use the token embedding as the output projection too.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the embedding and on both residual branches.")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys per head before RoPE (arXiv:2302.05442).")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies (arXiv:2104.09864).")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of RMSNorm.")
    init_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of the initial weights; output projections are divided by sqrt(2*depth).",
    )
    attention: AttentionConfig = Field(default_factory=AttentionConfig, description="Attention kind and backend.")

    @model_validator(mode="after")
    def _divisibility(self) -> TransformerConfig:
        problems = []
        if self.dim % self.heads:
            rule = f"must divide model.dim: {self.dim} % {self.heads} = {self.dim % self.heads}"
            problems.append(Problem("heads", rule, self.heads, related=("dim",)))
        elif (self.dim // self.heads) % 2:
            rule = f"model.dim / model.heads must be even for RoPE, it is {self.dim // self.heads}"
            problems.append(Problem("heads", rule, self.heads, related=("dim",)))
        if self.kv_heads is not None and self.heads % self.kv_heads:
            rule = f"must divide model.heads: {self.heads} % {self.kv_heads} = {self.heads % self.kv_heads}"
            problems.append(Problem("kv_heads", rule, self.kv_heads, related=("heads",)))
        if problems:
            raise RuleError(problems)
        return self

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: given, or one per query head."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: given, or 8/3 of dim rounded up to a multiple of 8 (arXiv:2002.05202)."""
        return self.ffn_dim or -(-8 * self.dim // 24) * 8
