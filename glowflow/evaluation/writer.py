"""Text in, text out: a model with its tokenizer, and perhaps a draft, goes on from prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.generation import (
    SamplingOptions,
    Speculation,
    TextStream,
    TokenScore,
    beam_search,
    generate,
    generate_batch,
    speculate,
)
from glowflow.core.model import require_same_tokenizer
from glowflow.data.processors.text import tokenizer_from_spec
from glowflow.evaluation.load import Target

__all__ = ["Writer", "WritingOptions", "Written", "device_named"]


@dataclass(frozen=True)
class WritingOptions:
    """How a text goes on, and when it ends.

    Args:
        max_tokens: how many tokens at most.
        sampling: how the next token is chosen; the tokenizer says which token ends a document.
        stops: strings that end the text, which does not hold them.
        truncate_prompt: read only the end of a prompt that is longer than the context.
        cached: False passes over the whole text for every token.
    """

    max_tokens: int = 200
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stops: tuple[str, ...] = ()
    truncate_prompt: bool = False
    cached: bool = True


@dataclass(frozen=True)
class Written:
    """One text.

    Args:
        prompt: what it goes on from.
        sample: which of several texts after the same prompt, from 0; of a beam search the best comes first.
        text: what was written.
        finish: why it ends: ``length``, ``eos`` or ``stop``.
        prompt_tokens: tokens of the prompt, the one that starts a document among them.
        ids: the new tokens; those of a stop string are among them.
        scores: what the model said about each token, where that was asked for.
        log_prob, score: of a beam search, see ``Hypothesis``.
    """

    prompt: str
    sample: int
    text: str
    finish: str
    prompt_tokens: int
    ids: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()
    log_prob: float | None = None
    score: float | None = None


class Writer:
    """Goes on from prompts.

    Args:
        target: the model.
        draft: a smaller model with the same tokenizer; with one, texts are decoded speculatively, one after another.
        draft_tokens: how many tokens it proposes at a time.
        device: where to compute.

    ``speculation`` counts what the draft proposed and what was accepted.

    Raises:
        ConfigError: model and draft have different tokenizers.
    """

    def __init__(
        self,
        target: Target,
        draft: Target | None = None,
        *,
        draft_tokens: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer = tokenizer_from_spec(target.tokenizer_spec)
        self.module, self.context = target.module.to(device), target.config.data.context
        self.draft, self.draft_tokens = None, draft_tokens
        if draft is not None:
            require_same_tokenizer(target.model, draft.model)
            self.draft = draft.module.to(device)
            self.context = min(self.context, draft.config.data.context)
        self.speculation = Speculation()

    def stream(self, prompt: str, options: WritingOptions) -> Iterator[str]:
        """The text after a prompt, piece by piece as it is written."""
        ids = self._encode(prompt)
        text = self._text(ids, options)
        for token in self._tokens(ids, options, number=0):
            yield text.push(token)
            if text.stopped:
                return
        yield text.finish()

    def write(
        self,
        prompts: Sequence[str],
        options: WritingOptions,
        *,
        samples: int = 1,
        batch_size: int = 16,
        log_probs: int | None = None,
    ) -> list[Written]:
        """Texts after all prompts, in their order.

        Args:
            samples: how many after each prompt.
            batch_size: how many texts are written at once.
            log_probs: tell the log-probability of each token, and so many of the likeliest tokens.
        """
        starts = [(prompt, sample, self._encode(prompt)) for prompt in prompts for sample in range(samples)]
        texts = [self._text(ids, options) for _, _, ids in starts]
        if self.draft is not None:
            return [self._one(start, number, options) for number, start in enumerate(starts)]

        def ends(number: int, token: int) -> bool:
            texts[number].push(token)
            return texts[number].stopped

        completions = generate_batch(
            self.module,
            [ids for _, _, ids in starts],
            options.max_tokens,
            self.context,
            self._sampling(options),
            batch_size=batch_size,
            ends=ends,
            log_probs=log_probs,
            truncate_prompt=options.truncate_prompt,
            cached=options.cached,
        )
        return [
            _written(start, text, done.ids, str(done.finish), tuple(done.scores))
            for start, text, done in zip(starts, texts, completions, strict=True)
        ]

    def search(
        self, prompts: Sequence[str], options: WritingOptions, beams: int, *, length_penalty: float = 1.0, best: int = 1
    ) -> list[Written]:
        """The likeliest texts after each prompt by beam search, ``best`` of each."""
        found = []
        for prompt in prompts:
            ids = self._encode(prompt)
            hypotheses = beam_search(
                self.module,
                ids,
                options.max_tokens,
                self.context,
                beams,
                length_penalty=length_penalty,
                num_results=best,
                eos_id=self.tokenizer.eos_id,
                ends=self._ends(ids, options),
                truncate_prompt=options.truncate_prompt,
                cached=options.cached,
            )
            for sample, one in enumerate(hypotheses):
                text = self._text(ids, options)
                for token in one.ids:
                    text.push(token)
                written = _written((prompt, sample, ids), text, one.ids, one.finish, ())
                found.append(replace(written, log_prob=one.log_prob, score=one.score))
        return found

    def decode(self, token: int) -> str:
        """The text of one token by itself."""
        return self.tokenizer.decode([token])

    def _encode(self, prompt: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]

    def _text(self, ids: Sequence[int], options: WritingOptions) -> TextStream:
        return TextStream(self.tokenizer.decode, ids[1:], options.stops)

    def _sampling(self, options: WritingOptions) -> SamplingOptions:
        return replace(options.sampling, eos_id=self.tokenizer.eos_id)

    def _ends(self, ids: Sequence[int], options: WritingOptions) -> Callable[[Sequence[int]], bool] | None:
        """Whether new tokens hold a stop string."""
        if not options.stops:
            return None

        def ends(new: Sequence[int]) -> bool:
            text = self._text(ids, options)
            for token in new:
                text.push(token)
            return text.stopped

        return ends

    def _tokens(self, ids: list[int], options: WritingOptions, number: int) -> Iterator[int]:
        """New tokens of one text, with the draft where there is one."""
        sampling, prompt = self._sampling(options), {"truncate_prompt": options.truncate_prompt}
        if self.draft is None:
            return generate(
                self.module, ids, options.max_tokens, self.context, sampling, cached=options.cached, **prompt
            )
        return speculate(
            self.module,
            self.draft,
            ids,
            options.max_tokens,
            self.context,
            sampling,
            draft_tokens=self.draft_tokens,
            number=number,
            counts=self.speculation,
            cached=options.cached,
            **prompt,
        )

    def _one(self, start: tuple[str, int, list[int]], number: int, options: WritingOptions) -> Written:
        """One text, decoded speculatively."""
        text, new = self._text(start[2], options), []
        for token in self._tokens(start[2], options, number):
            new.append(token)
            text.push(token)
            if text.stopped:
                break
        finish = "stop" if text.stopped else "length" if len(new) == options.max_tokens else "eos"
        return _written(start, text, new, finish, ())


def _written(
    start: tuple[str, int, list[int]], text: TextStream, ids: Sequence[int], finish: str, scores: tuple[TokenScore, ...]
) -> Written:
    text.finish()
    prompt, sample, prompt_ids = start
    finish = "stop" if text.stopped else finish
    return Written(prompt, sample, text.text, finish, len(prompt_ids), tuple(ids), scores)


def device_named(name: str | None, target: Target) -> torch.device:
    """The device of this name; by default a GPU where there is one and the model's config does not say ``cpu``.

    Raises:
        ConfigError: no such device here.
    """
    gpu = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if gpu and target.config.resources.accelerator != "cpu" else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(Problem("device", "must be cpu, cuda or cuda:N", name)) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(Problem("device", "must be cpu, cuda or cuda:N", name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(Problem("device", f"this machine has {torch.cuda.device_count()} CUDA devices", name))
    return device
