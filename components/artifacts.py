"""The nouns of sidflow, what stages exchange: their fields and the invariants checked at construction.

How they are saved and loaded stands in ``folders.py``.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from components.config import require
from components.folders import Artifact, ArtifactError


@dataclass(frozen=True, kw_only=True)
class InteractionLog(Artifact):
    """Who met what, in order. Ids are dense from 0; rows are sorted by user and position.

    ``sources`` lists the raw files as ``{"name", "sha256", "bytes"}``; ``statistics`` what ingestion kept and dropped.
    """

    SCHEMAS = {
        "events": pl.Schema(
            {
                "user_id": pl.UInt32(),
                "item_id": pl.UInt32(),
                "position": pl.UInt32(),
                "timestamp": pl.Int64(),
                "rating": pl.Float32(),
            }
        ),
        "users": pl.Schema({"user_id": pl.UInt32(), "raw_id": pl.String()}),
    }
    events: pl.DataFrame
    users: pl.DataFrame
    sources: list[dict[str, Any]]
    statistics: dict[str, Any]

    def check(self) -> None:
        """Dense ids, sorted rows, positions from 0 in every user, times that never fall."""
        events = self.events
        require(len(events) > 0, "InteractionLog.events is empty")
        dense = events["user_id"].unique().sort()
        require(
            len(dense) == len(self.users) and dense[-1] == len(dense) - 1,
            f"InteractionLog: {len(dense)} users have events, {len(self.users)} are named; ids must be dense from 0",
        )
        step = events.select(
            user=pl.col("user_id").cast(pl.Int64()).diff(),
            position=pl.col("position").cast(pl.Int64()).diff(),
            time=pl.col("timestamp").diff(),
            first=pl.col("position"),
        ).with_row_index("row")
        starts = (pl.col("user") == 1) & (pl.col("first") == 0)
        goes_on = (pl.col("user") == 0) & (pl.col("position") == 1) & (pl.col("time").fill_null(0) >= 0)
        wrong = step.slice(1).filter(~(starts | goes_on))
        if len(wrong) or events["position"][0] != 0:
            row = wrong["row"][0] if len(wrong) else 0
            raise ArtifactError(
                f"InteractionLog.events row {row}: rows go by user, position counts from 0, times never fall"
            )

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.users)


@dataclass(frozen=True, kw_only=True)
class ItemCatalog(Artifact):
    """One row an item, in the order of ``item_id``. ``text`` is what embeddings read."""

    SCHEMAS = {
        "items": pl.Schema(
            {
                "item_id": pl.UInt32(),
                "raw_id": pl.String(),
                "title": pl.String(),
                "brand": pl.String(),
                "categories": pl.List(pl.String()),
                "text": pl.String(),
            }
        )
    }
    items: pl.DataFrame

    def check(self) -> None:
        """Row number is the item id, raw ids are unique."""
        require(len(self.items) > 0, "ItemCatalog.items is empty")
        _check_row_is_item("ItemCatalog.items", self.items)
        duplicated = self.items.filter(self.items["raw_id"].is_duplicated())
        require(
            not len(duplicated),
            f"ItemCatalog.items: raw_id {duplicated['raw_id'].head(3).to_list()} occurs twice",
        )

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.items)


@dataclass(frozen=True, kw_only=True)
class ContentEncoder(Artifact):
    """What turns item text into vectors: fitted LSA weights, or the name of a model that brings its own.

    ``vocabulary`` is empty and ``weights["projection"]`` has no elements where nothing was fitted.
    """

    SCHEMAS = {"vocabulary": pl.Schema({"term": pl.String(), "idf": pl.Float64()})}
    vocabulary: pl.DataFrame
    weights: dict[str, Tensor]
    config: dict[str, Any]
    catalog: str


@dataclass(frozen=True, kw_only=True)
class ContentEmbeddings(Artifact):
    """Content vectors; ``vectors["vectors"]`` is (n_items, dim) float32, its row the item id."""

    vectors: dict[str, Tensor]
    encoder: str
    revision: str
    normalised: bool
    catalog: str

    def check(self) -> None:
        """Two axes, float32, finite."""
        x = self.vectors.get("vectors")
        require(
            x is not None and x.ndim == 2 and x.dtype == torch.float32 and x.numel() > 0,
            "ContentEmbeddings wants one float32 tensor 'vectors' of shape (n_items, dim)",
        )
        assert x is not None
        finite = torch.isfinite(x).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ArtifactError(
                f"ContentEmbeddings row {row}: a vector must be finite; {int((~finite).sum())} are not"
            )

    @property
    def matrix(self) -> Tensor:
        """The vectors, (n_items, dim) float32."""
        return self.vectors["vectors"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingShard(Artifact):
    """Part ``shard`` of ``num_shards`` of the content vectors: (rows, dim) float32, its first row item ``start``.

    ``catalog`` and ``encoder`` are fingerprints of what was encoded and with what.
    """

    vectors: dict[str, Tensor]
    shard: int
    num_shards: int
    start: int
    catalog: str
    encoder: str

    def check(self) -> None:
        """A place among the shards, two axes, float32, at least one row."""
        require(
            0 <= self.shard < self.num_shards,
            f"EmbeddingShard {self.shard} of {self.num_shards}: count from 0",
        )
        x = self.vectors.get("vectors")
        require(
            x is not None and x.ndim == 2 and x.dtype == torch.float32 and x.numel() > 0,
            f"EmbeddingShard {self.shard} of {self.num_shards} wants one float32 tensor 'vectors' of shape (rows, dim) "
            "that is not empty; encode this shard again",
        )

    @property
    def matrix(self) -> Tensor:
        """The vectors, (rows, dim) float32."""
        return self.vectors["vectors"]


SEQUENCE = pl.Schema({"user_id": pl.UInt32(), "sequence": pl.List(pl.UInt32())})
HELD_OUT = pl.Schema({"user_id": pl.UInt32(), "history": pl.List(pl.UInt32()), "target": pl.UInt32()})
COLD = pl.Schema({"item_id": pl.UInt32()})


@dataclass(frozen=True, kw_only=True)
class SequenceSplit(Artifact):
    """Training sequences, oldest first and one row a user, and one held-out target a user for valid and test.

    Every training event after a user's first is a training target, so prefixes are not written out.
    ``cold``: items that training and validation leave out and test does not, often none.
    ``log`` and ``catalog`` are fingerprints.
    """

    SCHEMAS = {"train": SEQUENCE, "valid": HELD_OUT, "test": HELD_OUT, "cold": COLD}
    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    cold: pl.DataFrame
    num_items: int
    protocol: str
    log: str
    catalog: str

    def check(self) -> None:
        """Known items only, no empty history, one row a user; no cold item outside test."""
        cold = self.cold["item_id"]
        require(
            cold.is_sorted() and cold.is_unique().all() and (cold.is_empty() or cold[-1] < self.num_items),
            f"SequenceSplit.cold: items below {self.num_items} in ascending order, each once",
        )
        for name, ids in (("train", "sequence"), ("valid", "history"), ("test", "history")):
            frame: pl.DataFrame = getattr(self, name)
            require(len(frame) > 0, f"SequenceSplit.{name} is empty")
            require(frame["user_id"].is_unique().all(), f"SequenceSplit.{name}: one row a user")
            empty = frame.filter(pl.col(ids).list.len() == 0)
            require(
                not len(empty), f"SequenceSplit.{name}: user {empty['user_id'].to_list()[:1]} has no {ids}"
            )
            ids_met = pl.concat([frame[ids].explode(), *([frame["target"]] if name != "train" else [])])
            highest = ids_met.to_numpy().max()
            require(highest < self.num_items, f"SequenceSplit.{name}: item {highest} of {self.num_items}")
            if name != "test":
                met = ids_met.filter(ids_met.is_in(cold.implode()))
                require(
                    met.is_empty(), f"SequenceSplit.{name}: item {met[:1].to_list()} is cold, for test alone"
                )

    @property
    def num_training_targets(self) -> int:
        """Number of (prefix, next item) pairs in the training sequences."""
        return int((self.train["sequence"].list.len().cast(pl.Int64()) - 1).sum())


@dataclass(frozen=True, kw_only=True)
class TokenizerCheckpoint(Artifact):
    """Weights of a tokenizer and the configuration that rebuilds it; ``embeddings`` is a fingerprint."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    input_dim: int
    embeddings: str
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SidTable(Artifact):
    """Item to semantic ID: content codes of any length up to ``len(codebook_sizes)``, closed by a suffix.

    ``suffix`` tells items of equal codes apart and ends every string; its symbols have a range of their own
    of ``suffix_size``, so strings are unique and none is the beginning of another.
    ``tokenizer`` is the fingerprint of the checkpoint that made the codes.
    """

    SCHEMAS = {
        "codes": pl.Schema({"item_id": pl.UInt32(), "codes": pl.List(pl.UInt16()), "suffix": pl.UInt16()})
    }
    codes: pl.DataFrame
    codebook_sizes: list[int]
    suffix_size: int
    shared: bool
    tokenizer: str

    def check(self) -> None:
        """Codes inside their codebook, suffixes inside their range, every (codes, suffix) once."""
        frame = self.codes
        _check_row_is_item("SidTable.codes", frame)
        lengths = frame["codes"].list.len()
        require(
            not self.shared or len(set(self.codebook_sizes)) == 1,
            f"SidTable: levels that share one codebook have one size, got {self.codebook_sizes}",
        )
        require(
            bool(((lengths > 0) & (lengths <= len(self.codebook_sizes))).all()),
            f"SidTable: an item has between 1 and {len(self.codebook_sizes)} codes",
        )
        for level, size in enumerate(self.codebook_sizes):
            codes = frame["codes"].list.get(level, null_on_oob=True).drop_nulls().to_numpy()
            highest = codes.max(initial=0)
            require(highest < size, f"SidTable: code {highest} on level {level + 1}, the codebook has {size}")
        top = frame["suffix"].to_numpy().max()
        require(
            top < self.suffix_size,
            f"SidTable: suffix {top} is outside suffix_size {self.suffix_size}: raise suffix_size, or use more codes",
        )
        twice = frame.filter(frame.select("codes", "suffix").is_duplicated())
        if len(twice):
            row = twice.row(0, named=True)
            raise ArtifactError(
                f"SidTable: item {row['item_id']} shares SID {row['codes']}+{row['suffix']} with another"
            )

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.codes)


