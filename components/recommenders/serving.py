"""A Bundle answers histories of raw item ids: ranked items by name, and a warning where it could not do as asked.

Shapes: R histories, k items of an answer, N items of the catalogue.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from components.artifacts import Bundle, ItemCatalog, SequenceSplit
from components.config import require
from components.data.batches import Rows
from components.data.splits import count_events
from components.recommenders.build import load_recommender
from components.recommenders.decoding import rank_rows
from components.recommenders.exact import exact_ranker
from components.seams import Ranker
from components.tokenizers.sids import table_symbols
from components.tokenizers.trie import build_trie

BEAMS = 20
"""Least width of the search. Shorter lists are cut from it: a beam as narrow as the list loses good items. Longer ones
double it until they fit (``search_width``)."""
MOST = 1000
"""Longest list that is served: what a search holds grows with its width, and one request must not take all memory."""
QUERIES = 2560
"""Beams decoded at once, those of all histories of a batch together: sets the memory, not the answer."""
NAMED = 3
"""Most unknown ids that a warning spells out, each by its first characters."""
SPELT = 40

HISTORY = pl.List(pl.String)
ANSWER = pl.Schema(
    {"items": HISTORY, "titles": HISTORY, "scores": pl.List(pl.Float64), "warning": pl.String()}
)


class RequestError(ValueError):
    """What was asked cannot be answered; the message says in one sentence what is wrong with it."""


def training_popularity(split: SequenceSplit, catalog: ItemCatalog) -> pl.DataFrame:
    """Count the training events of every item, as ``Bundle.popularity`` wants them.

    Raises
    ------
    ValueError
        The split is one of another catalogue.
    """
    require(
        split.catalog == catalog.fingerprint,
        f"the SequenceSplit is of ItemCatalog {split.catalog[:12]}, got {catalog.fingerprint[:12]}: its ids mean other "
        "items; take split and catalogue of the same run",
    )
    events = count_events(split.train["sequence"], catalog.num_items)
    return pl.DataFrame({"events": events}).select(
        item_id=pl.int_range(pl.len(), dtype=pl.UInt32), events=pl.col("events").cast(pl.UInt32)
    )


def read_histories(values: Sequence[Any]) -> pl.Series:
    """Take histories as a client sent them: one list of raw ids a row, or nothing (None, NaN).

    Raises
    ------
    RequestError
        A row is no list, or an id no string; the message names the row.
    """
    try:
        # Arrow finds out what the values are; asked for strings it would cut the string "abc" into three ids.
        histories = pl.Series("history", pa.array(values, from_pandas=True))
        return check_histories(histories)
    except (ValueError, TypeError, OverflowError) as error:
        which = [row for row, value in enumerate(values) if not _is_history(value)]
        place = f"row {which[0]} holds {values[which[0]]!r:.{SPELT}}" if which else str(error)
        raise RequestError(f"history must be a list of item ids, which are strings; {place}") from error


def _is_history(value: Any) -> bool:
    if isinstance(value, list | tuple | np.ndarray):
        return all(each is None or _is_text(each) for each in value)
    return value is None or value != value  # NaN is how pandas spells a missing value


def _is_text(value: Any) -> bool:
    """Half of a surrogate pair is a Python string, and no text."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def check_histories(histories: pl.Series) -> pl.Series:
    """Return a column of histories as lists of strings.

    Raises
    ------
    RequestError
        The column has another type.
    """
    # Arrow and parquet know no type for the items of lists that are all empty.
    if histories.dtype not in (HISTORY, pl.List(pl.Null), pl.Null):
        raise RequestError(
            f"history must be a list of item ids, which are strings; this column is {histories.dtype}"
        )
    return histories if histories.dtype == HISTORY else histories.cast(HISTORY)


