"""Compute precision: autocast contexts, fp16 loss scaling on the device, and warnings about slow hardware.

Weights, optimiser state and gradients stay fp32. The loss scaler is three device tensors that are updated without
asking the host anything; a step that overflows is skipped by the optimiser itself (``optimizer.found_inf``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glowflow.config.errors import Problem, RunError
from glowflow.config.schema import TrainingConfig

__all__ = [
    "LossScaler",
    "autocast",
    "compute_dtype",
    "cpu_has_native_bf16",
    "name_steps",
    "nonfinite_error",
    "precision_warnings",
]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is how arm64 names it


def compute_dtype(precision: str) -> torch.dtype:
    """Type of the matrix multiplications."""
    return _DTYPES[precision]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass: nothing for fp32, torch.autocast otherwise."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype(precision))


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX or arm64 bf16)."""
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    if "AMX" in capability:
        return True
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = {
        flag for line in text.splitlines() if line.lower().startswith(("flags", "features")) for flag in line.split()
    }
    return bool(flags & _NATIVE_BF16_FLAGS)


def precision_warnings(precision: str, device: torch.device) -> list[str]:
    """What a user should know before training with this precision on this device."""
    if device.type == "cpu" and precision == "bf16" and not cpu_has_native_bf16():
        missing = "no avx512_bf16, AMX or arm64 bf16"
        rule = f"bf16 is emulated on this CPU ({missing}): its matrix products are many times slower than in fp32"
        return [f"training.precision: {rule}. Use training.precision=fp32 here"]
    if device.type == "cpu" and precision == "fp16":
        return ["training.precision: fp16 is meant for GPUs; on a CPU it is slow. Use fp32, or bf16 where it is native"]
    if device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return [f"training.precision: {name} has no bf16 units and emulates it. Use training.precision=fp16 there"]
    return []


class LossScaler:
    """Dynamic loss scale for fp16, wholly on the device (Micikevicius et al., arXiv:1710.03740).

    Starts at 65536, doubles after 2000 good steps in a row and halves after an overflow, but not below 1: at 1 an
    infinite gradient is no longer the scale's fault.
    """

    initial_scale = 65536.0
    growth_interval = 2000

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), self.initial_scale if enabled else 1.0, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.float32, device=device)

    def apply(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.scale if self.enabled else loss

    @torch.no_grad()
    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide plain (local) gradients by the scale, in place."""
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    @torch.no_grad()
    def update(self, skipped: Tensor) -> Tensor:
        """Adapt the scale after a step.

        Args:
            skipped: () float32, 1 where the step was not applied.

        Returns:
            () float32, 1 where the step was skipped although the scale is already 1 (always ``skipped`` when disabled).
        """
        if not self.enabled:
            return skipped
        to_blame = skipped * (self.scale <= 1.0)
        good = (self.good_steps + 1.0) * (1.0 - skipped)
        grow = (good >= self.growth_interval).float()
        self.scale.mul_(1.0 + grow - 0.5 * skipped).clamp_(min=1.0)
        self.good_steps.copy_(good * (1.0 - grow))
        return to_blame

    def state_dict(self) -> dict[str, float]:
        """Plain numbers; reads the device."""
        return {"scale": float(self.scale), "good_steps": float(self.good_steps)} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(state["good_steps"])


def name_steps(steps: list[int]) -> str:
    """``step 7``, ``steps 7, 8``; the first ten of many."""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps[:10]))}{', ...' if len(steps) > 10 else ''}"


def nonfinite_error(training: TrainingConfig, step: int, bad: list[int], total: int, lr: float) -> RunError:
    """Why a run is stopped whose losses or gradients are not finite, and what to try.

    Args:
        step: steps done. bad: steps since the last log step that were skipped. total: all skipped steps.
        lr: learning rate of the last step.
    """
    hint = "try a lower training.lr, a longer training.warmup_steps or a smaller training.grad_clip"
    if training.precision != "fp32":
        hint += f", or training.precision=fp32 instead of {training.precision}"
    rule = (
        f"the run was stopped at step {step}: {total} steps had a loss or a gradient that is not finite and were "
        f"skipped (lately {name_steps(bad)}), at learning rate {lr:.3g} in {training.precision}; the weights are as "
        "they were before"
    )
    return RunError(Problem("training.max_nonfinite_steps", rule, training.max_nonfinite_steps, hint))
