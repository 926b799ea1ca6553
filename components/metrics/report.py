"""Evaluation: ranks of held-out targets, turned into metrics with intervals, never without the simple rules.

Shapes: U test users, k length of a list, N items of the catalogue.
"""

from collections.abc import Callable, Container
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from components.artifacts import EvaluationReport, SequenceSplit
from components.config import Config
from components.data.splits import count_events
from components.folders import ArtifactError, Provenance
from components.metrics.ranking import bootstrap, contributions, metric_names, ranks_in_lists
from components.recommenders.full_ranking import Scorer, flatten, rank_exactly
from components.recommenders.itemknn import ItemKnn, ItemKnnConfig
from components.recommenders.popularity import Popularity
from components.seams import Ranking

BASELINES = ("popularity", "itemknn")
SEEN = ("kept", "excluded")
COLD = "R@10 cold"
"""Name of R@10 on the slice ``cold`` in tables, beside the metrics over all users."""
RANKS = EvaluationReport.SCHEMAS["ranks"]
METRICS = EvaluationReport.SCHEMAS["metrics"]

RankFn = Callable[[pl.DataFrame, bool], Ranking]
"""(rows with user_id, history and target; exclude seen items?) -> one list a row, in the order of the rows."""


def blocks_of(found: Container[str]) -> list[str]:
    """Return the treatments of seen items that are among ``found``, in the order of all tables."""
    return [seen for seen in SEEN if seen in found]


