"""An ablation pairs arms by seed, adopts by one rule, and refuses arms that do not compare."""

from dataclasses import replace
from io import StringIO

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from components.artifacts import Ablation, CollisionReport, EvaluationReport, RecommenderCheckpoint, SidTable
from components.folders import ArtifactError
from components.metrics.ablation import (
    KNOWN_FIGURES,
    Measured,
    ablate,
    chance_adoption,
    decision,
    headline,
    run_name,
    summarise,
    verdicts,
)
from components.metrics.ablation_tables import grids, markdown_table, tables
from components.metrics.compare import short
from components.metrics.figures import ablation_figure
from components.metrics.report import METRICS, RANKS
from components.metrics.sids import COLLAPSED_AT, CollisionConfig, analyze
from components.pages.ablation import ablation_page

NAMES = ("R@5", "R@10", "N@5", "N@10", "coverage@10")
BASELINES = {"popularity": 0.03, "itemknn": 0.19}


def _report(name: str, value: float, *, split: str = "split", users: int = 6, blocks=("kept",)):
    """A report in which every metric of ``name`` is ``value``."""
    ranks = [
        (method, seen, user, 1, 1)
        for method in (*BASELINES, name)
        for seen in blocks
        for user in range(users)
    ]
    metrics = [
        (method, seen, part, metric, number, None, None)
        for method, number in {**BASELINES, name: value}.items()
        for seen in blocks
        for part in ("all", "tail")
        for metric in NAMES
    ]
    return EvaluationReport(
        ranks=pl.DataFrame(ranks, schema=RANKS, orient="row"),
        metrics=pl.DataFrame(metrics, schema=METRICS, orient="row"),
        split=split,
        details={"users": {"all": users}},
    )


def _codes(codes: list[tuple[int, ...]], **known) -> CollisionReport:
    frame = pl.DataFrame(
        {"item_id": range(len(codes)), "codes": [list(c) for c in codes], "suffix": range(len(codes))},
        schema=SidTable.SCHEMAS["codes"],
    )
    table = SidTable(codes=frame, codebook_sizes=[4, 4], suffix_size=len(codes), shared=False, tokenizer="")
    return analyze(table, None, CollisionConfig(), **known)


EVEN = _codes([(i, j) for i in range(4) for j in range(4)])
ONE_CODE = _codes([(0, 0)] * 16)


def _trained(codes: CollisionReport, metrics: dict[str, float] | None = None) -> RecommenderCheckpoint:
    return RecommenderCheckpoint(
        weights={}, config={}, sids=codes.sids, step=1, epoch=1, metrics=metrics or {}
    )


def _arm(name: str, values: list[float], against: str | None = "plain", codes=EVEN, **report):
    """One arm at seeds 0, 1, ...: one value a seed."""
    return [
        Measured(
            name,
            "two_stage" if against is None else "joint",
            against,
            seed,
            _report(run_name(name, seed), value, **report),
            codes,
            _trained(codes),
        )
        for seed, value in enumerate(values)
    ]


def _row(result: Ablation, arm: str, metric: str = "N@10", seen: str = "kept") -> dict:
    return result.summary.filter(arm=arm, metric=metric, seen=seen).row(0, named=True)


PLAIN = [0.25, 0.5, 0.75]


def test_means_errors_and_paired_differences_are_those_of_the_hand() -> None:
    result = ablate([*_arm("plain", PLAIN, None), *_arm("new", [0.375, 0.5, 0.9375])])
    plain, new = _row(result, "plain"), _row(result, "new")
    assert (plain["seeds"], plain["mean"]) == (3, 0.5)
    assert plain["standard_error"] == pytest.approx((0.0625 / 3) ** 0.5)  # variance (.0625 + 0 + .0625) / 2
    assert plain["against"] is plain["difference"] is plain["adopted"] is None
    # Gaps 1/8, 0, 3/16: mean 5/48, squared deviations 1/2304 + 25/2304 + 16/2304 over 2.
    error = (42 / 2304 / 2 / 3) ** 0.5
    assert new["against"] == "plain"
    assert new["difference"] == pytest.approx(5 / 48)
    assert new["difference_se"] == pytest.approx(error)
    # Student's t at 2 degrees of freedom and 97.5 %: 4.30265.
    assert new["low"] == pytest.approx(5 / 48 - 4.30265 * error, abs=1e-6)
    assert new["high"] == pytest.approx(5 / 48 + 4.30265 * error, abs=1e-6)


