"""A training that a collapse has stopped is marked in the words of its cause, on the stage that ran."""

from types import SimpleNamespace

import polars as pl
import torch

from components.artifacts import RecommenderCheckpoint
from components.metrics.sids import COLLAPSED_AT
from components.training.recommender import RecommenderStage
from tasks import ablation, recommender
from tasks.recommender import fit_recommender
from tasks.tracking import open_store


def test_an_ablation_marks_the_stage_that_trained_the_arm(monkeypatch) -> None:
    summary = pl.DataFrame({"arm": ["walks", "moves", "sasrec"], "method": ["two_stage", "joint", "sasrec"]})
    tables = pl.DataFrame(
        {"arm": ["walks", "walks", "moves"], "seed": [0, 1, 0], "collapsed_at_epoch": [3, None, 5]}
    )
    result = SimpleNamespace(summary=summary, tables=tables)
    marks = {}
    monkeypatch.setattr(ablation, "mark_pipeline", lambda run_id, word, texts: marks.update(texts))
    ablation.mark_collapses(result, "run")
    assert marks == {"fit_recommender walks seed 0": "epoch 3", "fit_jointly moves seed 0": "epoch 5"}


def test_a_recommender_whose_walks_collapse_is_marked_with_the_figure_the_rule_and_the_remedy(
    tiny, flyte_home, monkeypatch
) -> None:
    checkpoint = RecommenderCheckpoint(
        weights={"w": torch.zeros(1)},
        config={},
        sids=tiny.sids.fingerprint,
        step=1,
        epoch=1,
        metrics={COLLAPSED_AT: 2.0},
    )
    monkeypatch.setattr(recommender, "train_recommender", lambda *_: checkpoint)
    fit_recommender(
        split=tiny.split, sids=tiny.sids, embeddings=tiny.embeddings, config=RecommenderStage(min_paths=0.25)
    )
    client = open_store()
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    mark = run.data.tags["sidflow.collapsed"]
    for words in ("epoch 2: ", "distinct paths", "recommender.min_paths 0.25", "recommender.model.alignment"):
        assert words in mark
