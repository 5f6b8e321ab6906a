"""Spaces of an experiment: dimensions, draws, Python spaces, and the check against a config; see config/space.py."""
