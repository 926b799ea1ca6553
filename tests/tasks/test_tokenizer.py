"""What the analysis of a SID table reads and shows as a task."""

from dataclasses import replace

import polars as pl
import pytest
from mlflow.entities import Run

from components.artifacts import SidTable
from components.metrics.sids import CollisionConfig
from components.tokenizers.build import load_tokenizer
from components.tokenizers.prefixes import prefix_errors
from tasks.tokenizer import analyze_collisions
from tasks.tracking import open_store


def shortened(table: SidTable) -> SidTable:
    """The same table, every second item with its first code alone."""
    first = pl.when(pl.col("item_id") % 2 == 0).then(pl.col("codes").list.head(1)).otherwise("codes")
    suffix = pl.int_range(pl.len()).over("codes").cast(pl.UInt16)
    codes = table.codes.with_columns(codes=first).with_columns(suffix=suffix)
    return replace(table, codes=codes, suffix_size=table.num_items)


def analyse(tiny, **changed):
    inputs = tiny._asdict() | changed
    parts = {name: inputs[name] for name in ("tokenizer", "sids", "catalog", "embeddings", "log")}
    return analyze_collisions(name="mine", **parts, config=CollisionConfig(max_group_share=1))


def last_run() -> Run:
    client = open_store()
    return client.search_runs([client.get_experiment_by_name("stages").experiment_id])[0]


def figures(run: Run) -> set[str]:
    return {file.path.split("/")[1] for file in open_store().list_artifacts(run.info.run_id, "figures")}


def test_reconstruction_and_histories_are_those_of_tokenizer_and_log(tiny, flyte_home) -> None:
    report = analyse(tiny)
    codes = tiny.sids.codes["codes"].to_list()
    errors_NL = prefix_errors(
        load_tokenizer(tiny.tokenizer), tiny.embeddings.matrix, pl.DataFrame(codes, orient="row").to_torch()
    )
    assert report.figures["reconstruction"] == pytest.approx(errors_NL[:, -1].mean().item(), rel=1e-5)
    levels = report.levels["reconstruction"].to_list()
    assert levels == pytest.approx(errors_NL.mean(dim=0).tolist(), rel=1e-5)
    assert levels == sorted(levels, reverse=True)
    assert report.levels["reconstruction_draw"].null_count() == 0
    per_user = len(tiny.log.events) / tiny.log.num_users
    assert report.figures["tokens_per_history"] == pytest.approx(4 * per_user)
    run = last_run()
    assert run.data.metrics["reconstruction"] == report.figures["reconstruction"]
    assert figures(run) == {"code_usage.png", "collisions.png", "prefix_errors.png"}


def test_of_unequal_lengths_the_task_shows_who_is_short_and_says_so(tiny, flyte_home) -> None:
    report = analyse(tiny, sids=shortened(tiny.sids))
    run = last_run()
    assert "length_by_popularity.png" in figures(run)
    said = open_store().download_artifacts(run.info.run_id, "verdict.md")
    with open(said) as file:
        words = file.read()
    assert "items have 1 to 3 codes, 2.00 on average" in words
    assert all(
        report.bands[name] in words for name in ("codes_per_item", "events_in_budget", "reconstruction")
    )
    assert report.levels["items"].to_list()[1:] == [tiny.catalog.num_items // 2] * 2


def test_another_tokenizer_than_made_the_sids_is_refused(tiny, flyte_home) -> None:
    other = replace(tiny.tokenizer, steps=tiny.tokenizer.steps + 1)
    with pytest.raises(ValueError, match="give the tokenizer that made these SIDs"):
        analyse(tiny, tokenizer=other)
