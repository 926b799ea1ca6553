"""The backfill on planted data: one run over four windows, of which the first has too little data."""

from datetime import UTC, datetime, timedelta

import pytest

from workflows.backfill import backfill

FIRST = datetime(2020, 9, 15, tzinfo=UTC)
LAST = FIRST + timedelta(days=3 * 30)


@pytest.fixture(scope="module")
def done(planted_settings):
    """Four windows of 30 days, run once."""
    return backfill(config=planted_settings(split={"test_days": 20, "protocol": "by_time"}), first=FIRST, last=LAST, every_days=30)


def test_x(done):
    print(done.windows)
