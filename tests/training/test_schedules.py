"""Learning-rate schedules against values worked out by hand, and what holds for all of them."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.schema import TrainingConfig
from glowflow.training.schedulers import SCHEDULES, build_schedule


def schedule(name: str, **keys: Any) -> Any:
    values = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, "max_steps": 104, "schedule": name, **keys}
    return build_schedule(TrainingConfig(**values))


def test_every_name_of_the_config_is_there() -> None:
    field = TrainingConfig.model_fields["schedule"].annotation
    assert set(SCHEDULES) == set(field.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_warm_up_is_nanogpts(name: str) -> None:
    lr = schedule(name)
    assert [lr(step) for step in range(4)] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])
    assert lr(4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 100, 1.0),
        ("linear", 54, 0.55),
        ("linear", 104, 0.1),
        ("cosine", 29, 0.1 + 0.45 * (1 + math.cos(math.pi / 4))),
        ("cosine", 54, 0.55),
        ("cosine", 104, 0.1),
        ("inverse_sqrt", 16, 0.5),
        ("inverse_sqrt", 64, 0.25),
        ("wsd", 80, 1.0),
        ("wsd", 83, 1.0),  # 104 - round(0.2 * 104) = 83
        ("wsd", 83 + 21 * 4 // 9, 0.1 + 0.9 * (1 - math.sqrt((21 * 4 // 9) / 21))),
        ("wsd", 104, 0.1),
    ],
)
def test_values(name: str, step: int, expected: float) -> None:
    assert schedule(name)(step) == pytest.approx(expected)


def test_default_final_rate_is_a_tenth_and_inverse_sqrt_has_no_floor() -> None:
    assert schedule("cosine", min_lr=None, lr=3e-4)(104) == pytest.approx(3e-5)
    assert schedule("inverse_sqrt", min_lr=None, warmup_steps=1, max_steps=10**6)(10**6) == pytest.approx(1e-3)
    assert schedule("inverse_sqrt", warmup_steps=1, max_steps=10**6)(10**6) == pytest.approx(0.1)


def test_warm_up_longer_than_the_run_never_reaches_the_peak() -> None:
    lr = schedule("cosine", warmup_steps=200, max_steps=100)
    assert max(lr(step) for step in range(100)) < 0.5


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    warmup=st.integers(0, 50),
    max_steps=st.integers(1, 300),
    fraction=st.floats(0.01, 1.0),
    step=st.integers(0, 400),
)
def test_stays_in_range_and_depends_on_the_step_alone(
    name: str, warmup: int, max_steps: int, fraction: float, step: int
) -> None:
    lr = schedule(name, warmup_steps=warmup, max_steps=max_steps, decay_fraction=fraction)
    value = lr(step)
    assert 0 < value <= 1.0 + 1e-12
    if step >= warmup:
        assert value >= 0.1 - 1e-12
        assert lr(step + 1) <= value + 1e-12
    assert pickle.loads(pickle.dumps(lr))(step) == value
