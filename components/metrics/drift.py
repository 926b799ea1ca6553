"""Whether the codebooks of the last training still fit a catalogue that has grown, and when to train again.

What is new is held against what was known. After the first code alone, where that is possible: deeper codebooks follow
the very items that they were trained on, so that even newcomers of the same making lie much further from them. The
first codebook does too, a little: that part is taken out (``_reconstruction``).

Shapes: N items, n of them known to the last training, L levels, K codes of a level.
"""

import polars as pl
import torch
from pydantic import Field
from rich import box
from rich.table import Table
from torch import Tensor

from components.artifacts import (
    ContentEmbeddings,
    EvaluationReport,
    SidDrift,
    SidTable,
    TokenizerCheckpoint,
)
from components.config import Config, require
from components.folders import ArtifactError, Provenance
from components.metrics.report import BASELINES
from components.tokenizers.build import load_tokenizer
from components.tokenizers.extend import check_extends
from components.tokenizers.prefixes import prefix_errors
from components.tokenizers.sids import padded_codes

KEEP = "keep"
DUE = "full retraining due"


class DriftConfig(Config):
    """Limits beyond which a full retraining is due. With the encoder and the codebooks of the day, 64 or 256 codes a
    level, what came to Online Retail and to MovieTweetings later stays within all limits on codes; films among gifts
    and gifts among films do not.
    """

    min_newcomers: int = Field(30, ge=1)
    """With fewer newcomers than this, their reconstruction, collisions and use of codes tell nothing: they are reported
    and have no say."""
    max_reconstruction_ratio: float = Field(1.35, gt=0)
    """Most that newcomers may lie further from what their first code decodes to than known items would, had the
    codebook not been fitted to them, as a ratio."""
    max_collision_excess: float = Field(0.15, ge=0)
    """Most by which the share of newcomers that share their codes may exceed that of known items among themselves."""
    min_perplexity_ratio: float = Field(0.35, ge=0)
    """Least perplexity of newcomers' first codes, relative to that of as many known items drawn at random."""
    max_unseen_share: float = Field(0.05, ge=0, le=1)
    """Largest share of newcomers with a code that no known item has: a recommender has never read it."""
    crowded: float = Field(0.75, gt=0, le=1)
    """Share of the suffixes from which on a bucket counts as crowded."""
    max_crowded_share: float = Field(0.01, ge=0, le=1)
    """Largest share of the buckets that are crowded and have newcomers."""
    max_fullest: float = Field(0.95, gt=0, le=1)
    """Most of its suffixes that the fullest bucket with newcomers may use; when none is left, newcomers cannot be
    named."""
    max_new_share: float = Field(0.25, gt=0, le=1)
    """Largest share of the catalogue that the last training did not know."""
    max_recall_lost: float = Field(0.1, ge=0, le=1)
    """Largest share of the recall on known targets that is lost over all users because some targets are newcomers."""
    recall_at: int = Field(10, ge=1)
    """Places of a list that recall looks at; not more than the evaluation ranked (evaluate.beams)."""


def drift(
    checkpoint: TokenizerCheckpoint,
    embeddings: ContentEmbeddings,
    trained: SidTable,
    grown: SidTable,
    config: DriftConfig,
    report: EvaluationReport | None = None,
) -> SidDrift:
    """Measure newcomers against the items that the last training knew.

    Parameters
    ----------
    checkpoint : TokenizerCheckpoint
        The tokenizer of both tables.
    embeddings : ContentEmbeddings
        The grown catalogue.
    trained : SidTable
        The table of the last training, not of the last extension: drift adds up over extensions.
    grown : SidTable
        The table as it is now.
    config : DriftConfig
        Limits.
    report : EvaluationReport, optional
        Of one recommender on the grown catalogue, whose cold items are the newcomers; adds recall.

    Raises
    ------
    ArtifactError
        Tokenizer, tables, embeddings or report are not of one catalogue.
    ValueError
        The report is of baselines alone or of several recommenders, or ranked fewer places than ``recall_at``.
    """
    if trained.tokenizer != checkpoint.fingerprint or len(embeddings.matrix) != grown.num_items:
        raise ArtifactError(
            f"drift: tables of tokenizer {trained.tokenizer[:12]} and {grown.num_items} items, got tokenizer "
            f"{checkpoint.fingerprint[:12]} and {len(embeddings.matrix)} embeddings: take those of the grown table"
        )
    check_extends(trained, grown)
    codes_NL = padded_codes(grown)
    errors_NL = prefix_errors(load_tokenizer(checkpoint), embeddings.matrix, codes_NL).double()
    is_new_N = torch.arange(grown.num_items) >= trained.num_items
    levels = _levels(errors_NL, codes_NL, is_new_N, trained)
    figures = {
        "items": float(grown.num_items),
        "newcomers": float(is_new_N.sum()),
        "new_share": float(is_new_N.double().mean()),
    }
    if bool(is_new_N.any()):
        figures |= _room(trained, grown, config.crowded)
        figures |= _reconstruction(errors_NL, codes_NL, is_new_N)
        figures |= _collisions(trained, grown)
        figures |= _use(codes_NL, is_new_N, trained)
    if report is not None:
        figures |= _recall(report, trained.num_items, grown.num_items, config.recall_at)
    checks = _checks(figures, config)
    parents = {
        "TokenizerCheckpoint": checkpoint.fingerprint,
        "ContentEmbeddings": embeddings.fingerprint,
        "SidTable": grown.fingerprint,
        "trained SidTable": trained.fingerprint,
    }
    return SidDrift(
        levels=levels,
        checks=checks,
        figures=figures,
        verdict=DUE if checks["beyond"].any() else KEEP,
        trained=trained.fingerprint,
        grown=grown.fingerprint,
        provenance=Provenance(
            config=config.model_dump(mode="json"),
            parents=parents | ({} if report is None else {"EvaluationReport": report.fingerprint}),
        ),
    )


