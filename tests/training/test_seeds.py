"""Seeds are functions of where we are; threads are chosen for a reason."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from glowflow.training.seeds import choose_threads, derive_seed, seed_everything, seed_forward


def test_derived_seeds_are_the_same_everywhere() -> None:
    assert derive_seed("forward", 0, 0, 0, 0) == 4309782471369303433


@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 4), min_size=2, max_size=50, unique=True))
def test_derived_seeds_differ(parts: list[tuple[int, int, int, int]]) -> None:
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_forward_seed_repeats_and_depends_on_every_part() -> None:
    def draw(*where: int) -> list[float]:
        seed_forward(*where)
        return torch.rand(4).tolist()

    base = (1, 2, 3, 4)
    assert draw(*base) == draw(*base)
    for index in range(4):
        changed = [value + (position == index) for position, value in enumerate(base)]
        assert draw(*changed) != draw(*base)


def test_seed_everything() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    assert draw() != first
    seed_everything(5)
    assert draw() == first


def test_threads_the_config_wins_then_the_checkpoint_then_the_cores() -> None:
    assert choose_threads(3, 2, 1) == (3, "training.threads")
    assert choose_threads(None, 2, 1) == (2, "as in the checkpoint")
    all_cores, reason = choose_threads(None, None, 1)
    assert all_cores >= 1 and "cores" in reason
    assert choose_threads(None, None, 10**6)[0] == 1
    assert choose_threads(None, None, 2)[0] == max(1, all_cores // 2)