def test_pairing_takes_out_what_a_seed_does_to_both() -> None:
    """Arms swing by .5 between seeds, and the gain is the same at each: its error is that of the gain."""
    result = ablate([*_arm("plain", PLAIN, None), *_arm("new", [0.3125, 0.5625, 0.8125])])
    row = _row(result, "new")
    assert row["standard_error"] > 0.1
    assert (row["difference"], row["difference_se"], row["adopted"]) == (0.0625, 0.0, True)


@pytest.mark.parametrize(
    ("gaps", "adopted"),
    [
        ([0.75, 0.25], False),  # mean 1/2 is exactly two errors of 1/4
        ([0.75, 0.2578125], True),
        ([0.75, 0.2421875], False),
        ([-0.75, -0.7], False),  # as sure, and worse
        ([0.0, 0.0], False),
    ],
)
def test_an_arm_is_adopted_beyond_two_standard_errors_and_not_at_them(gaps, adopted: bool) -> None:
    result = ablate([*_arm("plain", [0.0, 0.0], None), *_arm("new", gaps)])
    assert _row(result, "new")["adopted"] is adopted
    assert (": adopted new" in decision(result)[0]) is adopted
    assert ("not adopted" not in verdicts(result)[0]) is adopted


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_stated_chance_is_the_share_of_arms_without_effect_that_the_rule_adopts(seeds: int) -> None:
    arms, rng = 4000, np.random.default_rng(0)
    runs = pl.DataFrame(
        {
            "arm": np.repeat([f"arm {n}" for n in range(arms + 1)], seeds),
            "method": "joint",
            "seed": np.tile(np.arange(seeds), arms + 1),
            "seen": "kept",
            "metric": "N@10",
            "value": np.concatenate([np.zeros(seeds), rng.normal(0, 0.01, arms * seeds)]),
        },
        schema=Ablation.SCHEMAS["runs"],
    )
    summary = summarise(runs, {"arm 0": None} | {f"arm {n}": "arm 0" for n in range(1, arms + 1)})
    chance = chance_adoption(seeds)
    assert summary["adopted"].mean() == pytest.approx(chance, abs=4 * (chance * (1 - chance) / arms) ** 0.5)


def test_the_table_says_how_easily_its_rule_is_passed_and_how_many_tried() -> None:
    plain, arms = _arm("plain", PLAIN, None), [*_arm("a", PLAIN), *_arm("b", PLAIN)]
    caption = grids(ablate([*plain, *arms]))[0].caption
    assert "With 3 seeds an arm without effect passes with probability .09; 2 arms were compared." in caption
    two = [each for each in (*plain, *arms[:3]) if each.seed < 2]
    assert "probability .15; 1 arm was compared." in grids(ablate(two))[0].caption
    assert "without effect" not in grids(ablate([each for each in plain if each.seed == 0]))[0].caption


def test_an_arm_is_compared_with_the_one_it_names() -> None:
    result = ablate(
        [*_arm("plain", [0.1, 0.2], None), *_arm("a", [0.5, 0.6]), *_arm("b", [0.625, 0.725], "a")]
    )
    assert _row(result, "b")["difference"] == pytest.approx(0.125)
    assert "Δ is the difference to plain (b to a)" in grids(result)[0].caption


def test_one_seed_has_no_errors_and_adopts_nothing() -> None:
    result = ablate([*_arm("plain", [0.1], None), *_arm("new", [0.9])])
    row = _row(result, "new")
    assert row["difference"] == pytest.approx(0.8)
    assert [row[name] for name in ("standard_error", "difference_se", "low", "high", "adopted")] == [None] * 5
    assert "±" not in markdown_table(result).split("\n\n")[1]
    assert "one seed (0): there is no error over seeds, and nothing can be adopted" in markdown_table(result)
    assert decision(result) == ["N@10, seen items kept in the ranking: nothing is adopted on one seed."]
    assert "says nothing about another: not adopted" in verdicts(result)[0]


def test_baselines_stand_once_without_seed_error_or_difference() -> None:
    result = ablate([*_arm("plain", PLAIN, None), *_arm("new", PLAIN)])
    rows = result.runs.filter(pl.col("arm").is_in(list(BASELINES)))
    assert len(rows) == len(BASELINES) * len(NAMES) and rows["seed"].is_null().all()
    knn = _row(result, "itemknn")
    assert (knn["seeds"], knn["mean"], knn["method"]) == (0, 0.19, "baseline")
    assert knn["standard_error"] is knn["difference"] is None
    assert [row[0] for row in grids(result)[0].rows] == ["popularity", "itemknn", "plain", "new"]


