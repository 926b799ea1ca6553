"""Reports follow from their ranks, always carry the baselines, and refuse what does not compare."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from components.artifacts import COLD, HELD_OUT, SEQUENCE, EvaluationReport, SequenceSplit
from components.data.planted import plant
from components.data.splits import SplitConfig, hold_out
from components.folders import ArtifactError
from components.metrics.compare import CompareConfig, compare
from components.metrics.report import (
    EvaluateConfig,
    evaluate_baselines,
    evaluate_recommender,
    headline_rows,
    inspect_lists,
    recompute,
)
from components.seams import Ranking

CONFIG = EvaluateConfig(resamples=200)


@pytest.fixture(scope="module")
def split() -> SequenceSplit:
    return hold_out(*plant(), SplitConfig())


@pytest.fixture(scope="module")
def baselines(split: SequenceSplit) -> EvaluationReport:
    return evaluate_baselines(split, CONFIG)


def _ranking(items: np.ndarray) -> Ranking:
    tensor = torch.from_numpy(items.astype(np.int64))
    return Ranking(tensor, torch.zeros(tensor.shape))


def _place_of_target(split: SequenceSplit, place: int):
    """Rank with the target at one place and other items around it."""

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        targets = frame["target"].to_numpy().astype(np.int64)
        lists = (targets[:, None] + 1 + np.arange(20)) % split.num_items
        lists[:, place - 1] = targets
        return _ranking(lists)

    return rank


def _value(report: EvaluationReport, method: str, seen: str, metric: str, part: str = "all") -> float:
    return report.metrics.filter(
        (pl.col("method") == method)
        & (pl.col("seen") == seen)
        & (pl.col("metric") == metric)
        & (pl.col("slice") == part)
    )["value"].item()


@pytest.fixture(scope="module")
def third(split: SequenceSplit, baselines: EvaluationReport) -> EvaluationReport:
    return evaluate_recommender("third", _place_of_target(split, 3), split, CONFIG, baselines)


def test_metrics_of_lists_with_the_target_in_third_place(third: EvaluationReport) -> None:
    for seen in ("kept", "excluded"):
        for part in ("all", "head", "tail"):
            assert _value(third, "third", seen, "R@1", part) == 0
            assert _value(third, "third", seen, "R@5", part) == 1
            assert _value(third, "third", seen, "N@5", part) == pytest.approx(0.5)
            assert _value(third, "third", seen, "MRR", part) == pytest.approx(1 / 3)


def test_every_report_holds_the_baselines(third: EvaluationReport, baselines: EvaluationReport) -> None:
    assert third.ranks["method"].unique(maintain_order=True).to_list() == ["popularity", "itemknn", "third"]
    assert third.metrics.filter(pl.col("method") != "third").equals(baselines.metrics)
    assert third.details["itemknn"] == baselines.details["itemknn"]


def test_metrics_follow_from_the_ranks(tmp_path: Path, third: EvaluationReport, split: SequenceSplit) -> None:
    third.save(tmp_path / "report")
    loaded = EvaluationReport.load(tmp_path / "report")
    assert loaded.fingerprint == third.fingerprint
    assert recompute(loaded, split).equals(third.metrics)


def test_a_method_that_ranks_like_a_baseline_has_its_numbers(
    split: SequenceSplit, baselines: EvaluationReport
) -> None:
    """The way from ranks and the way from lists agree: popularity without ties is the same on both."""
    counts = np.bincount(split.train["sequence"].explode().to_numpy(), minlength=split.num_items)
    ranks = baselines.ranks.filter(pl.col("method") == "popularity", pl.col("seen") == "kept")
    assert len(ranks) == len(split.test)
    targets = ranks["target"].to_numpy()
    higher = (counts[None, :] > counts[targets][:, None]).sum(axis=1)
    equal = (counts[None, :] == counts[targets][:, None]).sum(axis=1) - 1
    expected = 1 + higher + equal // 2
    found = ranks["rank"].fill_null(0).to_numpy()
    assert (found == np.where(expected <= CONFIG.beams, expected, 0)).all()


def test_intervals_hold_their_value_and_coverage_has_none(baselines: EvaluationReport) -> None:
    means = baselines.metrics.filter(~pl.col("metric").str.starts_with("coverage"))
    assert (
        means.select((pl.col("low") <= pl.col("value")) & (pl.col("value") <= pl.col("high")))
        .to_series()
        .all()
    )
    assert means.null_count().sum_horizontal().item() == 0
    coverage = baselines.metrics.filter(pl.col("metric") == "coverage@10")
    assert len(coverage) == 4 and coverage["low"].is_null().all()


def test_head_and_tail_share_out_the_users(baselines: EvaluationReport, split: SequenceSplit) -> None:
    users = baselines.details["users"]
    assert users["head"] + users["tail"] == users["all"] == len(split.test)
    for metric in ("R@10", "MRR"):
        parts = [
            users[part] * _value(baselines, "itemknn", "kept", metric, part) for part in ("head", "tail")
        ]
        assert sum(parts) / users["all"] == pytest.approx(_value(baselines, "itemknn", "kept", metric))


def test_the_decay_is_the_best_on_validation(baselines: EvaluationReport) -> None:
    tried = baselines.details["itemknn"]["validation"]
    assert [entry["decay"] for entry in tried] == CONFIG.itemknn.decays
    best = max(entry["N@10"] for entry in tried)
    chosen = [entry for entry in tried if entry["decay"] == baselines.details["itemknn"]["decay"]]
    assert chosen[0]["N@10"] == best


def test_equal_inputs_give_equal_reports(split: SequenceSplit, baselines: EvaluationReport) -> None:
    assert evaluate_baselines(split, CONFIG).fingerprint == baselines.fingerprint


def _small() -> SequenceSplit:
    held = pl.DataFrame({"user_id": [0, 1], "history": [[0, 1], [2]], "target": [3, 4]}, schema=HELD_OUT)
    return SequenceSplit(
        train=pl.DataFrame({"user_id": [0, 1], "sequence": [[0], [2]]}, schema=SEQUENCE),
        valid=held,
        test=held,
        cold=COLD.to_frame(),
        num_items=5,
        protocol="leave_one_out",
        log="",
        catalog="",
    )


def test_faults_of_lists_are_counted() -> None:
    config = EvaluateConfig(ks=[1, 2], beams=5, coverage_k=2)
    good = np.array([[2, 3, 4, -1, -1], [0, 4, 1, 3, -1]])
    found = inspect_lists(good, _small(), config, seen="excluded")
    assert found.ranks.tolist() == [2, 2]
    assert found.coverage == 4 / 5
    assert found.faults == {"invalid": 0, "duplicates": 0, "seen_items": 0}

    bad = np.array([[1, 3, 3, -1, 9], [0, 4, -1, -1, -1]])
    found = inspect_lists(bad, _small(), config, seen="excluded")
    # User 0 may leave two places empty and has item 9 of 5; user 1 may leave one empty and leaves three.
    assert found.faults == {"invalid": 3, "duplicates": 1, "seen_items": 1}
    found = inspect_lists(bad, _small(), config, seen="kept")
    assert found.faults == {"invalid": 5, "duplicates": 1, "seen_items": 0}


def test_baselines_of_another_split_are_refused(baselines: EvaluationReport) -> None:
    other = _small()
    with pytest.raises(ArtifactError, match="evaluate the baselines on this split"):
        evaluate_recommender("x", _place_of_target(other, 1), other, CONFIG, baselines)
    with pytest.raises(ArtifactError, match="the report is of split"):
        recompute(baselines, other)


def test_baselines_with_other_settings_are_refused(split: SequenceSplit, baselines: EvaluationReport) -> None:
    with pytest.raises(ArtifactError, match="same settings"):
        evaluate_recommender("x", _place_of_target(split, 1), split, EvaluateConfig(seed=9), baselines)


def test_batch_size_is_not_a_setting_of_the_numbers(
    split: SequenceSplit, baselines: EvaluationReport
) -> None:
    other = EvaluateConfig(resamples=200, batch_size=7)
    assert evaluate_baselines(split, other).fingerprint == baselines.fingerprint


def test_methods_that_decode_differently_stand_beside_the_same_baselines(
    split: SequenceSplit, baselines: EvaluationReport
) -> None:
    exactly = CONFIG.model_copy(update={"decode": "exact"})
    assert evaluate_baselines(split, exactly).fingerprint == baselines.fingerprint
    reports = [
        evaluate_recommender(
            config.decode, _place_of_target(split, 3), split, config, baselines, {"decode": config.decode}
        )
        for config in (CONFIG, exactly)
    ]
    assert [report.details["decode"] for report in reports] == ["beam", "exact"]
    assert set(compare(reports, CompareConfig(resamples=100)).metrics["method"]) >= {"beam", "exact"}


def test_names_of_baselines_and_short_lists_are_refused(
    split: SequenceSplit, baselines: EvaluationReport
) -> None:
    with pytest.raises(ArtifactError, match="taken by a baseline"):
        evaluate_recommender("itemknn", _place_of_target(split, 1), split, CONFIG, baselines)

    def five(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        return _ranking(np.zeros((len(frame), 5)))

    with pytest.raises(ValueError, match="at least 20 items"):
        evaluate_recommender("short", five, split, CONFIG, baselines)


def test_cut_offs_beyond_the_list_are_refused() -> None:
    with pytest.raises(ValueError, match="50 places asked of 20 beams"):
        EvaluateConfig(ks=[10, 50])


def test_one_treatment_of_seen_items_is_the_same_rows_at_half_the_cost(
    split: SequenceSplit, baselines: EvaluationReport
) -> None:
    asked = []

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        asked.append(exclude_seen)
        return _place_of_target(split, 3)(frame, exclude_seen)

    for seen in ("kept", "excluded"):
        config = CONFIG.model_copy(update={"seen": [seen]})
        alone = evaluate_baselines(split, config)
        assert alone.metrics.equals(baselines.metrics.filter(seen=seen))
        assert alone.ranks.equals(baselines.ranks.filter(seen=seen))
        report = evaluate_recommender("third", rank, split, config, alone)
        assert set(report.ranks["seen"]) == {seen} and recompute(report, split).equals(report.metrics)
    assert asked == [False, True]


def test_baselines_of_another_treatment_are_refused(
    split: SequenceSplit, baselines: EvaluationReport
) -> None:
    kept = CONFIG.model_copy(update={"seen": ["kept"]})
    with pytest.raises(ArtifactError, match="same settings"):
        evaluate_recommender("x", _place_of_target(split, 1), split, kept, baselines)


def test_the_order_in_which_treatments_are_named_does_not_matter_and_none_or_twice_is_refused() -> None:
    assert EvaluateConfig(seen=["excluded", "kept"]).blocks == ["kept", "excluded"]
    for wrong in ([], ["kept", "kept"], ["both"]):
        with pytest.raises(ValueError, match="seen"):
            EvaluateConfig.model_validate({"seen": wrong})


@pytest.fixture(scope="module")
def with_cold() -> SequenceSplit:
    return hold_out(*plant(), SplitConfig(cold_share=0.2))


def test_metrics_on_cold_targets_are_those_of_the_users_who_have_them(with_cold: SequenceSplit) -> None:
    """The method finds targets in third place if their id is even, and never else."""

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        items = _place_of_target(with_cold, 3)(frame, exclude_seen).items.numpy()
        targets = frame["target"].to_numpy()
        items[targets % 2 == 1, 2] = (targets[targets % 2 == 1].astype(int) + 50) % with_cold.num_items
        return _ranking(items)

    report = evaluate_recommender("even", rank, with_cold, CONFIG, evaluate_baselines(with_cold, CONFIG))
    cold = set(with_cold.cold["item_id"])
    targets = [target for target in with_cold.test["target"] if target in cold]
    assert report.details["cold"] == {"items": 24, "targets": len(targets)}
    assert report.details["users"]["cold"] == len(targets) > 10
    even = sum(target % 2 == 0 for target in targets) / len(targets)
    assert 0 < even < 1 and even != _value(report, "even", "kept", "R@10")
    assert _value(report, "even", "kept", "R@10", "cold") == pytest.approx(even)
    assert _value(report, "even", "excluded", "N@5", "cold") == pytest.approx(even / 2)
    for method in ("popularity", "itemknn", "even"):
        ranks = report.ranks.filter(pl.col("target").is_in(list(cold)), method=method, seen="kept")["rank"]
        hits = sum(rank is not None and rank <= 20 for rank in ranks)
        assert _value(report, method, "kept", "R@20", "cold") == pytest.approx(hits / len(targets))
    assert recompute(report, with_cold).equals(report.metrics)


def test_cold_items_are_in_the_tail_and_a_split_without_them_has_no_such_slice(
    with_cold: SequenceSplit, third: EvaluationReport
) -> None:
    report = evaluate_baselines(with_cold, CONFIG)
    assert report.details["users"]["cold"] <= report.details["users"]["tail"]
    assert set(report.metrics["slice"]) == {"all", "head", "tail", "cold"}
    assert set(third.metrics["slice"]) == {"all", "head", "tail"}
    assert "cold" not in third.details and "cold" not in third.details["users"]


def test_baselines_do_not_find_what_they_have_not_met(with_cold: SequenceSplit) -> None:
    report = evaluate_baselines(with_cold, CONFIG)
    assert _value(report, "popularity", "kept", "R@20", "cold") == 0
    assert _value(report, "popularity", "kept", "R@20") > 0


def test_the_headline_is_all_users_and_recall_on_cold_targets_by_its_own_name(
    with_cold: SequenceSplit, third: EvaluationReport
) -> None:
    metrics = evaluate_baselines(with_cold, CONFIG).metrics
    rows = headline_rows(metrics)
    cold = metrics.filter(slice="cold", metric="R@10")
    assert rows.filter(metric="R@10 cold")["value"].equals(cold["value"]) and len(cold) == 4
    assert rows.filter(pl.col("metric") != "R@10 cold").equals(metrics.filter(slice="all"))
    assert headline_rows(third.metrics).equals(third.metrics.filter(slice="all"))
