"""Comparisons pair users, take baselines once, and say only what the interval bears out."""

from dataclasses import replace
from io import StringIO

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from components.artifacts import EvaluationReport
from components.folders import ArtifactError
from components.metrics.compare import (
    CompareConfig,
    compare,
    headline,
    html_table,
    markdown_table,
    short,
    signed,
    table,
    verdict,
    verdicts,
)
from components.metrics.ranking import contributions
from components.metrics.report import METRICS, RANKS

USERS = 120
CONFIG = CompareConfig(resamples=200)


def _report(methods: dict[str, np.ndarray], split: str = "split", users: int = USERS) -> EvaluationReport:
    """Make a report from one array of ranks a method, 0 a miss; the users stand in any order."""
    ranks, metrics = [], []
    for name, places in methods.items():
        for seen in ("kept", "excluded"):
            order = np.random.default_rng(len(ranks)).permutation(users)
            ranks.append(
                pl.DataFrame(
                    {"user_id": order, "rank": places[order]},
                    schema={"user_id": pl.UInt32, "rank": pl.UInt32},
                ).select(
                    pl.lit(name).alias("method"),
                    pl.lit(seen).alias("seen"),
                    "user_id",
                    pl.lit(1, pl.UInt32).alias("target"),
                    pl.col("rank").replace(0, None),
                )
            )
            for metric in ("R@5", "R@10", "N@5", "N@10"):
                value = contributions(places, [metric]).mean()
                metrics.append((name, seen, "all", metric, value, value - 0.01, value + 0.01))
    return EvaluationReport(
        ranks=pl.concat(ranks).cast(dict(RANKS)),
        metrics=pl.DataFrame(metrics, schema=METRICS, orient="row"),
        split=split,
        details={},
    )


RNG = np.random.default_rng(0)
POPULARITY, ITEMKNN, PLAIN = (RNG.integers(0, 30, USERS) for _ in range(3))
BETTER = np.maximum(PLAIN - 2, PLAIN > 0)
BASE = {"popularity": POPULARITY, "itemknn": ITEMKNN}


@pytest.fixture
def two() -> list[EvaluationReport]:
    return [_report(BASE | {"two-stage": PLAIN}), _report(BASE | {"joint": BETTER})]


def test_baselines_stand_once_and_first(two: list[EvaluationReport]) -> None:
    result = compare(two, CONFIG)
    methods = result.metrics["method"].unique(maintain_order=True).to_list()
    assert methods == ["popularity", "itemknn", "two-stage", "joint"]
    assert not result.metrics.select("method", "seen", "slice", "metric").is_duplicated().any()


def test_each_pair_is_compared_once_in_the_order_of_reports(two: list[EvaluationReport]) -> None:
    pairs = compare(two, CONFIG).differences.select("method", "baseline").unique(maintain_order=True).rows()
    assert set(pairs) == {
        ("two-stage", "popularity"),
        ("two-stage", "itemknn"),
        ("joint", "popularity"),
        ("joint", "itemknn"),
        ("joint", "two-stage"),
    }


def test_differences_are_taken_user_by_user(two: list[EvaluationReport]) -> None:
    """Rows come in any order; a method that is better for every user shows an interval above 0."""
    result = compare(two, CONFIG)
    rows = result.differences.filter(pl.col("method") == "joint", pl.col("baseline") == "two-stage")
    for row in rows.iter_rows(named=True):
        expected = (
            contributions(BETTER, [row["metric"]]).mean() - contributions(PLAIN, [row["metric"]]).mean()
        )
        assert row["difference"] == pytest.approx(expected)
        assert row["low"] <= row["difference"] <= row["high"]
    assert (rows.filter(pl.col("metric").str.starts_with("N"))["low"] > 0).all()


def test_a_method_against_its_copy_shows_no_difference() -> None:
    result = compare([_report(BASE | {"a": PLAIN}), _report(BASE | {"b": PLAIN})], CONFIG)
    rows = result.differences.filter(pl.col("baseline") == "a")
    assert len(rows) == 8
    assert rows.select("difference", "low", "high").to_numpy().tolist() == [[0, 0, 0]] * 8


