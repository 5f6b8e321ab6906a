"""A custom model tried on two sequences of eight tokens: what the loop, evaluation and generation will ask of it.

A small module goes in; ``Findings`` come out. Training twice over (with the carry of the first pass), evaluation,
cached decoding. On the CPU values are compared too; on the meta device only types, shapes and the autograd graph.

Legend: B sequences, T positions, D width, N positions of all sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from glowflow.core.architectures.base import BaseArchitecture, Carry
from glowflow.core.architectures.findings import Findings
from glowflow.core.batch import Batch, ModelOutput

__all__ = ["LENGTH", "ROWS", "Trial"]

ROWS, LENGTH = 2, 8
_PROMPT = 5
_TOLERANCE = 1e-3
_SHOWN = 3


class Trial:
    """One small model and what is tried with it.

    Args:
        module: with parameters, on the CPU or the meta device.
        units: its valid shard units.
        findings: where problems go.
    """

    def __init__(self, module: BaseArchitecture, units: Sequence[nn.Module], findings: Findings) -> None:
        self.module, self.units, self.findings = module, units, findings
        self.device = next(module.parameters()).device
        self.real = self.device.type != "meta"
        self.runs = True  # forward gives hidden states
        self.sums = False  # and a loss as it should be

    def run(self) -> None:
        """Train, evaluate, decode; what depends on something broken is left out."""
        self._train()
        if not self.runs:
            return
        self.module.eval()
        with torch.no_grad():
            self._stir()
            self._evaluate()
        if type(self.module).decode is BaseArchitecture.decode:
            without = "has no cached decoding (new_cache, decode): it generates with --no-cache only"
            self.findings.warn(f"{self.findings.owner} {without}")
        elif not (self.findings.of("decode") or self.findings.of("new_cache") or self.findings.of("logits")):
            with torch.inference_mode():
                self._decode()

    # -- training ----------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Two sequences per lane, one after the other; then the gradients of both."""
        self.module.train()
        called: set[nn.Module] = set()
        hooks = [unit.register_forward_pre_hook(lambda module, _: called.add(module)) for unit in self.units]
        batch, carry, total = self._batch(documents=True), None, torch.zeros((), device=self.device)
        try:
            for _ in range(2):
                passed = self._forward(batch, carry)
                if passed is None or not self._loss_is_sound(passed[0], batch):
                    return
                output, carry = passed
                assert output.loss_sum is not None
                total = total + output.loss_sum + (0.0 if output.aux_sum is None else output.aux_sum)
                if carry is None or not self._carry_is_sound(carry):
                    break
                batch = replace(batch, reset=torch.zeros_like(batch.reset))
        finally:
            for hook in hooks:
                hook.remove()
        self.sums = True
        self._check_called(called)
        self._check_gradients(total)

    def _forward(self, batch: Batch, carry: Carry, **options: bool) -> tuple[ModelOutput, Carry] | None:
        """One pass; None when what it gives back is unusable."""
        torch.manual_seed(0)
        given = self.findings.attempt("forward", lambda: self.module(batch, carry, **options))
        result = None if given is None else given[0]
        if given is not None and self._is_sound(result):
            return result
        self.runs = False
        return None

    def _is_sound(self, result: object) -> bool:
        """Whether a pass gave back an output with (B, T, D) hidden states, and a carry."""
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], ModelOutput)):
            shown = [type(part).__name__ for part in result] if isinstance(result, tuple) else type(result).__name__
            self.findings.add("forward", "must return (ModelOutput, carry)", shown)
            return False
        hidden = result[0].hidden
        if not (isinstance(hidden, Tensor) and hidden.is_floating_point()):
            self.findings.add("forward", "must give hidden states as a tensor of floats", type(hidden).__name__)
        elif hidden.ndim != 3 or hidden.shape[:2] != (ROWS, LENGTH):
            rule = f"must give hidden states of shape (B, T, D), here ({ROWS}, {LENGTH}, D)"
            self.findings.add("forward", rule, tuple(hidden.shape))
        else:
            return True
        return False

    def _loss_is_sound(self, output: ModelOutput, batch: Batch) -> bool:
        """Two sums as () tensors, finite, with a gradient."""
        add = partial(self.findings.add, "forward")
        if output.loss_sum is None or output.weight_sum is None:
            add("gives no loss: ModelOutput needs loss_sum and weight_sum", hint="as head.loss computes them")
            return False
        for name in ("loss_sum", "weight_sum"):
            value = getattr(output, name)
            if not (isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                add(f"must give {name} as one float, a tensor of shape ()", shape)
                return False
        if not output.loss_sum.requires_grad:
            add("gives a loss without a gradient", hint="is it detached, or computed under no_grad?")
            return False
        if not self.real:
            return True
        if not torch.isfinite(output.loss_sum):
            add("gives a loss that is not finite before the first step", output.loss_sum.item())
            return False
        if not torch.isclose(output.weight_sum, batch.loss_weights.sum()):
            add("must give the sum of batch.loss_weights as weight_sum", output.weight_sum.item())
        return True

    def _carry_is_sound(self, carry: object) -> bool:
        """A mapping from names to detached tensors with lanes in front."""
        add = partial(self.findings.add, "forward")
        if not (isinstance(carry, dict) and all(isinstance(name, str) for name in carry)):
            add("must give the carry as a dict from names to tensors, or None", type(carry).__name__)
            return False
        for name, value in carry.items():
            if not isinstance(value, Tensor):
                add(f"must give carry[{name!r}] as a tensor", type(value).__name__)
            elif value.shape[:1] != (ROWS,):
                rule = f"must give carry[{name!r}] with lanes in the first dimension, here {ROWS}"
                add(rule, tuple(value.shape), "it is split, joined and saved by lane")
            elif value.requires_grad:
                add(f"must detach carry[{name!r}]", hint="gradients do not cross steps")
        return not self.findings.of("forward")

    def _check_called(self, called: set[nn.Module]) -> None:
        missed = [name for name, module in self.module.named_modules() if module in {*self.units} - called]
        if missed:
            hint = "call the block itself, block(x): FSDP gathers its weights at that call"
            self.findings.add("shard_units", f"names blocks that forward never calls: {_some(missed)}", hint=hint)

    def _check_gradients(self, total: Tensor) -> None:
        if self.findings.attempt("forward", total.backward, "the backward pass") is None:
            return
        unused = [name for name, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            hint = "use them, leave them out, or freeze them with requires_grad_(False)"
            self.findings.add("parameters", f"must all get a gradient; none gets to {_some(unused)}", hint=hint)
        self.module.zero_grad(set_to_none=True)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _stir(self) -> None:
        """Give all parameters a size at which everything shows: first values may be zero, and hide a mistake."""
        generator = torch.Generator().manual_seed(1)
        for parameter in self.module.parameters() if self.real else ():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))

    def _evaluate(self) -> None:
        batch = self._batch()
        passed = self._forward(batch, None)
        without = self._forward(batch, None, compute_loss=False)
        if passed is None or without is None:
            return
        if self.real and self.sums:
            self._check_sums(passed[0], batch)
        if self.real:
            self._check_causality(passed[0], batch)
        if type(self.module).logits is BaseArchitecture.logits and getattr(self.module, "head", None) is None:
            self.findings.warn(f"{self.findings.owner} has neither a head nor logits(): it cannot be evaluated")
        else:
            self._logits(without[0].hidden)

    def _check_sums(self, output: ModelOutput, batch: Batch) -> None:
        """The loss is linear in the weights: a mean is not, and what weighs nothing must add nothing."""
        assert output.loss_sum is not None
        for factor in (2.0, 0.0):
            passed = self._forward(replace(batch, loss_weights=factor * batch.loss_weights), None)
            if passed is None or passed[0].loss_sum is None:
                return
            wanted = factor * output.loss_sum
            if not torch.allclose(passed[0].loss_sum, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                rule = "must give the loss as a sum weighted by batch.loss_weights, which a mean is not: "
                rule += f"{factor:g} times the weights must give {factor:g} times the loss"
                self.findings.add("forward", rule, f"{(passed[0].loss_sum / output.loss_sum).item():.3g} times")
                return

    def _check_causality(self, output: ModelOutput, batch: Batch) -> None:
        """Another last token must leave the states before it alone: else the target is read, not predicted."""
        tokens = batch.tokens.clone()
        tokens[:, -1] = (tokens[:, -1] + 1) % self.module.vocab_size
        passed = self._forward(replace(batch, tokens=tokens), None)
        if passed is None or not _differ(passed[0].hidden, output.hidden)[:-1].any():
            return
        self.findings.warn(
            f"{self.findings.owner} sees the future: hidden states change with a later token. As a language model it "
            "reads its targets, and its loss means nothing"
        )

    def _logits(self, hidden_btd: Tensor) -> Tensor | None:
        """(B, T, V) scores, asked for flattened as evaluation does; None when they are wrong."""
        hidden_nd = hidden_btd.flatten(0, 1)
        given = self.findings.attempt("logits", lambda: self.module.logits(hidden_nd))
        if given is None:
            return None
        (logits_nv,) = given
        wanted = (ROWS * LENGTH, self.module.vocab_size)
        if not isinstance(logits_nv, Tensor) or logits_nv.shape != wanted:
            shape = tuple(logits_nv.shape) if isinstance(logits_nv, Tensor) else type(logits_nv).__name__
            self.findings.add("logits", f"must turn (N, D) into (N, V), here {wanted}", shape)
            return None
        return logits_nv.unflatten(0, (ROWS, LENGTH))

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """All tokens at once for the last score; a prompt and then token by token for all of them."""
        batch = self._batch()
        if self._step(batch.tokens, self._cache(), last_only=True) is None:
            return
        parts, cache, start = [], self._cache(), 0
        for stop in (_PROMPT, *range(_PROMPT + 1, LENGTH + 1)):
            part = self._step(batch.tokens[:, start:stop], cache)
            if part is None:
                return
            parts.append(part)
            start = stop
        passed = self._forward(batch, None, compute_loss=False)
        wanted = None if passed is None else self._logits(passed[0].hidden)
        if wanted is not None and self.real:
            self._check_same(torch.cat(parts, dim=1), wanted)

    def _cache(self) -> object:
        dtype = next(self.module.parameters()).dtype
        made = self.findings.attempt("new_cache", lambda: self.module.new_cache(ROWS, LENGTH, self.device, dtype))
        return None if made is None else made[0]

    def _step(self, tokens_bt: Tensor, cache: object, *, last_only: bool = False) -> Tensor | None:
        """Scores of one call; None when something is wrong."""
        if self.findings.of("new_cache"):
            return None
        given = self.findings.attempt("decode", lambda: self.module.decode(tokens_bt, cache, last_only=last_only))
        if given is None:
            return None
        (scores,) = given
        wanted = (ROWS, 1 if last_only else tokens_bt.shape[1], self.module.vocab_size)
        if isinstance(scores, Tensor) and scores.shape == wanted:
            return scores
        asked = f"{tokens_bt.shape[1]} tokens{' and last_only' if last_only else ''}"
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        self.findings.add("decode", f"must give scores of shape {wanted} for {asked}", shape)
        return None

    def _check_same(self, decoded_btv: Tensor, wanted_btv: Tensor) -> None:
        wrong = _differ(decoded_btv, wanted_btv).nonzero().flatten().tolist()
        if wrong:
            rule = f"must score as forward does: {_PROMPT} tokens at once and then one by one, positions {wrong} differ"
            self.findings.add("decode", rule)

    def _batch(self, *, documents: bool = False) -> Batch:
        """Random tokens; with ``documents`` the second row holds two, and one target does not count."""
        text = torch.randint(self.module.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        ids, positions = torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.arange(LENGTH).repeat(ROWS, 1)
        weights = torch.ones(ROWS, LENGTH)
        if documents:
            ids[1, _PROMPT:], positions[1, _PROMPT:] = 1, torch.arange(LENGTH - _PROMPT)
            weights[1, _PROMPT - 1] = 0.0
        return Batch(
            tokens=text[:, :-1].contiguous(),
            targets=text[:, 1:].contiguous(),
            loss_weights=weights,
            positions=positions,
            document_ids=ids,
            sample_ids=torch.arange(ROWS),
            reset=torch.ones(ROWS, dtype=torch.bool),
            single_document=not documents,
        ).to(self.device)


def _differ(found_btx: Tensor, wanted_btx: Tensor) -> Tensor:
    """(T,) bool: positions that differ by more than rounding."""
    error_t = (found_btx - wanted_btx).abs().amax(dim=(0, 2))
    return error_t > _TOLERANCE * wanted_btx.abs().max()


def _some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
