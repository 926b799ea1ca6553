"""The backfill on planted data: one run over three windows, of which the first has too little data."""

from collections import OrderedDict
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from click.testing import CliRunner
from flytekit import FlyteContextManager
from flytekit.clis.sdk_in_container import pyflyte
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.tools.translator import get_serializable

from components.metrics.windows import Window
from tasks.backfill import survey_windows
from tasks.lineage import lineage_of
from tasks.runs import open_store
from workflows.as_of import as_of
from workflows.backfill import backfill, run_windows
from workflows.two_stage import two_stage

FIRST = datetime(2020, 9, 15, tzinfo=UTC)
DAYS = [FIRST + k * timedelta(days=30) for k in range(3)]
RUN, LAST = DAYS[1:]


@pytest.fixture(scope="module")
def settings(planted_settings):
    """Leave-one-out, as the presets have it, and one treatment of seen items."""
    return planted_settings(evaluate={"resamples": 100, "seen": ["kept"]})


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return []


@pytest.fixture(scope="module")
def done(settings, printed):
    """Three windows, run once; the dates name no time zone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rich.console.Console.print", lambda _, *parts, **__: printed.extend(map(_text, parts)))
        return backfill(
            config=settings, first=FIRST.replace(tzinfo=None), last=LAST.replace(tzinfo=None), every_days=30
        )


def _text(part) -> str:
    return (
        part
        if isinstance(part, str)
        else "\n".join(cell for column in getattr(part, "columns", []) for cell in map(str, column.cells))
    )


def runs():
    client = open_store()
    experiment = client.get_experiment_by_name("planted").experiment_id
    return client.search_runs([experiment], max_results=1000, order_by=["attributes.start_time ASC"])


def parent():
    (run,) = (run for run in runs() if run.data.tags.get("sidflow.workflow") == "backfill")
    return run


def children():
    above = parent().info.run_id
    return [run for run in runs() if run.data.tags.get("mlflow.parentRunId") == above]


def test_a_window_without_enough_data_is_skipped_with_its_reason_and_the_others_run(done) -> None:
    note = parent().data.tags["mlflow.note.content"]
    assert "2020-09-15 skipped: hold_out: no user has an event in the valid window" in note
    assert note.count("skipped:") == 1 and len(done) == len(DAYS) - 1


def test_a_window_is_the_pipeline_as_of_its_day(done, settings) -> None:
    by_time = settings.model_copy(update={"split": settings.split.model_copy(update={"protocol": "by_time"})})
    before = len(runs())
    alone = two_stage(config=as_of(config=by_time, until=RUN))
    assert alone.fingerprint == done[0].fingerprint
    assert [run.info.run_name for run in runs()[before:]][1:] == ["ingest"], "all else came from the cache"


def test_each_window_is_a_pipeline_of_its_own_below_one_run(done) -> None:
    run = parent()
    assert run.info.status == "FINISHED"
    assert (run.data.params["first"], run.data.params["every_days"]) == ("2020-09-15T00:00:00Z", "30")
    above, (survey, *windows) = run.info.run_id, children()
    assert survey.info.run_name == "survey_windows"
    for run, day in zip(windows, DAYS[1:], strict=True):
        assert run.info.run_name == f"two_stage as of {day:%Y-%m-%d}"
        assert run.data.tags["sidflow.backfill"] == above
        for setting in ("ingest.until", "split.until"):
            assert run.data.params[setting] == f"{day:%Y-%m-%dT%H:%M:%SZ}"


def test_table_figure_page_and_curves_are_kept_by_the_run_and_printed(done, printed) -> None:
    client, run_id = open_store(), parent().info.run_id
    kept = {
        file.path for folder in ("", "figures", "pages") for file in client.list_artifacts(run_id, folder)
    }
    assert {"windows.md", "windows.csv", "figures/comparison.png", "pages/windows.html"} <= kept
    curve = client.get_metric_history(run_id, "two-stage/kept/R_at_10")
    values = [comparison.metrics for comparison in done]
    wanted = [m.row(by_predicate=_is("two-stage", "R@10"), named=True)["value"] for m in values]
    assert [(point.step, point.value) for point in curve] == list(zip([1, 2], wanted, strict=True))
    note = parent().data.tags["mlflow.note.content"]
    assert note.count("| two-stage |") == 2 and "2020-09-15 skipped: hold_out" in note
    text = "\n".join(printed)
    assert "2020-11-14" in text and "2020-09-15 skipped: hold_out" in text and f"MLflow run {run_id}" in text


def _is(method: str, metric: str) -> pl.Expr:
    return (
        (pl.col("method") == method)
        & (pl.col("metric") == metric)
        & (pl.col("slice") == "all")
        & (pl.col("seen") == "kept")
    )


def test_the_lineage_of_a_backfill_names_the_stages_of_all_windows(done) -> None:
    names = [step.name for step in lineage_of(parent().info.run_id).steps.values()]
    assert names.count("fit_recommender") == 2


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"first": LAST, "last": FIRST}, "first must not be after last"),
        ({"every_days": 0}, "every_days must be >= 1, got 0"),
    ],
)
def test_windows_that_make_no_sense_are_refused_before_a_run_is_opened(done, settings, changes, rule) -> None:
    before = len(runs())
    with pytest.raises(ValueError, match=rule):
        backfill(**{"config": settings, "first": FIRST, "last": LAST} | changes)
    assert len(runs()) == before


def test_settings_that_end_on_a_day_of_their_own_are_refused(settings) -> None:
    ended = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"until": LAST})})
    with pytest.raises(ValueError, match="are what a backfill sets, window by window"):
        backfill(config=ended, first=FIRST, last=LAST)


def test_a_backfill_without_any_data_says_so_and_fails(settings) -> None:
    with pytest.raises(Exception, match="none of 1 windows has enough data; the last: hold_out: no user"):
        backfill(config=settings, first=FIRST, last=FIRST)


def test_on_a_cluster_windows_run_side_by_side_without_a_time_limit(settings) -> None:
    image = Image(name="default", fqn="example/other", tag="0")
    serialization = SerializationSettings(
        project="p", domain="d", version="v", image_config=ImageConfig(image, [image])
    )
    windows = [Window(until=FIRST, skipped="too little"), Window(until=RUN), Window(until=LAST)]
    context = FlyteContextManager.current_context().with_serialization_settings(serialization)
    with FlyteContextManager.with_context(context) as inside:
        spec = run_windows.compile_into_workflow(
            inside, run_windows.task_function, config=settings, windows=windows
        )
    assert [node.workflow_node.sub_workflow_ref.name for node in spec.nodes] == [two_stage.name] * 2
    assert not any(node.upstream_node_ids for node in spec.nodes)
    limits = [
        get_serializable(OrderedDict(), serialization, one).template.metadata.timeout
        for one in (run_windows, survey_windows)
    ]
    assert limits[0] == timedelta(0) < limits[1]


def test_dates_are_given_on_the_command_line_as_days(settings, tmp_path) -> None:
    config = tmp_path / "config.json"
    config.write_text(settings.model_dump_json())
    command = ["run", "workflows/as_of.py", "as_of", "--config", str(config)]
    given = CliRunner().invoke(pyflyte.main, [*command, "--until", "2020-11-14"])
    assert given.exit_code == 0 and "until=datetime.datetime(2020, 11, 14, 0, 0, tzinfo" in given.output
    left_out = CliRunner().invoke(pyflyte.main, command)
    assert left_out.exit_code == 0 and "until=None" in left_out.output


def test_a_day_is_refused_where_the_settings_name_another(settings) -> None:
    dated = as_of(config=settings, until=RUN)
    assert dated.ingest.until == RUN and dated.split.until is None, "leave_one_out has no window to end"
    assert as_of(config=dated, until=RUN) == as_of(config=dated) == dated
    with pytest.raises(ValueError, match=r"ingest.until is 2020-10-15 .*, and this run is as of 2020-11-14"):
        as_of(config=dated, until=LAST)