def test_equal_inputs_give_equal_comparisons(two: list[EvaluationReport]) -> None:
    assert compare(two, CONFIG).fingerprint == compare(two, CONFIG).fingerprint


def test_what_does_not_compare_is_refused(two: list[EvaluationReport]) -> None:
    with pytest.raises(ArtifactError, match="at least one report"):
        compare([], CONFIG)
    with pytest.raises(ArtifactError, match="different splits"):
        compare([two[0], _report(BASE | {"joint": BETTER}, split="other")], CONFIG)
    with pytest.raises(ArtifactError, match="different results of 'itemknn'"):
        compare([two[0], _report(BASE | {"itemknn": PLAIN, "joint": BETTER})], CONFIG)
    with pytest.raises(ArtifactError, match="different results of 'two-stage'"):
        compare([two[0], _report(BASE | {"two-stage": BETTER})], CONFIG)
    with pytest.raises(ArtifactError, match="ranked for other users"):
        compare([two[0], _report({"joint": BETTER}, users=USERS - 1)], CONFIG)


def test_the_verdict_needs_an_interval_without_0() -> None:
    above = verdict("joint", "two-stage", "kept", "R@10", 0.0123, 0.004, 0.02)
    assert "joint is above two-stage by .0123" in above and "+.0040 to +.0200" in above
    assert "is below itemknn by .0100" in verdict("joint", "itemknn", "kept", "R@10", -0.01, -0.02, -0.001)
    assert "cannot be told apart" in verdict("joint", "itemknn", "excluded", "R@10", 0.01, -0.001, 0.02)
    assert "cannot be told apart" in verdict("joint", "itemknn", "excluded", "R@10", 0.0, 0.0, 0.0)


def test_there_is_one_sentence_a_difference(two: list[EvaluationReport]) -> None:
    result = compare(two, CONFIG)
    assert len(verdicts(result, ["R@10"])) == 5 * 2
    assert len(set(verdicts(result, ["R@10", "N@10"]))) == 20


def test_the_table_fits_100_columns_and_shows_every_value(two: list[EvaluationReport]) -> None:
    result = compare(two, CONFIG)
    page = StringIO()
    Console(file=page, width=100).print(table(result))
    lines = page.getvalue().splitlines()
    assert max(map(len, lines)) <= 100 and not any("…" in line for line in lines)
    for method in ("popularity", "itemknn", "two-stage", "joint"):
        assert sum(line.split()[:1] == [method] for line in lines) == 2
    for value in result.metrics["value"]:
        assert short(value) in page.getvalue()


@pytest.mark.parametrize("width", [100, 80])
def test_nothing_is_cut_off_where_the_table_has_little_room(width: int) -> None:
    """Intervals of full width, in the terminal that people get without asking: 80 columns."""
    sure = {method: np.ones(USERS, int) for method in ("popularity", "itemknn", "two-stage", "joint")}
    page = StringIO()
    Console(file=page, width=width).print(table(compare([_report(sure)], CONFIG)))
    lines = page.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    for method in sure:
        assert [line.split()[1] for line in lines if line.split()[:1] == [method]] == ["kept", "excluded"]


def test_the_best_of_each_block_is_marked_in_html_and_names_are_escaped() -> None:
    page = html_table(compare([_report(BASE | {"<b>": PLAIN})], CONFIG))
    assert page.count("color:#00684a") >= 8
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_markdown_and_headline_show_the_values_of_all_users(two: list[EvaluationReport]) -> None:
    comparison = compare(two, CONFIG)
    values = headline(comparison)
    lines = markdown_table(comparison).splitlines()
    assert len(lines) == 2 + len({tuple(name.split("/")[:2]) for name in values})
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    for name, value in values.items():
        method, seen, metric = name.split("/")
        row = next(line for line in lines if line.startswith(f"| {method} | {seen} |"))
        column = [cell.strip() for cell in lines[0].split("|")].index(metric)
        assert row.split("|")[column].strip().startswith(short(value) + " (")


