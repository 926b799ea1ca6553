"""The collision report equals loops over the table; the gate stops collapse and names it."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import CollisionReport, ContentEmbeddings, ItemCatalog, SidTable
from components.metrics.sids import CollapseError, CollisionConfig, analyze, evenness, gate, group_sizes

SIZES = [4, 3, 5]
CODES = st.lists(
    st.integers(1, 3).flatmap(lambda n: st.tuples(*(st.integers(0, size - 1) for size in SIZES[:n]))),
    min_size=1,
    max_size=25,
)
CONFIG = CollisionConfig()


def _table(codes: list[tuple[int, ...]], sizes: list[int] = SIZES) -> SidTable:
    schema = {"item_id": pl.UInt32, "codes": pl.List(pl.UInt16)}
    frame = pl.DataFrame({"item_id": range(len(codes)), "codes": [list(c) for c in codes]}, schema=schema)
    suffixes = []
    times: Counter[tuple[int, ...]] = Counter()
    for code in codes:
        suffixes.append(times[code])
        times[code] += 1
    return SidTable(
        codes=frame.with_columns(suffix=pl.Series(suffixes, dtype=pl.UInt16)),
        codebook_sizes=sizes,
        suffix_size=len(codes),
        shared=False,
        tokenizer="",
    )


def _catalog(count: int) -> ItemCatalog:
    texts = [f"text {i}" for i in range(count)]
    columns = {"title": texts, "brand": None, "categories": [[]] * count, "text": texts}
    names = [str(i) for i in range(count)]
    return ItemCatalog(
        items=pl.DataFrame(
            {"item_id": range(count), "raw_id": names} | columns, schema=ItemCatalog.SCHEMAS["items"]
        )
    )


def _embeddings(x_ND: np.ndarray) -> ContentEmbeddings:
    vectors = {"vectors": torch.from_numpy(x_ND.astype(np.float32))}
    return ContentEmbeddings(vectors=vectors, encoder="", revision="", normalised=False, catalog="")


def _perplexity(values: list[int]) -> float:
    shares = [n / len(values) for n in Counter(values).values()]
    return math.exp(-sum(p * math.log(p) for p in shares))


@settings(max_examples=30, deadline=None)
@given(CODES)
def test_groups_and_rates_equal_loops(codes: list[tuple[int, ...]]) -> None:
    report = analyze(_table(codes), _catalog(len(codes)), CONFIG)
    members = defaultdict(list)
    for item, code in enumerate(codes):
        members[code].append(item)
    shared = {code: items for code, items in members.items() if len(items) > 1}
    assert {tuple(r["codes"]): r["item_ids"] for r in report.groups.iter_rows(named=True)} == shared
    assert report.groups["size"].to_list() == sorted(map(len, shared.values()), reverse=True)
    for row in report.groups.head(20).iter_rows(named=True):
        assert row["texts"] == [f"text {i}" for i in row["item_ids"]]
    colliding = sum(map(len, shared.values()))
    assert report.figures["collision_rate"] == pytest.approx(colliding / len(codes))
    assert report.figures["distinct_sids"] == len(members)
    assert report.figures["largest_group"] == max(map(len, members.values()))
    sizes = {row["size"]: row["groups"] for row in group_sizes(report).iter_rows(named=True)}
    assert {s: n for s, n in sizes.items() if n} == Counter(map(len, members.values()))
    assert group_sizes(report)["items"].sum() == len(codes)


@settings(max_examples=30, deadline=None)
@given(CODES)
def test_levels_equal_loops(codes: list[tuple[int, ...]]) -> None:
    report = analyze(_table(codes), None, CONFIG)
    for row in report.levels.iter_rows(named=True):
        level = row["level"]
        here = [code[level - 1] for code in codes if len(code) >= level]
        counts = Counter(here)
        usage = report.usage.filter(pl.col("level") == level)
        assert usage["count"].to_list() == [counts[c] for c in range(SIZES[level - 1])]
        assert row["codebook_size"] == SIZES[level - 1] and row["codes_in_use"] == len(counts)
        assert row["items"] == len(here)
        if not here:
            assert row["perplexity"] == row["perplexity_in_prefix"] == row["prefixes"] == 0
            continue
        below = defaultdict(list)
        for code in codes:
            if len(code) >= level:
                below[code[: level - 1]].append(code[level - 1])
        assert row["perplexity"] == pytest.approx(_perplexity(here))
        assert row["entropy"] == pytest.approx(math.log(_perplexity(here)))
        assert row["largest_share"] == pytest.approx(max(counts.values()) / len(here))
        assert row["prefixes"] == len(below)
        inside = sum(len(values) * _perplexity(values) for values in below.values()) / len(here)
        assert row["perplexity_in_prefix"] == pytest.approx(inside)


@settings(max_examples=20, deadline=None)
@given(CODES, st.integers(0, 5))
def test_cosines_and_traffic_equal_loops(codes: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(codes), 4))
    events = torch.from_numpy(rng.integers(1, 9, len(codes)))
    report = analyze(_table(codes), None, CONFIG, events=events, embeddings=_embeddings(x))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(codes)) for j in range(len(codes)) if i != j]
    together = [unit[i] @ unit[j] for i, j in pairs if codes[i] == codes[j]]
    colliding = {i for i, j in pairs if codes[i] == codes[j]}
    share = sum(int(events[i]) for i in colliding) / int(events.sum())
    assert report.figures["collision_share_of_events"] == pytest.approx(share)
    assert ("cosine_in_groups" in report.figures) == bool(together)
    if together:
        assert report.figures["cosine_in_groups"] == pytest.approx(np.mean(together), abs=1e-5)
        everything = np.mean([unit[i] @ unit[j] for i, j in pairs])
        assert report.figures["cosine_of_all_pairs"] == pytest.approx(everything, abs=1e-5)


def _errors(codes: list[tuple[int, ...]], seed: int) -> np.ndarray:
    """Errors in [0, 4] where there is a code, NaN beyond."""
    errors = np.random.default_rng(seed).uniform(0, 4, (len(codes), len(SIZES)))
    there = np.arange(len(SIZES)) < np.array([len(code) for code in codes])[:, None]
    return np.where(there, errors, np.nan)


@settings(max_examples=30, deadline=None)
@given(CODES, st.integers(0, 99))
def test_reconstruction_equals_loops_by_item_and_by_interaction(
    codes: list[tuple[int, ...]], seed: int
) -> None:
    errors, events = _errors(codes, seed), np.random.default_rng(seed).integers(0, 5, len(codes))
    events[0] += 1
    report = analyze(
        _table(codes), None, CONFIG, events=torch.from_numpy(events), errors=torch.from_numpy(errors)
    )
    last = [errors[item, len(code) - 1] for item, code in enumerate(codes)]
    assert report.figures["reconstruction"] == pytest.approx(np.mean(last))
    assert report.figures["reconstruction_draw"] == pytest.approx(np.average(last, weights=events))
    for row in report.levels.iter_rows(named=True):
        here = [item for item, code in enumerate(codes) if len(code) >= row["level"]]
        there = errors[here, row["level"] - 1]
        assert row["reconstruction"] == (pytest.approx(there.mean()) if here else None)
        met = events[here].sum() > 0
        assert row["reconstruction_draw"] == (
            pytest.approx(np.average(there, weights=events[here])) if met else None
        )


def test_reconstruction_by_interaction_is_null_where_interactions_are_not_known() -> None:
    codes = [(0,), (1, 2)]
    report = analyze(_table(codes), None, CONFIG, errors=torch.from_numpy(_errors(codes, 0)))
    assert "reconstruction" in report.figures and "reconstruction_draw" not in report.figures
    assert report.levels["reconstruction"].is_not_null().to_list() == [True, True, False]
    assert report.levels["reconstruction_draw"].is_null().all()


def test_words_say_how_much_the_codes_keep_and_of_whom() -> None:
    errors = torch.tensor([[0.4, 0.2, 0.1], [0.4, 0.3, 0.3]])
    table = _table([(0, 1, 2), (1, 2, 3)])
    words = analyze(table, None, CONFIG, errors=errors).bands["reconstruction"]
    assert words.startswith("items lie 0.200 (mean cosine 0.90) from what all their codes decode to")
    for events, than in (([9, 1], "better than"), ([1, 9], "worse than"), ([1, 1], "as well as")):
        said = analyze(table, None, CONFIG, errors=errors, events=torch.tensor(events)).bands[
            "reconstruction"
        ]
        assert said.endswith(f"codes keep popular items {than} others")


def test_errors_that_do_not_belong_to_the_table_are_refused() -> None:
    codes = [(0,), (1, 2), (0, 1, 2)]
    right = torch.from_numpy(_errors(codes, 0))
    for item, level, value in ((1, 1, np.nan), (0, 1, 0.5), (2, 0, 4.1), (2, 2, -0.1), (2, 1, np.inf)):
        wrong = right.clone()
        wrong[item, level] = value
        with pytest.raises(ValueError, match=f"item {item} has .* at level {level + 1} and {item + 1} codes"):
            analyze(_table(codes), None, CONFIG, errors=wrong)
    with pytest.raises(ValueError, match=r"errors are \(3, 2\), the codes \(3, 3\)"):
        analyze(_table(codes), None, CONFIG, errors=right[:, :2])
    with pytest.raises(ValueError, match="SidTable has 3 items, errors 2"):
        analyze(_table(codes), None, CONFIG, errors=right[:2])


def _spread(count: int, sizes: list[int]) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(int(rng.integers(size)) for size in sizes) for _ in range(count)]


def test_the_report_follows_from_the_saved_table(tmp_path: Path) -> None:
    table = _table(_spread(300, [16, 16]), [16, 16])
    report = analyze(table, _catalog(300), CONFIG)
    table.save(tmp_path / "table")
    report.save(tmp_path / "report")
    again = analyze(SidTable.load(tmp_path / "table"), _catalog(300), CONFIG)
    assert again.fingerprint == CollisionReport.load(tmp_path / "report").fingerprint
    assert report.sids == table.fingerprint


def test_suffixes_do_not_count() -> None:
    codes = [(0, 1), (0, 1), (1, 2), (2, 0)]
    table = _table(codes)
    moved = table.codes.with_columns(suffix=(pl.lit(3, pl.UInt16) - pl.col("suffix")).cast(pl.UInt16))
    other = SidTable(codes=moved, codebook_sizes=SIZES, suffix_size=4, shared=False, tokenizer="")
    assert analyze(table, None, CONFIG).figures == analyze(other, None, CONFIG).figures


def test_a_healthy_table_passes_the_gate() -> None:
    report = analyze(_table(_spread(500, [16, 16, 16]), [16] * 3), None, CONFIG)
    assert report.verdict == "healthy"
    gate(report, CONFIG)


def test_the_gate_names_the_level_that_collapsed_and_its_figure() -> None:
    codes = [(a, int(i == 7), c) for i, (a, _, c) in enumerate(_spread(500, [16, 16, 16]))]
    report = analyze(_table(codes, [16] * 3), None, CONFIG)
    assert report.verdict == "collapsed"
    with pytest.raises(CollapseError, match=r"level 2: perplexity 1\.01 of 16 codes") as caught:
        gate(report, CONFIG)
    assert "level 1" not in str(caught.value) and "level 3" not in str(caught.value)


def test_the_gate_names_collision_rate_and_largest_group() -> None:
    codes = [(i % 8 // 4 * (i % 4), i % 2) for i in range(400)]
    report = analyze(_table(codes, [4, 2]), None, CONFIG)
    with pytest.raises(CollapseError, match=r"collision rate 1\.000, wanted at most 0\.95.*largest group"):
        gate(report, CONFIG)
    gate(report, CollisionConfig(max_collision_rate=1, max_group_share=1))


def test_where_collapse_is_a_result_the_gate_lets_it_pass_and_the_verdict_still_says_so() -> None:
    told = CollisionConfig(on_collapse="report")
    report = analyze(_table([(0, 0)] * 100, [4, 2]), None, told)
    assert report.verdict == "collapsed"
    gate(report, told)
    with pytest.raises(CollapseError):
        gate(report, CONFIG)


def test_a_pair_in_a_catalogue_of_four_is_no_collapse() -> None:
    report = analyze(_table([(0, 1), (0, 1), (1, 0), (1, 1)], [2, 2]), None, CONFIG)
    assert report.figures["largest_group"] == 2 and report.verdict != "collapsed"
    gate(report, CONFIG)


def test_one_code_of_a_small_codebook_is_collapse_too() -> None:
    """Perplexity 1 of 4 codes is a quarter of the codebook and yet nothing but collapse."""
    codes = [(0, b) for _, b in _spread(100, [4, 64])]
    report = analyze(_table(codes, [4, 64]), None, CollisionConfig(max_collision_rate=1, max_group_share=1))
    assert report.verdict == "collapsed"
    assert evenness(report.levels)[0] == 0


def test_between_the_thresholds_the_verdict_is_watch() -> None:
    codes = [(a if i % 4 == 0 else 0, b) for i, (a, b) in enumerate(_spread(600, [16, 64]))]
    report = analyze(_table(codes, [16, 64]), None, CollisionConfig(max_collision_rate=1))
    assert report.verdict == "watch"
    gate(report, CollisionConfig(max_collision_rate=1))


def test_a_level_that_nobody_reaches_is_no_collapse() -> None:
    codes = [(a,) for (a,) in _spread(12, [16])]
    report = analyze(_table(codes, [16, 16]), None, CollisionConfig(max_collision_rate=1))
    assert evenness(report.levels).to_list()[1] is None
    assert "fewer than two items reach it" in report.bands["level_2"]
    assert report.verdict != "collapsed"


def _with_deep_items(count: int, same: int, codes: int = 64) -> CollisionReport:
    """``count`` items of two codes, of which the first ``same`` go one level deeper, all with the same code."""
    codes_of = [(a, b, 3) if i < same else (a, b) for i, (a, b) in enumerate(_spread(count, [codes] * 2))]
    return analyze(_table(codes_of, [codes] * 3), None, CollisionConfig(max_collision_rate=1))


@pytest.mark.parametrize(
    ("same", "verdict"),
    [(1, "healthy"), (3, "healthy"), (4, "healthy"), (5, "watch"), (24, "watch"), (25, "collapsed")],
)
def test_a_level_that_few_items_reach_is_no_collapse_and_of_more_than_four_worth_a_look(
    same: int, verdict: str
) -> None:
    """A twentieth of 500 items is 25."""
    report = _with_deep_items(500, same)
    assert report.verdict == verdict
    if verdict == "collapsed":
        with pytest.raises(CollapseError, match="level 3: .*100% of its 25 items have one code"):
            gate(report, CONFIG)
    else:
        gate(report, CollisionConfig(max_collision_rate=1))


def test_two_of_a_small_catalogue_are_no_collapse_though_they_are_a_tenth_of_it() -> None:
    assert _with_deep_items(20, 2).verdict == "healthy"


def test_a_level_that_all_reach_counts_in_a_catalogue_of_any_size() -> None:
    report = analyze(_table([(0, 0), (0, 1), (0, 2)]), None, CONFIG)
    with pytest.raises(CollapseError, match="level 1"):
        gate(report, CONFIG)


def _short_and_long(count: int, codes: int, deepest: int) -> list[tuple[int, ...]]:
    """Strings of 1 to ``deepest`` codes, as many of each length: short ones collide, long ones do not."""
    return [code[: 1 + item % deepest] for item, code in enumerate(_spread(count, [codes] * deepest))]


def test_short_sids_collide_by_design_and_that_alone_is_no_collapse() -> None:
    """Published tables of variable length have down to .78 strings an item; one has fewer still, and is watched."""
    usual = analyze(_table(_short_and_long(1600, 64, 4), [64] * 4), None, CONFIG)
    assert 0.7 < usual.figures["distinct_sids"] / 1600 < 0.8
    assert usual.verdict == "healthy"
    crowded = analyze(_table(_short_and_long(4000, 32, 2), [32] * 2), None, CONFIG)
    assert crowded.figures["distinct_sids"] < 0.25 * 4000 and crowded.figures["collision_rate"] > 0.8
    assert crowded.verdict == "watch"
    gate(crowded, CONFIG)


def test_lengths_that_fell_to_one_code_are_collapse() -> None:
    """All but a few items end after their first code: well spread, and yet they tell nothing apart."""
    codes = [code[: 1 if item % 50 else 3] for item, code in enumerate(_spread(2000, [64] * 3))]
    report = analyze(_table(codes, [64] * 3), None, CONFIG)
    assert evenness(report.levels)[0] > 0.9
    with pytest.raises(CollapseError, match=r"collision rate 0\.980"):
        gate(report, CONFIG)


def test_words_name_how_many_items_reach_a_level() -> None:
    bands = _with_deep_items(500, 5).bands
    assert "codes in use by the 5 items that reach it, perplexity" in bands["level_3"]
    assert "codes in use, perplexity" in bands["level_2"]


def test_words_stand_beside_every_figure() -> None:
    codes = _spread(200, [4, 4])
    events = torch.ones(200, dtype=torch.long)
    x = _embeddings(np.random.default_rng(1).normal(size=(200, 8)))
    report = analyze(_table(codes, [4, 4]), None, CONFIG, events=events, embeddings=x)
    assert report.bands["level_1"].startswith("level 1: 4 of 4 codes in use, perplexity ")
    assert "about as often as" in report.bands["collision_share_of_events"]
    assert "unlike items" in report.bands["cosine_in_groups"]


def test_parts_of_another_catalogue_are_refused() -> None:
    with pytest.raises(ValueError, match="SidTable has 3 items, catalogue 4"):
        analyze(_table([(0,), (1,), (2,)]), _catalog(4), CONFIG)
