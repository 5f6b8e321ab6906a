"""The analyzer: every target once, sums that equal a slow computation, intervals over documents."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from glowflow.config.errors import DataError
from glowflow.config.loader import apply_overrides
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.data.plan import eval_plan
from glowflow.data.prepare import ensure_built
from glowflow.evaluation.analyzer import ModelAnalyzer, token_nll
from glowflow.evaluation.baselines import ngram_baselines
from glowflow.evaluation.documents import TargetLookup, TargetStream, document_texts


class Uniform(torch.nn.Module):
    """Gives every token the same probability."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, batch, carry=None, *, compute_loss=True):
        from glowflow.core.batch import ModelOutput

        return ModelOutput(torch.zeros(*batch.tokens.shape, 1)), carry

    def logits(self, hidden):
        return torch.zeros(*hidden.shape[:-1], self.vocab_size)


def slow_losses(model: GlowFlowModel, manifest: Manifest, context: int) -> np.ndarray:
    """The loss of each target with the whole scores at once, one sequence at a time."""
    from glowflow.data.stream import to_batch

    plan, losses = eval_plan(manifest, split="validation", context=context, global_batch=1), []
    model.module.eval()
    with torch.no_grad():
        for step in range(plan.num_steps or 0):
            batch = to_batch(plan.batch(step))
            scores = model.module.logits(model.module(batch, compute_loss=False)[0].hidden).double()
            nll = -scores.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
            losses.append(nll[batch.loss_weights > 0].numpy())
    return np.concatenate(losses)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(byte_manifest: Manifest) -> None:
    result = ModelAnalyzer(Uniform(257), byte_manifest.tokenizer_spec).perplexity(byte_manifest, context=32)  # type: ignore[arg-type]
    split = byte_manifest.split("validation")
    assert result["perplexity"] == pytest.approx(257) and result["loss"] == pytest.approx(math.log(257))
    assert result["tokens"] == split.tokens - split.rows
    assert result["documents"] == split.documents and result["text_bytes"] == split.text_bytes
    # One target a byte and one for the end of each document.
    assert result["bits_per_byte"] == pytest.approx(math.log2(257) * (1 + split.documents / split.text_bytes))
    assert result["confidence"]["loss"] == pytest.approx([math.log(257)] * 2)


