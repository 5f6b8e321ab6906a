"""MFU: a denominator that is looked up or measured, never guessed."""

from __future__ import annotations

import pytest
import torch

from glowflow.training.flops import device_peak, measure_gemm_peak, mfu


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    peak = device_peak(name)
    assert peak is not None and not peak.measured
    assert peak.flops == tflops * 1e12
    assert name in peak.label and "data sheet" in peak.label


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "Tesla T4", "Quadro RTX 5000", "A1000", ""])
def test_unknown_devices_have_none(name: str) -> None:
    assert device_peak(name) is None


def test_a_cpu_has_none() -> None:
    assert device_peak(torch.device("cpu")) is None


def test_mfu_of_palm_540b() -> None:
    """PaLM, appendix B: 540B parameters, 118 layers, 48 heads of 256, T 2048, 238.3k token/s, 6144 TPU v4: 46.2 %."""
    peak = device_peak("NVIDIA A100")
    assert peak is not None
    tpu = type(peak)(275e12, "TPU v4")
    flops_per_token = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert mfu(238.3e3, flops_per_token, tpu, 6144) == pytest.approx(0.462, abs=0.003)


def test_measured_peak_is_labelled_and_plausible() -> None:
    peak = measure_gemm_peak(size=256, seconds=0.05)
    assert peak.measured and "measured" in peak.label
    assert 1e8 < peak.flops < 1e14