@dataclass(frozen=True, kw_only=True)
class RecommenderCheckpoint(Artifact):
    """Weights of a recommender; ``sids`` is the fingerprint of the only table that it can be used with."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    sids: str
    step: int
    epoch: int
    metrics: dict[str, float]

    def check_sids(self, table: SidTable) -> None:
        """Refuse a table of another epoch or another tokenizer."""
        if table.fingerprint != self.sids:
            raise ArtifactError(
                f"RecommenderCheckpoint was trained with SidTable {self.sids[:12]}, got {table.fingerprint[:12]}: "
                "its symbols mean other items; take tokenizer, table and recommender of the same run"
            )


@dataclass(frozen=True, kw_only=True)
class SasRecCheckpoint(Artifact):
    """Weights of SASRec over ``num_items`` item ids; ``split`` is the fingerprint of what it was trained on."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    num_items: int
    split: str
    step: int
    epoch: int
    metrics: dict[str, float]

    def check_split(self, split: SequenceSplit) -> None:
        """Refuse another catalogue, and another way of holding out: test targets may have been trained on."""
        if split.num_items != self.num_items:
            raise ArtifactError(
                f"SasRecCheckpoint scores {self.num_items} items, the SequenceSplit has {split.num_items}: "
                "they come from different catalogues; train SASRec on this split"
            )
        if split.fingerprint != self.split:
            raise ArtifactError(
                f"SasRecCheckpoint was trained on SequenceSplit {self.split[:12]}, got {split.fingerprint[:12]}: "
                "its ids may mean other items, and it may have learned test targets; train SASRec on this split"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Artifact):
    """One rank a user, and the metrics that follow from the ranks.

    ``ranks``: rank from 1, or null beyond the list; ``seen`` is "kept" or "excluded".
    ``metrics``: value with its 95 % interval, by method, seen, slice and metric name (``R@10``).
    """

    SCHEMAS = {
        "ranks": pl.Schema(
            {
                "method": pl.String(),
                "seen": pl.String(),
                "user_id": pl.UInt32(),
                "target": pl.UInt32(),
                "rank": pl.UInt32(),
            }
        ),
        "metrics": pl.Schema(
            {
                "method": pl.String(),
                "seen": pl.String(),
                "slice": pl.String(),
                "metric": pl.String(),
                "value": pl.Float64(),
                "low": pl.Float64(),
                "high": pl.Float64(),
            }
        ),
    }
    ranks: pl.DataFrame
    metrics: pl.DataFrame
    split: str
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison(Artifact):
    """Methods side by side on the same users, and their paired differences with 95 % intervals.

    ``differences``: ``method`` minus ``baseline``, user by user.
    """

    SCHEMAS = {
        "metrics": EvaluationReport.SCHEMAS["metrics"],
        "differences": pl.Schema(
            {
                "method": pl.String(),
                "baseline": pl.String(),
                "seen": pl.String(),
                "metric": pl.String(),
                "difference": pl.Float64(),
                "low": pl.Float64(),
                "high": pl.Float64(),
            }
        ),
    }
    metrics: pl.DataFrame
    differences: pl.DataFrame
    reports: list[str]


