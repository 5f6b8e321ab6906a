"""The cases of ``glowflow attention check``: what is computed, and the inputs that are drawn for it.

Lengths are odd, so that last blocks are ragged, and long enough for kernels that cut a sequence into blocks to do so;
windows are narrow, so that one key more or less shows.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec, LinearSpec, SparsePattern

__all__ = ["CASES", "CheckCase", "draw"]

_BATCH = 2
_DENSE = AttentionSpec(heads=4, kv_heads=2, head_dim=64)
_WINDOW = replace(_DENSE, kind="windowed", window=17)
_SPARSE = replace(_DENSE, kind="sparse")
_STRIDED, _FIXED = (SparsePattern(pattern, local=11, stride=16) for pattern in ("strided", "fixed"))
_GLOBAL = SparsePattern("local_global", local=13, global_tokens=3)
_BLOCKS = SparsePattern(
    "blocks", block_size=32, blocks=((True, False, False), (False, True, False), (True, True, True))
)


@dataclass(frozen=True)
class CheckCase:
    """One thing to compute.

    Args:
        name: in words.
        spec: what is computed.
        num_keys: S.
        num_queries: T; None: as many as keys.
        documents: each row holds several documents.
        padding: some keys are padding, the first of a row among them, so that a query sees nothing.
        relative: relative positions, as ``transformer-xl`` has them.
    """

    name: str
    spec: AttentionSpec
    num_keys: int = 389
    num_queries: int | None = None
    documents: bool = False
    padding: bool = False
    relative: bool = False

    @property
    def kind(self) -> str:
        """The kind, as tables show it."""
        return "relative" if self.relative else self.spec.kind

    def conditions(self, device: torch.device, dtype: torch.dtype, training: bool) -> Conditions:
        """What the kernels are asked about."""
        decoding = self.num_queries is not None and not self.relative  # relative positions train with a memory
        more = {"documents": self.documents, "padding": self.padding, "decoding": decoding}
        return Conditions.here(device, dtype, training=training, **more)

    def visibility(self, device: torch.device) -> Visibility:
        """Documents and padding of the case, the same in every run."""
        position_s = torch.arange(self.num_keys, device=device)
        row_b1 = torch.arange(_BATCH, device=device)[:, None]
        documents = (position_s * (row_b1 + 2) // 111 + (position_s > 5)) if self.documents else None
        valid = ((position_s + row_b1) % 7 != 0) if self.padding else None
        queries = self.num_queries or self.num_keys
        return Visibility(queries, self.num_keys, device, documents=documents, key_valid=valid)


def _linear(variant: str, **more: object) -> AttentionSpec:
    spec = AttentionSpec("linear", heads=4, kv_heads=4, head_dim=64, linear=LinearSpec(variant, chunk=32))  # type: ignore[arg-type]
    return replace(spec, **more)  # type: ignore[arg-type]


CASES: tuple[CheckCase, ...] = (
    CheckCase("causal", replace(_DENSE, kv_heads=4), 133),
    CheckCase("causal, grouped heads", _DENSE, 133),
    CheckCase("bidirectional", replace(_DENSE, causal=False), 133),
    CheckCase("causal, documents", _DENSE, documents=True),
    CheckCase("causal, padding", _DENSE, 133, padding=True),
    CheckCase("causal, softcap", replace(_DENSE, softcap=2.0), 133),
    CheckCase("causal, ALiBi", replace(_DENSE, alibi=True), 133),
    CheckCase("causal, behind a cache", _DENSE, 133, num_queries=5),
    CheckCase("window", _WINDOW),
    CheckCase("window, documents", _WINDOW, documents=True),
    CheckCase("window, sinks", replace(_WINDOW, sinks=3)),
    CheckCase("window, bidirectional", replace(_WINDOW, causal=False)),
    CheckCase("window, softcap", replace(_WINDOW, softcap=2.0)),
    CheckCase("window, behind a cache", _WINDOW, num_queries=5),
    CheckCase("strided", replace(_SPARSE, sparse=_STRIDED)),
    CheckCase("strided, documents", replace(_SPARSE, sparse=_STRIDED), documents=True),
    CheckCase("fixed", replace(_SPARSE, sparse=_FIXED)),
    CheckCase("local and global", replace(_SPARSE, sparse=_GLOBAL)),
    CheckCase("local and global, bidirectional", replace(_SPARSE, sparse=_GLOBAL, causal=False)),
    CheckCase("blocks", replace(_SPARSE, sparse=_BLOCKS)),
    CheckCase("relative positions", _DENSE, 133, relative=True),
    CheckCase("relative positions, memory", _DENSE, 133, num_queries=60, relative=True),
    CheckCase("relative positions, documents", _DENSE, 133, documents=True, relative=True),
    CheckCase("gated", _linear("gated"), 69),
    CheckCase("gated, documents", _linear("gated"), 69, documents=True),
    CheckCase("gated, padding", _linear("gated"), 69, padding=True),
    CheckCase("gated, bidirectional", _linear("gated", causal=False), 69),
    CheckCase("feature map", _linear("feature_map"), 69),
    CheckCase("retention", _linear("retention"), 69),
    CheckCase("gated delta", _linear("gated_delta"), 69),
)
"""Everything that is checked; a kernel is asked only about those of its kind that it does not refuse."""


def draw(case: CheckCase, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What gradients are taken of: q (B, H, T, D), k and v (B, K, S, D).

    Of kind ``linear`` also decay and beta (B, H, T), with relative positions the scores by distance (B, H, T, S).
    Drawn on the CPU, so that every device gets the same numbers, and rounded to ``dtype``.
    """
    generator = torch.Generator().manual_seed(len(case.name) * 1000 + case.num_keys)
    spec, queries = case.spec, case.num_queries or case.num_keys

    def normal(*shape: int) -> Tensor:
        return torch.randn(_BATCH, *shape, generator=generator, dtype=torch.float64)

    drawn = {"q": normal(spec.heads, queries, spec.head_dim)}
    drawn |= {name: normal(spec.kv_heads, case.num_keys, spec.head_dim) for name in ("k", "v")}
    if case.relative:
        drawn["position"] = normal(spec.heads, queries, case.num_keys)
    if spec.linear is not None:
        drawn |= _of_recurrence(spec.linear.variant, drawn, normal(spec.heads, queries), normal(spec.heads, queries))
    return {name: x.to(device, dtype).requires_grad_() for name, x in drawn.items()}


def _of_recurrence(variant: str, drawn: dict[str, Tensor], first_bht: Tensor, second_bht: Tensor) -> dict[str, Tensor]:
    """What the layer makes of keys and gates before the kernel gets them."""
    if variant == "feature_map":
        return {name: F.elu(drawn[name]) + 1 for name in ("q", "k")}
    decay = F.logsigmoid(first_bht) / 16
    if variant == "retention":
        return {"decay": decay.mean((0, 2), keepdim=True).expand(1, -1, decay.shape[2]).contiguous()}
    if variant == "gated_delta":
        return {"decay": decay, "beta": second_bht.sigmoid(), "k": F.normalize(drawn["k"], dim=-1)}
    return {"decay": decay}
