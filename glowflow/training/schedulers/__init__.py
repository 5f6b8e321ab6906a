"""Learning-rate schedules, all pure functions of the step."""

from glowflow.training.schedulers.schedules import SCHEDULES, build_schedule

__all__ = ["SCHEDULES", "build_schedule"]
