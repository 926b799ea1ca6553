"""Laws of serving: who gets what, in whose words, and what is said where it could not be done as asked."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import Bundle
from components.data.batches import Rows, held_out_rows
from components.embeddings import LsaConfig, fit_encoder
from components.recommenders import batch_scoring
from components.recommenders.batch_scoring import ScoreConfig, Scored, score_file
from components.recommenders.build import RecommenderConfig, load_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.decoding import rank_rows
from components.recommenders.intrr import IntrrConfig
from components.recommenders.serving import (
    BundleRanker,
    RequestError,
    check_histories,
    latest_rows,
    read_histories,
    search_width,
    training_popularity,
)
from components.seams import Ranker, Ranking
from components.tokenizers.sids import table_symbols
from components.tokenizers.trie import build_trie
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "head_dim": 8,
    "hidden": 32,
    "max_history": 5,
}


def bundle_of(tiny, model: RecommenderConfig) -> Bundle:
    stage = RecommenderStage(model=model, loop=LoopConfig(epochs=1), device="cpu")
    return Bundle(
        catalog=tiny.catalog,
        encoder=fit_encoder(tiny.catalog, LsaConfig(dim=16)),
        tokenizer=tiny.tokenizer,
        sids=tiny.sids,
        recommender=train_recommender(tiny.split, tiny.sids, tiny.embeddings, stage, lambda *_: None),
        popularity=training_popularity(tiny.split, tiny.catalog),
    )


@pytest.fixture(scope="module")
def bundle(tiny) -> Bundle:
    return bundle_of(tiny, CausalConfig(**SIZES))


@pytest.fixture(scope="module")
def ranker(bundle) -> BundleRanker:
    return BundleRanker(bundle, CPU)


@pytest.fixture(scope="module")
def ids(tiny) -> list[str]:
    return tiny.catalog.items["raw_id"].to_list()


@pytest.fixture(scope="module")
def popular(bundle, ids) -> list[str]:
    """Raw ids by training events, of equal ones the first of the catalogue first."""
    events = bundle.popularity["events"].to_list()
    return sorted(ids, key=lambda name: (-events[ids.index(name)], ids.index(name)))


def column(*histories: list[str | None] | None) -> pl.Series:
    return pl.Series("history", histories, dtype=pl.List(pl.String))


def test_an_answer_is_the_beam_search_of_the_recommender_in_the_clients_ids(
    tiny, bundle, ranker, ids
) -> None:
    """The order of the rows is kept although histories of like length are decoded together."""
    chosen = [[7, 3], [40, 41, 42, 43, 44, 45, 46], [9], [0, 119]]
    answer = ranker.recommend(column(*([ids[i] for i in row] for row in chosen)), 6)
    model = load_recommender(bundle.recommender, bundle.sids)
    symbols = table_symbols(bundle.sids)
    rows = held_out_rows(
        pl.DataFrame(
            {"history": chosen, "target": [0] * 4},
            schema={"history": pl.List(pl.UInt32), "target": pl.UInt32},
        )
    )
    with torch.no_grad():
        wanted = rank_rows(
            model, rows, model.catalogue(symbols, build_trie(symbols)), 1, 20, exclude_seen=True
        )
    assert answer["items"].to_list() == [[ids[i] for i in row] for row in wanted.items[:, :6].tolist()]
    titles = tiny.catalog.items["title"].to_list()
    assert answer["titles"].to_list() == [[titles[i] for i in row] for row in wanted.items[:, :6].tolist()]
    np.testing.assert_allclose(np.stack(answer["scores"].to_list()), wanted.scores[:, :6].numpy(), atol=1e-5)
    assert answer["warning"].to_list() == [""] * 4


def test_unknown_items_change_nothing_but_the_warning(ranker, ids) -> None:
    plain, mixed = column(ids[:3], ids[4:6]), column([ids[0], "x", *ids[1:3]], [*"abcda", *ids[4:6]])
    before, after = ranker.recommend(plain, 5), ranker.recommend(mixed, 5)
    assert after.drop("warning").equals(before.drop("warning"))
    assert after["warning"].to_list() == [
        "ignored 1 unknown item: 'x'",
        "ignored 4 unknown items: 'a', 'b', 'c', ...",
    ]


def test_a_long_unknown_id_is_cut_in_the_warning(ranker, ids) -> None:
    (warning,) = ranker.recommend(column([ids[0], "x" * 10_000]))["warning"]
    assert warning == f"ignored 1 unknown item: '{'x' * 40}'"


def test_ids_are_found_whatever_they_sort_like(tiny, bundle) -> None:
    """Before all, after all and between: found where they are equal, and only there."""
    odd = ["", "zebra", "Zebra", "é", "10", "9", "item", "item-00000000"]
    names = pl.Series(odd + [f"item-{i:05d}" for i in range(len(odd), tiny.catalog.num_items)])
    catalog = dataclasses.replace(tiny.catalog, items=tiny.catalog.items.with_columns(raw_id=names))
    renamed = BundleRanker(dataclasses.replace(bundle, catalog=catalog), CPU)
    found = renamed.look_up(column(odd, ["zebr", "e", "item-", "\U0010ffff", "1", " "]))
    assert found.rows.values.tolist() == list(range(len(odd))) and found.known.tolist() == [len(odd), 0]
    assert found.warnings[1].startswith("ignored 6 unknown items: 'zebr', 'e', 'item-', ...")


def test_who_has_no_known_item_gets_what_is_popular(bundle, ranker, ids, popular) -> None:
    answer = ranker.recommend(column([], None, ["x"], [None], [ids[5]], ["x", "x", "y", None]), 4)
    assert [row == popular[:4] for row in answer["items"].to_list()] == [True] * 4 + [False, True]
    nobody = "no item of the history is known, so these are the most popular items"
    assert answer["warning"].to_list() == [
        "the history is empty, so these are the most popular items",
        "the history is empty, so these are the most popular items",
        f"ignored 1 unknown item: 'x'; {nobody}",
        f"ignored nulls in the history: 1; {nobody}",
        "",
        f"ignored 2 unknown items: 'x', 'y'; ignored nulls in the history: 1; {nobody}",
    ]
    events = bundle.popularity["events"].to_numpy()
    share = (events + 1) / (events.sum() + len(ids))
    np.testing.assert_allclose(answer["scores"][0], np.log(np.sort(share)[::-1][:4]))


def test_popularity_over_all_items_is_a_finite_distribution(tiny, bundle) -> None:
    """Also over items that nobody met."""
    events = bundle.popularity.with_columns(
        events=pl.when(pl.col("item_id") < 100).then("events").otherwise(pl.lit(0, pl.UInt32))
    )
    ranker = BundleRanker(dataclasses.replace(bundle, popularity=events), CPU)
    (scores,) = ranker.recommend(column(None), tiny.catalog.num_items)["scores"].to_list()
    assert np.exp(scores).sum() == pytest.approx(1) and np.isfinite(scores).all()
    assert scores == sorted(scores, reverse=True)


def test_nulls_are_left_out_and_repeats_are_read_as_often_as_they_stand(ranker, ids) -> None:
    given = column([ids[1], None, ids[2]], [ids[1], ids[2]], [ids[1], ids[1], ids[2]])
    found = ranker.look_up(given)
    assert found.rows.values.tolist() == [1, 2, 1, 2, 1, 1, 2] and found.rows.end.tolist() == [2, 4, 7]
    assert found.given.tolist() == [3, 2, 3]
    answer = ranker.recommend(given, 5)
    assert answer["items"][0].equals(answer["items"][1])
    assert answer["warning"].to_list() == ["ignored nulls in the history: 1", "", ""]
    assert not {ids[1], ids[2]} & set(answer["items"][2])


@pytest.mark.parametrize("k", [1, 19, 20, 21, 70, 120])
def test_any_length_up_to_the_catalogue_can_be_asked_for(ranker, ids, k: int) -> None:
    """Above the width of the search too; what is excluded makes lists shorter, and nothing stands twice."""
    answer = ranker.recommend(column(ids[:50], None), k)
    assert answer["items"].list.len().to_list() == [min(k, 70), k]
    assert answer["items"].list.n_unique().equals(answer["items"].list.len())
    assert not set(ids[:50]) & set(answer["items"][0])
    kept = ranker.recommend(column(ids[:50]), k, exclude_seen=False)
    assert kept["items"].list.len().item() == k
    if k == 120:
        assert sorted(kept["items"][0]) == sorted(ids)
        assert set(ids[:50]) <= set(kept["items"][0])


@pytest.mark.parametrize(("short", "long"), [(3, 20), (19, 20), (21, 40), (25, 33), (41, 80)])
def test_short_lists_are_beginnings_of_longer_ones_that_are_searched_alike(
    ranker, ids, short: int, long: int
) -> None:
    some = column(*(ids[i : i + 2] for i in range(0, 100, 5)))
    assert ranker.recommend(some, short)["items"].equals(
        ranker.recommend(some, long)["items"].list.head(short)
    )


@given(st.integers(1, 1000))
def test_a_search_is_as_wide_as_the_list_and_less_than_twice_that(k: int) -> None:
    assert k <= search_width(k) < max(2 * k, 21) and search_width(k) % 20 == 0


def test_exact_lists_are_beginnings_of_all_longer_ones(tiny, ids) -> None:
    ranker = BundleRanker(bundle_of(tiny, IntrrConfig(**SIZES)), CPU)
    some = column(*(ids[i : i + 2] for i in range(0, 100, 5)))
    longest = ranker.recommend(some, 100, decode="exact")["items"]
    for k in (5, 20, 21, 40, 41):
        assert ranker.recommend(some, k, decode="exact")["items"].equals(longest.list.head(k))


def test_a_list_that_is_shorter_than_asked_says_why(ranker, ids) -> None:
    answer = ranker.recommend(column(ids[:50], ["x", *ids[:119]], ids[:2], None), 110)
    assert answer["warning"].to_list() == [
        "the list has 70 of 110 items: the history holds all others",
        "ignored 1 unknown item: 'x'; the list has 1 of 110 items: the history holds all others",
        "",
        "the history is empty, so these are the most popular items",
    ]
    assert ranker.recommend(column(ids), 1)["items"].to_list() == [[]]
    assert set(ranker.recommend(column(ids[:50]), 120, exclude_seen=False)["warning"]) == {""}


def test_a_list_longer_than_any_that_is_served_is_refused(bundle, ids, monkeypatch) -> None:
    monkeypatch.setattr("components.recommenders.serving.MOST", 50)
    ranker = BundleRanker(bundle, CPU)
    assert ranker.recommend(column(ids[:2]), 50)["items"].list.len().item() == 50
    with pytest.raises(RequestError, match="from 1 to 50, the longest list that is served; got 51"):
        ranker.recommend(column(ids[:2]), 51)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=6), st.integers(1, 8)
)
def test_of_long_histories_the_latest_are_kept_and_one_of_each_earlier_item(histories, most: int) -> None:
    end = np.cumsum([len(each) for each in histories])
    start = np.concatenate([[7], end + 7])[:-1]
    rows = Rows(np.array([9] * 7 + sum(histories, [])), start, end + 7, np.zeros_like(end))
    for keep_seen in (True, False):
        cut = latest_rows(rows, most, keep_seen=keep_seen)
        for history, first, last in zip(histories, cut.start, cut.end, strict=True):
            kept = cut.values[first:last].tolist()
            assert kept[-most:] == history[-most:]
            assert keep_seen or len(kept) <= most
            if keep_seen:
                assert set(kept) == set(history)
                assert len(history) <= most or len(kept) <= most + len(set(history) - set(history[-most:]))


def test_a_long_history_is_answered_as_before_and_pads_nothing(tiny, bundle, ids, monkeypatch) -> None:
    """Its latest items are read and all of them excluded; the batch is no wider than its different items."""
    widths = []
    long, short = column(ids[:40] * 50 + ids[40:45]), column(ids[:3])
    ranker = BundleRanker(bundle, CPU)
    within = ranker._rankers["beam"]

    class Watched:
        def rank(self, batch: Any, *arguments: Any, **settings: Any) -> Ranking:
            widths.append(batch.items.shape[1])
            return within.rank(batch, *arguments, **settings)

    ranker._rankers["beam"] = Watched()
    together = ranker.recommend(pl.concat([long, short]), 20)
    assert max(widths) == 45
    assert together["items"][1].equals(ranker.recommend(short, 20)["items"][0])
    monkeypatch.setattr("components.recommenders.serving.latest_rows", lambda rows, *_, **__: rows)
    uncut = ranker.recommend(pl.concat([long, short]), 20)
    assert max(widths) == 2005 and uncut["items"].equals(together["items"])


def test_nothing_asked_is_nothing_answered(ranker) -> None:
    answer = ranker.recommend(column(), 3)
    assert len(answer) == 0 and answer.columns == ["items", "titles", "scores", "warning"]


def test_the_memory_setting_changes_no_answer(ranker, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    some = column(*(ids[i : i + 1 + i % 4] for i in range(30)))
    before = ranker.recommend(some, 5)
    monkeypatch.setattr("components.recommenders.serving.QUERIES", 20)
    after = ranker.recommend(some, 5)
    assert after.drop("scores").equals(before.drop("scores"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"k": 0}, "k must be a whole number from 1 to 120, the items of the catalogue; got 0"),
        ({"k": -3}, "got -3"),
        ({"k": 121}, "from 1 to 120, the items of the catalogue; got 121"),
        ({"k": "ten"}, "got 'ten'"),
        ({"k": True}, "got True"),
        ({"k": 2.0}, r"got 2\.0"),
        ({"k": None}, "got None"),
        ({"exclude_seen": None}, "exclude_seen must be true or false, got None"),
        ({"exclude_seen": 1}, "exclude_seen must be true or false, got 1"),
        ({"decode": "exact"}, "decode must be one of beam for this model, got 'exact'"),
        ({"decode": ["beam"]}, "decode must be one of beam"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(ranker, ids, asked: dict[str, Any], said: str) -> None:
    for histories in (column(ids[:2]), column(None)):
        with pytest.raises(RequestError, match=said):
            ranker.recommend(histories, **asked)


def test_a_recommender_with_exact_scores_serves_them(tiny, ids) -> None:
    """The exact list of all items is the beam's where the beam is as wide as the catalogue."""
    ranker = BundleRanker(bundle_of(tiny, IntrrConfig(**SIZES)), CPU)
    some = column(ids[:2], ids[50:54], None)
    exact, beam = (ranker.recommend(some, 120, decode=way) for way in ("exact", "beam"))
    assert exact["items"].list.len().to_list() == [118, 116, 120]
    np.testing.assert_allclose(exact["scores"].explode(), beam["scores"].explode(), atol=1e-4)
    with pytest.raises(RequestError, match="one of beam, exact for this model, got 'greedy'"):
        ranker.recommend(some, decode="greedy")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([["a", "b"], None, []], [["a", "b"], None, []]),
        ([["a", None]], [["a", None]]),
        ([["a"], float("nan")], [["a"], None]),
        ([("a", "b"), np.array(["c"], dtype=object)], [["a", "b"], ["c"]]),
        ([None], [None]),
        ([[]], [[]]),
        ([[None]], [[None]]),
        ([], []),
    ],
)
def test_histories_are_read_as_clients_send_them(values: list[Any], wanted: list[Any]) -> None:
    read = read_histories(values)
    assert read.dtype == pl.List(pl.String) and read.to_list() == wanted


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([1, 2], "row 0 holds 1"),
        (["abc"], "row 0 holds 'abc'"),
        ([["a"], "abc"], "row 1 holds 'abc'"),
        ([["a"], [22423]], r"row 1 holds \[22423\]"),
        ([[1]], r"row 0 holds \[1\]"),
        ([["a"], None, ["b", 2]], r"row 2 holds \['b', 2\]"),
        ([[["a"]]], r"row 0 holds \[\['a'\]\]"),
        ([{"a": 1}], "row 0 holds {'a': 1}"),
        ([[True]], r"row 0 holds \[True\]"),
        ([[b"a"]], r"row 0 holds \[b'a'\]"),
        ([[2**80]], "row 0 holds"),
        ([["a"], ["b", "\ud800"]], r"row 1 holds \['b', '\\ud800'\]"),
        (["\ud800"], r"row 0 holds '\\ud800'"),
    ],
)
def test_what_is_no_history_is_refused_by_row(values: list[Any], place: str) -> None:
    with pytest.raises(RequestError, match=f"history must be a list of item ids, which are strings; {place}"):
        read_histories(values)