def test_a_metric_that_no_report_holds_is_named(two: list[EvaluationReport]) -> None:
    with pytest.raises(ValueError, match=r"no \['R@7'\]"):
        table(compare(two, CONFIG), ["R@7"])


def _cold(report: EvaluationReport) -> EvaluationReport:
    """Add the slice of cold targets, a tenth of each value; the methods' order turns around."""
    cold = report.metrics.with_columns(slice=pl.lit("cold"), value=(1 - pl.col("value")) / 10)
    return replace(report, metrics=pl.concat([report.metrics, cold]))


def test_recall_on_cold_targets_is_a_column_where_the_reports_have_it(two: list[EvaluationReport]) -> None:
    plain, result = compare(two, CONFIG), compare([_cold(report) for report in two], CONFIG)
    titles = [column.header for column in table(result).columns]
    assert titles == ["method", "seen", "R@5", "R@10", "N@5", "N@10", "R@10 cold"]
    assert markdown_table(result).splitlines()[0].endswith("| N@10 | R@10 cold |")
    for page in (html_table(result), table(result).caption):
        assert "R@10 cold: only users whose target training never met" in page
    values = result.metrics.filter(slice="cold", metric="R@10")
    best = values.filter(pl.col("value") == pl.col("value").max().over("seen"))
    page = html_table(result)
    for row in values.iter_rows(named=True):
        line = next(
            x for x in markdown_table(result).splitlines() if f"| {row['method']} | {row['seen']}" in x
        )
        assert line.split("|")[-2].strip().startswith(short(row["value"]) + " (")
        assert headline(result)[f"{row['method']}/{row['seen']}/R@10 cold"] == row["value"]
    for value in best["value"]:
        assert f'color:#00684a">{short(value)}<' in page
    for text in (markdown_table(plain), html_table(plain), table(plain).caption, str(headline(plain))):
        assert "cold" not in text
    assert markdown_table(result).startswith(markdown_table(plain)[:40])


@pytest.mark.parametrize("width", [100, 80])
def test_the_column_of_cold_targets_fits_too(two: list[EvaluationReport], width: int) -> None:
    page = StringIO()
    Console(file=page, width=width).print(table(compare([_cold(report) for report in two], CONFIG)))
    lines = page.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    for method in ("popularity", "itemknn", "two-stage", "joint"):
        assert sum(line.split()[:1] == [method] for line in lines) == 2


def test_numbers_are_written_short() -> None:
    assert [short(x) for x in (0.1234, 1.0, 0.0, -0.05)] == [".1234", "1.0000", ".0000", "-.0500"]
    assert short(0.02351, 3) == ".024"
    assert [signed(x) for x in (0.01, -0.01)] == ["+.0100", "−.0100"]


def _kept(report: EvaluationReport) -> EvaluationReport:
    return replace(report, ranks=report.ranks.filter(seen="kept"), metrics=report.metrics.filter(seen="kept"))


def test_reports_of_one_treatment_of_seen_items_compare_and_show_no_empty_block(
    two: list[EvaluationReport],
) -> None:
    both, kept = compare(two, CONFIG), compare([_kept(report) for report in two], CONFIG)
    assert kept.differences.equals(both.differences.filter(seen="kept"))
    assert "excluded" not in markdown_table(kept) + html_table(kept)
    assert "excluded" in markdown_table(both) and "do not compare" in html_table(both)
    assert table(kept).row_count == 4
    assert all("kept" in sentence for sentence in verdicts(kept))


def test_reports_of_different_treatments_are_refused(two: list[EvaluationReport]) -> None:
    with pytest.raises(
        ArtifactError, match="seen items kept and excluded, and with seen items kept: evaluate"
    ):
        compare([two[0], _kept(two[1])], CONFIG)