def rows(report: SidDrift) -> list[tuple[str, str, str, str]]:
    """Return a row a check, for tables: what it is about in words, value, limit, and ``beyond`` or nothing."""
    return [
        (row["words"], f"{row['value']:.3g}", f"{row['limit']:.3g}", "beyond" if row["beyond"] else "")
        for row in report.checks.iter_rows(named=True)
    ]


HEAD = ("what is looked at", "value", "limit", "")


def markdown_table(report: SidDrift) -> str:
    """Write verdict and checks as Markdown."""
    lines = [HEAD, ("---", "---:", "---:", "---"), *rows(report)]
    return "\n".join([f"**{report.verdict}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def table(report: SidDrift) -> Table:
    """Draw verdict and checks for a terminal."""
    view = Table(title=report.verdict, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEAD:
        view.add_column(name, justify="right" if name in ("value", "limit") else "left")
    for row in rows(report):
        view.add_row(*row, style="red" if row[-1] else "")
    return view


def _levels(errors_NL: Tensor, codes_NL: Tensor, is_new_N: Tensor, trained: SidTable) -> pl.DataFrame:
    """Describe each level, over the items that reach it."""
    new_NL = is_new_N[:, None] & (codes_NL >= 0)
    known_NL = ~is_new_N[:, None] & (codes_NL >= 0)
    unseen_NL = _unseen(codes_NL, is_new_N, trained)

    def means(values_NL: Tensor, among_NL: Tensor) -> pl.Series:
        sums_L = (values_NL.nan_to_num() * among_NL).sum(dim=0)
        return pl.Series((sums_L / among_NL.sum(dim=0)).tolist(), dtype=pl.Float64).fill_nan(None)

    def perplexities(among_NL: Tensor) -> list[float | None]:
        by_level = zip(codes_NL.T, among_NL.T, strict=True)
        return [_perplexity(code_N[among_N]) if among_N.any() else None for code_N, among_N in by_level]

    return pl.DataFrame(
        {
            "level": range(1, codes_NL.shape[1] + 1),
            "reconstruction_known": means(errors_NL, known_NL),
            "reconstruction_newcomers": means(errors_NL, new_NL),
            "perplexity_known": perplexities(known_NL),
            "perplexity_newcomers": perplexities(new_NL),
            "unseen_share": means(unseen_NL.double(), new_NL),
        },
        schema=SidDrift.SCHEMAS["levels"],
    )


def _reconstruction(errors_NL: Tensor, codes_NL: Tensor, is_new_N: Tensor) -> dict[str, float]:
    """Return mean squared distances of unit vectors after the first code and after the last, and their ratios.

    A known item has drawn what its first code decodes to towards itself: the mean of m items lies (m - 1) / m as far
    from each as the mean of the others does. ``reconstruction_first_expected`` undoes that, so that newcomers are held
    against known items that training had not met. Between unit vectors, as errors are, it comes to within 2 % of
    leaving each item out of its k-means code; codes of other tokenizers are no means, but follow their items too.
    """
    last_N = (codes_NL >= 0).sum(dim=1) - 1
    known, new = ~is_new_N, is_new_N
    first_n, items_n = errors_NL[known, 0], codes_NL[known, 0].bincount()[codes_NL[known, 0]]
    drawn_n = items_n / (items_n - 1).clamp(min=0.5)  # of an item alone nothing is known: as of a pair
    expected = float((first_n * drawn_n**2).mean())
    whole_N = errors_NL.gather(1, last_N[:, None])[:, 0]
    figures = {
        "reconstruction_first_known": float(first_n.mean()),
        "reconstruction_first_expected": expected,
        "reconstruction_first_newcomers": float(errors_NL[new, 0].mean()),
        "reconstruction_known": float(whole_N[known].mean()),
        "reconstruction_newcomers": float(whole_N[new].mean()),
    }
    # Known items may be met exactly; then rounding is what newcomers are held against.
    return figures | {
        "reconstruction_first_ratio": figures["reconstruction_first_newcomers"] / max(expected, 1e-6),
        "reconstruction_ratio": figures["reconstruction_newcomers"]
        / max(figures["reconstruction_known"], 1e-6),
    }


def _collisions(trained: SidTable, grown: SidTable) -> dict[str, float]:
    """Return the shares of items that share their codes: of newcomers, and of known items among themselves."""
    size, is_known = pl.len().over("codes"), pl.col("item_id") < trained.num_items
    newcomers = grown.codes.with_columns(size=size, known=is_known.sum().over("codes")).filter(~is_known)
    known = trained.codes.select(size > 1).to_series()
    shares = {
        "collision_share_known": known,
        "collision_share_newcomers": newcomers["size"] > 1,
        "collision_share_with_known": newcomers["known"] > 0,
        "collision_share_among_newcomers": newcomers["size"] - newcomers["known"] > 1,
    }
    figures = {name: float(share.sum()) / len(share) for name, share in shares.items()}
    excess = figures["collision_share_newcomers"] - figures["collision_share_known"]
    return figures | {"collision_excess": excess}


def _room(trained: SidTable, grown: SidTable, crowded: float) -> dict[str, float]:
    """Return how full the fullest bucket is that newcomers entered, and the share of buckets that they crowd.

    What stood full at the training is no drift: training again with the same settings fills it again.
    """
    is_new = pl.col("item_id") >= trained.num_items
    buckets = grown.codes.group_by("codes").agg(items=pl.len(), new=is_new.sum())
    used = buckets.filter(pl.col("new") > 0)["items"]
    return {
        "fullest_bucket": float(used.max()),  # type: ignore[arg-type]
        "fullest_share": float(used.max()) / grown.suffix_size,  # type: ignore[arg-type]
        "crowded_share": float((used >= crowded * grown.suffix_size).sum()) / len(buckets),
    }


def _use(codes_NL: Tensor, is_new_N: Tensor, trained: SidTable) -> dict[str, float]:
    """Return how newcomers use the first codes, and how many have a code that is new."""
    known_n, new_M = codes_NL[~is_new_N, 0], codes_NL[is_new_N, 0]
    # Few items cannot use many codes: newcomers are held against as many known ones.
    order = torch.randperm(len(known_n), generator=torch.Generator().manual_seed(0))
    drawn, found = _perplexity(known_n[order[: len(new_M)]]), _perplexity(new_M)
    unseen_M = _unseen(codes_NL, is_new_N, trained)[is_new_N].any(dim=1)
    return {
        "perplexity_first_known": drawn,
        "perplexity_first_newcomers": found,
        "perplexity_ratio": found / drawn,
        "unseen_share": float(unseen_M.double().mean()),
    }


def _unseen(codes_NL: Tensor, is_new_N: Tensor, trained: SidTable) -> Tensor:
    """Say which codes (N, L) no known item has: on their level, or anywhere if the levels share a codebook."""
    seen_KL = torch.zeros(max(trained.codebook_sizes) + 1, codes_NL.shape[1], dtype=torch.bool)
    seen_KL.scatter_(0, codes_NL[~is_new_N] + 1, True)  # row 0 takes the places behind the end of a name
    if trained.shared:
        seen_KL = seen_KL.any(dim=1, keepdim=True).expand(-1, codes_NL.shape[1])
    return ~seen_KL.gather(0, codes_NL + 1) & (codes_NL >= 0)


def _perplexity(codes_M: Tensor) -> float:
    share_K = torch.bincount(codes_M).double() / len(codes_M)
    return float(torch.special.entr(share_K).sum().exp())


def _recall(report: EvaluationReport, known: int, items: int, k: int) -> dict[str, float]:
    """Return recall on known and on new targets, what guessing has, and what new targets cost over all users."""
    methods = [name for name in report.ranks["method"].unique(maintain_order=True) if name not in BASELINES]
    require(
        len(methods) == 1,
        f"drift reads the EvaluationReport of one recommender, this one has {methods or 'baselines alone'}",
    )
    listed = report.provenance.config.get("beams")
    require(
        listed is None or k <= listed,
        f"drift.recall_at {k} looks beyond the {listed} places that the evaluation ranked: lower it, or raise "
        "evaluate.beams",
    )
    seen = report.metrics["seen"].unique(maintain_order=True).to_list()
    ranks = report.ranks.filter(method=methods[0], seen="kept" if "kept" in seen else seen[0])
    is_new = ranks["target"] >= known
    cold = report.details.get("cold", {}).get("targets", 0)
    highest = ranks["target"].to_numpy().max()
    if is_new.sum() != cold or highest >= items:
        raise ArtifactError(
            f"drift: the EvaluationReport has {cold} cold targets and items up to {highest}, the tables {is_new.sum()} "
            f"newcomers among its targets and {items} items: evaluate on a split of the grown catalogue, its newcomers "
            "cold"
        )
    hit = (ranks["rank"] <= k).fill_null(False)
    figures = {"recall_chance": min(1.0, k / items), "new_target_share": cold / len(ranks)}
    if cold:
        figures["recall_newcomers"] = float(hit.filter(is_new).sum()) / cold
    if cold < len(ranks):
        figures["recall_known"] = float(hit.filter(~is_new).sum()) / (len(ranks) - cold)
        overall = float(hit.sum()) / len(ranks)
        if figures["recall_known"] > 0:
            figures["recall_lost"] = max(0.0, 1 - overall / figures["recall_known"])
    return figures


def _checks(figures: dict[str, float], config: DriftConfig) -> pl.DataFrame:
    """Hold every figure that has a limit against it."""
    f = figures
    found: list[tuple[str, float, float, bool, str]] = []

    def most(figure: str, limit: float, words: str) -> None:
        found.append((figure, f[figure], limit, f[figure] > limit, words))

    def least(figure: str, limit: float, words: str) -> None:
        found.append((figure, f[figure], limit, f[figure] < limit, words))

    most(
        "new_share",
        config.max_new_share,
        f"{f['new_share']:.1%} of the catalogue is new since the last training; at most {config.max_new_share:.0%}",
    )
    if f["newcomers"]:
        most(
            "fullest_share",
            config.max_fullest,
            f"the fullest bucket with newcomers has {f['fullest_bucket']:.0f} items, {f['fullest_share']:.0%} of its "
            f"suffixes; at most {config.max_fullest:.0%}",
        )
        most(
            "crowded_share",
            config.max_crowded_share,
            f"{f['crowded_share']:.2%} of the buckets have newcomers and use {config.crowded:.0%} of their suffixes or "
            f"more; at most {config.max_crowded_share:.2%}",
        )
    if f["newcomers"] >= config.min_newcomers:
        most(
            "reconstruction_first_ratio",
            config.max_reconstruction_ratio,
            f"newcomers lie {f['reconstruction_first_newcomers']:.3f} from what their first code decodes to, of known "
            f"items untrained on {f['reconstruction_first_expected']:.3f} would be expected: "
            f"{f['reconstruction_first_ratio']:.2f} times as far; at most {config.max_reconstruction_ratio:.2f}",
        )
        most(
            "collision_excess",
            config.max_collision_excess,
            f"{f['collision_share_newcomers']:.1%} of the newcomers share their codes, of known items "
            f"{f['collision_share_known']:.1%}: a difference of {f['collision_excess']:.3f}; at most "
            f"{config.max_collision_excess:.3f}",
        )
        least(
            "perplexity_ratio",
            config.min_perplexity_ratio,
            f"newcomers' first codes have perplexity {f['perplexity_first_newcomers']:.1f}, those of as many known "
            f"items {f['perplexity_first_known']:.1f}: a ratio of {f['perplexity_ratio']:.2f}; at least "
            f"{config.min_perplexity_ratio:.2f}",
        )
        most(
            "unseen_share",
            config.max_unseen_share,
            f"{f['unseen_share']:.1%} of the newcomers have a code that no known item has; at most "
            f"{config.max_unseen_share:.1%}",
        )
    if "recall_lost" in f:
        cold = f"{f['recall_newcomers']:.4f} on newcomers, " if "recall_newcomers" in f else ""
        most(
            "recall_lost",
            config.max_recall_lost,
            f"R@{config.recall_at} is {f['recall_known']:.4f} on known targets, {cold}{f['recall_chance']:.4f} by "
            f"chance; {f['new_target_share']:.1%} of the targets are new, which costs {f['recall_lost']:.1%} of it; at "
            f"most {config.max_recall_lost:.0%}",
        )
    return pl.DataFrame(found, schema=SidDrift.SCHEMAS["checks"], orient="row")
