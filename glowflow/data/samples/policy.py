"""What a stream does about bad samples: names the first ones, counts all, and stops where they are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from glowflow.config.errors import DataError, Problem
from glowflow.data.samples.sample import PreparedSample

__all__ = ["BadSampleCount"]

logger = logging.getLogger(__name__)

_NAMED = 10  # so many are named in the log, and so many never stop a run
_named: dict[str, list[str]] = {}  # fingerprint of a plan -> names told, so that no stream of a run tells them again


class BadSampleCount:
    """Counts the bad samples of one stream.

    Args:
        plan: fingerprint of the plan.
        most: largest share of bad samples among those seen, beyond the first ten.
    """

    def __init__(self, plan: str, most: float) -> None:
        self._told = _named.setdefault(plan, [])
        self._most = most
        self._kinds: Counter[str] = Counter()
        self._seen = 0

    def add(self, samples: Sequence[PreparedSample]) -> list[tuple[str, str]]:
        """Count the samples of a step.

        Returns:
            (kind, name) of the bad ones.

        Raises:
            DataError: too many have been bad.
        """
        self._seen += sum(sample.sample_id >= 0 for sample in samples)
        bad = [(sample.bad.partition(":")[0], sample.name) for sample in samples if sample.bad]
        for sample in samples:
            if sample.bad and sample.name not in self._told and len(self._told) < _NAMED:
                self._told.append(sample.name)
                more = "; further ones are only counted" if len(self._told) == _NAMED else ""
                logger.warning("bad sample %s: %s; its place stays, with weight 0%s", sample.name, sample.bad, more)
        self._kinds.update(kind for kind, _ in bad)
        total = self._kinds.total()
        if bad and total > _NAMED and total > self._most * self._seen:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self._kinds.most_common())
            rule = f"{total} of {self._seen} samples so far cannot be used ({kinds}), first {', '.join(self._told[:3])}"
            hint = "mend the data, or raise data.max_bad_fraction"
            raise DataError(Problem("data.max_bad_fraction", rule, self._most, hint))
        return bad
