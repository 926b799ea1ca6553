"""The file of schedules: what is shipped fits, and what does not fit is refused by name."""

from itertools import combinations
from pathlib import Path

import pytest
import yaml

from workflows.schedules import Domain, Schedules, load_schedules

SHIPPED = Path(__file__).parents[1] / "workflows" / "schedules.yaml"
DOMAINS = list(Schedules.model_fields)
SCHEDULED = ("nightly", "weekly")
PLANS = Domain.model_fields.keys() - {"notify"}


@pytest.fixture
def altered(tmp_path, monkeypatch):
    """Name a copy of the shipped file, changed in one place, as the file to read."""

    def change(keys: str, value: object) -> Path:
        values = yaml.safe_load(SHIPPED.read_text())
        *sections, last = keys.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        monkeypatch.setenv("SIDFLOW_SCHEDULES", str(path))
        return path

    return change


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    monkeypatch.delenv("SIDFLOW_SCHEDULES", raising=False)


def test_no_domain_writes_into_the_experiment_or_moves_the_champion_of_another() -> None:
    shipped = load_schedules()
    for one, other in combinations([getattr(shipped, domain) for domain in DOMAINS], 2):
        names, models = [], []
        for domain in (one, other):
            names.append({getattr(domain, plan).config.name for plan in PLANS})
            models.append({getattr(domain, plan).config.promote.model for plan in SCHEDULED})
        assert names[0].isdisjoint(names[1]) and models[0].isdisjoint(models[1])


def test_both_schedules_of_a_domain_work_on_one_model() -> None:
    for domain in DOMAINS:
        section = getattr(load_schedules(), domain)
        assert section.nightly.config == section.weekly.config


def test_nobody_is_written_to_and_nothing_runs_by_itself_before_the_file_is_filled_in() -> None:
    for domain in DOMAINS:
        section = getattr(load_schedules(), domain)
        assert not (section.notify.email or section.notify.slack or section.notify.pagerduty)
        assert not (section.nightly.active or section.weekly.active)


def test_another_file_is_read_where_one_is_named(altered) -> None:
    altered("production.nightly.cron", "30 4 * * *")
    assert load_schedules().production.nightly.cron == "30 4 * * *"
    assert load_schedules().staging.nightly.cron == "0 2 * * *"


def test_a_file_that_is_not_there_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("SIDFLOW_SCHEDULES", "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="SIDFLOW_SCHEDULES=nowhere.yaml: no such file"):
        load_schedules()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("production.nightly.cron", "every night", r"mine.yaml.*\n *production.nightly.cron: .*every night"),
        ("production.notify.email", ["nobody"], r"production.notify.email.0: String should match"),
        (
            "staging.weekly.max_parallelism",
            0,
            r"staging.weekly.max_parallelism: .*greater than or equal to 1",
        ),
        ("staging.backfill.last", "2011-01-01", r"staging.backfill: .*first must not be after last"),
        ("development.backfill.every_days", 0, r"development.backfill: .*every_days must be >= 1, got 0"),
        ("production.hourly", {"cron": "0 * * * *"}, r"production.hourly: Extra inputs are not permitted"),
        ("canary", {}, r"canary: Extra inputs are not permitted"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(altered, keys, value, message) -> None:
    altered(keys, value)
    with pytest.raises(ValueError, match=message):
        load_schedules()
