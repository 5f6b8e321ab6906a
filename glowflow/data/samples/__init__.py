"""Samples with media: one row of a shard is one sequence."""