def test_equals_the_slow_computation_whatever_the_batch(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    slow = slow_losses(model, byte_manifest, 32)
    analyzer = ModelAnalyzer(model.module, byte_manifest.tokenizer_spec)
    for batch_size in (1, 7, 64):
        result = analyzer.perplexity(byte_manifest, context=32, batch_size=batch_size)
        assert result["tokens"] == len(slow)
        assert result["loss"] == pytest.approx(slow.mean(), rel=1e-6)
        bits = slow.sum() / math.log(2) / byte_manifest.split("validation").text_bytes
        assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_documents_get_their_own_losses(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    """With a context longer than any document and a mask, a document's loss does not depend on its neighbours."""
    analyzer = ModelAnalyzer(model.module, byte_manifest.tokenizer_spec)
    result = analyzer.perplexity(byte_manifest, context=1024, batch_size=2)
    texts = list(document_texts(byte_manifest, "validation"))
    tokenizer = byte_manifest.tokenizer()
    alone = []
    for text in texts:
        ids = torch.from_numpy(tokenizer.encode_document(text.decode()).astype(np.int64))[None]
        with torch.no_grad():
            cache = model.module.new_cache(1, ids.shape[1])
            scores = model.module.decode(ids[:, :-1], cache).log_softmax(-1)
        alone.append(-scores.gather(-1, ids[:, 1:, None]).sum().item())
    # Documents that are cut by the end of a sequence lose context; with 1024 positions only few are.
    assert result["loss"] == pytest.approx(sum(alone) / result["tokens"], rel=0.02)
    assert result["confidence"]["unit"] == "document" and result["confidence"]["units"] == len(texts) >= 30


def test_target_stream_repeats_the_plan(byte_manifest: Manifest) -> None:
    plan = eval_plan(byte_manifest, split="train", context=16, global_batch=5, window_tokens=500)
    stream, seen = TargetStream(byte_manifest, "train"), []
    for batch in plan.batches(range(plan.num_steps or 0)):
        wanted = batch.targets[batch.loss_weights > 0]
        targets, documents = stream.take(len(wanted))
        np.testing.assert_array_equal(targets, wanted)
        seen.append(documents)
    assert len(stream.take(10)[0]) == 0
    documents = np.concatenate(seen)
    assert len(np.unique(documents)) == byte_manifest.split("train").documents
    changes = int((documents[1:] != documents[:-1]).sum())
    assert changes == byte_manifest.split("train").documents - 1  # each document in one piece


def test_target_lookup_finds_the_document_of_any_target(byte_manifest: Manifest) -> None:
    split = byte_manifest.split("train")
    _, documents = TargetStream(byte_manifest, "train").take(split.tokens)
    numbers = np.random.default_rng(0).permutation(len(documents))
    np.testing.assert_array_equal(TargetLookup(byte_manifest, "train").documents(numbers), documents[numbers])


def test_memory_is_carried_along_lanes(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    """With a memory that holds every document, one lane in short segments gives each document what it gets alone."""
    keys = {"model.arch": "transformer-xl", "model.memory": 8, "model.eval_memory": 400}
    xl = GlowFlowModel(apply_overrides(model.config, keys))
    analyzer, total = ModelAnalyzer(xl.module, byte_manifest.tokenizer_spec), 0.0
    for text in document_texts(byte_manifest, "validation"):
        ids = torch.from_numpy(byte_manifest.tokenizer().encode_document(text.decode()).astype(np.int64))[None]
        with torch.no_grad():
            scores = xl.module.decode(ids[:, :-1], xl.module.new_cache(1, ids.shape[1])).log_softmax(-1)
        total -= scores.gather(-1, ids[:, 1:, None]).sum().item()
    results = {n: analyzer.perplexity(byte_manifest, context=32, batch_size=n, layout="lanes") for n in (1, 6)}
    split = byte_manifest.split("validation")
    for result in results.values():
        assert result["tokens"] == split.tokens - split.rows and result["documents"] == split.documents
    assert results[1]["loss"] == pytest.approx(total / results[1]["tokens"], rel=1e-5)
    # Each of six lanes begins inside a document, of which it remembers nothing.
    assert (
        results[6]["loss"] == pytest.approx(results[1]["loss"], rel=0.01) and results[6]["loss"] != results[1]["loss"]
    )
    forgetful = analyzer.perplexity(byte_manifest, context=32, batch_size=1)["loss"]
    assert abs(forgetful / results[1]["loss"] - 1) > 1e-4


@pytest.mark.parametrize("lanes", [3, 8])
def test_lanes_give_every_target_to_its_document(
    model: GlowFlowModel, byte_manifest: Manifest, monkeypatch, lanes: int
) -> None:
    """A loss that says which document and target it belongs to lands there."""
    split = byte_manifest.split("validation")
    targets, documents = TargetStream(byte_manifest, "validation").take(split.tokens)
    analyzer, found = ModelAnalyzer(model.module, byte_manifest.tokenizer_spec), {}
    monkeypatch.setattr("glowflow.evaluation.analyzer.token_nll", lambda module, hidden, wanted: wanted.double() + 0.25)
    monkeypatch.setattr("glowflow.evaluation.analyzer._report", lambda sums, *_: found.update(sums=sums) or {})
    analyzer.perplexity(byte_manifest, context=16, batch_size=lanes, layout="lanes")
    units = found["sums"].documents
    assert {key: unit.tokens for key, unit in units.items()} == Counter(documents.tolist())
    for key, unit in units.items():
        assert unit.nll == pytest.approx((targets[documents == key] + 0.25).sum())
    blocks = found["sums"].blocks
    assert sum(unit.tokens for unit in blocks.values()) == len(targets)
    assert {unit.tokens for key, unit in blocks.items() if key < max(blocks)} == {max(16, len(targets) // 200)}


def test_is_deterministic_and_leaves_the_module_as_it_was(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    analyzer = ModelAnalyzer(model.module, byte_manifest.tokenizer_spec)
    first, second = (analyzer.perplexity(byte_manifest, context=32) for _ in range(2))
    del first["seconds"], second["seconds"]
    assert first == second
    assert model.module.training
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    loss = model.module(_batch(byte_manifest))[0].loss_sum  # training goes on after an evaluation
    loss.backward()


def _batch(manifest: Manifest):
    from glowflow.data.stream import to_batch

    return to_batch(eval_plan(manifest, split="train", context=32, global_batch=2).batch(0))


def test_intervals_hold_the_estimate_and_narrow_with_more_text(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    analyzer = ModelAnalyzer(model.module, byte_manifest.tokenizer_spec)
    small = analyzer.perplexity(byte_manifest, "validation", context=64)
    large = analyzer.perplexity(byte_manifest, "train", context=64)
    for result in (small, large):
        for name in ("loss", "perplexity", "bits_per_byte"):
            low, high = result["confidence"][name]
            assert low < result[name] < high
    width = [r["confidence"]["loss"][1] - r["confidence"]["loss"][0] for r in (small, large)]
    assert width[1] < width[0]


def test_one_long_document_is_cut_into_blocks(model: GlowFlowModel, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("all work and no play makes a dull day\n" * 600)
    data = model.config.data.model_copy(update={"dataset": str(tmp_path / "one.txt"), "cache_dir": str(tmp_path / "c")})
    manifest = ensure_built(data, use_ray=False)[0][0]
    result = ModelAnalyzer(model.module, model.tokenizer_spec or {}).perplexity(manifest, "train", context=32)
    assert result["documents"] == 1 and result["confidence"]["unit"] == "block"
    assert 150 <= result["confidence"]["units"] <= 260


def test_characters_and_unknown_ones(char_manifest: Manifest, tmp_path: Path) -> None:
    size = char_manifest.tokenizer().vocab_size
    result = ModelAnalyzer(Uniform(size), char_manifest.tokenizer_spec).perplexity(char_manifest)  # type: ignore[arg-type]
    assert result["unknown_tokens"] == 0
    text = b"".join(document_texts(char_manifest, "validation"))
    assert result["tokens"] == len(text.decode()) < result["text_bytes"] == len(text)
    assert result["bits_per_byte"] == pytest.approx(math.log2(size) * result["tokens"] / len(text))


def test_bf16_is_near(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    exact, rough = (
        ModelAnalyzer(model.module, byte_manifest.tokenizer_spec, precision=p).perplexity(byte_manifest, context=32)
        for p in ("fp32", "bf16")
    )
    assert exact["loss"] != rough["loss"] and rough["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_chunks_do_not_change_the_losses(model: GlowFlowModel, monkeypatch) -> None:
    hidden, targets = torch.randn(3, 11, 16), torch.randint(257, (3, 11))
    whole = token_nll(model.module, hidden, targets)
    monkeypatch.setattr("glowflow.evaluation.analyzer._CHUNK_SCORES", 257 * 4)
    torch.testing.assert_close(token_nll(model.module, hidden, targets), whole)


def test_data_of_another_tokenizer_and_missing_splits_are_refused(
    model: GlowFlowModel, byte_manifest: Manifest, char_manifest: Manifest
) -> None:
    analyzer = ModelAnalyzer(model.module, byte_manifest.tokenizer_spec)
    with pytest.raises(DataError, match="another tokenizer"):
        analyzer.perplexity(char_manifest)
    with pytest.raises(DataError, match="no such split"):
        analyzer.perplexity(byte_manifest, "tset")


def test_baselines_are_measured_on_the_same_bytes(
    corpus: Path, byte_manifest: Manifest, char_manifest: Manifest
) -> None:
    whole = {file.read_bytes() for file in corpus.iterdir()}
    splits = {name: list(document_texts(byte_manifest, name)) for name in byte_manifest.splits}
    assert set().union(*splits.values()) == whole and sum(map(len, splits.values())) == len(whole)
    two, three = ngram_baselines(byte_manifest)
    assert (two["order"], three["order"]) == (2, 3)
    assert 0.5 < three["bits_per_byte"] < two["bits_per_byte"] < 4
    assert two["confidence"][0] < two["bits_per_byte"] < two["confidence"][1]
    assert ngram_baselines(char_manifest)[0]["bits_per_byte"] == pytest.approx(two["bits_per_byte"])
    with pytest.raises(DataError, match="no such split"):
        ngram_baselines(byte_manifest, split="none")
