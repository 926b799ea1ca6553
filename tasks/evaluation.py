"""Rank the whole catalogue for every test user, and set methods side by side."""

import functools
from typing import Annotated, Any, NamedTuple

import polars as pl
import torch
from flytekit import task

from components.artifacts import (
    Comparison,
    EvaluationReport,
    ItemCatalog,
    RecommenderCheckpoint,
    SequenceSplit,
    SidTable,
)
from components.data.batches import held_out_rows
from components.metrics import compare as comparing
from components.metrics import report as reporting
from components.metrics.beam_loss import beam_loss
from components.metrics.compare import CompareConfig, short
from components.metrics.figures import comparison_figure
from components.metrics.report import EvaluateConfig, RankFn, blocks_of
from components.pages.results import comparison_page, results_page
from components.recommenders.build import load_recommender
from components.recommenders.decoding import rank_rows
from components.recommenders.exact import NOT_EXACT, exact_ranker
from components.seams import Ranker
from components.tokenizers.sids import table_symbols
from components.tokenizers.trie import build_trie
from components.training.loop import device_of
from tasks import runtime
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.tracking import StageRun, tracked

SHOWN = ("R@10", "N@10")
"""Metrics that are said in a line of progress."""
FAULTS = ("invalid", "duplicates", "seen_items")


class RankFns(NamedTuple):
    """How a trained recommender ranks held-out rows."""

    beam: RankFn
    exact: RankFn | None
    """None where it cannot score the whole catalogue."""


@torch.no_grad()
def rankers(recommender: RecommenderCheckpoint, sids: SidTable, config: EvaluateConfig) -> RankFns:
    """Return the functions that rank held-out rows with a trained recommender."""
    device = device_of("auto")
    module = load_recommender(recommender, sids).to(device)
    symbols = table_symbols(sids).to(device)
    catalogue = module.catalogue(symbols, build_trie(symbols))

    def ranks_with(which: Ranker) -> RankFn:
        return lambda frame, exclude_seen: rank_rows(
            which,
            held_out_rows(frame),
            catalogue,
            config.batch_size,
            config.beams,
            exclude_seen=exclude_seen,
        )

    exact = exact_ranker(module, catalogue)
    return RankFns(ranks_with(module), None if exact is None else ranks_with(exact))


def _log_metrics(run: StageRun, metrics: pl.DataFrame) -> None:
    name = pl.concat_str("method", "seen", "slice", "metric", separator="/")
    rows = metrics.drop_nulls("value").select(name, "value").iter_rows()
    run.metrics(dict(rows))


def record_method(run: StageRun, name: str, report: EvaluationReport) -> None:
    """Log one method's metrics and say the usual two; log the faulty entries of its lists."""
    metrics = report.metrics.filter(pl.col("method") == name)
    _log_metrics(run, metrics)
    value = dict(metrics.filter(slice="all").select(pl.concat_str("seen", "metric"), "value").iter_rows())
    for seen in blocks_of(metrics["seen"]):
        shown = [f"{metric} {short(value[seen + metric])}" for metric in SHOWN if seen + metric in value]
        run.say(f"seen items {seen}: " + "  ".join(shown))
    faults = {
        f"{row['seen']}/{fault}": row[fault]
        for row in report.details["lists"]
        for fault in FAULTS
        if row["method"] == name
    }
    run.metrics({f"faults/{fault}": count for fault, count in faults.items()})
    run.say(f"{sum(faults.values())} faulty entries in the lists (invalid, doubled, or seen and excluded)")


def record_beam_loss(run: StageRun, lost: list[dict[str, Any]]) -> None:
    """Log what the beam missed of the exact ranking."""
    for row in lost:
        figures = {name: value for name, value in row.items() if name not in ("seen", "users")}
        run.metrics(
            {f"beam/{row['seen']}/{name.replace(' ', '_')}": value for name, value in figures.items()}
        )
        run.say(f"seen items {row['seen']}: the beam lists {row['found']:.1%} of the exact top")


@task(**runtime.CPU, cache=runtime.cached("2"))
def evaluate_baselines(
    split: Annotated[SequenceSplit, by_content], config: EvaluateConfig, run_id: str = ""
) -> Annotated[EvaluationReport, by_content]:
    """Evaluate popularity and item-kNN, which every result is read beside.

    Args:
        split: Folder of a SequenceSplit.
        config: Settings, a YAML file or JSON. Keys: make keys SECTION=evaluate.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("evaluate_baselines", config, run_id, [split]) as run:
        report = reporting.evaluate_baselines(split, config)
        _log_metrics(run, report.metrics)
        run.output(report)
        return report


@task(**runtime.GPU, **runtime.DECK, cache=runtime.cached("4"))
def evaluate_recommender(
    name: str,
    recommender: Annotated[RecommenderCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    split: Annotated[SequenceSplit, by_content],
    baselines: Annotated[EvaluationReport, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    config: EvaluateConfig,
    run_id: str = "",
) -> Annotated[EvaluationReport, by_content]:
    """Evaluate a recommender on the test targets, seen items kept and excluded.

    Args:
        name: What to call the method in tables.
        recommender: Folder of a RecommenderCheckpoint.
        sids: Folder of the SidTable that it was trained with.
        split: Folder of the SequenceSplit.
        baselines: Folder of the EvaluationReport of the baselines, made with the same settings.
        catalog: Folder of the ItemCatalog, for names on the deck.
        config: Settings, a YAML file or JSON. Keys: make keys SECTION=evaluate.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    read = [recommender, sids, split, baselines, catalog]
    with tracked(f"evaluate_recommender {name}", config, run_id, read) as run:
        beam, exact = rankers(recommender, sids, config)
        ranks = beam if config.decode == "beam" else exact
        if ranks is None:
            raise ValueError(NOT_EXACT)
        lists = functools.cache(functools.partial(ranks, split.test))  # by the treatment of seen items
        details: dict[str, Any] = {"decode": config.decode, "recommender": recommender.fingerprint}
        if config.decode == "beam" and exact is not None:
            lost = beam_loss(lists, exact, split, config)
            details["beam_loss"] = [{"method": name} | row for row in lost]
            record_beam_loss(run, lost)
        report = reporting.evaluate_recommender(
            name, lambda _, exclude_seen: lists(exclude_seen), split, config, baselines, details
        )
        record_method(run, name, report)
        shown = config.blocks[0]
        items = lists(shown == "excluded").items.cpu().numpy()
        run.output(report)
        show(run, "Results", results_page, name, report, split, catalog, items, shown)
        return report


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("1"))
def compare_reports(
    reports: list[Annotated[EvaluationReport, by_content]], config: CompareConfig, run_id: str = ""
) -> Annotated[Comparison, by_content]:
    """Set methods side by side on the same users, with paired differences.

    Args:
        reports: Folders of EvaluationReports of one split, the plainer method first.
        config: Settings, a YAML file or JSON. Keys: make keys SECTION=compare.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("compare_reports", config, run_id, reports) as run:
        comparison = comparing.compare(reports, config)
        run.output(comparison)
        run.figure("comparison", comparison_figure(comparison))
        show(run, "Comparison", comparison_page, comparison)
        return comparison
