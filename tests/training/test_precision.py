"""Autocast contexts, warnings and the error text; the loss scaler is tested with the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glowflow.config.schema import TrainingConfig
from glowflow.training import precision as subject
from glowflow.training.precision import autocast, compute_dtype, name_steps, nonfinite_error, precision_warnings

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_autocast_computes_in_that_type(name: str) -> None:
    with autocast(name, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == compute_dtype(name)
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_without_hardware_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "cpu_has_native_bf16", lambda: False)
    (text,) = precision_warnings("bf16", CPU)
    assert "training.precision" in text and "fp32" in text
    monkeypatch.setattr(subject, "cpu_has_native_bf16", lambda: True)
    assert precision_warnings("bf16", CPU) == []


def test_fp32_never_warns_and_fp16_on_a_cpu_does() -> None:
    assert precision_warnings("fp32", CPU) == []
    assert "fp16" in precision_warnings("fp16", CPU)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t: fpu sse avx512f avx512_bf16", True),
        ("flags\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t: fpu sse avx2 avx512f", False),
        ("model name\t: bf16 the cpu", False),
    ],
)
def test_cpu_flags(monkeypatch: pytest.MonkeyPatch, text: str, expected: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(subject.Path, "read_text", lambda *_, **__: text)
    assert subject.cpu_has_native_bf16() is expected


def test_error_names_everything_a_person_needs() -> None:
    training: Any = TrainingConfig(precision="fp16", max_nonfinite_steps=2)
    text = str(nonfinite_error(training, 40, [38, 39, 40], 3, 1e-3))
    for part in ("step 40", "38, 39, 40", "0.001", "fp16", "training.lr", "training.max_nonfinite_steps", "fp32"):
        assert part in text


def test_many_steps_are_shortened() -> None:
    assert name_steps([3]) == "step 3"
    assert name_steps(list(range(20))) == "steps 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."
