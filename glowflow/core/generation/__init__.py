"""Text from a model: sampling, beam search, speculative decoding with a smaller model, and prompts with media."""

from glowflow.core.generation.beam import Hypothesis, beam_search
from glowflow.core.generation.conditioned import ConditionedModule
from glowflow.core.generation.decoding import Completion, TokenScore, generate, generate_batch
from glowflow.core.generation.sampling import SamplingOptions, next_token_probabilities
from glowflow.core.generation.speculative import Speculation, speculate
from glowflow.core.generation.text import TextStream

__all__ = [
    "Completion",
    "ConditionedModule",
    "Hypothesis",
    "SamplingOptions",
    "Speculation",
    "TextStream",
    "TokenScore",
    "beam_search",
    "generate",
    "generate_batch",
    "next_token_probabilities",
    "speculate",
]
