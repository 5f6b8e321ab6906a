"""Sophia's extra pass in the loop: on what it is made, whatever the workers; resumes; nothing else changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.config.errors import ConfigError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.optim.sophia import SophiaG, SophiaH
from glowflow.training.hessian import HessianBatch, label_draws
from glowflow.training.loop import TrainLoop
from glowflow.training.markers import checkpoint_path
from glowflow.training.strategies.base import gather
from tests.training.distributed import run_workers
from tests.training.small_run import make_loop, make_rows, optimizer_state, small_config, stream, train, weights
from tests.training.test_carry_xl import lanes
from tests.training.test_loop import FailOnSync

SORTS: dict[str, dict[str, Any]] = {
    "g": {"name": "sophia-g"},
    "h": {"name": "sophia-h"},
    "differences": {"name": "sophia-h", "hvp": "finite_diff"},
}
every_sort = pytest.mark.parametrize("sort", SORTS.values(), ids=SORTS.keys())
MOE: dict[str, Any] = {"model__moe__experts": 4, "model__moe__active": 2, "model__moe__balance": 0.1}


pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(sort: dict[str, Any], *, every: int = 4, rows: int | None = None, **more: Any) -> GlowFlowConfig:
    optimizer = {**sort, "hessian_interval": every, "hessian_batch_size": rows}
    keys = {"training__optimizer": optimizer, "training__log_interval": 1, "training__max_steps": 10, **more}
    return small_config(**keys)


def loop_of(config: GlowFlowConfig, run_dir: Path, **options: Any) -> TrainLoop:
    return make_loop(config, run_dir, validate=False, **options)[0]


def extra_pass(loop: TrainLoop, step: int = 0, **options: Any) -> dict[str, Tensor]:
    """The estimates after the extra pass of a step."""
    assert loop._extra is not None
    loop.module.train()
    loop._extra.run(next(stream(loop.config, step, step + 1, **options)), loop._carries)
    assert all(p.grad is None for p in loop.module.parameters())
    return hessians(loop)


def hessians(loop: TrainLoop) -> dict[str, Tensor]:
    """By name, whole."""
    named = loop.strategy.unwrap(loop.module).named_parameters()
    return {name: gather(loop.optimizer.state[p]["hessian"]).clone() for name, p in named}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# -- on what it is made ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 8, 3])
def test_g_is_what_the_definition_gives_on_the_first_rows(tmp_path: Path, float64: None, rows: int | None) -> None:
    config = config_of(SORTS["g"], rows=rows, training__micro_batch_size=2)
    loop = loop_of(config, tmp_path)
    module: Any = loop.strategy.unwrap(loop.module)
    batch, first = make_rows(4, config), rows or 8
    scores = module.logits(module(batch)[0].hidden)[:first]
    draws = label_draws(7, 4, range(32, 32 + first), 12).unsqueeze(-1)
    labels = (scores.softmax(-1).cumsum(-1) <= draws).sum(-1)
    weights_bt = batch.loss_weights[:first].double()
    nll = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
    ghat = torch.autograd.grad((nll * weights_bt.flatten()).sum() / weights_bt.sum(), list(module.parameters()))
    found = extra_pass(loop, 4)
    for (name, _), gradient in zip(module.named_parameters(), ghat, strict=True):
        torch.testing.assert_close(found[name], 0.01 * weights_bt.sum() * gradient**2, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("sort", [SORTS["h"], SORTS["differences"]], ids=["exact", "differences"])
@pytest.mark.parametrize("rows", [None, 3])
def test_h_is_what_the_definition_gives_on_the_first_rows(
    tmp_path: Path, float64: None, sort: dict[str, Any], rows: int | None
) -> None:
    """Against differences of the gradients of a loss written out plainly."""
    config = config_of(sort, rows=rows, training__micro_batch_size=2)
    loop = loop_of(config, tmp_path)
    module: Any = loop.strategy.unwrap(loop.module)
    batch, first = make_rows(4, config), rows or 8
    weights_bt = batch.loss_weights.clone()
    weights_bt[first:] = 0
    source = HessianBatch(loop._extra, next(stream(config, 4, 5)), loop._carries)  # type: ignore[arg-type]
    u = {name: source.probe(p) for name, p in module.named_parameters()}
    found = extra_pass(loop, 4)

    def gradient() -> tuple[Tensor, ...]:
        scores = module.logits(module(batch)[0].hidden)
        nll = F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (nll * weights_bt.flatten()).sum() / weights_bt.sum()
        return torch.autograd.grad(loss, list(module.parameters()))

    def moved(by: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.add_(u[name], alpha=by)
        return gradient()

    ahead, behind = moved(1e-5), moved(-2e-5)
    want = [0.01 * x * (a - b) / 2e-5 for x, a, b in zip(u.values(), ahead, behind, strict=True)]
    want_n, found_n = torch.cat([x.flatten() for x in want]), flat(found)
    assert (found_n - want_n).norm() < (1e-6 if sort == SORTS["h"] else 1e-3) * want_n.norm()
    assert want_n.norm() > 0


def test_differences_in_fp32_follow_the_exact_product(tmp_path: Path) -> None:
    exact, differences = (
        flat(extra_pass(loop_of(config_of(SORTS[name], model__dropout=0.1), tmp_path))) for name in ("h", "differences")
    )
    assert (differences - exact).norm() < 1e-3 * exact.norm()
    assert not torch.equal(differences, exact)


@every_sort
@pytest.mark.parametrize("batch_size", [4, 8])
def test_micro_batches_change_nothing(tmp_path: Path, float64: None, sort: dict[str, Any], batch_size: int) -> None:
    found = []
    for micro in (1, 2, batch_size):
        config = config_of(sort, training__batch_size=batch_size, training__micro_batch_size=micro)
        found.append(flat(extra_pass(loop_of(config, tmp_path))))
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1], rtol=1e-6, atol=1e-12)


def test_micro_batches_without_any_of_the_rows_are_left_out(tmp_path: Path) -> None:
    for rows, passes in ((1, 1), (2, 1), (3, 2), (8, 4), (None, 4)):
        config = config_of(SORTS["g"], rows=rows, training__micro_batch_size=2)
        loop, seen = loop_of(config, tmp_path), []
        loop.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].loss_weights.any(1)))  # noqa: B023
        extra_pass(loop)
        assert len(seen) == passes
        counted = torch.cat(seen)
        assert counted[:rows].all() and not counted[rows or 8 :].any()


def test_labels_and_probes_differ_from_step_to_step_and_row_to_row(tmp_path: Path) -> None:
    draws = label_draws(7, 0, range(4), 12)
    assert draws.unique().numel() == 48 and 0.2 < draws.mean() < 0.8
    assert torch.equal(label_draws(7, 0, range(2, 4), 12), draws[2:])
    assert not torch.equal(label_draws(7, 1, range(4), 12), draws)
    assert not torch.equal(label_draws(8, 0, range(4), 12), draws)
    loop = loop_of(config_of(SORTS["h"]), tmp_path)
    probes = [
        HessianBatch(loop._extra, next(stream(loop.config, step, step + 1)), loop._carries).probe(p)  # type: ignore[arg-type]
        for step in (0, 1)
        for p in list(loop.module.parameters())[:2]
    ]
    numbers = torch.cat([probe.flatten() for probe in probes])
    assert numbers.unique().numel() > 0.999 * numbers.numel()
    assert abs(numbers.mean()) < 0.1 and abs(numbers.std() - 1) < 0.1


# -- beside the step ---------------------------------------------------------------------------------------------------


@every_sort
def test_the_step_itself_sees_nothing_of_it(tmp_path: Path, sort: dict[str, Any]) -> None:
    """Losses and gradients of a step with an extra pass before it are those without, dropout included."""
    config = config_of(sort, model__dropout=0.2, training__micro_batch_size=4)
    curves = []
    for name in ("with", "without"):
        loop, recorder = make_loop(config.model_copy(deep=True), tmp_path / name, validate=False, stop_at=1)
        if name == "without":
            loop._extra = None
        loop.run()
        curves.append((recorder.curve["train_loss"], recorder.curve["grad_norm"]))
        assert bool(loop.optimizer.state[next(loop.module.parameters())]["hessian"].any()) is (name == "with")
    assert curves[0] == curves[1]


@every_sort
def test_estimates_are_made_every_so_many_steps_from_the_first_on(tmp_path: Path, sort: dict[str, Any]) -> None:
    loop, _ = make_loop(config_of(sort, every=3, training__max_steps=7), tmp_path, validate=False)
    seen, step = [], loop._train_step

    def watched(batches: Any) -> None:
        before = hessians(loop) if batches.step else {}
        step(batches)
        seen.append(not before or not torch.equal(flat(before), flat(hessians(loop))))

    loop._train_step = watched  # type: ignore[method-assign]
    loop.run()
    assert seen == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["g", "h"])
def test_memory_is_read_and_not_advanced(tmp_path: Path, name: str) -> None:
    config = config_of(
        SORTS[name], model__arch="transformer-xl", model__memory=18, model__init_std=0.2, training__micro_batch_size=4
    )
    loop = loop_of(config, tmp_path, rows=lanes, stop_at=2)
    loop.run()
    carries = [dict(carry) for carry in loop._carries if carry is not None]
    assert len(carries) == 2
    copies = [{key: value.clone() for key, value in carry.items()} for carry in carries]
    before = hessians(loop)
    after = extra_pass(loop, 4, rows=lanes)
    assert not torch.equal(flat(before), flat(after))
    for carry, copy, held in zip(carries, copies, loop._carries, strict=True):
        assert held is not None and all(held[key] is carry[key] for key in carry)
        assert all(torch.equal(carry[key], copy[key]) for key in carry)
    for parameter in loop.module.parameters():
        loop.optimizer.state[parameter]["hessian"].zero_()
    remembering = flat(extra_pass(loop, 4, rows=lanes))
    for parameter in loop.module.parameters():
        loop.optimizer.state[parameter]["hessian"].zero_()
    loop._carries = [None] * 2
    assert not torch.allclose(flat(extra_pass(loop, 4, rows=lanes)), remembering, rtol=1e-3)


@pytest.mark.parametrize("name", ["g", "h"])
def test_the_balance_of_experts_is_no_part_of_it(tmp_path: Path, name: str) -> None:
    found = []
    for balance in (0.1, 100.0):
        config = config_of(SORTS[name], **{**MOE, "model__moe__balance": balance})
        loop, recorder = make_loop(config, tmp_path / str(balance), validate=False)
        found.append(flat(extra_pass(loop)))
        assert torch.isfinite(found[-1]).all() and found[-1].any()
    assert torch.equal(*found)
    loop.run()
    assert recorder.curve["aux_loss"][1] > 1


@every_sort
@pytest.mark.parametrize("model", [{}, MOE, {"model__arch": "transformer-xl", "model__memory": 6}])
def test_it_learns(tmp_path: Path, sort: dict[str, Any], model: dict[str, Any]) -> None:
    _, recorder, _ = train(config_of(sort, **model, training__max_steps=14), tmp_path, validate=False)
    losses = recorder.curve["train_loss"]
    assert losses[14] < losses[1] - 0.3
    assert all(0 <= metrics["win_rate"] < 1 for _, metrics in recorder.records)
    assert recorder.records[0][1]["win_rate"] > 0


# -- precision, resumes, waiting ---------------------------------------------------------------------------------------


def test_the_scale_of_fp16_is_divided_out_before_squaring(tmp_path: Path) -> None:
    full = flat(extra_pass(loop_of(config_of(SORTS["g"]), tmp_path)))
    found = []
    for scale in (2.0**8, 2.0**12):
        loop = loop_of(config_of(SORTS["g"], training__precision="fp16"), tmp_path)
        loop.scaler.scale.fill_(scale)
        found.append(flat(extra_pass(loop)))
        assert (found[-1] - full).norm() < 0.05 * full.norm()
    torch.testing.assert_close(*found, rtol=0.05, atol=1e-6)
    loop.scaler.scale.fill_(2.0**40)  # overflows: nothing changes
    assert torch.equal(flat(extra_pass(loop, 4)), found[-1])


@pytest.mark.parametrize("name", ["h", "differences"])
def test_products_are_made_in_fp32_whatever_the_precision(tmp_path: Path, name: str) -> None:
    full, half = (
        flat(extra_pass(loop_of(config_of(SORTS[name], training__precision=precision), tmp_path)))
        for precision in ("fp32", "bf16")
    )
    assert torch.equal(full, half)


@every_sort
def test_a_batch_whose_loss_is_not_finite_leaves_the_estimate(tmp_path: Path, sort: dict[str, Any]) -> None:
    loop = loop_of(config_of(sort), tmp_path)
    start = weights(loop)
    before = flat(extra_pass(loop))
    assert torch.equal(flat(extra_pass(loop, 4, poison=frozenset({4}))), before)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), weights(loop).values(), strict=True))
    assert not torch.equal(flat(extra_pass(loop, 8)), before)


@every_sort
def test_a_run_stopped_between_two_estimates_goes_on_to_the_bit(tmp_path: Path, sort: dict[str, Any]) -> None:
    config = config_of(sort, model__dropout=0.1, training__micro_batch_size=4, training__max_steps=12)
    _, whole, loop_whole = train(config, tmp_path / "whole", validate=False)
    _, first, _ = train(config, tmp_path / "parts", validate=False, stop_at=6)
    torch.manual_seed(999)
    _, second, loop_second = train(config, tmp_path / "parts", checkpoint_path(tmp_path / "parts", 6), validate=False)
    for metric in ("train_loss", "grad_norm"):
        assert {**first.curve[metric], **second.curve[metric]} == whole.curve[metric]
    for a, b in zip(weights(loop_whole).values(), weights(loop_second).values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer_state(loop_whole), optimizer_state(loop_second), strict=True):
        assert torch.equal(a, b)
    assert set(loop_second.optimizer.state[next(loop_second.module.parameters())]) == {"exp_avg", "hessian"}


@every_sort
@pytest.mark.parametrize(("strategy", "precision"), [("single", "fp32"), ("fsdp", "fp32"), ("single", "fp16")])
def test_nothing_waits_for_the_device(tmp_path: Path, sort: dict[str, Any], strategy: str, precision: str) -> None:
    config = config_of(
        sort, every=2, rows=5, training__micro_batch_size=4, model__dropout=0.1, training__strategy=strategy,
        training__precision=precision, training__max_steps=3, training__checkpoint_interval=3,
    )  # fmt: skip
    loop, mode = loop_of(config, tmp_path), FailOnSync()
    loop.module.train()
    optimizer: Any = loop.optimizer
    for batches in stream(config, 0, 3):
        with mode:
            assert loop._extra is not None
            loop._extra.run(batches, loop._carries)
            loop._forward_backward(batches)
            with torch.no_grad():  # as on a GPU: on a CPU the step asks whether to skip
                for group in optimizer.param_groups:
                    optimizer.update_group(group, None, torch.zeros((), dtype=torch.bool))
        optimizer.zero_grad()
    assert mode.operations > 500
    assert flat(hessians(loop)).any()


# -- what cannot be had ------------------------------------------------------------------------------------------------


def test_a_hessian_batch_larger_than_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hessian_batch_size.*at most training.batch_size, which is 8"):
        loop_of(config_of(SORTS["g"], rows=9), tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"training__strategy": "fsdp"}, "sharded"),
        ({"training__activation_checkpointing": True}, "activation_checkpointing"),
        (MOE, "mixture of experts"),
    ],
)
def test_where_the_exact_product_cannot_be_had_differences_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: dict[str, Any], words: str
) -> None:
    with caplog.at_level(logging.INFO):
        loop = loop_of(config_of(SORTS["h"], **keys), tmp_path)
    assert words in caplog.text.partition("by finite_diff (no exact ones: ")[2]
    reference = flat(extra_pass(loop_of(config_of(SORTS["differences"], **keys), tmp_path)))
    assert torch.equal(flat(extra_pass(loop)), reference)
    with pytest.raises(ConfigError, match=rf"exact cannot be had.*{words}"):
        loop_of(config_of({"name": "sophia-h", "hvp": "exact"}, **keys), tmp_path)


def test_differences_of_half_precision_shards_are_refused(tmp_path: Path) -> None:
    config = config_of(SORTS["h"], training__strategy="fsdp", training__precision="bf16")
    with pytest.raises(ConfigError, match=r"(?s)exact cannot.*sharded.*finite_diff cannot.*bf16"):
        loop_of(config, tmp_path)


def test_other_optimisers_take_no_extra_pass(tmp_path: Path) -> None:
    for name in ("adamw", "lion", "adan"):
        assert loop_of(small_config(training__optimizer=name), tmp_path)._extra is None
    assert isinstance(loop_of(config_of(SORTS["g"]), tmp_path).optimizer, SophiaG)
    assert isinstance(loop_of(config_of(SORTS["h"]), tmp_path).optimizer, SophiaH)


# -- two workers -------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[dict[str, Any], int | None]] = {
    "g": (SORTS["g"], None),
    "g, rows of the first worker alone": (SORTS["g"], 3),
    "h": (SORTS["h"], None),
    "h, rows of both": (SORTS["h"], 5),
    "differences": (SORTS["differences"], 5),
}


def run(name: str, run_dir: Path, strategy: str, workers: int) -> tuple[dict[int, float], float, Any]:
    """Losses, the last share of what is not clipped, and the estimates."""
    sort, rows = RUNS[name]
    config = config_of(
        sort, every=2, rows=rows, training__strategy=strategy, resources__workers=workers, training__max_steps=5,
        training__micro_batch_size=2, training__warmup_steps=1,
    )  # fmt: skip
    _, recorder, loop = train(config, run_dir / strategy / name, validate=False)
    return recorder.curve["train_loss"], recorder.records[-1][1]["win_rate"], flat(hessians(loop)).numpy()


def run_on_rank(run_dir: Path) -> dict[str, Any]:
    return {f"{strategy} {name}": run(name, run_dir, strategy, 2) for strategy in ("ddp", "fsdp") for name in RUNS}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(2, run_on_rank, tmp_path_factory.mktemp("two"), timeout=240)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_two_workers_are_one(two: list[dict[str, Any]], tmp_path: Path, name: str, strategy: str) -> None:
    alone, share, estimate = run(name, tmp_path, "single", 1)
    for found in two:
        losses, win_rate, hessian = found[f"{strategy} {name}"]
        assert losses == pytest.approx(alone, abs=2e-6)
        assert win_rate == pytest.approx(share, abs=2e-3) and 0 < share < 1
        assert torch.from_numpy(hessian - estimate).norm() < 1e-3 * torch.from_numpy(estimate).norm() > 0
