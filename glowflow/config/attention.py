"""Schema of ``model.attention``: what each layer computes (the kind) and which kernel computes it. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from glowflow.config.base import StrictModel
from glowflow.config.errors import Problem, RuleError

__all__ = [
    "AdaptiveConfig",
    "AttentionConfig",
    "BackendName",
    "Kind",
    "LayerKind",
    "LinearConfig",
    "SparseConfig",
]

Kind = Literal["dense", "windowed", "sparse", "linear", "adaptive"]
LayerKind = Literal["dense", "windowed", "sparse", "linear", "gated"]
"""What one layer computes: a kind, or the learned mixture of a window and linear attention."""
BackendName = Literal[
    "auto",
    "reference",
    "sdpa",
    "blocked",
    "gather",
    "flex",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "xformers",
    "chunk",
    "fla",
]
_LETTERS: dict[str, LayerKind] = {"D": "dense", "W": "windowed", "S": "sparse", "L": "linear", "G": "gated"}


class SparseConfig(StrictModel):
    """Which keys a query of kind `sparse` sees. Positions are counted from the start of the sequence."""

    pattern: Literal["strided", "fixed", "local_global", "blocks"] = Field(
        "strided",
        description=(
            "`strided`: the last `local` keys and every `stride`-th before (arXiv:1904.10509); `fixed`: the last "
            "`local` and each position that closes a run of `stride`; `local_global`: the last `local` and the first "
            "`global_tokens` (arXiv:2004.05150); `blocks`: what the matrix `blocks` says."
        ),
    )
    local: int = Field(16, ge=1, description="Nearest keys that are always seen, the query's own among them.")
    stride: int = Field(8, ge=2, description="Distance between the far keys of `strided` and `fixed`.")
    global_tokens: int = Field(1, ge=1, description="How many first positions everybody sees with `local_global`.")
    block_size: int = Field(64, ge=1, description="Positions per row and column of `blocks`.")
    blocks: list[list[int]] | None = Field(
        None,
        description=(
            "Square matrix of 0 and 1: which blocks of keys (columns) a block of queries (rows) sees; the diagonal "
            "must be 1. Longer sequences repeat its last row, shifted along the diagonal."
        ),
    )

    @model_validator(mode="after")
    def _matrix(self) -> SparseConfig:
        if (self.pattern == "blocks") != (self.blocks is not None):
            rule = "is needed with pattern blocks" if self.blocks is None else "only counts with pattern blocks"
            raise RuleError(Problem("blocks", rule, self.blocks, related=("pattern",)))
        if self.blocks is not None:
            size = len(self.blocks)
            square = size > 0 and all(len(row) == size and set(row) <= {0, 1} for row in self.blocks)
            if not square or not all(self.blocks[i][i] for i in range(size)):
                raise RuleError(Problem("blocks", "must be a square matrix of 0 and 1 with ones on its diagonal"))
        return self


class LinearConfig(StrictModel):
    """The recurrence of kind `linear`: a state of constant size instead of a growing cache."""

    variant: Literal["gated", "feature_map", "retention", "gated_delta"] = Field(
        "gated",
        description=(
            "`gated`: one learned decay per head and position (arXiv:2312.06635, arXiv:2405.21060); `feature_map`: "
            "elu + 1 (arXiv:2006.16236); `retention`: a fixed decay per head and RoPE (arXiv:2307.08621); "
            "`gated_delta`: decay and delta rule (arXiv:2412.06464)."
        ),
    )
    conv: int = Field(4, ge=0, le=16, description="Width of the short causal convolution on q, k and v; 0: none.")
    output_gate: bool = Field(True, description="Multiply the normalised output by silu(W x).")
    chunk: int = Field(64, ge=1, description="Positions that are computed in parallel; changes speed alone.")


class AdaptiveConfig(StrictModel):
    """How kind `adaptive` chooses."""

    policy: Literal["pattern", "by_length", "gated"] = Field(
        "pattern",
        description=(
            "`pattern`: by layer; `by_length`: dense up to a length, windowed above it; `gated`: every layer mixes a "
            "window and linear attention by a learned gate per head."
        ),
    )
    pattern: str = Field(
        "LLLD",
        min_length=1,
        description="One letter per layer, repeated: D dense, W windowed, S sparse, L linear, G gated.",
    )
    dense_up_to: int | None = Field(
        None,
        ge=1,
        description="`by_length`: longest sequence that is dense. Default: from the benchmark file.",
    )
    benchmark: str | None = Field(
        None,
        description="`by_length`: JSON file of `glowflow bench attention --json`. Default: the one that is shipped.",
    )

    @model_validator(mode="after")
    def _letters(self) -> AdaptiveConfig:
        unknown = sorted(set(self.pattern) - set(_LETTERS))
        if unknown:
            rule = f"may hold the letters {', '.join(_LETTERS)} alone"
            raise RuleError(Problem("pattern", rule, self.pattern))
        return self


class AttentionConfig(StrictModel):
    """What attention computes (kind) and which kernel computes it (backend)."""

    kind: Kind = Field(
        "dense",
        description=(
            "What is computed. `dense`: every earlier position; `windowed`: the last `window`; `sparse`: a pattern; "
            "`linear`: a recurrent state; `adaptive`: by layer, by length or by a learned gate."
        ),
    )
    backend: BackendName = Field(
        "auto", description="Which kernel computes it; `auto` takes the first that can serve and logs why."
    )
    window: int | None = Field(
        None, ge=1, description="Keys that `windowed` and `gated` layers see, the query's own among them."
    )
    sinks: int = Field(
        0, ge=0, description="First positions of the sequence that every window sees too (arXiv:2309.17453)."
    )
    softcap: float | None = Field(
        None, gt=0, description="Scores s become softcap * tanh(s / softcap) (arXiv:2408.00118)."
    )
    sparse: SparseConfig = Field(default_factory=SparseConfig, description="Pattern of kind `sparse`.")
    linear: LinearConfig = Field(default_factory=LinearConfig, description="Recurrence of kind `linear`.")
    adaptive: AdaptiveConfig = Field(default_factory=AdaptiveConfig, description="Choice of kind `adaptive`.")

    @model_validator(mode="after")
    def _what_counts(self) -> AttentionConfig:
        problems = list(self._problems())
        if problems:
            raise RuleError(problems)
        return self

    def _problems(self) -> Iterator[Problem]:
        kinds = self.layer_kinds()
        windows = bool({"windowed", "gated"} & kinds)
        if windows and self.window is None:
            rule = f"must be set for {_said(self)}: how many keys a query sees"
            yield Problem("window", rule, None, "e.g. model.attention.window=256", related=("kind",))
        if not windows:
            unused = [name for name in ("window", "sinks") if getattr(self, name)]
            for name in unused:
                yield Problem(name, f"has no effect on {_said(self)}", getattr(self, name), related=("kind",))
        sections = {"sparse": "sparse" in kinds, "linear": bool({"linear", "gated"} & kinds)}
        sections["adaptive"] = self.kind == "adaptive"
        for name, counts in sections.items():
            section = getattr(self, name)
            if not counts and section != type(section)():
                yield Problem(name, f"has no effect on {_said(self)}", related=("kind",))
        if self.softcap is not None and kinds <= {"linear"}:
            yield Problem("softcap", f"has no effect on {_said(self)}, which has no scores", self.softcap)

    def layer_kinds(self) -> set[LayerKind]:
        """Every kind that some layer may have."""
        return {self.layer_kind(layer) for layer in range(len(self.adaptive.pattern))} | (
            {"windowed"} if self.kind == "adaptive" and self.adaptive.policy == "by_length" else set()
        )

    def layer_kind(self, layer: int) -> LayerKind:
        """What this layer computes; with `by_length` it is `dense`, and `windowed` for long sequences."""
        if self.kind != "adaptive":
            return self.kind
        if self.adaptive.policy == "pattern":
            return _LETTERS[self.adaptive.pattern[layer % len(self.adaptive.pattern)]]
        return "gated" if self.adaptive.policy == "gated" else "dense"


def _said(attention: AttentionConfig) -> str:
    """The kind in words."""
    if attention.kind != "adaptive":
        return f"kind {attention.kind}"
    shown = f" {attention.adaptive.pattern}" if attention.adaptive.policy == "pattern" else ""
    return f"kind adaptive, policy {attention.adaptive.policy}{shown}"
