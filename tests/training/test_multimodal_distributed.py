"""Ranks never part ways: two ranks with disjoint modalities equal one process, whatever the fusion and the task.

A model that calls an encoder only where it has something to encode ends here in an error or waits for ever.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.distributed import run_workers
from tests.training.media_run import make, passes_of, rows_of, run_config, step_batches, trained
from tests.training.test_loop import FailOnSync

FUSIONS = ("prefix", "cross_attention", "bottleneck", "late", "mixture")
CASES: dict[str, dict[str, Any]] = {
    f"{fusion}-{task}": {"fusion": fusion, "task": task}
    for fusion in FUSIONS
    for task in ("language_modelling", "classification")
}
# As much as there is beside the plain blocks: a resampler, later layers, a mixture of experts, two stems.
CASES["resampled"] = {
    "fusion": "bottleneck",
    "depth": 3,
    "bottleneck": {"tokens": 2, "from_layer": 1},
    "image": {"encoder": "conv", "channels": [4, 8], "depth": 1, "heads": 2, "tokens": 3},
    "audio": {"encoder": "linear", "patch": 2, "tokens": 2},
}
CASES["experts"] = {"fusion": "cross_attention", "moe": {"experts": 3, "active": 2, "ffn_dim": 8}}
CASES["frozen"] = {
    "fusion": "late",
    "image": {"encoder": "vit", "patch": 4, "depth": 1, "heads": 2, "frozen": True},
    "audio": {"encoder": "conv", "channels": [8], "depth": 1, "heads": 2, "frozen": True},
}
CASES["contrastive"] = {"fusion": "late", "task": "contrastive", "audio": None, "embedding_dim": 8}
# Strategy and rows of a micro-batch: one of two, or two of one, of which some have blanks only.
WAYS = (("ddp", 1), ("fsdp", 2), ("sharded", 1))
HALF = (*(f"{fusion}-language_modelling" for fusion in FUSIONS), "contrastive")


def run_on_rank(cases: list[str]) -> dict[tuple[str, str, int], Any]:
    found = {}
    for name in cases:
        for strategy, micro in WAYS:
            measured, state = trained(run_config(**CASES[name]), strategy, micro)
            found[name, strategy, micro] = measured, {key: value.numpy() for key, value in state.items()}
    # As sharded as it gets: gathered in half precision, anew for each pass, blocks recomputed.
    half = {"precision": "bf16", "activation_checkpointing": True}
    for name in HALF:
        found[name, "half", 1] = trained(run_config(half, **CASES[name]), "sharded", 1)[0], {}
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[tuple[str, str, int], Any]]:
    return run_workers(2, run_on_rank, list(CASES), timeout=600)


@pytest.fixture(scope="module")
def one() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    torch.set_num_threads(1)
    return {name: trained(run_config(**model), "single", 4) for name, model in CASES.items()}


@pytest.mark.parametrize(("strategy", "micro"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two: Any, one: Any, case: str, strategy: str, micro: int) -> None:
    measured, state = two[0][case, strategy, micro]
    wanted, wanted_state = one[case]
    torch.testing.assert_close(measured, wanted, rtol=1e-5, atol=1e-5)
    for name, value in wanted_state.items():
        torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(two[1][case, strategy, micro][0], measured), "ranks agree"


@pytest.mark.parametrize("case", HALF)
def test_half_precision_is_near(two: Any, one: Any, case: str) -> None:
    (found, _), wanted = two[0][case, "half", 1], one[case][0]
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert torch.equal(two[1][case, "half", 1][0], found), "ranks agree"


@pytest.mark.parametrize("case", CASES)
def test_accumulation_in_one_process_equals_one_pass(one: Any, case: str) -> None:
    measured, state = trained(run_config(**CASES[case]), "single", 1)
    torch.testing.assert_close(measured, one[case][0], rtol=1e-5, atol=1e-5)
    for name, value in one[case][1].items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_frozen_weights_stay_as_they_were_drawn(one: Any) -> None:
    config = run_config(**CASES["frozen"])
    drawn = make("single").prepare(config).state_dict()
    frozen = {name for name in drawn if ".stem." in name or "encoder.blocks." in name or "encoder.norm." in name}
    assert {name for name, value in one["frozen"][1].items() if torch.equal(value, drawn[name])} == frozen


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_device(case: str) -> None:
    config, strategy = run_config(**CASES[case]), make("single")
    passes = passes_of(config, strategy)
    for step, rows in enumerate(rows_of(config)):
        batches, mode = step_batches(config, step, rows, strategy, 2), FailOnSync()
        with mode:
            passes.run(batches, [None, None])
        assert mode.operations > 300