def test_codes_and_the_epoch_of_a_collapse_stand_beside_the_values() -> None:
    measured = [*_arm("plain", [0.1, 0.2], None), *_arm("new", [0.1, 0.2], codes=ONE_CODE)]
    measured[3] = measured[3]._replace(recommender=_trained(ONE_CODE, {COLLAPSED_AT: 5.0}))
    result = ablate(measured)
    assert result.items == 16
    assert result.codes.filter(arm="plain", seed=0)["perplexity"].to_list() == pytest.approx([4.0, 4.0])
    assert result.tables.filter(arm="new").drop("arm", *KNOWN_FIGURES).rows() == [
        (0, 1, 1.0, 16, "collapsed", None),
        (1, 1, 1.0, 16, "collapsed", 5),
    ]
    rows = {row[0]: row[1:] for row in grids(result)[1].rows}
    assert rows["plain"] == ["4.0", "4.0", "16", "0.0%", "1", "healthy"]
    assert rows["new"][-1] == "stopped at epoch 5 (1 of 2 seeds); kept: collapsed"


def test_frozen_sids_under_a_training_that_a_collapse_stopped_are_not_called_collapsed() -> None:
    measured = [*_arm("plain", [0.1, 0.2], None), *_arm("walks", [0.1, 0.2])]
    for at in (2, 3):
        measured[at] = measured[at]._replace(recommender=_trained(EVEN, {COLLAPSED_AT: 3.0 + at}))
    grid = grids(ablate(measured))[1]
    assert grid.rows[1][-1] == "stopped at epoch 5, 6; kept: healthy"
    assert grid.marks == ["", "bad"] and "an epoch before it was evaluated" in grid.caption


def test_arms_without_codes_are_in_the_table_of_values_alone() -> None:
    sasrec = [
        each._replace(method="sasrec", collisions=None, recommender=None) for each in _arm("sasrec", PLAIN)
    ]
    result = ablate([*_arm("plain", PLAIN, None), *sasrec])
    values, codes = grids(result)
    assert [row[0] for row in values.rows][-1] == "sasrec" and [row[0] for row in codes.rows] == ["plain"]
    assert len(grids(ablate([each._replace(against=None) for each in sasrec]))) == 1


def test_codebooks_of_different_sizes_and_depths_share_a_table() -> None:
    frame = pl.DataFrame(
        {"item_id": range(4), "codes": [[i] for i in range(4)], "suffix": [0] * 4},
        schema=SidTable.SCHEMAS["codes"],
    )
    table = SidTable(codes=frame, codebook_sizes=[8], suffix_size=1, shared=False, tokenizer="")
    shallow = analyze(table, None, CollisionConfig())
    result = ablate([*_arm("plain", [0.1], None), *_arm("short", [0.1], codes=shallow)])
    grid = grids(result)[1]
    assert grid.columns[1:3] == ["level 1", "level 2 of 4"]
    assert [row[1:3] for row in grid.rows] == [["4.0 of 4", "4.0"], ["4.0 of 8", ""]]


def _described(codes: list[tuple[int, ...]], error: float) -> CollisionReport:
    """Codes of two levels, item 0 met five times and the others once, all errors the same or half of it."""
    lengths = np.array([[len(code)] for code in codes])
    errors = np.where(np.arange(2) < lengths, [error, error / 2], np.nan)
    users = pl.Series([[0] * 5, list(range(1, len(codes)))], dtype=pl.List(pl.UInt32))
    events = torch.tensor([5] + [1] * (len(codes) - 1))
    return _codes(codes, events=events, errors=torch.from_numpy(errors), sequences=users)


SQUARE = [(i, j) for i in range(4) for j in range(4)]
SHORT = [(0,), *SQUARE[1:]]
"""The most popular item has one code."""


def test_lengths_and_reconstruction_stand_beside_the_codes_of_each_arm() -> None:
    result = ablate(
        [
            *_arm("plain", [0.1, 0.2], None, codes=_described(SQUARE, 0.5)),
            *_arm("short", [0.1, 0.2], codes=_described(SHORT, 0.25)),
        ]
    )
    # Items: (15 * 2 + 1) / 16. Interactions: (15 * 2 + 5 * 1) / 20. Symbols: 5 * 2 and 15 * 3, over two users.
    # A budget of 80 symbols holds all: (5 + 15) / 2. Errors .25 for the short item, .125 for the 15 others.
    row = result.tables.filter(arm="short", seed=1).select(KNOWN_FIGURES).row(0)
    assert row == pytest.approx((31 / 16, 35 / 20, 55 / 2, 10, (15 * 0.125 + 0.25) / 16, 3.125 / 20))
    grid = grids(result)[-1]
    assert grid.title == "Lengths and reconstruction"
    assert grid.columns == [
        "arm",
        "codes item / draw",
        "tokens per history",
        "events in budget",
        "D item / draw",
    ]
    assert grid.rows == [
        ["plain", "2.00 / 2.00", "30.0", "10.0", ".250 / .250"],
        ["short", "1.94 / 1.75", "27.5", "10.0", ".133 / .156"],
    ]
    assert all(f"{word}: " in grid.caption for word in ("item", "draw", "codes", "events in budget", "D"))


