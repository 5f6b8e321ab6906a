"""Sweeps: many training runs of one config, searched and scheduled by Ray Tune, recorded in a journal of our own."""
