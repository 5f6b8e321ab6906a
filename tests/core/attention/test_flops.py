"""FLOPs from the spec alone: against the masks counted one by one, against torch's counter, and by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glowflow.core.attention.backends.base import Backend
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.backends.sdpa import SdpaBackend
from glowflow.core.attention.flops import attention_flops, keys_per_query, run_flops
from glowflow.core.attention.masks import Visibility, visible
from glowflow.core.attention.spec import AttentionSpec, LinearSpec, SparsePattern

BANDED = ((True, False, False), (True, True, False), (False, True, True))  # the last row moves along the diagonal
FULL_ROWS = ((True, True), (True, True))
SPECS = {
    "dense": AttentionSpec("dense"),
    "window 1": AttentionSpec("windowed", window=1),
    "window 7": AttentionSpec("windowed", window=7),
    "window beyond the end": AttentionSpec("windowed", window=999),
    "sinks": AttentionSpec("windowed", window=5, sinks=3),
    "more sinks than keys": AttentionSpec("windowed", window=2, sinks=99),
    "strided": AttentionSpec("sparse", sparse=SparsePattern("strided", local=5, stride=4)),
    "strided, local a multiple": AttentionSpec("sparse", sparse=SparsePattern("strided", local=8, stride=4)),
    "strided, local 1": AttentionSpec("sparse", sparse=SparsePattern("strided", local=1, stride=3)),
    "fixed": AttentionSpec("sparse", sparse=SparsePattern("fixed", local=6, stride=4)),
    "local and global": AttentionSpec("sparse", sparse=SparsePattern("local_global", local=4, global_tokens=3)),
    "all are global": AttentionSpec("sparse", sparse=SparsePattern("local_global", local=2, global_tokens=99)),
    "banded blocks": AttentionSpec("sparse", sparse=SparsePattern("blocks", block_size=4, blocks=BANDED)),
    "blocks above the diagonal": AttentionSpec(
        "sparse", sparse=SparsePattern("blocks", block_size=5, blocks=FULL_ROWS)
    ),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("causal", [True, False])
def test_keys_per_query_are_the_row_sums_of_the_mask(name: str, causal: bool) -> None:
    spec = replace(SPECS[name], causal=causal)
    for num_queries, num_keys in itertools.chain(((t, t) for t in (1, 2, 13, 29)), [(1, 30), (7, 33)]):
        query, key = torch.arange(num_keys - num_queries, num_keys), torch.arange(num_keys)
        expected = visible(spec, query[:, None], key[None, :]).sum(-1)
        torch.testing.assert_close(keys_per_query(spec, num_queries, num_keys), expected)


def test_linear_attention_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        keys_per_query(AttentionSpec("linear", linear=LinearSpec()), 4, 4)


def test_long_sequences_are_counted_without_a_mask() -> None:
    length = 1 << 20  # a mask would be a TiB
    window = keys_per_query(AttentionSpec("windowed", window=256), length, length)
    assert int(window.sum()) == 256 * length - 256 * 255 // 2


@pytest.mark.parametrize("backend", [ReferenceBackend(), SdpaBackend()], ids=["reference", "sdpa, MATH"])
@pytest.mark.parametrize("num_queries", [24, 5])
def test_dense_agrees_with_torchs_counter(backend: Backend, num_queries: int) -> None:
    # The counter sees every pair of a materialised matrix, so the spec must not be causal for both to count the same.
    spec = AttentionSpec("dense", causal=False, heads=4, kv_heads=2, head_dim=8)
    shapes = [(3, 4, num_queries, 8), (3, 2, 24, 8), (3, 2, 24, 8)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    visibility = Visibility(num_queries, 24, torch.device("cpu"))
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        output = backend.run(q, k, v, spec, visibility)
    assert forward.get_total_flops() == 3 * run_flops(spec, num_queries, 24)
    with FlopCounterMode(display=False) as gradients:
        output.sum().backward()
    both = forward.get_total_flops() + gradients.get_total_flops()
    assert both == 3 * run_flops(spec, num_queries, 24, backward=True)
    if num_queries == 24:
        assert both == 3 * 24 * attention_flops(spec, 24)


def test_causality_halves_what_runs_but_not_the_convention() -> None:
    spec = AttentionSpec("dense", heads=2, head_dim=16)
    assert attention_flops(spec, 100) == 12 * 2 * 16 * 100  # PaLM, appendix B
    assert run_flops(spec, 100, 100) == 4 * 2 * 16 * (100 * 101 // 2)
    assert run_flops(spec, 1, 100) == 4 * 2 * 16 * 100


def test_windows_count_their_width() -> None:
    spec = AttentionSpec("windowed", heads=2, head_dim=16, window=32, sinks=4)
    assert attention_flops(spec, 100) == 12 * 2 * 16 * 36
    assert attention_flops(spec, 20) == 12 * 2 * 16 * 20
    assert attention_flops(replace(spec, causal=False), 100) == 12 * 2 * 16 * 67


@pytest.mark.parametrize("name", ["strided", "strided, local a multiple", "local and global"])
def test_causal_patterns_count_as_if_mirrored(name: str) -> None:
    spec = SPECS[name]
    # To the rounding of the mean; these rules are symmetric in query and key.
    assert attention_flops(spec, 40) == pytest.approx(attention_flops(replace(spec, causal=False), 40), rel=1e-12)


def test_a_full_table_of_blocks_costs_what_dense_costs() -> None:
    lower = tuple(tuple(column <= row for column in range(4)) for row in range(4))
    spec = AttentionSpec("sparse", sparse=SparsePattern("blocks", block_size=8, blocks=lower))
    assert attention_flops(spec, 32) == attention_flops(AttentionSpec("dense"), 32)


def test_linear_attention_costs_the_same_per_token_at_every_length() -> None:
    spec = AttentionSpec("linear", heads=3, head_dim=16, linear=LinearSpec("gated", chunk=8))
    assert attention_flops(spec, 64) == 3 * 3 * (2 * 8 * (16 + 16) + 4 * 16 * 16)
    assert attention_flops(spec, 64) == attention_flops(spec, 1 << 16)
    assert run_flops(spec, 64, 64, backward=True) == 64 * attention_flops(spec, 64)
    assert run_flops(spec, 1, 1) == 3 * (2 * 1 * 32 + 4 * 16 * 16)  # one step of decoding is a chunk of one
    assert attention_flops(replace(spec, causal=False), 64) == 2 * attention_flops(spec, 64)
    delta = replace(spec, linear=LinearSpec("gated_delta", chunk=8))
    assert attention_flops(delta, 64) == 3 * 3 * (2 * 8 * 32 + 4 * 256 + 4 * 8 * 16 + 2 * 256)
