"""Experiments: the journal of a sweep, who proposes its points, and what its trials add up to."""
