"""Speculative decoding (arXiv:2211.17192): a smaller model proposes tokens, the model checks all of them in one pass.

With p and q the distributions of model and draft (after temperature and the rest), a proposed token x is accepted with
probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from max(0, p - q), normalised, and after
the last one a token is drawn from p. So every token is distributed as if the model had sampled it alone.

Legend: K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.generation.reading import Reader, open_reader, whole_text
from glowflow.core.generation.sampling import (
    Sampler,
    SamplingOptions,
    draw,
    next_token_probabilities,
    require_finite,
)

__all__ = ["Speculation", "speculate", "verify"]


@dataclass
class Speculation:
    """How well the draft guessed."""

    proposed: int = 0
    accepted: int = 0
    passes: int = 0

    def add(self, proposed: int, accepted: int) -> None:
        """Count one pass of the model."""
        self.proposed, self.accepted, self.passes = self.proposed + proposed, self.accepted + accepted, self.passes + 1

    @property
    def accepted_share(self) -> float | None:
        """Accepted over proposed tokens; None before the first proposal."""
        return self.accepted / self.proposed if self.proposed else None


def verify(
    target_kv: Tensor, draft_kv: Tensor | None, proposed: Sequence[int], accept_k: Tensor, replace: Tensor
) -> tuple[int, int]:
    """Which of the proposed tokens stay, and the token after them.

    Args:
        target_kv: (K + 1, V) the model's distributions before each proposed token and after the last.
        draft_kv: (K, V) those that the tokens were drawn from; None where there are none.
        proposed: K tokens.
        accept_k: (K,) numbers in [0, 1) that decide what stays.
        replace: () one more, for the token after.

    Returns:
        How many stay, and the next token.
    """
    count, rest_v = 0, target_kv[0]
    if draft_kv is not None:
        place = torch.tensor(proposed, device=target_kv.device).unsqueeze(-1)
        p_k, q_k = target_kv[:-1].gather(1, place).squeeze(-1), draft_kv.gather(1, place).squeeze(-1)
        count = int((accept_k * q_k < p_k).long().cumprod(0).sum())
        rest_v = target_kv[count]
        if count < len(proposed):
            rest_v = (rest_v - draft_kv[count]).clamp(min=0)
    return count, int(draw(rest_v[None], replace[None]))


def speculate(
    module: BaseArchitecture,
    draft: BaseArchitecture,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    context: int,
    options: SamplingOptions | None = None,
    *,
    draft_tokens: int = 4,
    number: int = 0,
    counts: Speculation | None = None,
    truncate_prompt: bool = False,
    cached: bool = True,
) -> Iterator[int]:
    """Sample ids after a prompt; with temperature 0 they are the model's greedy ones.

    Args:
        module, prompt_ids, max_new_tokens, context, options, truncate_prompt, cached: as for ``generate``; prompt and
            new tokens must fit the context together, which both models must be able to read.
        draft: a faster model with the same tokenizer.
        draft_tokens: how many tokens it proposes at a time.
        number: of the prompt among others; seeds its random numbers.
        counts: is filled with how many tokens were proposed and accepted.

    Raises:
        ConfigError: a prompt as in ``generate``, a text that does not fit, models of different vocabularies, or a cache
            that cannot be restored (at once, not at the first ``next``).
    """
    options, counts = options or SamplingOptions(), counts or Speculation()
    problems = []
    if draft_tokens < 1:
        problems.append(Problem("draft_tokens", "must be at least 1", draft_tokens))
    if draft.vocab_size != module.vocab_size:
        rule = f"must have the model's vocabulary of {module.vocab_size:,} tokens"
        problems.append(Problem("draft", rule, draft.vocab_size))
    if problems:
        raise ConfigError(problems)
    what = "speculative decoding"
    prompt = whole_text(module, prompt_ids, max_new_tokens, context, what, truncate=truncate_prompt)
    readers = [open_reader(each, 1, context, cached) for each in (module, draft)]
    reasons = [reason for reader in readers if (reason := reader.cannot("rewind"))]
    if reasons:
        hint = "give the cache the methods of DecodeCache (docs/custom-architecture.md), or decode without a draft"
        rule = "speculative decoding takes back what was read: "
        raise ConfigError([Problem("draft", rule + reason, hint=hint) for reason in reasons])
    sampler = Sampler(options, [number], [prompt], module.vocab_size, readers[0].device)
    return _speculate(readers[0], readers[1], prompt, max_new_tokens, sampler, draft_tokens, counts)


def _speculate(
    target: Reader,
    draft: Reader,
    text: list[int],
    max_new_tokens: int,
    sampler: Sampler,
    draft_tokens: int,
    counts: Speculation,
) -> Iterator[int]:
    known = {target: len(text) - 1, draft: len(text) - 1}  # how much of the text each has read
    if len(text) > 1:
        for reader in known:
            reader.read([text[:-1]])
    left = max_new_tokens
    while left > 0:
        # The model's own token comes after the proposed ones.
        count = min(draft_tokens, left - 1)
        proposed, draft_kv = _propose(draft, text[known[draft] :], count, sampler) if count else ([], None)
        target.mark()
        scores_tv = target.read([text[known[target] :] + proposed], every=True)[0, -len(proposed) - 1 :]
        target_kv = _distributions(scores_tv, sampler, proposed)
        uniforms = sampler.uniforms([0] * (len(proposed) + 1)).to(target.device)
        kept, token = verify(target_kv, draft_kv, proposed, uniforms[:-1], uniforms[-1])
        counts.add(len(proposed), kept)
        new = [*proposed[:kept], token]
        for each in new:
            if each == sampler.options.eos_id:
                return
            yield each
        left -= len(new)
        for reader, stays in ((target, kept), (draft, min(kept, count - 1))):
            if left > 0:
                reader.rewind(len(text) - known[reader] + stays)
                known[reader] = len(text) + stays
        text.extend(new)
        sampler.saw(0, new)


def _propose(draft: Reader, unread: list[int], count: int, sampler: Sampler) -> tuple[list[int], Tensor]:
    """Tokens that the draft samples, and the distributions (K, V) that it drew them from."""
    proposed: list[int] = []
    drawn_from = []
    draft.mark()
    for _ in range(count):
        probabilities_1v = _distributions(draft.read([unread]), sampler, proposed)
        drawn_from.append(probabilities_1v)
        unread = draw(probabilities_1v, sampler.uniforms([0]).to(draft.device)).tolist()
        proposed += unread
    return proposed, torch.cat(drawn_from)


def _distributions(scores_tv: Tensor, sampler: Sampler, proposed: Sequence[int]) -> Tensor:
    """(T, V) what follows the last T of: the text, the text and one proposed token, ..., and all of them."""
    require_finite(scores_tv.amax(-1))
    seen_1v = sampler.seen([0])
    if seen_1v is None:
        return next_token_probabilities(scores_tv, sampler.options)
    seen_tv = seen_1v.repeat(len(proposed) + 1, 1)
    for place, token in enumerate(proposed):
        seen_tv[place + 1 :, token] = True
    return next_token_probabilities(scores_tv, sampler.options, seen_tv[-len(scores_tv) :])