@dataclass(frozen=True, kw_only=True)
class CollisionReport(Artifact):
    """How well a SID table uses its codes, and who shares them.

    ``groups``: items of equal content codes, largest first. ``usage``: items by level and code.
    ``levels``: figures by level, over the ``items`` that reach it; ``reconstruction`` is their mean squared distance
    to what so many codes decode to, ``reconstruction_draw`` weighs it by interactions.
    ``lengths``: items and interactions by number of codes. ``deciles``: tenths of the items, the most popular first,
    with mean ``codes``. What was not given is null; without interactions there are no deciles.
    ``bands`` says in words what each figure means.
    """

    SCHEMAS = {
        "groups": pl.Schema(
            {
                "codes": pl.List(pl.UInt16()),
                "size": pl.UInt32(),
                "item_ids": pl.List(pl.UInt32()),
                "texts": pl.List(pl.String()),
            }
        ),
        "usage": pl.Schema({"level": pl.UInt8(), "code": pl.UInt16(), "count": pl.UInt32()}),
        "levels": pl.Schema(
            {
                "level": pl.UInt8(),
                "items": pl.UInt32(),
                "codebook_size": pl.UInt32(),
                "codes_in_use": pl.UInt32(),
                "perplexity": pl.Float64(),
                "entropy": pl.Float64(),
                "prefixes": pl.UInt32(),
                "perplexity_in_prefix": pl.Float64(),
                "largest_share": pl.Float64(),
                "reconstruction": pl.Float64(),
                "reconstruction_draw": pl.Float64(),
            }
        ),
        "lengths": pl.Schema({"codes": pl.UInt8(), "items": pl.UInt32(), "events": pl.UInt32()}),
        "deciles": pl.Schema(
            {"decile": pl.UInt8(), "items": pl.UInt32(), "events": pl.UInt32(), "codes": pl.Float64()}
        ),
    }
    groups: pl.DataFrame
    usage: pl.DataFrame
    levels: pl.DataFrame
    lengths: pl.DataFrame
    deciles: pl.DataFrame
    figures: dict[str, float]
    bands: dict[str, str]
    verdict: str
    sids: str


