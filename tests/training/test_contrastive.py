"""Contrastive training: the written-out gradients, and one loss whatever the workers and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from glowflow.config.errors import ConfigError
from glowflow.training.contrastive import contrast
from glowflow.training.markers import checkpoint_path
from glowflow.training.strategies import make_strategy
from tests.training.distributed import run_workers
from tests.training.small_run import make_loop, stream, train, train_sharded, weights
from tests.training.test_loop import FailOnSync
from tests.training.two_towers import PAIRS, make_pairs, tower_config

STEPS = 3


def reference(texts: Tensor, media: Tensor, pair_weights: Tensor, scale: Tensor) -> Tensor:
    """The symmetrical loss as written in arXiv:2103.00020, over the pairs that count."""
    kept = pair_weights > 0
    scores, labels = scale * texts[kept] @ media[kept].T, torch.arange(int(kept.sum()))
    both = F.cross_entropy(scores, labels, reduction="none") + F.cross_entropy(scores.T, labels, reduction="none")
    return (pair_weights[kept] * both / 2).sum() / pair_weights.sum()


def embeddings(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, pairs, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    texts, media = F.normalize(drawn, dim=-1)
    return texts, media


def alone() -> Any:
    return make_strategy("single", device=torch.device("cpu"), precision="fp32")


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9), st.integers(0, 99))
def test_gradients_are_those_of_the_loss(given_weights: list[float], seed: int) -> None:
    pair_weights = torch.tensor(given_weights, dtype=torch.float64)
    texts, media = (part.requires_grad_() for part in embeddings(len(pair_weights), seed))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    found = contrast(texts, media, pair_weights, scale, alone())
    if not pair_weights.any():
        assert not any(value.any() for value in vars(found).values())
        return
    share = pair_weights.sum() / pair_weights.sum().clamp(min=1.0)  # less than one pair counts as one
    wanted = reference(texts, media, pair_weights, scale) * share
    wanted.backward()
    torch.testing.assert_close(found.loss_sum / pair_weights.sum() * share, wanted)
    torch.testing.assert_close(found.text_grads, texts.grad)
    torch.testing.assert_close(found.media_grads, media.grad)
    torch.testing.assert_close(found.scale_grad, scale.grad)


def test_recall_counts_texts_whose_own_medium_is_nearest_and_ties_share() -> None:
    texts, scale, ones = torch.eye(4), torch.tensor(1.0), torch.ones(4)
    assert contrast(texts, torch.eye(4), ones, scale, alone()).found_sum == 4
    assert contrast(texts, torch.eye(4).roll(1, 0), ones, scale, alone()).found_sum == 0
    collapsed = torch.ones(4, 4) / 2
    assert contrast(collapsed, collapsed, ones, scale, alone()).found_sum == 1
    three = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert contrast(collapsed, collapsed, three, scale, alone()).found_sum == 1
    assert contrast(texts, torch.eye(4), three, scale, alone()).found_sum == 3


def config_of(strategy: str, workers: int, micro: int, **more: Any) -> Any:
    return tower_config(
        training__strategy=strategy, resources__workers=workers, training__micro_batch_size=micro, **more
    )


def run_on_rank(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        for micro in (4, 1):
            config = config_of(strategy, 2, micro)
            _, recorder, loop = train(config, run_dir / f"{strategy}-{micro}", rows=make_pairs)
            state = {name: value.numpy() for name, value in weights(loop).items()}
            found[f"{strategy}-{micro}"] = (recorder.curve, recorder.validations, state)
    for micro in (4, 1):  # a group for each tower, gathered anew for each pass
        name = f"sharded-{micro}"
        curve = train_sharded(config_of("fsdp", 2, micro, model__dropout=0.0), run_dir / name, None, rows=make_pairs)
        found[name] = (curve, None, None)
    dropped = config_of("fsdp", 2, 1, model__dropout=0.3)
    whole = train_sharded(dropped, run_dir / "whole", None, rows=make_pairs)
    again = train_sharded(dropped, run_dir / "again", checkpoint_path(run_dir / "whole", 2), rows=make_pairs)
    found["resume"] = (whole, again)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(2, run_on_rank, tmp_path_factory.mktemp("two"), timeout=240)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """By micro-batch: all pairs at once, and four micro-batches."""
    torch.set_num_threads(1)
    found = {}
    for micro in (PAIRS, PAIRS // 4):
        run_dir = tmp_path_factory.mktemp(f"one-{micro}")
        _, recorder, loop = train(config_of("single", 1, micro), run_dir, rows=make_pairs)
        found[micro] = (recorder.curve, recorder.validations, weights(loop))
    return found


def close(curve: Any, wanted: Any) -> None:
    for step in range(1, STEPS + 1):
        assert curve["train_loss"][step] == pytest.approx(wanted["train_loss"][step], rel=1e-5)
        assert curve["grad_norm"][step] == pytest.approx(wanted["grad_norm"][step], rel=1e-5)


def test_four_micro_batches_equal_one(one: Any) -> None:
    (curve, validations, state), (wanted, wanted_validations, wanted_state) = one[PAIRS // 4], one[PAIRS]
    close(curve, wanted)
    assert validations[STEPS] == pytest.approx(wanted_validations[STEPS], rel=1e-5)
    for name, value in wanted_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_equal_one(two: Any, one: Any, strategy: str, micro: int) -> None:
    wanted, wanted_validations, wanted_state = one[PAIRS]
    curve, validations, state = two[0][f"{strategy}-{micro}"]
    close(curve, wanted)
    assert validations[STEPS] == pytest.approx(wanted_validations[STEPS], rel=1e-5)
    for name, value in wanted_state.items():
        torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-5, atol=1e-5)
    assert two[1][f"{strategy}-{micro}"][:2] == (curve, validations), "ranks agree"


@pytest.mark.parametrize("micro", [4, 1])
def test_two_workers_equal_one_when_each_tower_is_gathered_anew(two: Any, one: Any, micro: int) -> None:
    close(two[0][f"sharded-{micro}"][0], one[PAIRS][0])


def test_resume_is_exact_with_dropout_in_two_passes(two: Any) -> None:
    for found in two:
        whole, again = found["resume"]
        assert again["train_loss"] == {3: whole["train_loss"][3]}
        assert again["grad_norm"] == {3: whole["grad_norm"][3]}


def test_the_first_loss_is_that_of_all_pairs_and_not_the_mean_over_micro_batches(one: Any, tmp_path: Path) -> None:
    config = config_of("single", 1, PAIRS // 4)
    loop, _ = make_loop(config, tmp_path, rows=make_pairs)
    with torch.no_grad():
        outputs = [loop.module(batch)[0] for batch in next(stream(config, 0, 1, rows=make_pairs)).micro_batches]
    texts, media = (torch.cat([output.pairs[kind] for output in outputs]) for kind in (0, 1))
    pair_weights, scale = torch.cat([output.pair_weights for output in outputs]), outputs[0].logit_scale
    assert one[PAIRS // 4][0]["train_loss"][1] == pytest.approx(
        float(reference(texts, media, pair_weights, scale)), rel=1e-6
    )
    apart = [float(reference(*output.pairs, output.pair_weights, scale)) for output in outputs]
    assert abs(sum(apart) / 4 - one[PAIRS][0]["train_loss"][1]) > 0.1


def test_both_passes_draw_the_same_random_numbers(tmp_path: Path) -> None:
    config = config_of("single", 1, PAIRS // 2, model__dropout=0.5)
    loop, _ = make_loop(config, tmp_path, rows=make_pairs)
    seen: list[Tensor] = []
    loop.module.register_forward_hook(lambda _, __, given: seen.append(given[0].pairs[0].detach()))
    loop._forward_backward(next(stream(config, 0, 1, rows=make_pairs)))
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    without = loop.module.eval()(next(stream(config, 0, 1, rows=make_pairs)).micro_batches[0])[0].pairs[0]
    assert not torch.allclose(first, without), "there is something to draw"


@pytest.mark.parametrize("micro", [PAIRS, 2])
def test_nothing_waits_for_the_device(tmp_path: Path, micro: int) -> None:
    loop, _ = make_loop(config_of("single", 1, micro), tmp_path, rows=make_pairs)
    batches, mode = next(stream(loop.config, 0, 1, rows=make_pairs)), FailOnSync()
    with mode:
        loop._forward_backward(batches)
    assert mode.operations > 50


def test_the_scale_is_trained(one: Any) -> None:
    assert all(state["log_scale"].abs() > 1e-3 for _, _, state in one.values())


def test_validation_is_the_loss_within_each_global_batch(one: Any, tmp_path: Path) -> None:
    config = config_of("single", 1, PAIRS)
    loop, recorder = make_loop(config, tmp_path, rows=make_pairs)
    loop.run()
    losses, pairs, right = 0.0, 0.0, 0.0
    with torch.no_grad():
        for batches in stream(config, 10_000, 10_003, rows=make_pairs):
            output = loop.module.eval()(batches.micro_batches[0])[0]
            kept = output.pair_weights > 0
            losses += float(reference(*output.pairs, output.pair_weights, output.logit_scale) * kept.sum())
            scores = output.pairs[0][kept] @ output.pairs[1][kept].T
            right += float((scores.argmax(1) == torch.arange(len(scores))).sum())
            pairs += float(kept.sum())
    assert recorder.validations[STEPS].keys() == {"val_loss", "val_recall_at_1"}
    assert recorder.validations[STEPS]["val_loss"] == pytest.approx(losses / pairs, rel=1e-6)
    assert recorder.validations[STEPS]["val_recall_at_1"] == pytest.approx(right / pairs)


def test_an_optimiser_with_extra_passes_is_refused(tmp_path: Path) -> None:
    config = tower_config(training__optimizer={"name": "sophia-h"})
    with pytest.raises(ConfigError, match="a contrastive loss is no sum over sequences"):
        make_loop(config, tmp_path, rows=make_pairs)
