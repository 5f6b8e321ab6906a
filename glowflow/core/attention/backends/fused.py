"""What the adapters of fused CUDA kernels share: their common limits, documents laid end to end.

The fused kernels know a causal flag and a window. What else a pass may ask for (padding, sinks, patterns) they cannot
compute, and ``fused_reasons`` says so. Documents they take as sequences of different lengths that lie end to end:
``document_runs`` finds their borders.

Legend: B batch, S keys, N documents of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.masks import Visibility, alibi_slopes
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["HALF", "DocumentRuns", "capability_reason", "document_runs", "fused_reasons", "slopes_on"]

HALF = (torch.float16, torch.bfloat16)
"""The types that flash attention computes."""


@dataclass(frozen=True)
class DocumentRuns:
    """The documents of all rows, laid end to end.

    Args:
        borders: (N + 1,) int32; document n is the positions borders[n] .. borders[n + 1] - 1 of the flattened rows.
        longest: positions of the longest one.
    """

    borders: Tensor
    longest: int


def document_runs(visibility: Visibility) -> DocumentRuns:
    """Where the documents of a pass begin and end; waits for the device, once per pass.

    Documents lie in runs, as the batch gives them: one that went on after another would count as two.
    """
    assert visibility.documents is not None and visibility.num_queries == visibility.num_keys
    documents_bs = visibility.documents
    return visibility.kept("runs", lambda: _find_runs(documents_bs))


def _find_runs(documents_bs: Tensor) -> DocumentRuns:
    begins_bs = F.pad(documents_bs[:, 1:] != documents_bs[:, :-1], (1, 0), value=True)
    end = torch.tensor([documents_bs.numel()], device=documents_bs.device)
    borders = torch.cat((begins_bs.flatten().nonzero().flatten(), end)).to(torch.int32)
    return DocumentRuns(borders, int(borders.diff().max()))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def slopes_on(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H,) slopes of ALiBi on a device: copied there once, perhaps while generating, and yet fit for autograd."""
    return alibi_slopes(heads, device, dtype)


def fused_reasons(spec: AttentionSpec, conditions: Conditions, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """What no fused kernel with a causal flag and a window can do."""
    reasons = common_reasons(spec, conditions, ("dense", "windowed"))
    if conditions.device_type != "cuda":
        reasons.append(f"runs on CUDA alone, not on {conditions.device_type}")
    if conditions.dtype.is_floating_point and conditions.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(f"needs {names}, not {str(conditions.dtype).removeprefix('torch.')}")
    if spec.kind == "windowed" and spec.sinks:
        reasons.append("cannot keep the first positions in view of a window (sinks)")
    if conditions.padding:
        reasons.append("takes no padding mask")
    if conditions.decoding and spec.kind == "windowed":
        reasons.append("needs keys in order, which a window's ring of a cache does not keep")
    if conditions.decoding and conditions.documents:
        reasons.append("needs as many queries as keys to keep documents apart")
    if conditions.second_order:
        reasons.append("its kernels have no second derivative")
    return reasons


def capability_reason(conditions: Conditions, rule: str, serves: Callable[[tuple[int, int]], bool]) -> list[str]:
    """Why this GPU is not one of those that the kernel is built for; nothing where the GPU is not known."""
    if conditions.capability is None or serves(conditions.capability):
        return []
    major, minor = conditions.capability
    return [f"needs compute capability {rule}, this GPU has {major}.{minor}"]
