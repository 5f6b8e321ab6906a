"""Attention with relative positions and a memory (Transformer-XL, arXiv:1901.02860, section 3.3 and appendix B).

The score of a query i and a key j, i - j = d positions apart, is ((q_i + u) k_j + (q_i + v) W_r R_d) / sqrt(W): R_d are
sinusoids of the distance, W_r is the layer's own, u and v belong to all layers. All distances of a query are scored
at once and the rows are then shifted into place. Queries come from the new positions alone, keys and values from the
remembered ones too, which the block has normalised and which are projected here like the new ones.

Legend: B batch, T new positions, M remembered ones, S = M + T keys, P distances, D width, H heads, K key/value heads,
W head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.backends.sdpa import sdpa_reasons
from glowflow.core.attention.cache import RingKV
from glowflow.core.attention.dispatch import choose
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.stacked import StackedLinear

__all__ = [
    "RELATIVE_BACKENDS",
    "DistanceEncoding",
    "RelativeAttention",
    "RelativeBackend",
    "RelativeCache",
    "RelativeContext",
    "by_distance",
    "relative_shift",
    "resolve_relative",
]


class DistanceEncoding:
    """Makes and keeps the sinusoids R_d, per device and precision; no parameters and no buffers.

    Args:
        dim: width D; the first half are sines, the second cosines.
        clamp: larger distances count as this one; None: none does.
    """

    def __init__(self, dim: int, clamp: int | None = None) -> None:
        self.dim, self.clamp = dim, clamp
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def rows(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(P, D): R of the distances P - 1, ..., 1, 0, in the order of the keys that the last query sees."""
        different = count if self.clamp is None else min(count, self.clamp + 1)
        table = self._tables.get((device, dtype))
        if table is None or table.shape[0] < different:
            table = self._tables[device, dtype] = self._compute(different, device, dtype)
        return table[torch.arange(count - 1, -1, -1, device=device).clamp(max=different - 1)]

    def _compute(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        # A table that sampling has made must serve training too. In fp64 on the host: far distances keep precision.
        with torch.inference_mode(False), torch.no_grad():
            exponents = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
            angles = torch.outer(torch.arange(count, dtype=torch.float64), 10000.0**-exponents)
            return torch.cat((angles.sin(), angles.cos()), dim=-1).to(device, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> DistanceEncoding:
        return DistanceEncoding(self.dim, self.clamp)


def relative_shift(scores_bhts: Tensor) -> Tensor:
    """From scores by distance (S-1, ..., 0 along the last dimension) to scores by key, for the last T of S positions.

    The trick of the paper's appendix B: one column more, and the same numbers read in rows of another length. What it
    leaves where a key comes after its query is meaningless and must be masked.
    """
    batch, heads, queries, keys = scores_bhts.shape
    padded = F.pad(scores_bhts, (1, 0)).view(batch, heads, keys + 1, queries)
    return padded[:, :, 1:].view(batch, heads, queries, keys)


def by_distance(scores_bhtp: Tensor, visibility: Visibility) -> Tensor:
    """The same for keys that lie in any order: each pair's distance is looked up. (B, H, T, P) -> (B, H, T, S)."""
    distance_ts = visibility.queries()[:, None] - visibility.keys()[None, :]
    last = scores_bhtp.shape[-1] - 1
    index_ts = (last - distance_ts).clamp(0, last)  # what is clamped is masked: no distance is negative or so large
    return scores_bhtp.gather(-1, index_ts.expand(*scores_bhtp.shape[:2], -1, -1))


class RelativeBackend(Protocol):
    """One way to compute it; ``reasons`` and ``advice`` as for ``Backend``."""

    name: str

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]: ...

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str: ...

    def run(
        self, content_bhtw: Tensor, position_bhtp: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, seen: Visibility
    ) -> Tensor:
        """Queries q + u, the scores (q + v) W_r R_d by distance, keys and values (B, K, S, W) -> (B, H, T, W).

        Every query sees at least its own position.
        """


class RelativeReference:
    """The definition, written out: distances looked up, weights materialised."""

    name = "reference"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return common_reasons(spec, conditions, ("dense",))

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return "relative positions, each pair's distance looked up; materialises the attention weights"

    def run(
        self, content_bhtw: Tensor, position_bhtp: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, seen: Visibility
    ) -> Tensor:
        k_bhsw, v_bhsw = _per_query_head(k, spec), _per_query_head(v, spec)
        scores_bhts = (content_bhtw @ k_bhsw.mT + by_distance(position_bhtp, seen)) * spec.softmax_scale
        if spec.softcap is not None:
            scores_bhts = spec.softcap * torch.tanh(scores_bhts / spec.softcap)
        weights_bhts = scores_bhts.masked_fill(~seen.mask(spec), float("-inf")).softmax(dim=-1)
        return weights_bhts.to(v.dtype) @ v_bhsw


class RelativeSdpa:
    """torch's attention with the scores of the distances as its additive mask."""

    name = "sdpa"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return sdpa_reasons(spec, conditions, ("dense",))

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        if conditions.device_type == "cpu" and conditions.training:
            return "torch SDPA with relative positions as a mask that learns, which leaves the CPU its unfused kernel"
        return "torch SDPA with relative positions as an additive mask"

    def run(
        self, content_bhtw: Tensor, position_bhtp: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, seen: Visibility
    ) -> Tensor:
        bias_bhts = relative_shift(position_bhtp) if seen.in_order else by_distance(position_bhtp, seen)
        bias_bhts = (bias_bhts * spec.softmax_scale).masked_fill(~seen.mask(spec), float("-inf"))
        # Heads are repeated here: torch's kernels take grouped ones or a mask with gradients, not both.
        k_bhsw, v_bhsw = _per_query_head(k, spec), _per_query_head(v, spec)
        return F.scaled_dot_product_attention(content_bhtw, k_bhsw, v_bhsw, attn_mask=bias_bhts, scale=spec.scale)


def _per_query_head(x_bksw: Tensor, spec: AttentionSpec) -> Tensor:
    group = spec.heads // spec.kv_heads
    return x_bksw if group == 1 else x_bksw.repeat_interleave(group, dim=-3)


RELATIVE_BACKENDS: dict[str, RelativeBackend] = {b.name: b for b in (RelativeSdpa(), RelativeReference())}
"""Name -> kernel, in the order in which ``auto`` tries them on every device."""


@lru_cache(maxsize=256)
def resolve_relative(spec: AttentionSpec, backend: str, conditions: Conditions) -> tuple[RelativeBackend, str]:
    """The kernel that serves and why; see ``dispatch.resolve``.

    Raises:
        ConfigError: the named kernel cannot serve, or there is none of this name.
    """
    return choose(list(RELATIVE_BACKENDS.values()), spec, backend, conditions)


@dataclass(kw_only=True)
class RelativeContext(AttentionContext):
    """What all layers of one pass share, relative positions among it.

    Args:
        encoding_pd: R_d of the distances P - 1 to 0; P = S in training.
        content_bias_h1w: u, what every query adds when it looks at contents.
        position_bias_h1w: v, what every query adds when it looks at distances.
        relative: the kernel.
    """

    encoding_pd: Tensor
    content_bias_h1w: Tensor
    position_bias_h1w: Tensor
    relative: RelativeBackend


class RelativeCache:
    """One layer's memory while decoding: keys and values in a ring (keys know no position), and W_r R.

    A query sees ``reach`` positions before the first of its pass. W_r R is kept for passes over one position.
    """

    def __init__(
        self, batch_size: int, spec: AttentionSpec, reach: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.reach = reach
        self.ring = RingKV(batch_size, spec.kv_heads, reach + 1, 0, spec.head_dim, device, dtype)
        self.distances_kpw: Tensor | None = None

    def update(self, k_bktw: Tensor, v_bktw: Tensor, start: int) -> tuple[Tensor, Tensor, Visibility]:
        """Take in positions from ``start`` on; returns keys, values and who sees whom."""
        k, v, positions_s = self.ring.update(k_bktw, v_bktw, start)
        assert positions_s is not None
        seen = Visibility(k_bktw.shape[2], k.shape[2], k.device)
        seen.query_positions = torch.arange(start, start + k_bktw.shape[2], device=k.device)
        seen.key_positions = positions_s.masked_fill(positions_s < start - self.reach, -1)
        return k.to(k_bktw.dtype), v.to(v_bktw.dtype), seen

    def nbytes(self) -> int:
        return self.ring.nbytes() + (0 if self.distances_kpw is None else self.distances_kpw.nbytes)

    def select(self, rows: Tensor) -> None:
        self.ring.select(rows)

    def save(self) -> Any:
        return self.ring.save()

    def restore(self, saved: Any) -> None:
        self.ring.restore(saved)

    def cut(self, length: int) -> bool:
        return self.ring.cut(length)


class RelativeAttention(nn.Module):
    """Self-attention over memory and new positions; ``kv.weight`` holds the rows of all keys, then values.

    Args:
        dim: width D.
        spec: heads, widths, scale, cap.
        layer: which part of the cache is this layer's.
        memory: positions that it remembers while decoding.
        qk_norm_eps: RMSNorm on queries and keys with this epsilon, before u and v are added; None: none.
    """

    def __init__(
        self, dim: int, spec: AttentionSpec, layer: int, memory: int, qk_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.spec, self.layer, self.memory = spec, layer, memory
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q = nn.Linear(dim, width, bias=False)
        self.kv = StackedLinear(dim, (kv_width, kv_width), bias=False)
        self.r = nn.Linear(dim, kv_width, bias=False)
        self.out = nn.Linear(width, dim, bias=False)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(spec.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(spec.head_dim, qk_norm_eps)

    def forward(self, x_btd: Tensor, context: RelativeContext, memory_bmd: Tensor | None = None) -> Tensor:
        """(B, T, D), with (B, M, D) before it that is looked at -> (B, T, D)."""
        x_bsd = x_btd if memory_bmd is None else torch.cat((memory_bmd, x_btd), dim=1)
        q_bhtw = self._heads(self.q(x_btd))
        k_bksw, v_bksw = self._heads(self.kv(x_bsd)).chunk(2, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_bhtw, k_bksw = self.q_norm(q_bhtw).to(v_bksw.dtype), self.k_norm(k_bksw).to(v_bksw.dtype)
        seen, cache = context.visibility, None
        if context.cache is not None:
            part = context.cache.layers[self.layer]
            assert isinstance(part, RelativeCache)
            k_bksw, v_bksw, seen = part.update(k_bksw, v_bksw, context.cache.length)
            cache = part
        # u and v are fp32 where autocast has made the queries half precision.
        content_bhtw = (q_bhtw + context.content_bias_h1w).to(q_bhtw.dtype)
        position_bhtw = (q_bhtw + context.position_bias_h1w).to(q_bhtw.dtype)
        r_hpw = _per_query_head(self._distances(context.encoding_pd, cache), self.spec)
        position_bhtp = torch.einsum("bhtw,hpw->bhtp", position_bhtw, r_hpw)
        y_bhtw = context.relative.run(content_bhtw, position_bhtp, k_bksw, v_bksw, self.spec, seen)
        output: Tensor = self.out(y_bhtw.transpose(1, 2).flatten(2))
        return output

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> RelativeCache:
        """Room for the memory, and for ``max_length`` positions at least, so that so many equal one whole pass."""
        return RelativeCache(batch_size, self.spec, max(self.memory, max_length - 1), device, dtype)

    def _distances(self, encoding_pd: Tensor, cache: RelativeCache | None) -> Tensor:
        """W_r R, (K, P, W)."""
        if cache is not None and cache.distances_kpw is not None:
            if cache.distances_kpw.shape[1] == encoding_pd.shape[0]:
                return cache.distances_kpw
        r_kpw = self._heads(self.r(encoding_pd))
        if cache is not None and encoding_pd.shape[0] == cache.reach + 1:
            cache.distances_kpw = r_kpw
        return r_kpw

    def _heads(self, x: Tensor) -> Tensor:
        """(..., T, N W) -> (..., N, T, W)."""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(-3, -2)