def test_where_all_sids_are_of_one_length_only_reconstruction_is_added_and_only_if_known() -> None:
    plain = _arm("plain", [0.1], None)
    assert [grid.title for grid in grids(ablate(plain))][1:] == ["Semantic IDs"]
    known = ablate([*plain, *_arm("told", [0.1], codes=_described(SQUARE, 0.5))])
    grid = grids(known)[-1]
    assert (grid.title, grid.columns) == ("Reconstruction", ["arm", "D item / draw"])
    assert grid.rows == [["plain", "– / –"], ["told", ".250 / .250"]]
    assert grids(known)[1].columns == grids(ablate(plain))[1].columns


def test_the_table_of_lengths_fits_a_terminal_too() -> None:
    name = "an arm with a long name 1"
    result = ablate([*_arm("plain", [0.1], None), *_arm(name, [0.1], codes=_described(SHORT, 0.5))])
    console = Console(file=StringIO(), width=120, highlight=False)
    for view in tables(result):
        console.print(view)
    page = console.file.getvalue()
    assert max(map(len, page.splitlines())) <= 120 and "…" not in page
    for text in (page, markdown_table(result)):
        assert "1.94 / 1.75" in text and "2.00 / –" in text


def _cold(measured: list[Measured], values: list[float]) -> list[Measured]:
    """Give each report a slice of cold targets: a value a seed, and 0 for baselines."""
    told = []
    for each, value in zip(measured, values, strict=True):
        rows = each.report.metrics.filter(slice="all")
        number = pl.when(pl.col("method").is_in(list(BASELINES))).then(0.0).otherwise(value)
        metrics = pl.concat([each.report.metrics, rows.with_columns(slice=pl.lit("cold"), value=number)])
        details = {"users": {"all": 6, "cold": 2}}
        told.append(each._replace(report=replace(each.report, metrics=metrics, details=details)))
    return told


def test_recall_on_cold_targets_is_a_table_of_its_own_with_its_error_over_seeds() -> None:
    both = ("kept", "excluded")
    sasrec = [each._replace(collisions=None, recommender=None) for each in _arm("sasrec", PLAIN, blocks=both)]
    plain, long = _arm("plain", PLAIN, None, blocks=both), _arm("an arm with a long name", PLAIN, blocks=both)
    measured = [*_cold(plain, [0.0, 0.25, 0.5]), *_cold(long, [0.5] * 3), *_cold(sasrec, [0.0] * 3)]
    result = ablate(measured)
    assert (result.cold_users, result.users) == (2, 6)
    assert [grid.title for grid in grids(result)][2:] == ["Cold items", "Semantic IDs"]
    grid = grids(result)[2]
    assert grid.columns == ["arm", "R@10, seen kept ± SE", "R@10, seen excluded ± SE"]
    error = short((0.0625 / 3) ** 0.5)
    assert grid.rows == [
        ["popularity", ".0000", ".0000"],
        ["itemknn", ".0000", ".0000"],
        ["plain", f".2500 ± {error}", f".2500 ± {error}"],
        ["an arm with a long name", ".5000 ± .0000", ".5000 ± .0000"],
        ["sasrec", ".0000 ± .0000", ".0000 ± .0000"],
    ]
    assert grid.caption.startswith("2 of 6 test users")
    assert headline(result)["plain/kept/R@10 cold/mean"] == 0.25
    console = Console(file=StringIO(), width=120, highlight=False)
    for view in tables(result):
        console.print(view)
    page = console.file.getvalue()
    assert max(map(len, page.splitlines())) <= 120 and "…" not in page
    for text in (page, markdown_table(result)):
        assert "Cold items" in text and text.count(error) >= 2


def test_cold_targets_change_no_other_table_and_are_not_mentioned_where_there_are_none() -> None:
    plain = [*_arm("plain", PLAIN, None), *_arm("new", [0.375, 0.5, 0.9375])]
    before, after = ablate(plain), ablate([*_cold(plain[:3], [0.9] * 3), *_cold(plain[3:], [0.1] * 3)])
    assert before.cold_users == 0
    for text in (markdown_table(before), str(headline(before))):
        assert "cold" not in text.lower()
    assert [grid for grid in grids(after) if grid.title != "Cold items"] == grids(before)
    assert verdicts(after) == verdicts(before) and decision(after) == decision(before)


