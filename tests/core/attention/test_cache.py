"""Caches whose rows are reordered, and that are taken back: what follows is as if it had never been otherwise."""

from __future__ import annotations

import pytest
import torch

from glowflow.core.attention.cache import DecodeCache, FullKV

from ..generation.models import CONTEXT, KINDS, VOCABULARY, make

every_kind = pytest.mark.parametrize("kind", KINDS)


def text_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@every_kind
@pytest.mark.parametrize("read", [1, 7, 12])
def test_selected_rows_go_on_as_they_would(kind: str, read: int) -> None:
    module, text = make(kind).eval(), text_of(3, CONTEXT)
    rows = torch.tensor([2, 0, 0, 2, 1])
    with torch.no_grad():
        cache, again = (module.new_cache(size, CONTEXT, "cpu", torch.float64) for size in (3, 5))
        module.decode(text[:, :read], cache)
        module.decode(text[rows, :read], again)
        cache.select(rows)
        for at in range(read, CONTEXT):  # every row goes its own way
            tokens = (text[rows, at : at + 1] + torch.arange(5)[:, None]) % VOCABULARY
            got, want = module.decode(tokens, cache), module.decode(tokens, again)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("ahead", [[1], [4], [1, 1, 3]])
def test_restored_it_goes_on_as_if_nothing_had_been_read(kind: str, ahead: list[int]) -> None:
    module, text, other = make(kind).eval(), text_of(2, CONTEXT), text_of(2, CONTEXT, seed=1)
    with torch.no_grad():
        want = module.decode(text, module.new_cache(2, CONTEXT, "cpu", torch.float64))
        cache = module.new_cache(2, CONTEXT, "cpu", torch.float64)
        parts = []
        for start, stop in ((0, 1), (1, 6), (6, 7), (7, 8), (8, 11)):
            saved = cache.save()
            for count in ahead:
                module.decode(other[:, :count], cache)
            cache.restore(saved)
            parts.append(module.decode(text[:, start:stop], cache))
            assert cache.length == stop
        torch.testing.assert_close(torch.cat(parts, 1), want[:, :11], rtol=1e-12, atol=1e-12)


def test_keys_of_all_positions_are_cut_without_a_copy() -> None:
    module, text, other = make().eval(), text_of(2, 10), text_of(2, 10, seed=1)
    with torch.no_grad():
        want = module.decode(text, module.new_cache(2, CONTEXT, "cpu", torch.float64))
        cache = module.new_cache(2, CONTEXT, "cpu", torch.float64)
        module.decode(torch.cat((text[:, :6], other[:, :4]), dim=1), cache)
        held = [layer.keys.data_ptr() for layer in cache.layers]
        assert cache.cut(6) and cache.length == 6
        got = module.decode(text[:, 6:], cache)
    torch.testing.assert_close(got, want[:, 6:], rtol=1e-12, atol=1e-12)
    assert [layer.keys.data_ptr() for layer in cache.layers] == held


@pytest.mark.parametrize("kind", ["windowed", "gated-linear", "adaptive", "transformer-xl"])
def test_what_overwrites_or_adds_up_cannot_be_cut(kind: str) -> None:
    cache = make(kind).new_cache(1, CONTEXT, "cpu", torch.float64)
    assert not cache.cut(0)


def test_selecting_copies_only_what_is_filled() -> None:
    part = FullKV(2, 1, 1000, 2, "cpu", torch.float32)
    k = torch.arange(12.0).view(2, 1, 3, 2)
    part.update(k, -k, 0)
    DecodeCache([part], 1000, 3).select(torch.tensor([1, 1, 0]))
    keys, values, _ = part.update(torch.ones(3, 1, 1, 2), torch.ones(3, 1, 1, 2), 3)
    assert torch.equal(keys[:, :, :3], k[[1, 1, 0]]) and torch.equal(values[:, :, :3], -k[[1, 1, 0]])
    assert keys.shape[2] == 4