class EvaluateConfig(Config):
    """Settings of an evaluation."""

    ks: list[Annotated[int, Field(ge=1)]] = Field([1, 5, 10, 20], min_length=1)
    """Cut-offs of recall and NDCG."""
    beams: int = Field(20, ge=1)
    """Length of every method's list: beams of a generative method; a target further down is a miss, also in MRR."""
    seen: list[Literal["kept", "excluded"]] = Field(["kept", "excluded"], min_length=1)
    """Rank with the items of the history kept in the lists, excluded from them, or both; each costs one ranking."""
    decode: Literal["beam", "exact"] = "beam"
    """How recommenders that write SIDs rank: by beam search, or from exact scores of all items, which only intrr with
    writes=ran and context=last has. Where both are possible, a report of the beam states what it missed."""
    coverage_k: int = Field(10, ge=1)
    """Catalogue coverage is the share of items that stand in the first so many places of some user's list."""
    batch_size: int = Field(128, ge=1)
    """Users ranked at once; sets memory and speed, not the result."""
    resamples: int = Field(1000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap."""
    head_share: float = Field(0.2, gt=0, lt=1)
    """Share of the catalogue, most training events first, that makes up the head; the rest is the tail."""
    itemknn: ItemKnnConfig = ItemKnnConfig()
    """Settings of the item-kNN baseline."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        deepest = max(*self.ks, self.coverage_k)
        if deepest > self.beams:
            raise ValueError(
                f"ks and coverage_k must be <= beams: {deepest} places asked of {self.beams} beams"
            )
        if len(set(self.seen)) < len(self.seen):
            raise ValueError(f"seen names each treatment once, got {self.seen}")
        return self

    @property
    def blocks(self) -> list[str]:
        """The treatments of seen items to evaluate, in the order of all tables."""
        return blocks_of(self.seen)


class Lists(NamedTuple):
    """Lists of one method, looked through."""

    ranks: NDArray[np.int64]
    """(U,) place of the target from 1, 0 where it is not listed."""
    coverage: float
    """Share of the catalogue in the first places of some user's list."""
    faults: dict[str, int]
    """``invalid``: entries that are no item, or empty places while items were left; ``duplicates``: items
    listed again for the same user; ``seen_items``: items of the history in lists that exclude them. All should be 0."""


def evaluate_baselines(split: SequenceSplit, config: EvaluateConfig) -> EvaluationReport:
    """Evaluate popularity and item-kNN on the test targets, with seen items kept, excluded or both.

    Both learn from the training sequences alone. The item-kNN's recency decay is the one with the best NDCG@10
    on validation; ``details["itemknn"]`` holds it and the score of every decay tried.
    """
    sequences = split.train["sequence"]
    knn = ItemKnn.fit(sequences, split.num_items, neighbours=config.itemknn.neighbours)
    scores = {
        decay: _validation_score(knn.with_decay(decay), split, config) for decay in config.itemknn.decays
    }
    decay = max(scores, key=lambda d: (scores[d], d))
    methods: dict[str, Scorer] = {
        "popularity": Popularity.fit(sequences, split.num_items),
        "itemknn": knn.with_decay(decay),
    }
    test, found = split.test, {}
    for name, scorer in methods.items():
        for seen in config.blocks:
            exact = rank_exactly(
                scorer,
                test["history"],
                test["target"],
                k=config.beams,
                exclude_seen=seen == "excluded",
                batch_size=config.batch_size,
            )
            lists = inspect_lists(exact.items, split, config, seen=seen)
            found[name, seen] = lists._replace(ranks=np.where(exact.ranks <= config.beams, exact.ranks, 0))
    tried = [{"decay": d, "N@10": s} for d, s in scores.items()]
    return _report(found, split, config, {"itemknn": {"decay": decay, "validation": tried}}, parents={})


def evaluate_recommender(
    name: str,
    rank_fn: RankFn,
    split: SequenceSplit,
    config: EvaluateConfig,
    baselines: EvaluationReport,
    details: dict[str, Any] | None = None,
) -> EvaluationReport:
    """Evaluate one method on the test targets and set it beside the baselines.

    Parameters
    ----------
    name : str
        Name of the method in tables.
    rank_fn : callable
        ``rank_fn(frame, exclude_seen)`` lists items for every row of ``frame`` (user_id, history, target), in the
        order of the rows. The target is there for methods that need it to be scored; lists must not use it.
    split : SequenceSplit
        Where the targets come from.
    config : EvaluateConfig
        Settings; those of the baselines, but for the batch size and ``decode``.
    baselines : EvaluationReport
        What ``evaluate_baselines`` returned for this split; its rows stand in the new report too.
    details : dict, optional
        What else is known of the method's lists; kept in the report's ``details``.

    Raises
    ------
    ArtifactError
        The baselines are of another split or other settings, or the name is one of theirs.
    ValueError
        The lists are too short, or not one a row.
    """
    if baselines.split != split.fingerprint:
        raise ArtifactError(
            f"baselines were evaluated on split {baselines.split[:12]}, {name!r} on {split.fingerprint[:12]}: "
            "their numbers do not compare; evaluate the baselines on this split"
        )
    if baselines.details["config"] != _settings(config):
        raise ArtifactError(
            f"baselines were evaluated with {baselines.details['config']}, {name!r} with {_settings(config)}; "
            "evaluate both with the same settings"
        )
    if name in baselines.ranks["method"]:
        raise ArtifactError(f"method name {name!r} is taken by a baseline; choose another")
    found = {}
    for seen in config.blocks:
        items = rank_fn(split.test, seen == "excluded").items.cpu().numpy()
        shortest = min(max(*config.ks, config.coverage_k), split.num_items)
        if items.ndim != 2 or len(items) != len(split.test) or items.shape[1] < shortest:
            raise ValueError(
                f"{name!r} returned lists of shape {items.shape}: one list of at least {shortest} items is wanted "
                f"for each of {len(split.test)} rows"
            )
        found[name, seen] = inspect_lists(items[:, : config.beams], split, config, seen=seen)
    own = _report(found, split, config, details or {}, parents={"EvaluationReport": baselines.fingerprint})
    lists = {"lists": baselines.details["lists"] + own.details["lists"]}
    return EvaluationReport(
        ranks=pl.concat([baselines.ranks, own.ranks]),
        metrics=pl.concat([baselines.metrics, own.metrics]),
        split=split.fingerprint,
        details=baselines.details | own.details | lists,
        provenance=own.provenance,
    )


def inspect_lists(
    items_Uk: NDArray[np.int64], split: SequenceSplit, config: EvaluateConfig, *, seen: str
) -> Lists:
    """Find the test targets in the lists and count what should not be there.

    A place is rightly empty (-1) only where the catalogue has no further item for the user.
    """
    num_users, length = items_Uk.shape
    targets = split.test["target"].to_numpy().astype(np.int64)
    ranks = ranks_in_lists(items_Uk, targets)

    valid = (items_Uk >= 0) & (items_Uk < split.num_items)
    history = flatten(split.test["history"])
    seen_keys = np.unique(history.rows * split.num_items + history.items)
    available = np.full(num_users, split.num_items)
    if seen == "excluded":
        available -= np.bincount(seen_keys // split.num_items, minlength=num_users)
    rightly_empty = np.maximum(0, length - available)
    empty = (items_Uk == -1).sum(axis=1)
    wrong = (~valid).sum(axis=1) - np.minimum(empty, rightly_empty)

    keys = (np.arange(num_users)[:, None] * split.num_items + items_Uk)[valid]
    distinct = np.unique(keys)
    again = np.isin(distinct, seen_keys).sum() if seen == "excluded" else 0
    first = items_Uk[:, : config.coverage_k]
    covered = np.unique(first[valid[:, : config.coverage_k]])
    return Lists(
        ranks,
        len(covered) / split.num_items,
        {"invalid": int(wrong.sum()), "duplicates": len(keys) - len(distinct), "seen_items": int(again)},
    )


def recompute(report: EvaluationReport, split: SequenceSplit) -> pl.DataFrame:
    """Compute a report's metrics again from its ranks.

    Coverage is a property of the lists, which a report does not keep: its rows are carried over.

    Returns
    -------
    DataFrame
        Equal to ``report.metrics``.

    Raises
    ------
    ArtifactError
        The report is of another split.
    """
    if report.split != split.fingerprint:
        raise ArtifactError(f"the report is of split {report.split[:12]}, got split {split.fingerprint[:12]}")
    config = EvaluateConfig.model_validate(report.details["config"])
    coverage = {
        (method, seen): value
        for method, seen, value in report.metrics.filter(pl.col("metric").str.starts_with("coverage@"))
        .select("method", "seen", "value")
        .iter_rows()
    }
    frames = [
        measure(method, seen, ranks["rank"].fill_null(0).to_numpy(), coverage[method, seen], split, config)
        for (method, seen), ranks in report.ranks.group_by("method", "seen", maintain_order=True)
    ]
    return pl.concat(frames)


def measure(
    method: str,
    seen: str,
    ranks_U: NDArray[np.int64],
    coverage: float,
    split: SequenceSplit,
    config: EvaluateConfig,
) -> pl.DataFrame:
    """Compute one method's metrics on all users, and on those of each slice by target.

    A slice without users has no rows. Coverage is not a mean over users and has no interval (null).
    """
    names = metric_names(config.ks)
    values = contributions(ranks_U, names)
    rows: list[tuple[str, str, float, float | None, float | None]] = []
    for part, mask in slices(split, config.head_share).items():
        if mask.any():
            means = bootstrap(values[mask], resamples=config.resamples, seed=config.seed)
            columns = zip(names, *(column.tolist() for column in means), strict=True)
            rows += [(part, *column) for column in columns]
        if part == "all":
            rows.append((part, f"coverage@{config.coverage_k}", coverage, None, None))
    columns_after = {name: METRICS[name] for name in list(METRICS)[2:]}
    frame = pl.DataFrame(rows, schema=columns_after, orient="row")
    return frame.select(pl.lit(method).alias("method"), pl.lit(seen).alias("seen"), pl.all())


def slices(split: SequenceSplit, head_share: float) -> dict[str, NDArray[np.bool_]]:
    """Sort test users by their target: in the head (most training events, ties by item id) or in the tail.

    Returns
    -------
    dict
        ``all``, ``head`` and ``tail``, each (U,) bool; with cold items ``cold`` too, whose targets training never met.
    """
    counts = count_events(split.train["sequence"], split.num_items)
    head_items = np.argsort(-counts, kind="stable")[: max(1, round(head_share * split.num_items))]
    targets = split.test["target"].to_numpy()
    head = np.isin(targets, head_items)
    parts = {"all": np.ones(len(head), dtype=bool), "head": head, "tail": ~head}
    return parts | ({"cold": np.isin(targets, split.cold["item_id"].to_numpy())} if len(split.cold) else {})


def headline_rows(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of a report's metrics over all users, and where it has the slice R@10 on cold targets.

    Returns
    -------
    DataFrame
        As given, less other slices; the metric of the cold rows is ``COLD``.
    """
    cold = metrics.filter(slice="cold", metric="R@10").with_columns(metric=pl.lit(COLD))
    return pl.concat([metrics.filter(slice="all"), cold])


def _validation_score(scorer: Scorer, split: SequenceSplit, config: EvaluateConfig) -> float:
    exact = rank_exactly(
        scorer,
        split.valid["history"],
        split.valid["target"],
        k=0,
        exclude_seen=False,
        batch_size=config.batch_size,
    )
    return float(contributions(exact.ranks, ["N@10"]).mean())


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """All settings that shape the numbers of every method; how a recommender decodes stands with its own."""
    return config.model_dump(mode="json", exclude={"batch_size", "decode"})


def _report(
    found: dict[tuple[str, str], Lists],
    split: SequenceSplit,
    config: EvaluateConfig,
    details: dict[str, Any],
    parents: dict[str, str],
) -> EvaluationReport:
    ranks, metrics = [], []
    for (method, seen), lists in found.items():
        place = pl.Series("rank", lists.ranks, dtype=RANKS["rank"])
        ranks.append(
            split.test.select(
                pl.lit(method).alias("method"),
                pl.lit(seen).alias("seen"),
                "user_id",
                "target",
                place.replace(0, None),
            )
        )
        metrics.append(measure(method, seen, lists.ranks, lists.coverage, split, config))
    users = {part: int(mask.sum()) for part, mask in slices(split, config.head_share).items()}
    cold = {"cold": {"items": len(split.cold), "targets": users["cold"]}} if len(split.cold) else {}
    target_seen = split.test.select(pl.col("history").list.contains(pl.col("target")).sum()).item()
    return EvaluationReport(
        ranks=pl.concat(ranks),
        metrics=pl.concat(metrics),
        split=split.fingerprint,
        details={
            "config": _settings(config),
            "users": users,
            "targets_in_history": int(target_seen),
            "lists": [{"method": m, "seen": s} | lists.faults for (m, s), lists in found.items()],
        }
        | cold
        | details,
        provenance=Provenance(
            config=_settings(config), parents={"SequenceSplit": split.fingerprint} | parents, seed=config.seed
        ),
    )
