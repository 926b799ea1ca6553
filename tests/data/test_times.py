"""A moment in a setting means the same on every machine and on every way that settings travel."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import InteractionLog, SequenceSplit
from components.config import load_preset
from components.data.ingest import IngestConfig, ingest
from components.data.splits import SplitConfig, hold_out
from components.data.times import microseconds, moment

OCTOBER = datetime(2011, 10, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "spelt",
    [
        "2011-10-01",
        "2011-10-01T00:00",
        "2011-10-01 00:00:00Z",
        "2011-10-01T02:00:00+02:00",
        datetime(2011, 10, 1),
        OCTOBER,
    ],
)
def test_a_moment_is_kept_in_utc_and_without_a_zone_it_is_utc(spelt: object) -> None:
    config = IngestConfig(until=spelt)
    assert config.until == OCTOBER and config.until.tzinfo is UTC


@pytest.mark.parametrize("number", [2011, 20111001, "2011", 1.3e9, "1317427200", "soon"])
def test_a_number_is_no_date(number: object) -> None:
    with pytest.raises(ValueError, match="until"):
        IngestConfig(until=number)


@pytest.mark.parametrize("line", ["until: 2011-10-01", "until: 2011-10-01T00:00:00Z", "until: '2011-10-01'"])
def test_yaml_overrides_and_json_carry_a_moment(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine.yaml").write_text(line)
    config = load_preset(IngestConfig, tmp_path / "mine.yaml")
    assert config.until == OCTOBER
    assert load_preset(IngestConfig, tmp_path / "mine.yaml", ["until=2011-10-02"]).until > OCTOBER
    assert IngestConfig.model_validate_json(config.model_dump_json()) == config
    assert (
        IngestConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    )


def test_manifests_say_the_moment_that_was_asked_for(tmp_path: Path) -> None:
    ingested = ingest(IngestConfig(until=OCTOBER))
    ingested.log.save(tmp_path / "log")
    split = hold_out(*ingested, SplitConfig(protocol="by_time", until="2011-09-20"))
    split.save(tmp_path / "split")
    log, held = InteractionLog.load(tmp_path / "log"), SequenceSplit.load(tmp_path / "split")
    assert IngestConfig.model_validate(log.provenance.config).until == OCTOBER
    assert SplitConfig.model_validate(held.provenance.config).until == datetime(2011, 9, 20, tzinfo=UTC)
    assert json.loads((tmp_path / "log" / "manifest.json").read_text())["provenance"]["config"]["until"]


@given(st.integers(-(10**15), 7 * 10**15))
def test_microseconds_are_exact(number: int) -> None:
    assert microseconds(moment(0) + timedelta(microseconds=number)) == number
