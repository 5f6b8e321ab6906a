"""``glowflow attention check``: every kernel that is there against the written-out reference in float64.

In: a device. Out: one row per case, kernel and type, with the relative error ||x - reference|| / ||reference|| of the
output and of each gradient. Inputs are rounded to the type before the reference gets them, so that only the kernel's
own rounding counts. In half precision a kernel must also be at most twice as far off as the reference itself in that
type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.attention.backends.base import Backend
from glowflow.core.attention.check_cases import CASES, CheckCase, draw
from glowflow.core.attention.dispatch import SOFTMAX_BACKENDS
from glowflow.core.attention.linear.base import LinearBackend, LinearInputs
from glowflow.core.attention.linear.kernels import LINEAR_BACKENDS
from glowflow.core.attention.relative import RELATIVE_BACKENDS, RelativeBackend

__all__ = ["DEFAULT_DTYPES", "LIMITS", "CheckRow", "check_attention", "checked_backends"]

LIMITS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
"""Largest relative error of an output or gradient."""

DEFAULT_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16),
}
"""What is checked on a device when nothing is said."""

_CHANGES_THE_PROCESS = "flash_attn_3"  # other kernels are checked before it, with torch's operators as they were

Kernel = Backend | LinearBackend | RelativeBackend


@dataclass(frozen=True)
class CheckRow:
    """One case, computed by one kernel in one type.

    Args:
        status: ``ok``, ``failed``, or ``cannot``: the kernel refuses the case.
        errors: name of the output or gradient -> relative error; without gradients where the kernel has none.
        limits: the same names -> the largest error that is accepted.
        note: why it cannot, what was raised, or what was left out.
    """

    kind: str
    case: str
    backend: str
    dtype: str
    status: str
    errors: dict[str, float]
    limits: dict[str, float]
    note: str = ""


def checked_backends() -> list[str]:
    """Names of all kernels, each once."""
    return list(dict.fromkeys((*SOFTMAX_BACKENDS, *LINEAR_BACKENDS, *RELATIVE_BACKENDS)))


def check_attention(
    device: torch.device | str,
    *,
    backends: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
    cases: Sequence[CheckCase] = CASES,
) -> Iterator[CheckRow]:
    """Compare every kernel with the reference.

    Args:
        device: ``cpu`` or ``cuda``.
        backends: their names; none: all.
        dtypes: types of the inputs; none: those of ``DEFAULT_DTYPES``.

    Raises:
        ConfigError: the device is not there, or a backend is not known.
    """
    device = torch.device(device)
    _require(device, backends)
    dtypes = dtypes or DEFAULT_DTYPES[device.type]
    names = backends or checked_backends()
    first = [name for name in names if name != _CHANGES_THE_PROCESS]
    last = [name for name in names if name == _CHANGES_THE_PROCESS]
    for some in (first, last):
        for dtype in dtypes:
            for case in cases:
                yield from _check_case(case, some, dtype, device)


def _require(device: torch.device, backends: Sequence[str]) -> None:
    problems = []
    if device.type not in DEFAULT_DTYPES:
        problems.append(Problem("--device", "must be cpu or cuda", device.type))
    elif device.type == "cuda" and not torch.cuda.is_available():
        problems.append(Problem("--device", "torch finds no CUDA device here", "cuda", "use --device cpu"))
    known = checked_backends()
    rule = f"must be one of {', '.join(known)}"
    problems += [Problem("--backend", rule, name) for name in backends if name not in known]
    if problems:
        raise ConfigError(problems)


def _kernels(case: CheckCase) -> dict[str, Any]:
    """Name -> kernel, of the kind of the case."""
    registries: dict[str, Any] = {"linear": LINEAR_BACKENDS, "relative": RELATIVE_BACKENDS}
    return dict(registries.get(case.kind, SOFTMAX_BACKENDS))


def _check_case(case: CheckCase, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> Iterator[CheckRow]:
    """The rows of one case in one type; the reference is computed if some kernel serves."""
    kernels = {name: kernel for name, kernel in _kernels(case).items() if name in names}
    able: dict[str, bool] = {}  # name -> with gradients
    for name, kernel in kernels.items():
        reasons = kernel.reasons(case.spec, case.conditions(device, dtype, training=True))
        if not reasons or not kernel.reasons(case.spec, case.conditions(device, dtype, training=False)):
            able[name] = not reasons
        else:
            yield _row(case, name, dtype, "cannot", note="; ".join(reasons))
    if not able:
        return
    reference = _kernels(case)["reference"]
    drawn = draw(case, dtype, device)
    wanted = _compute(reference, case, _leaves(drawn, torch.float64))
    limits = _limits(case, reference, drawn, wanted, dtype)
    for name, gradients in able.items():
        yield _compare(case, name, kernels[name], drawn, wanted, limits, gradients)


def _limits(
    case: CheckCase, reference: Kernel, drawn: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Per output and gradient: the limit of the type, and in half precision twice the reference's own error.

    The recurrences are left out of the latter: their reference keeps its state in float32, which no tensor core does.
    """
    limits = dict.fromkeys(wanted, LIMITS[dtype])
    if dtype.itemsize > 2 or case.spec.kind == "linear":
        return limits
    own = _errors(_compute(reference, case, _leaves(drawn, dtype)), wanted)
    return {name: min(limit, 2 * own[name]) for name, limit in limits.items()}