def test_a_column_of_another_type_is_refused() -> None:
    for wrong in (pl.Series(["a"]), pl.Series([[1]]), pl.Series([[["a"]]])):
        with pytest.raises(RequestError, match="this column is"):
            check_histories(wrong)


def test_threads_get_what_each_would_get_alone(ranker, ids) -> None:
    """Requests of all kinds at once, each from a thread of its own that starts with the others."""
    requests = [
        (column(*(ids[(i * 7 + j) % 110 :][: 1 + (i + j) % 6] for j in range(1 + i % 3)), [f"x{i}"]), 3 + i)
        for i in range(24)
    ]
    alone = [ranker.recommend(*request) for request in requests]
    start = threading.Barrier(len(requests))

    def ask(request: tuple[pl.Series, int]) -> pl.DataFrame:
        start.wait()
        return ranker.recommend(*request)

    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(ask, requests))
    assert [a.equals(b) for a, b in zip(alone, together, strict=True)] == [True] * len(requests)


def test_a_recommender_is_asked_by_one_thread_at_a_time(bundle, ids) -> None:
    ranker = BundleRanker(bundle, CPU)
    inside, most = [], []

    class Watched:
        def __init__(self, within: Ranker) -> None:
            self.within = within

        def rank(self, *arguments: Any, **settings: Any) -> Ranking:
            inside.append(threading.get_ident())
            most.append(len(inside))
            time.sleep(0.005)
            ranking = self.within.rank(*arguments, **settings)
            inside.pop()
            return ranking

    ranker._rankers["beam"] = Watched(ranker._rankers["beam"])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ranker.recommend, [column(ids[:2])] * 16))
    assert most == [1] * 16