def search_width(k: int) -> int:
    """Return the width of the search for lists of ``k``: the same for many k, whose lists then are cut from one."""
    return BEAMS * 2 ** max(0, (k - 1) // BEAMS).bit_length()


class LookedUp(NamedTuple):
    """Histories in the item ids of the catalogue."""

    rows: Rows
    """The known items of R histories; no targets, which nobody knows."""
    given: NDArray[np.int64]
    """(R,) entries of each history as it was sent."""
    warnings: pl.Series
    """(R,) what of it could not be used, and what was done instead; "" for nothing."""

    @property
    def known(self) -> NDArray[np.int64]:
        """(R,) entries that are items of the catalogue."""
        return self.rows.end - self.rows.start


class BundleRanker:
    """Ranks the items of a bundle. Everything that does not depend on a request is made once, here.

    One ranker may serve several threads. It ranks for one at a time, so recommenders need not be safe for threads; more
    cores are used by more processes.

    Parameters
    ----------
    bundle : Bundle
        Catalogue, table, recommender and popularity.
    device : torch.device
        Where to rank.
    """

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        items = bundle.catalog.items
        self.num_items = len(items)
        # Requests are small and many: arrow and numpy answer in microseconds where a query of frames takes a fraction
        # of a millisecond. Ids are looked up by bisection; a join would read all items again for every request.
        self._raw_ids, self._titles = items["raw_id"].to_arrow(), items["title"].fill_null("").to_arrow()
        by_name = items.select("raw_id", "item_id").sort("raw_id")
        self._names, self._named = by_name["raw_id"], by_name["raw_id"].to_arrow()
        self._item_named = by_name["item_id"].to_numpy().astype(np.int64)
        # One is added everywhere, so that an item without events has a finite score.
        share = bundle.popularity["events"].to_numpy().astype(np.float64) + 1
        self._most = min(self.num_items, MOST)
        self._popular = np.argsort(-share, kind="stable")
        self._popular_scores = np.log(share / share.sum())[self._popular]

        recommender = load_recommender(bundle.recommender, bundle.sids).to(device)
        symbols = table_symbols(bundle.sids).to(device)
        with torch.no_grad():
            self._catalogue = recommender.catalogue(symbols, build_trie(symbols))
        self._max_history = recommender.config.max_history
        exact = exact_ranker(recommender, self._catalogue)
        self._rankers: dict[str, Ranker] = {"beam": recommender} | ({} if exact is None else {"exact": exact})
        self._turn = threading.Lock()

    def recommend(
        self, histories: pl.Series, k: int = 10, *, exclude_seen: bool = True, decode: str = "beam"
    ) -> pl.DataFrame:
        """Rank items for every history.

        Parameters
        ----------
        histories : series of list of str
            R lists of raw item ids, oldest first. Ids that the catalogue lacks and nulls are left out, with a warning;
            an id that occurs twice is read twice, as in training. Who has no known item gets the most popular
            items, with a warning: an empty list, null, or unknown ids alone.
        k : int
            Length of the answers, 1 to N and at most ``MOST``. They are shorter, with a warning, where ``exclude_seen``
            leaves fewer items. A list is the beginning of a longer one that is cut from a search of equal width: up to
            20, from 21 to 40, to 80 and so on. A wider search may find others; exact scores never do.
        exclude_seen : bool
            Leave out the items of the history, all of them, though only its latest are read (``max_history``).
        decode : str
            ``beam``, or ``exact`` where the recommender can score every item. The bundle does not say what it was
            evaluated with: take the ``decode`` and ``beams`` of its EvaluationReport for the figures found there.

        Returns
        -------
        DataFrame
            R rows: ``items`` (raw ids, best first), ``titles`` ("" for none), ``scores`` and ``warning`` ("" for none).
            Scores are log-probabilities in nats: of the item under the recommender (see ``decoding.beam_search``, also
            for its length penalty), and of popular items log((events + 1) / (all events + N)).

        Raises
        ------
        RequestError
            An argument has another type, ``k`` is out of bounds, or this recommender does not decode so.
        """
        return self.answer(self.look_up(histories), k, exclude_seen=exclude_seen, decode=decode)

    def look_up(self, histories: pl.Series) -> LookedUp:
        """Translate raw ids, which are as in ``recommend``.

        Raises
        ------
        RequestError
            The column has another type.
        """
        lists = check_histories(histories).to_arrow()
        given = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
        ids = pc.list_flatten(lists)
        place = self._names.search_sorted(pl.Series(ids)).to_numpy().clip(max=self.num_items - 1)
        known = (
            pc.equal(self._named.take(pa.array(place)), ids).fill_null(False).to_numpy(zero_copy_only=False)
        )
        row = np.repeat(np.arange(len(given)), given)
        end = np.cumsum(np.bincount(row[known], minlength=len(given)))
        start = np.concatenate([[0], end])[:-1]
        warnings = _warnings(given, end - start, row[~known], pl.Series(ids.filter(pa.array(~known))))
        return LookedUp(Rows(self._item_named[place[known]], start, end, np.zeros_like(end)), given, warnings)

    def answer(
        self, looked_up: LookedUp, k: int, *, exclude_seen: bool = True, decode: str = "beam"
    ) -> pl.DataFrame:
        """Rank items for histories that ``look_up`` has read; all else as in ``recommend``."""
        self._check(k, exclude_seen, decode)
        known = looked_up.known > 0
        best_Rk = np.tile(self._popular[:k], (len(known), 1))
        scores_Rk = np.tile(self._popular_scores[:k], (len(known), 1))
        if known.any():
            values, *bounds = looked_up.rows
            rows, beams = Rows(values, *(each[known] for each in bounds)), search_width(k)
            rows = latest_rows(rows, self._max_history, keep_seen=exclude_seen)
            with self._turn:
                ranking = rank_rows(
                    self._rankers[decode],
                    rows,
                    self._catalogue,
                    max(1, QUERIES // beams),
                    beams,
                    exclude_seen=exclude_seen,
                )
            best_Rk[known], scores_Rk[known] = (each[:, :k].numpy() for each in ranking)
        listed = best_Rk >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(listed.sum(axis=1))]))
        items = pa.array(best_Rk[listed])
        answer = {
            "items": self._raw_ids.take(items),
            "titles": self._titles.take(items),
            "scores": pa.array(scores_Rk[listed]),
        }
        lists = {name: pl.Series(pa.LargeListArray.from_arrays(offsets, x)) for name, x in answer.items()}
        warnings = _with_short(looked_up.warnings, listed.sum(axis=1), k)
        return pl.DataFrame(lists | {"warning": warnings}, schema=ANSWER)

    def _check(self, k: Any, exclude_seen: Any, decode: Any) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self._most:
            what = (
                "the longest list that is served"
                if self._most < self.num_items
                else "the items of the catalogue"
            )
            raise RequestError(f"k must be a whole number from 1 to {self._most}, {what}; got {k!r}")
        if not isinstance(exclude_seen, bool):
            raise RequestError(f"exclude_seen must be true or false, got {exclude_seen!r}")
        if decode not in list(self._rankers):
            raise RequestError(
                f"decode must be one of {', '.join(self._rankers)} for this model, got {decode!r}"
            )


