"""Transformer-XL: the paper's formulas written out, segments against one pass, what may be seen, memory, decoding."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from glowflow.config.architectures import TransformerXLConfig
from glowflow.core.architectures.transformer_xl import Memory, TransformerXL
from glowflow.core.attention.masks import Visibility
from glowflow.core.batch import Batch
from glowflow.core.generation import SamplingOptions, generate
from glowflow.core.initialization import initialize
from glowflow.core.optim.groups import parameter_groups

VOCAB = 37
SMALL = {"dim": 24, "depth": 2, "heads": 4, "ffn_dim": 20, "vocab_size": VOCAB, "memory": 6, "init_std": 0.3}


def make(dtype: torch.dtype = torch.float64, **keys: Any) -> TransformerXL:
    module = TransformerXL(TransformerXLConfig(**{**SMALL, **keys})).to(dtype)
    initialize(module, 0)
    return module


def text_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(seed))


def segment(text: Tensor, start: int, stop: int, documents: Tensor | None = None) -> Batch:
    """Positions [start, stop) of each row."""
    rows, length = text.shape[0], stop - start
    ids = torch.zeros(rows, text.shape[1], dtype=torch.int64) if documents is None else documents
    return Batch(
        tokens=text[:, start:stop],
        targets=text[:, start + 1 : stop + 1],
        loss_weights=torch.ones(rows, length),
        positions=torch.arange(start, stop).expand(rows, length),
        document_ids=ids[:, start:stop],
        sample_ids=torch.arange(rows),
        reset=torch.zeros(rows, dtype=torch.bool),
        single_document=documents is None,
    )


def read(module: TransformerXL, text: Tensor, cuts: list[int], documents: Tensor | None = None) -> tuple[Tensor, Any]:
    """Hidden states of a text that is read in segments, and the last carry."""
    carry, parts = None, []
    for start, stop in pairwise(cuts):
        output, carry = module(segment(text, start, stop, documents), carry)
        parts.append(output.hidden)
    return torch.cat(parts, dim=1), carry


def by_hand(module: TransformerXL, text: Tensor, cuts: list[int], documents: Tensor | None = None) -> Tensor:
    """The architecture a second time, pair by pair as in the paper, from the parameters alone."""
    p, c, size = dict(module.named_parameters()), module.config, module.config.memory
    documents = torch.zeros_like(text) if documents is None else documents

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + c.norm_eps) * weight

    def sinusoid(distance: int) -> Tensor:
        distance = distance if c.clamp_distance is None else min(distance, c.clamp_distance)
        angles = distance / 10000 ** (torch.arange(0, c.dim, 2, dtype=torch.float64) / c.dim)
        return torch.cat((angles.sin(), angles.cos()))

    def attend(at: str, y: Tensor, old: Tensor, own_s: Tensor) -> Tensor:
        """One row, (T, D) and what it remembers, (M, D), both normalised; the document of each of these positions."""
        keys = torch.cat((old, y))
        q = (y @ p[at + "q.weight"].T).view(len(y), c.heads, -1)
        k, v = ((keys @ w.T).view(len(keys), c.num_kv_heads, -1) for w in p[at + "kv.weight"].chunk(2))
        if c.qk_norm:
            q, k = norm(q, p[at + "q_norm.weight"]), norm(k, p[at + "k_norm.weight"])
        out = []
        for i in range(len(y)):
            query, heads = len(old) + i, []
            for h in range(c.heads):
                g, scores, seen = h // (c.heads // c.num_kv_heads), [], []
                for j in range(query + 1):
                    if own_s[j] != own_s[query]:
                        continue
                    r = (p[at + "r.weight"] @ sinusoid(query - j)).view(c.num_kv_heads, -1)[g]
                    score = (q[i, h] + p["content_bias"][h]) @ k[j, g] + (q[i, h] + p["position_bias"][h]) @ r
                    scores.append(score / c.head_dim**0.5)
                    seen.append(v[j, g])
                s = torch.stack(scores)
                if c.attention.softcap is not None:
                    s = c.attention.softcap * torch.tanh(s / c.attention.softcap)
                heads.append(s.softmax(0) @ torch.stack(seen))
            out.append(torch.cat(heads))
        return torch.stack(out) @ p[at + "out.weight"].T

    rows = []
    for row, row_documents in zip(text, documents, strict=True):
        memory = [torch.zeros(0, c.dim, dtype=torch.float64) for _ in range(c.depth)]
        parts = []
        for start, stop in pairwise(cuts):
            x = p["embedding.weight"][row[start:stop]]
            for layer in range(c.depth):
                at, old = f"blocks.{layer}.", memory[layer]
                memory[layer] = torch.cat((old, x.detach()))[max(0, len(old) + len(x) - size) :]
                weight = p[at + "attention_norm.weight"]
                own_s = row_documents[start - len(old) : stop]
                x = x + attend(at + "attention.", norm(x, weight), norm(old, weight), own_s)
                y = norm(x, p[at + "feed_forward_norm.weight"]) @ p[at + "feed_forward.gate_up.weight"].T
                gate, up = y.chunk(2, -1)
                x = x + (F.silu(gate) * up) @ p[at + "feed_forward.down.weight"].T
            parts.append(norm(x, p["norm.weight"]))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def gradients(module: TransformerXL, hidden: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (hidden * torch.sin(torch.arange(hidden.numel(), dtype=hidden.dtype)).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


VARIANTS = {
    "plain": {},
    "grouped": {"kv_heads": 2, "tie_embeddings": False},
    "qk-norm": {"qk_norm": True, "kv_heads": 1},
    "softcap": {"attention": {"softcap": 1.5}},
    "clamped": {"clamp_distance": 3},
    "reference": {"attention": {"backend": "reference"}},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_equal_the_paper_written_out(variant: dict[str, Any]) -> None:
    """Without memory, with one shorter than a segment, and with one that reaches back over several."""
    text, documents = text_of(2, 7), torch.tensor([[0] * 3 + [1] * 5, [5] * 8])
    for memory, cuts in ((0, [0, 7]), (2, [0, 3, 7]), (4, [0, 2, 4, 7])):
        module = make(memory=memory, **variant)
        got, want = read(module, text, cuts, documents)[0], by_hand(module, text, cuts, documents)
        assert_close(got, want)
        assert_close(gradients(module, got), gradients(module, want))


@pytest.mark.parametrize("variant", [{}, {"kv_heads": 2, "qk_norm": True}], ids=["plain", "grouped"])
def test_the_two_kernels_agree(variant: dict[str, Any]) -> None:
    text, documents = text_of(3, 22), (torch.arange(23) // 5).expand(3, 23)
    found = []
    for backend in ("sdpa", "reference"):
        module = make(memory=9, attention={"backend": backend}, **variant)
        hidden, _ = read(module, text, [0, 7, 15, 22], documents)
        found.append((hidden, gradients(module, hidden)))
    assert_close(*found)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (1, 7), (4, 11), (7, 8)])
def test_the_shift_equals_looking_up_each_distance(queries: int, keys: int) -> None:
    from glowflow.core.attention.relative import by_distance, relative_shift

    scores = torch.randn(2, 3, queries, keys, dtype=torch.float64)
    shifted, gathered = relative_shift(scores), by_distance(scores, Visibility(queries, keys, scores.device))
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert torch.equal(shifted[:, :, causal], gathered[:, :, causal])
    for t in range(queries):
        for s in range(keys - queries + t + 1):
            distance = keys - queries + t - s
            assert torch.equal(gathered[:, :, t, s], scores[:, :, t, keys - 1 - distance])


# --- segments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[0, 16, 32, 48], [0, 1, 2, 30, 48], [0, 47, 48]])
def test_one_tied_layer_over_segments_equals_one_pass(cuts: list[int]) -> None:
    module, text = make(depth=1, memory=48, tie_embeddings=True), text_of(2, 48)
    whole = module(segment(text, 0, 48))[0]
    parts, _ = read(module, text, cuts)
    assert_close(parts, whole.hidden)
    assert_close(module.logits(parts), module.logits(whole.hidden))


def test_several_layers_in_segments_of_16_equal_one_pass() -> None:
    module, text = make(depth=4, memory=64), text_of(2, 64)
    assert_close(read(module, text, [0, 16, 32, 48, 64])[0], module(segment(text, 0, 64))[0].hidden)


def test_a_shorter_memory_is_not_one_pass() -> None:
    """The two tests above can fail: forgetting one position is seen."""
    text = text_of(2, 48)
    for memory, equal in ((32, True), (31, False)):
        module = make(depth=1, memory=memory)
        gap = read(module, text, [0, 16, 32, 48])[0] - module(segment(text, 0, 48))[0].hidden
        assert bool(gap.abs().max() < 1e-12) is equal


def test_no_gradient_reaches_old_segments() -> None:
    module = make(tie_embeddings=False, memory=20)
    text = torch.cat((torch.arange(0, 10), torch.arange(20, 31)))[None]  # no token of the first half in the second
    _, carry = module(segment(text, 0, 10))
    assert not any(tensor.requires_grad for tensor in carry.values())
    output, _ = module(segment(text, 10, 20), carry)
    output.loss_sum.backward()
    rows = module.embedding.weight.grad.abs().sum(1)
    assert not rows[:10].any() and bool((rows[20:30] > 0).all())
    # The old positions were nevertheless looked at: without them the result is another one.
    assert not torch.equal(output.hidden, module(segment(text, 10, 20))[0].hidden)


def test_the_carry_is_by_lane_and_says_how_much_of_it_counts() -> None:
    module, text = make(memory=6), text_of(3, 16)
    carry, lengths = None, []
    for start in range(0, 16, 4):
        _, carry = module(segment(text, start, start + 4), carry)
        lengths.append(carry["length"].tolist())
    assert lengths == [[4] * 3, [6] * 3, [6] * 3, [6] * 3]
    assert carry["states"].shape == (3, 2, 6, 24) and carry["documents"].shape == (3, 6)
    assert torch.equal(carry["states"][:, 0], module.embedding(text[:, 10:16]))
    picked = {name: tensor[[2, 0]] for name, tensor in carry.items()}
    alone = module(segment(text[[2, 0]], 12, 16), picked)[0].hidden
    assert_close(alone, module(segment(text, 12, 16), carry)[0].hidden[[2, 0]])


# --- what may be seen -----------------------------------------------------------------------------------------------


def outcome(module: TransformerXL, text: Tensor) -> list[Tensor]:
    """Hidden state of each position of a text that is read in segments of 8."""
    return list(read(module, text, list(range(0, text.shape[1], 8)))[0].unbind(1))


def changed_by(module: TransformerXL, position: int) -> list[int]:
    """Positions whose hidden state is not the same to the bit when the token at ``position`` is another one."""
    text = text_of(1, 32)
    other = text.clone()
    other[0, position] = (other[0, position] + 1) % VOCAB
    pairs = zip(outcome(module, text), outcome(module, other), strict=True)
    return [index for index, (a, b) in enumerate(pairs) if not torch.equal(a, b)]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_sees_the_future(backend: str, dtype: torch.dtype) -> None:
    module = make(dtype, memory=8, attention={"backend": backend})
    for position in (0, 7, 8, 13, 31):
        assert min(changed_by(module, position)) == position
    one = make(dtype, depth=1, memory=8, attention={"backend": backend})
    # One layer: from the query's segment the position itself on, and the whole next segment through memory.
    assert changed_by(one, 13) == list(range(13, 24)) and changed_by(one, 8) == list(range(8, 24))


def test_a_leak_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    mask_of = Visibility.mask

    def leaky_mask(self: Visibility, spec: Any) -> Tensor:
        mask = mask_of(self, spec).clone()
        mask[..., 2, -1] = True  # the third query of a segment sees its last position
        return mask

    module = make(memory=8)
    monkeypatch.setattr(Visibility, "mask", leaky_mask)
    assert min(changed_by(module, 15)) == 10
    monkeypatch.undo()
    follow = Memory.followed_by

    def early(self: Memory, inputs: list[Tensor], documents: Tensor) -> Memory:
        return follow(self, [x.roll(-1, 1) for x in inputs], documents)  # memory that is off by one

    monkeypatch.setattr(Memory, "followed_by", early)
    module, text = make(memory=32), text_of(1, 32)
    gap = read(module, text, [0, 16, 32])[0] - module(segment(text, 0, 32))[0].hidden
    assert gap.abs().max() > 1e-3


def test_the_exact_memory_that_a_query_looks_at() -> None:
    module = make(depth=1, memory=6)
    text = text_of(1, 5)
    for length in (0, 4, 6):
        states = torch.randn(1, 1, 6, 24, dtype=torch.float64)
        carry = vars(Memory(states, torch.zeros(1, 6, dtype=torch.int64), torch.tensor([length])))
        before = module(segment(text, 0, 5), carry)[0].hidden
        seen = []
        for slot in range(6):
            states[:, :, slot] += 1
            seen.append(not torch.equal(before, module(segment(text, 0, 5), carry)[0].hidden))
            states[:, :, slot] -= 1
        assert seen == [slot >= 6 - length for slot in range(6)]


def test_reset_forgets_a_lane_alone() -> None:
    module, text = make(memory=8), text_of(3, 16)
    _, carry = module(segment(text, 0, 8))
    batch = replace(segment(text, 8, 16), reset=torch.tensor([False, True, False]))
    got, after = module(batch, carry)
    kept, fresh = module(segment(text, 8, 16), carry)[0].hidden, module(segment(text, 8, 16))[0].hidden
    assert_close(got.hidden, torch.stack((kept[0], fresh[1], kept[2])))
    assert not torch.equal(kept[1], fresh[1])
    short = replace(segment(text, 8, 11), reset=batch.reset)
    assert module(short, carry)[1]["length"].tolist() == [8, 3, 8] and after["length"].tolist() == [8, 8, 8]


def test_documents_do_not_see_each_other_through_memory() -> None:
    """A text of three documents in segments gives each document what it gets alone; one ends with a segment."""
    module, text = make(memory=24), text_of(2, 24)
    documents = torch.tensor([7] * 5 + [8] * 11 + [9] * 9).expand(2, 25)
    hidden, _ = read(module, text, [0, 8, 16, 24], documents)
    for start, stop in ((0, 5), (5, 16), (16, 24)):
        assert_close(hidden[:, start:stop], module(segment(text, start, stop))[0].hidden)
    together, _ = read(module, text, [0, 8, 16, 24])
    assert not torch.equal(together, hidden)


def test_a_segment_of_one_document_does_not_see_another_ones_memory() -> None:
    """The batch says that its rows hold one document each, which is true; the memory holds another."""
    module, text = make(memory=8), text_of(2, 16)
    documents = (torch.arange(17) // 8).expand(2, 17)
    _, carry = module(replace(segment(text, 0, 8, documents), single_document=True))
    second = replace(segment(text, 8, 16, documents), single_document=True)
    assert_close(module(second, carry)[0].hidden, module(segment(text, 8, 16))[0].hidden)


def test_a_lane_that_came_out_infinite_starts_anew() -> None:
    module, text = make(memory=8), text_of(2, 16)
    _, carry = module(segment(text, 0, 8))
    spoilt = {**carry, "states": carry["states"].clone()}
    spoilt["states"][1, 1, 5] = float("nan")
    output, after = module(segment(text, 8, 12), spoilt)
    assert output.hidden[0].isfinite().all() and not output.hidden[1].isfinite().all()
    assert after["length"].tolist() == [8, 0] and all(t.isfinite().all() for t in after.values())
    again = module(segment(text, 12, 16), after)[0].hidden
    assert_close(again[1], module(segment(text, 12, 16))[0].hidden[1])


# --- evaluation and generation --------------------------------------------------------------------------------------


def test_evaluation_remembers_more_than_training() -> None:
    module, text = make(memory=8, eval_memory=40), text_of(2, 40)
    whole = module(segment(text, 0, 40))[0].hidden
    cuts = list(range(0, 41, 8))
    assert not torch.allclose(read(module, text, cuts)[0], whole)
    module.eval()
    hidden, carry = read(module, text, cuts)
    assert_close(hidden, whole)
    assert carry["states"].shape[2] == 40
    # A carry of another length is cut or given room, as after a change of the config.
    module.train()
    _, cut = module(segment(text, 32, 40), carry)
    assert cut["states"].shape[2] == 8 and cut["length"].tolist() == [8, 8]
    with_room = Memory(**cut).resized(10)
    assert with_room.length.tolist() == [8, 8] and torch.equal(with_room.states[:, :, 2:], cut["states"])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("memory", [0, 4, 30])
def test_decoding_step_by_step_equals_the_full_forward(variant: dict[str, Any], memory: int) -> None:
    module, text = make(memory=memory, **variant).eval(), text_of(2, 20)
    whole = module.logits(module(segment(text, 0, 20))[0].hidden)
    for sizes in ([1] * 20, [7, 1, 1, 5, 1, 5], [20]):
        cache, parts, start = module.new_cache(2, 20, dtype=torch.float64), [], 0
        for size in sizes:
            parts.append(module.decode(text[:, start : start + size], cache))
            start += size
        assert_close(torch.cat(parts, 1), whole)
    last = module.decode(text[:, :3], module.new_cache(2, 20, dtype=torch.float64), last_only=True)
    assert_close(last, whole[:, 2:3])


def test_long_decoding_equals_segments_with_memory_and_does_not_grow() -> None:
    module, text = make(memory=2, eval_memory=9).eval(), text_of(1, 60)
    for size in (1, 5):
        cache, parts, sizes = module.new_cache(1, 6, dtype=torch.float64), [], set()
        for start in range(0, 60, size):
            parts.append(module.decode(text[:, start : start + size], cache))
            if start >= 10:
                sizes.add(cache.nbytes())
        assert len(sizes) == 1
        hidden, _ = read(module, text, list(range(0, 61, size)))
        assert_close(torch.cat(parts, 1), module.logits(hidden))


def test_generation_reads_the_whole_prompt_and_has_no_end() -> None:
    module = make(memory=4, eval_memory=12)
    prompt = text_of(1, 29)[0].tolist()
    greedy = SamplingOptions(temperature=0)
    got = list(generate(module, prompt, 25, 8, greedy))
    assert len(got) == 25 and module.training
    module.eval()
    tokens, want = torch.tensor([prompt]), []
    cache = module.new_cache(1, 8, dtype=torch.float64)
    for piece in tokens.split(8, dim=1):
        scores = module.decode(piece, cache)
    for _ in range(25):
        want.append(int(scores[0, -1].argmax()))
        scores = module.decode(torch.tensor([[want[-1]]]), cache)
    assert got == want
    # What lies before the last context counts: the first tokens of the prompt change what the model says.
    changed = [(token + 1) % VOCAB for token in prompt[:20]] + prompt[20:]
    assert list(generate(module, changed, 25, 8, greedy)) != got


def test_without_memory_generation_starts_afresh_when_the_context_is_full() -> None:
    module = make(memory=0)
    assert module.new_cache(1, 8).max_length == 8
    prompt, greedy = text_of(1, 29)[0].tolist(), SamplingOptions(temperature=0)
    assert len(list(generate(module, prompt, 12, 8, greedy, truncate_prompt=True))) == 12


def test_training_goes_on_after_sampling() -> None:
    module = make(torch.float32)
    list(generate(module, [1, 2, 3], 8, 8))
    output, _ = module(segment(text_of(1, 4), 0, 4))
    output.loss_sum.backward()
    assert module.blocks[0].attention.r.weight.grad is not None


# --- precision, recomputation, roles, counts ------------------------------------------------------------------------


def test_bf16_autocast_is_near() -> None:
    module, text = make(torch.float32, memory=16, init_std=0.02), text_of(4, 48)
    exact, _ = read(module, text, [0, 16, 32, 48])
    with torch.autocast("cpu", torch.bfloat16):
        carry, losses = None, []
        for start in (0, 16, 32):
            output, carry = module(segment(text, start, start + 16), carry)
            losses.append(output.loss_sum)
    assert carry["states"].dtype == torch.float32
    torch.testing.assert_close(output.hidden.float(), exact[:, 32:], rtol=0.05, atol=0.05)
    assert not torch.equal(output.hidden.float(), exact[:, 32:])
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in module.parameters())  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_activations_changes_nothing(dropout: float) -> None:
    module, text, found = make(dropout=dropout, memory=8), text_of(2, 24), []
    for checkpointed in (False, True):
        run = copy.deepcopy(module)
        for block in run.blocks if checkpointed else ():
            forward = block.forward
            block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
        torch.manual_seed(3)
        hidden, _ = read(run, text, [0, 8, 16, 24])
        found.append((hidden, gradients(run, hidden)))
    assert_close(*found)


def test_dropout_reaches_positions_and_stops_in_evaluation() -> None:
    module, text = make(dropout=0.5), text_of(1, 8)
    context = module._context(module.embed(text[:, :8]), 0, None)
    assert 0.2 < (context.encoding_pd == 0).double().mean() < 0.8
    module.eval()
    first, second = (module(segment(text, 0, 8))[0].hidden for _ in range(2))
    assert torch.equal(first, second)


def test_u_and_v_are_shared_vectors_that_do_not_decay() -> None:
    module = make()
    assert module.content_bias.shape == module.position_bias.shape == (4, 6)
    assert 0.1 < module.content_bias.std() < 0.6 and not torch.equal(module.content_bias, module.position_bias)
    groups = parameter_groups(module, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not {id(module.content_bias), id(module.position_bias)} & decayed
    assert id(module.blocks[0].attention.r.weight) in decayed


def test_flops_are_those_that_torch_counts() -> None:
    """Per token of a batch of one; W_r R, which the formula counts once per token, runs over S distances here."""
    module = make(torch.float32, attention={"backend": "reference"}, memory=24, dim=64, depth=3, kv_heads=2)
    text = text_of(1, 24)
    _, carry = module(segment(text, 0, 12))
    with FlopCounterMode(display=False) as counter:
        module(segment(text, 12, 24), carry)[0].loss_sum.backward()
    r_weights = sum(block.attention.r.weight.numel() for block in module.blocks)
    vectors = sum(p.numel() for name, p in module.named_parameters() if "norm" in name or "bias" in name)
    more = r_weights * (4 * 36 - 6 * 12)  # forward and gradient of the weights over S, where 6 per token count
    assert counter.get_total_flops() - more + 12 * 6 * vectors == pytest.approx(12 * module.flops_per_token(12))