@dataclass(frozen=True, kw_only=True)
class SidDrift(Artifact):
    """How well the codebooks of the last training still fit a catalogue that has grown since.

    ``levels``: by level, mean ``reconstruction`` and ``perplexity`` of the items ``known`` to training and of the
    ``newcomers``, and the share of newcomers whose code no known item has; null where nobody reaches it.
    ``checks``: the figures that have a limit, whether they are ``beyond`` it, and what that means in words.
    ``trained`` and ``grown`` are fingerprints of the two tables.
    """

    SCHEMAS = {
        "levels": pl.Schema(
            {
                "level": pl.UInt8(),
                "reconstruction_known": pl.Float64(),
                "reconstruction_newcomers": pl.Float64(),
                "perplexity_known": pl.Float64(),
                "perplexity_newcomers": pl.Float64(),
                "unseen_share": pl.Float64(),
            }
        ),
        "checks": pl.Schema(
            {
                "figure": pl.String(),
                "value": pl.Float64(),
                "limit": pl.Float64(),
                "beyond": pl.Boolean(),
                "words": pl.String(),
            }
        ),
    }
    levels: pl.DataFrame
    checks: pl.DataFrame
    figures: dict[str, float]
    verdict: str
    trained: str
    grown: str

    @property
    def reasons(self) -> list[str]:
        """What speaks for a retraining, in words; empty where nothing does."""
        return self.checks.filter("beyond")["words"].to_list()


@dataclass(frozen=True, kw_only=True)
class SidChurn(Artifact):
    """How many of the ``items`` of an old table a retrained one names otherwise, before and after matching its codes.

    ``changes``: shares, by part of the name: the whole ``SID``, its ``codes``, the code on each ``level``.
    ``old``, ``new`` and ``renamed`` are fingerprints of tables: as it was, retrained, and under matched labels.
    """

    SCHEMAS = {
        "changes": pl.Schema({"part": pl.String(), "before": pl.Float64(), "after": pl.Float64()}),
    }
    changes: pl.DataFrame
    items: int
    old: str
    new: str
    renamed: str

    def share(self, part: str, when: str = "after") -> float:
        """Return the share of items whose part of the name changed, ``before`` or ``after`` matching."""
        return float(self.changes.filter(part=part)[when].item())


