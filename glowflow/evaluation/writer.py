"""Text in, text out: a model with its tokenizer, and perhaps a draft, goes on from prompts, also with media."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.generation import (
    ConditionedModule,
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
from glowflow.evaluation.prompts import Media, MediaPrompts, require_writing

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
        prompt: what it goes on from, as it was given.
        sample: which of several texts after the same prompt, from 0; of a beam search the best comes first.
        text: what was written.
        finish: why it ends: ``length``, ``eos`` or ``stop``.
        prompt_tokens: tokens of the prompt, the one that starts a document and all places of media among them.
        ids: the new tokens; those of a stop string are among them.
        scores: what the model said about each token, where that was asked for.
        log_prob, score: of a beam search, see ``Hypothesis``.
        number: which of the prompts it follows, from 0.
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
    number: int = 0


@dataclass(frozen=True)
class _Prompt:
    """A prompt as it is read, and how many tokens may follow it."""

    number: int
    text: str
    ids: list[int]
    room: int


@dataclass(frozen=True)
class _Asked:
    """Prompts, and what reads them: of media, a module that knows them."""

    prompts: list[_Prompt]
    context: int
    module: Callable[[Sequence[int]], BaseArchitecture]
    """Takes, for each text, which of the prompts it follows."""

    @property
    def max_tokens(self) -> int:
        """The most that any of them may get."""
        return max(prompt.room for prompt in self.prompts)


class Writer:
    """Goes on from prompts.

    With media, prompt and text fit the context together: a text ends where it is full.

    Args:
        target: the model.
        draft: a smaller model with the same tokenizer; with one, texts are decoded speculatively, one after another.
        draft_tokens: how many tokens it proposes at a time.
        device: where to compute.

    ``speculation`` counts what the draft proposed and what was accepted.

    Raises:
        ConfigError: model and draft have different tokenizers, or one of them does not write.
    """

    def __init__(
        self,
        target: Target,
        draft: Target | None = None,
        *,
        draft_tokens: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        require_writing(target.config)
        self.tokenizer = tokenizer_from_spec(target.tokenizer_spec)
        self.module, self.context = target.module.to(device), target.config.data.context
        self.draft, self.draft_tokens = None, draft_tokens
        if draft is not None:
            require_writing(draft.config)
            require_same_tokenizer(target.model, draft.model)
            self.draft = draft.module.to(device)
            self.context = min(self.context, draft.config.data.context)
        self.speculation = Speculation()
        self._media = MediaPrompts(target.config, self.tokenizer)

    def stream(self, prompt: str, options: WritingOptions, media: Media | None = None) -> Iterator[str]:
        """The text after a prompt, piece by piece as it is written."""
        asked = self._ask([prompt], [media], options)
        (one,) = asked.prompts
        text = self._text(one.ids, options)
        for token in self._tokens(asked, one, options, number=0):
            yield text.push(token)
            if text.stopped:
                return
        yield text.finish()

    def write(
        self,
        prompts: Sequence[str],
        options: WritingOptions,
        *,
        media: Sequence[Media | None] | None = None,
        samples: int = 1,
        batch_size: int = 16,
        log_probs: int | None = None,
    ) -> list[Written]:
        """Texts after all prompts, in their order.

        Args:
            media: the files of each prompt.
            samples: how many after each prompt.
            batch_size: how many texts are written at once.
            log_probs: tell the log-probability of each token, and so many of the likeliest tokens.

        Raises:
            ConfigError, DataError: a prompt is too long, or its media do not go with it or with the model, or a file
                cannot be read (all problems of all prompts).
        """
        if not prompts:
            return []
        asked = self._ask(prompts, media, options)
        starts = [(prompt, sample) for prompt in asked.prompts for sample in range(samples)]
        followed = [prompt.number for prompt, _ in starts]
        if self.draft is not None:
            return [self._one(asked, *start, number, options) for number, start in enumerate(starts)]
        texts, lengths = [self._text(prompt.ids, options) for prompt, _ in starts], [0] * len(starts)

        def ends(number: int, token: int) -> bool:
            texts[number].push(token)
            lengths[number] += 1
            return texts[number].stopped or lengths[number] == starts[number][0].room

        completions = generate_batch(
            asked.module(followed),
            [prompt.ids for prompt, _ in starts],
            asked.max_tokens,
            asked.context,
            self._sampling(options),
            batch_size=batch_size,
            ends=ends,
            log_probs=log_probs,
            truncate_prompt=options.truncate_prompt,
            cached=options.cached,
        )
        return [
            _written(*start, text, done.ids, "eos" if done.finish == "eos" else "length", tuple(done.scores))
            for start, text, done in zip(starts, texts, completions, strict=True)
        ]

    def search(
        self,
        prompts: Sequence[str],
        options: WritingOptions,
        beams: int,
        *,
        media: Sequence[Media | None] | None = None,
        length_penalty: float = 1.0,
        best: int = 1,
    ) -> list[Written]:
        """The likeliest texts after each prompt by beam search, ``best`` of each; ``media`` as for ``write``."""
        found = []
        asked = self._ask(prompts, media, options)
        for prompt in asked.prompts:
            hypotheses = beam_search(
                asked.module([prompt.number]),
                prompt.ids,
                prompt.room,
                asked.context,
                beams,
                length_penalty=length_penalty,
                num_results=best,
                eos_id=self.tokenizer.eos_id,
                ends=self._ends(prompt.ids, options),
                truncate_prompt=options.truncate_prompt,
                cached=options.cached,
            )
            for sample, one in enumerate(hypotheses):
                text = self._text(prompt.ids, options)
                for token in one.ids:
                    text.push(token)
                written = _written(prompt, sample, text, one.ids, one.finish, ())
                found.append(replace(written, log_prob=one.log_prob, score=one.score))
        return found

    def decode(self, token: int) -> str:
        """The text of one token by itself."""
        return self.tokenizer.decode([token])

    def _ask(self, prompts: Sequence[str], media: Sequence[Media | None] | None, options: WritingOptions) -> _Asked:
        """The prompts as ids, with the places of their media."""
        if not self._media.concern(prompts, media):
            plain = [
                _Prompt(i, text, [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()], options.max_tokens)
                for i, text in enumerate(prompts)
            ]
            return _Asked(plain, self.context, lambda followed: self.module)
        self._require_media_alone(options)
        prepared = self._media.prepare(prompts, media or [None] * len(prompts))
        # As in training, where the last token of a sample is a target only.
        room = [min(options.max_tokens, self.context + 1 - len(one.ids)) for one in prepared]
        asked = [_Prompt(i, text, prepared[i].ids, room[i]) for i, text in enumerate(prompts)]

        def module(followed: Sequence[int]) -> BaseArchitecture:
            return ConditionedModule(
                self.module, lambda numbers: self._media.batch([prepared[followed[number]] for number in numbers])
            )

        # Each text ends by itself within the model's context; what has ended may be read on for the sake of others.
        return _Asked(asked, max(len(one.ids) for one in prepared) + max(room), module)

    def _require_media_alone(self, options: WritingOptions) -> None:
        """Refuse what media cannot go with."""
        problems = []
        if self.draft is not None:
            rule = "cannot be used with media: what it proposes would have to be read with them by both models"
            problems.append(Problem("draft", rule))
        if options.truncate_prompt:
            rule = "cannot be used with media: their places at the beginning would be lost"
            problems.append(Problem("truncate_prompt", rule))
        if problems:
            raise ConfigError(problems)

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

    def _tokens(self, asked: _Asked, prompt: _Prompt, options: WritingOptions, number: int) -> Iterator[int]:
        """New tokens of one text, with the draft where there is one."""
        sampling, reading = self._sampling(options), {"truncate_prompt": options.truncate_prompt}
        if self.draft is None:
            module = asked.module([0])
            return generate(module, prompt.ids, prompt.room, asked.context, sampling, cached=options.cached, **reading)
        return speculate(
            self.module,
            self.draft,
            prompt.ids,
            prompt.room,
            self.context,
            sampling,
            draft_tokens=self.draft_tokens,
            number=number,
            counts=self.speculation,
            cached=options.cached,
            **reading,
        )

    def _one(self, asked: _Asked, prompt: _Prompt, sample: int, number: int, options: WritingOptions) -> Written:
        """One text, decoded speculatively."""
        text, new = self._text(prompt.ids, options), []
        for token in self._tokens(asked, prompt, options, number):
            new.append(token)
            text.push(token)
            if text.stopped:
                break
        return _written(prompt, sample, text, new, "length" if len(new) == options.max_tokens else "eos", ())


def _written(
    prompt: _Prompt, sample: int, text: TextStream, ids: Sequence[int], finish: str, scores: tuple[TokenScore, ...]
) -> Written:
    text.finish()
    finish = "stop" if text.stopped else finish
    return Written(prompt.text, sample, text.text, finish, len(prompt.ids), tuple(ids), scores, number=prompt.number)


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