def latest_rows(rows: Rows, most: int, *, keep_seen: bool) -> Rows:
    """Cut histories to what a recommender reads, so that a long one does not pad the batch that it is ranked in.

    Parameters
    ----------
    rows : Rows
        Histories; targets are not read.
    most : int
        Latest entries that are read; they stay as they are.
    keep_seen : bool
        Keep one of each earlier item before them, for it to be excluded.
    """
    length = rows.end - rows.start
    if (length <= most).all():
        return rows
    row = np.repeat(np.arange(len(length)), length)
    age = np.repeat(np.cumsum(length), length) - np.arange(len(row)) - 1
    values = rows.values[np.repeat(rows.end, length) - 1 - age]
    keep = age < most
    if keep_seen:
        pairs = row * (int(values.max()) + 1) + values
        keep[len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]] = True
    end = np.cumsum(np.bincount(row[keep], minlength=len(length)))
    return Rows(values[keep], np.concatenate([[0], end])[:-1], end, np.zeros_like(end))


def _with_short(warnings: pl.Series, listed: NDArray[np.int64], k: int) -> pl.Series:
    """Say of lists that are shorter than asked why they are."""
    if (listed == k).all():
        return warnings
    short = pl.format("the list has {} of {} items: the history holds all others", "listed", pl.lit(k))
    said = [
        pl.when(pl.col("warning") != "").then("warning"),
        pl.when(pl.col("listed") < k).then(short),
    ]
    frame = pl.DataFrame({"warning": warnings, "listed": listed})
    return frame.select(pl.concat_str(said, separator="; ", ignore_nulls=True)).to_series()


def _warnings(
    given: NDArray[np.int64], known: NDArray[np.int64], row: NDArray[np.int64], ignored: pl.Series
) -> pl.Series:
    """Say what of R histories could not be used.

    Parameters
    ----------
    given, known : array
        (R,) entries of each history, and how many of them are items of the catalogue.
    row : array
        Of each other entry, the history that it stands in.
    ignored : series of str
        These entries: unknown ids and nulls.
    """
    if known.all() and not len(row):
        return pl.Series([""] * len(given), dtype=pl.String)
    count = pl.col("unknown").list.len()
    names = pl.col("unknown").list.head(NAMED).list.eval(pl.format("'{}'", pl.element().str.head(SPELT)))
    unknown = pl.format(
        "ignored {} unknown item{}: {}{}",
        count,
        pl.when(count == 1).then(pl.lit("")).otherwise(pl.lit("s")),
        names.list.join(", "),
        pl.when(count > NAMED).then(pl.lit(", ...")).otherwise(pl.lit("")),
    )
    empty = pl.when(pl.col("given") == 0).then(pl.lit("the history is empty"))
    nobody = empty.otherwise(pl.lit("no item of the history is known"))
    said = [
        pl.when(count > 0).then(unknown),
        pl.when(pl.col("nulls") > 0).then(pl.format("ignored nulls in the history: {}", "nulls")),
        pl.when(pl.col("known") == 0).then(pl.format("{}, so these are the most popular items", nobody)),
    ]
    lost = (
        pl.LazyFrame({"row": row, "raw_id": ignored})
        .group_by("row")
        .agg(
            unknown=pl.col("raw_id").drop_nulls().unique(maintain_order=True),
            nulls=pl.col("raw_id").null_count(),
        )
    )
    rows = pl.LazyFrame({"row": np.arange(len(given)), "given": given, "known": known})
    frame = rows.join(lost, on="row", how="left", maintain_order="left")
    return frame.select(pl.concat_str(said, separator="; ", ignore_nulls=True)).collect().to_series()