def test_one_seed_has_no_error_on_cold_targets_either() -> None:
    grid = grids(ablate(_cold(_arm("plain", [0.5], None), [0.125])))[1]
    assert grid.columns == ["arm", "R@10, seen kept"] and grid.rows[-1] == ["plain", ".1250"]
    assert "one seed" in grid.caption


def test_arms_that_do_not_compare_are_refused() -> None:
    plain = _arm("plain", [0.1, 0.2], None)
    with pytest.raises(ArtifactError, match="'new seed 0' was evaluated on split other"):
        ablate([*plain, *_arm("new", [0.1, 0.2], split="other")])
    with pytest.raises(ArtifactError, match="'new seed 0' was ranked for other users"):
        ablate([*plain, *_arm("new", [0.1, 0.2], users=5)])
    with pytest.raises(ArtifactError, match="seen items treated otherwise"):
        ablate([*plain, *_arm("new", [0.1, 0.2], blocks=("kept", "excluded"))])
    with pytest.raises(
        ArtifactError, match=r"\['new seed 1'\] are missing: .* every arm is run with every seed"
    ):
        ablate([*plain, *_arm("new", [0.1])])
    with pytest.raises(ArtifactError, match="'plain seed 0' is there 2 times"):
        ablate([*plain, *plain[:1]])
    with pytest.raises(ArtifactError, match="compared with 'nobody', which is not among"):
        ablate([*plain, *_arm("new", [0.1, 0.2], "nobody")])
    with pytest.raises(ArtifactError, match="the report given as 'plain seed 1' holds"):
        ablate([plain[0], plain[1]._replace(report=plain[0].report)])
    with pytest.raises(ArtifactError, match="'plain seed 0': codes of SidTable"):
        ablate([plain[0]._replace(collisions=ONE_CODE), plain[1]])
    with pytest.raises(ArtifactError, match="nothing to put together"):
        ablate([])


def _many() -> Ablation:
    arms = _arm("plain", PLAIN, None, blocks=("kept", "excluded"))
    for number in range(12):
        name = f"an arm with a long name {number}"
        arms += _arm(name, [0.3, 0.4, 0.5 + number / 10], blocks=("kept", "excluded"))
    return ablate(arms)


def test_the_tables_fit_a_terminal_of_120_columns_and_lose_nothing() -> None:
    result = _many()
    console = Console(file=StringIO(), width=120, highlight=False)
    for view in tables(result):
        console.print(view)
    page = console.file.getvalue()
    assert max(map(len, page.splitlines())) <= 120
    assert "…" not in page and page.count("an arm with a long") == 12 * 3
    assert page.count("adopted") >= 2 and "6 test users" in page


def test_markdown_and_page_hold_every_arm_and_say_how_to_read_them() -> None:
    result = _many()
    page = ablation_page(result, ablation_figure(result))
    for text in (markdown_table(result), page):
        assert text.count("an arm with a long name 11") >= 3
        for words in ("6 test users", "seeds 0, 1, 2", "Student-t", "Seen items excluded", "Semantic IDs"):
            assert words in text
    assert page.count("<tr>") == 3 + 2 * 15 + 13
    strange = ablate(_arm("<script>", [0.1], None))
    assert "<script>" not in ablation_page(strange, ablation_figure(strange))


def test_a_short_description_drops_whole_tables() -> None:
    result = _many()
    whole = markdown_table(result)
    cut = markdown_table(result, longest=len(whole) - 1)
    assert whole.startswith(cut) and "Semantic IDs" not in cut and "Seen items excluded" in cut
    assert "Seen items kept" in markdown_table(result, longest=10)


def test_headline_names_arm_block_metric_and_figure() -> None:
    figures = headline(ablate([*_arm("plain", PLAIN, None), *_arm("new", [0.5, 0.75, 1.0])]))
    assert figures["plain/kept/N@10/mean"] == 0.5
    assert figures["new/kept/R@5/difference"] == 0.25
    assert "plain/kept/N@10/difference" not in figures and "itemknn/kept/R@5/standard_error" not in figures


def test_an_ablation_comes_back_from_its_folder(tmp_path) -> None:
    result = _many()
    result.save(tmp_path / "ablation")
    assert Ablation.load(tmp_path / "ablation").fingerprint == result.fingerprint