def test_popularity_counts_training_events_alone(tiny) -> None:
    frame = training_popularity(tiny.split, tiny.catalog)
    trained = tiny.split.train["sequence"].explode()
    assert frame["events"].sum() == len(trained) < len(tiny.log.events)
    assert frame["events"][3] == (trained == 3).sum()
    other = dataclasses.replace(tiny.catalog, items=tiny.catalog.items.with_columns(title=pl.lit("other")))
    with pytest.raises(ValueError, match="take split and catalogue of the same run"):
        training_popularity(tiny.split, other)


@pytest.fixture(scope="module")
def source(ids, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Histories of all kinds, beside columns of types that not every library has."""
    path = tmp_path_factory.mktemp("scoring") / "histories.parquet"
    frame = pl.DataFrame(
        {
            "who": pl.int_range(50, eager=True).cast(pl.UInt16),
            "history": column(*(None if i % 10 == 0 else ["x", *ids[i : i + i % 4]] for i in range(50))),
            "segment": pl.Series(["a", "b"] * 25).cast(pl.Categorical),
            "since": pl.Series([0, 1] * 25).cast(pl.Datetime("ms", "Europe/Paris")),
        }
    )
    frame.write_parquet(path, row_group_size=17)
    return path


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_a_file_is_answered_row_by_row_whatever_is_read_at_once(
    ranker, source: Path, tmp_path: Path, rows: int
) -> None:
    target, lines = tmp_path / "new" / "answers.parquet", []
    scored = score_file(ranker, source, target, ScoreConfig(k=3, rows=rows), lines.append)
    given, answers = pl.read_parquet(source), pl.read_parquet(target)
    assert answers.select(given.columns).equals(given)
    assert answers.drop(given.columns, "scores").equals(ranker.recommend(given["history"], 3).drop("scores"))
    known = sum(i % 4 for i in range(50) if i % 10)
    none = sum(i % 10 == 0 or i % 4 == 0 for i in range(50))
    assert scored == Scored(rows=50, entries=known + 45, ignored=45, popular=none)
    assert lines[-1] == "50 of 50 rows" and (len(lines) == 10 if rows < 10 else len(lines) <= 3)
    kept = pq.read_schema(source)
    assert [pq.read_schema(target).field(name).type for name in kept.names] == kept.types


def test_a_file_without_rows_is_answered_without_rows(ranker, tmp_path: Path) -> None:
    pl.DataFrame({"history": column()}).write_parquet(tmp_path / "none.parquet")
    scored = score_file(ranker, tmp_path / "none.parquet", tmp_path / "answers.parquet", ScoreConfig())
    assert scored == Scored(0, 0, 0, 0)
    answers = pl.read_parquet(tmp_path / "answers.parquet")
    assert len(answers) == 0 and answers.columns == ["history", "items", "titles", "scores", "warning"]


@pytest.mark.parametrize(
    ("frame", "config", "said"),
    [
        ({"past": [["a"]]}, {}, r"no column history among \['past'\]"),
        (
            {"history": ["a"]},
            {},
            "history must be a list of item ids, which are strings; this column is String",
        ),
        ({"history": [[1]]}, {}, r"this column is List\(Int64\)"),
        ({"history": [["a"]], "items": [1]}, {}, r"columns \['items'\] are what scoring adds; rename them"),
        ({"history": [["a"]]}, {"k": 121}, "k must be a whole number from 1 to 120"),
        ({"history": [["a"]]}, {"decode": "exact"}, "decode must be one of beam for this model"),
    ],
)
def test_a_file_that_cannot_be_answered_is_refused_by_name(
    ranker, tmp_path: Path, frame: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    pl.DataFrame(frame).write_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match=rf"wrong\.parquet: .*{said}"):
        score_file(
            ranker, tmp_path / "wrong.parquet", tmp_path / "out" / "answers.parquet", ScoreConfig(**config)
        )
    assert not any(tmp_path.glob("out/*"))


def test_what_is_no_parquet_is_refused_by_name(ranker, tmp_path: Path) -> None:
    (tmp_path / "wrong.parquet").write_text("history\n[a]\n")
    with pytest.raises(ValueError, match=r"wrong\.parquet: not a parquet file that can be read"):
        score_file(ranker, tmp_path / "wrong.parquet", tmp_path / "answers.parquet", ScoreConfig())
    with pytest.raises(FileNotFoundError):
        score_file(ranker, tmp_path / "none.parquet", tmp_path / "answers.parquet", ScoreConfig())


def test_a_file_stands_there_whole_or_not_at_all(
    ranker, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "answers.parquet"
    score_file(ranker, source, target, ScoreConfig(k=1))
    before = target.read_bytes()
    answered, parts = batch_scoring._answered, []

    def breaks(*arguments):
        parts.append(answered(*arguments))
        if len(parts) == 3:
            raise OSError(28, "No space left on device")
        return parts[-1]

    monkeypatch.setattr(batch_scoring, "_answered", breaks)
    with pytest.raises(OSError, match="No space left"):
        score_file(ranker, source, target, ScoreConfig(rows=5))
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]
