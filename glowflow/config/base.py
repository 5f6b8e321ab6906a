"""The strict base of every schema: unknown keys are refused, assignments are checked."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

__all__ = ["StrictModel"]


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown keys, infinities, and `true` where a number or text belongs."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads `depth: true` as 1; in a config file that is a mistake.
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            if not _admits_bool(cls.model_fields[info.field_name].annotation):
                raise ValueError("must not be true or false")
        return value


def _admits_bool(annotation: Any) -> bool:
    """Whether a type, or a member of a union, is bool or Any."""
    if annotation in (bool, Any, object):
        return True
    return any(_admits_bool(argument) for argument in typing.get_args(annotation))
