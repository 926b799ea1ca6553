"""Moments: how settings spell them, and the whole microseconds that they are compared in."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _no_number(value: object) -> object:
    # Pydantic takes numbers for seconds since 1970, and YAML reads 2011 and 20111001 as numbers.
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value
    raise ValueError(f"wants a date such as 2011-10-01 or 2011-10-01T08:30:00Z, got the number {value}")


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


Moment = Annotated[datetime, BeforeValidator(_no_number), AfterValidator(_utc)]
"""A moment as a setting, kept in UTC: a date is its midnight, and what names no time zone is read as UTC."""


def microseconds(moment: datetime) -> int:
    """Count the microseconds from 1970 to a moment with a time zone, exactly, as a float would not."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment(seconds: float) -> datetime:
    """Return the moment so many seconds after 1970 UTC."""
    return _EPOCH + timedelta(seconds=seconds)
