"""Callbacks of the training loop, one file each."""

from glowflow.training.callbacks.base import Callback, LogRecord
from glowflow.training.callbacks.best import BestTracker, monitored_metric
from glowflow.training.callbacks.export import Exporter
from glowflow.training.callbacks.goodput import Goodput
from glowflow.training.callbacks.hooks import CheckpointHook
from glowflow.training.callbacks.points import PointSink
from glowflow.training.callbacks.progress import ProgressLog
from glowflow.training.callbacks.samples import SampleLog, read_samples
from glowflow.training.callbacks.throughput import Throughput

__all__ = [
    "BestTracker",
    "Callback",
    "CheckpointHook",
    "Exporter",
    "Goodput",
    "LogRecord",
    "PointSink",
    "ProgressLog",
    "SampleLog",
    "Throughput",
    "monitored_metric",
    "read_samples",
]
