"""Model FLOPs utilisation: achieved arithmetic over a peak that is named, never guessed.

The numerator is the architecture's ``flops_per_token`` (PaLM, arXiv:2204.02311, appendix B: 6N + 12LHQT, without the
causal halving). The denominator is the dense bf16 figure of the vendor's data sheet, looked up by device name; an
unknown device has no MFU. A CPU has no such figure: ``measure_gemm_peak`` times matrix products and says so.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

__all__ = ["Peak", "device_peak", "measure_gemm_peak", "mfu"]


@dataclass(frozen=True)
class Peak:
    """The denominator of a utilisation.

    Args:
        flops: floating-point operations per second of one device.
        label: what it is, for logs and tables.
        measured: timed here instead of read from a data sheet.
    """

    flops: float
    label: str
    measured: bool = False


# Dense bf16 tensor-core TFLOP/s without sparsity. The first pattern that matches the device name wins.
_PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"\bH100 NVL\b", 835, "NVIDIA H100 data sheet, NVL"),
    (r"\bH100 PCIe\b", 756, "NVIDIA H100 data sheet, PCIe"),
    (r"\bH100\b", 989, "NVIDIA H100 data sheet, SXM"),
    (r"\bH200 NVL\b", 835, "NVIDIA H200 data sheet, NVL"),
    (r"\bH200\b", 989, "NVIDIA H200 data sheet, SXM"),
    (r"\bGH200\b", 989, "NVIDIA GH200 data sheet"),
    (r"\bH20\b", 148, "NVIDIA H20 data sheet"),
    (r"\bGB200\b", 2500, "NVIDIA GB200 data sheet"),
    (r"\bB200\b", 2250, "NVIDIA B200 data sheet, HGX"),
    (r"\bA100\b", 312, "NVIDIA A100 data sheet"),
    (r"\bA800\b", 312, "NVIDIA A800 data sheet"),
    (r"\bA10G\b", 70, "NVIDIA A10G data sheet"),
    (r"\bA10\b", 125, "NVIDIA A10 data sheet"),
    (r"\bA40\b", 149.7, "NVIDIA A40 data sheet"),
    (r"\bRTX A6000\b", 154.8, "NVIDIA RTX A6000 data sheet"),
    (r"\bL40S\b", 362, "NVIDIA L40S data sheet"),
    (r"\bL40\b", 181, "NVIDIA L40 data sheet"),
    (r"\bL4\b", 121, "NVIDIA L4 data sheet"),
    (r"\bRTX 4090\b", 165.2, "NVIDIA Ada white paper"),
    (r"\bRTX 3090\b", 71, "NVIDIA Ampere GA102 white paper"),
    (r"\bMI300X\b", 1307, "AMD Instinct MI300X data sheet"),
    (r"\bMI250X\b", 383, "AMD Instinct MI250X data sheet"),
)


def device_peak(device: torch.device | str) -> Peak | None:
    """The data-sheet peak of a device (or device name); None when it is not known.

    MFU is quoted against dense bf16 whatever the training precision, so that numbers can be compared.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    for pattern, tflops, source in _PEAKS:
        if re.search(pattern, device, flags=re.IGNORECASE):
            return Peak(tflops * 1e12, f"{device}: {tflops:g} TFLOP/s dense bf16 ({source})")
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak: Peak, num_devices: int = 1) -> float:
    """Share of the peak: ``tokens/s * flops/token / (peak * devices)``."""
    return tokens_per_second * flops_per_token / (peak.flops * num_devices)


def measure_gemm_peak(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024, seconds: float = 1.0
) -> Peak:
    """Time square matrix products and take the fastest: an achievable peak of this device at this thread count.

    Args:
        size: rows and columns of the matrices.
        seconds: how long to measure, warm-up excluded.
    """
    device = torch.device(device)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)

    def timed() -> float:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    best, deadline = timed(), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        best = min(best, timed())
    flops = 2.0 * size**3 / best
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    short = str(dtype).removeprefix("torch.")
    return Peak(flops, f"{name}: {flops / 1e9:.1f} GFLOP/s measured ({size}x{size} {short} GEMM)", measured=True)