@dataclass(frozen=True, kw_only=True)
class Bundle(Artifact):
    """All that serving needs: encoder, tokenizer, table, recommender and the items' raw ids and titles.

    ``popularity`` counts training events, for people of whom nothing is known.
    """

    SCHEMAS = {"popularity": pl.Schema({"item_id": pl.UInt32(), "events": pl.UInt32()})}
    catalog: ItemCatalog
    tokenizer: TokenizerCheckpoint
    sids: SidTable
    recommender: RecommenderCheckpoint
    encoder: ContentEncoder
    popularity: pl.DataFrame

    def check(self) -> None:
        """The parts were made for one another, and somebody met an item."""
        self.recommender.check_sids(self.sids)
        if self.sids.tokenizer != self.tokenizer.fingerprint:
            raise ArtifactError(
                f"Bundle: the SidTable came from tokenizer {self.sids.tokenizer[:12]}, "
                f"got tokenizer {self.tokenizer.fingerprint[:12]}"
            )
        require(
            self.sids.num_items == self.catalog.num_items,
            f"Bundle: {self.sids.num_items} SIDs for {self.catalog.num_items} items",
        )
        _check_row_is_item("Bundle.popularity", self.popularity)
        require(
            len(self.popularity) == self.catalog.num_items,
            f"Bundle: popularity of {len(self.popularity)} items for {self.catalog.num_items} items; "
            "count the events of a split of this catalogue",
        )
        require(bool(self.popularity["events"].sum()), "Bundle.popularity: no item has a training event")


@dataclass(frozen=True, kw_only=True)
class Promotion(Artifact):
    """What became of a model in the registry, and why.

    ``version`` of the registered ``model``; whether the ``alias`` moved to it, and the ``reason`` in a sentence.
    ``figures``: value of the new model and of the champion, their paired difference and its interval, as far as known.
    ``bundle`` and ``split`` are fingerprints.
    """

    model: str
    alias: str
    version: int
    promoted: bool
    reason: str
    figures: dict[str, float]
    bundle: str
    split: str


def _check_row_is_item(name: str, frame: pl.DataFrame) -> None:
    wrong = frame.with_row_index("row").filter(pl.col("row") != pl.col("item_id"))
    if len(wrong):
        raise ArtifactError(
            f"{name} row {wrong['row'][0]}: holds item {wrong['item_id'][0]}, row number is item id"
        )


@dataclass(frozen=True, kw_only=True)
class Ablation(Artifact):
    """Arms over seeds: every value, what becomes of it over the seeds, and the codes behind it.

    ``runs``: values over all test users, and ``R@10 cold`` over the ``cold_users`` whose target is cold; baselines that
    no seed changes have a null seed.
    ``summary``: over seeds, ``difference`` is ``arm`` minus ``against``, seed by seed; errors of one seed are null.
    ``codes`` and ``tables``: the SID table of each arm and seed, by level and as a whole; figures that its
    ``CollisionReport`` lacks are null.
    ``users``, ``cold_users`` and ``items`` are counts, ``seeds`` the seeds, ``split`` a fingerprint.
    """

    SCHEMAS = {
        "runs": pl.Schema(
            {
                "arm": pl.String(),
                "method": pl.String(),
                "seed": pl.Int64(),
                "seen": pl.String(),
                "metric": pl.String(),
                "value": pl.Float64(),
            }
        ),
        "summary": pl.Schema(
            {
                "arm": pl.String(),
                "method": pl.String(),
                "against": pl.String(),
                "seen": pl.String(),
                "metric": pl.String(),
                "seeds": pl.UInt32(),
                "mean": pl.Float64(),
                "standard_error": pl.Float64(),
                "difference": pl.Float64(),
                "difference_se": pl.Float64(),
                "low": pl.Float64(),
                "high": pl.Float64(),
                "adopted": pl.Boolean(),
            }
        ),
        "codes": pl.Schema(
            {
                "arm": pl.String(),
                "seed": pl.Int64(),
                "level": pl.UInt8(),
                "codebook_size": pl.UInt32(),
                "codes_in_use": pl.UInt32(),
                "perplexity": pl.Float64(),
            }
        ),
        "tables": pl.Schema(
            {
                "arm": pl.String(),
                "seed": pl.Int64(),
                "distinct": pl.UInt32(),
                "collision_rate": pl.Float64(),
                "largest_group": pl.UInt32(),
                "verdict": pl.String(),
                "collapsed_at_epoch": pl.UInt32(),
                "codes_per_item": pl.Float64(),
                "codes_per_interaction": pl.Float64(),
                "tokens_per_history": pl.Float64(),
                "events_in_budget": pl.Float64(),
                "reconstruction": pl.Float64(),
                "reconstruction_draw": pl.Float64(),
            }
        ),
    }
    runs: pl.DataFrame
    summary: pl.DataFrame
    codes: pl.DataFrame
    tables: pl.DataFrame
    users: int
    cold_users: int
    items: int
    seeds: list[int]
    split: str