def _leaves(drawn: dict[str, Tensor], dtype: torch.dtype, gradients: bool = True) -> dict[str, Tensor]:
    return {name: x.detach().to(dtype).requires_grad_(gradients) for name, x in drawn.items()}


def _compare(
    case: CheckCase,
    name: str,
    kernel: Kernel,
    drawn: dict[str, Tensor],
    wanted: dict[str, Tensor],
    limits: dict[str, float],
    gradients: bool,
) -> CheckRow:
    dtype = drawn["q"].dtype
    try:
        errors = _errors(_compute(kernel, case, _leaves(drawn, dtype, gradients)), wanted)
    except Exception as error:  # whatever a kernel or its compiler dies of is what the check is for
        return _row(case, name, dtype, "failed", note=f"{type(error).__name__}: {str(error).strip()[:300]}")
    ok = all(error <= limits[key] for key, error in errors.items())  # false for NaN
    note = "" if gradients else "outputs alone: it cannot train here"
    used = {key: limits[key] for key in errors}
    return _row(case, name, dtype, "ok" if ok else "failed", errors, used, note)


def _row(
    case: CheckCase,
    name: str,
    dtype: torch.dtype,
    status: str,
    errors: dict[str, float] | None = None,
    limits: dict[str, float] | None = None,
    note: str = "",
) -> CheckRow:
    short = str(dtype).removeprefix("torch.")
    return CheckRow(case.kind, case.name, name, short, status, errors or {}, limits or {}, note)


def _compute(kernel: Any, case: CheckCase, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and, where the inputs take them, the gradients along one fixed direction."""
    visibility = case.visibility(leaves["q"].device)
    if case.spec.kind == "linear":
        inputs = LinearInputs(**leaves)
        inputs.documents, inputs.key_valid = visibility.documents, visibility.key_valid
        out, _ = kernel.run(inputs, case.spec)
    elif case.relative:
        out = kernel.run(leaves["q"], leaves["position"], leaves["k"], leaves["v"], case.spec, visibility)
    else:
        out = kernel.run(leaves["q"], leaves["k"], leaves["v"], case.spec, visibility)
    results = {"out": out.detach()}
    if leaves["q"].requires_grad:
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(out.shape, generator=generator).bfloat16().to(out)  # exact in every type
        gradients = torch.autograd.grad(out, list(leaves.values()), direction)
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def _errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """||x - reference|| / ||reference|| of each."""
    return {name: float((x.double() - wanted[name]).norm() / wanted[name].norm()) for name, x in got.items()}
