"""Laws of the drift report: figures as counted by hand, silent about newcomers alike, loud about foreign ones."""

import math
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest
import torch
from torch import Tensor

from components.artifacts import (
    ContentEmbeddings,
    EvaluationReport,
    ItemCatalog,
    SidDrift,
    SidTable,
    TokenizerCheckpoint,
)
from components.data.ingest import IngestConfig, ingest
from components.data.samples import SampleSource
from components.embeddings import LsaConfig, assemble, encode_shard, fit_encoder, unreadable
from components.folders import ArtifactError
from components.metrics.drift import DUE, KEEP, DriftConfig, drift, markdown_table, rows, table
from components.tokenizers.build import build_tokenizer, checkpoint_of, load_tokenizer
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.extend import extend
from components.tokenizers.prefixes import prefix_errors
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.sids import SidConfig, assign, codes_to_table, padded_codes
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage

KNOWN, NEW = 200, 40
SIDS = SidConfig(suffix_size=64)


def items(rows: int, seed: int, group: int = 0) -> Tensor:
    """Unit vectors around ten centres; another group of centres lies in other dimensions."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.zeros(10, 24)
    centres[:, 12 * group : 12 * group + 12] = torch.randn(10, 12, generator=generator)
    noise = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(centres[torch.arange(rows) % 10] + 0.5 * noise)


def embeddings_of(x_ND: Tensor) -> ContentEmbeddings:
    return ContentEmbeddings(
        vectors={"vectors": x_ND.contiguous()}, encoder="lsa", revision="1", normalised=True, catalog="c"
    )


BEFORE = embeddings_of(items(KNOWN, seed=0))


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerCheckpoint:
    module = build_tokenizer(RkMeansConfig(codebook_sizes=[10, 6]), 24)
    module.fit(BEFORE.matrix, seed=0)
    return checkpoint_of(module, embeddings=BEFORE.fingerprint, steps=0, metrics={})


def grown(tokenizer: TokenizerCheckpoint, newcomers: Tensor) -> tuple[ContentEmbeddings, SidTable, SidTable]:
    """Embeddings of all, the table of the training, and the table now."""
    everything = embeddings_of(torch.cat([BEFORE.matrix, newcomers]))
    trained = assign(tokenizer, BEFORE, SIDS)
    return everything, trained, extend(tokenizer, everything, trained, SIDS, BEFORE)


def report_of(
    tokenizer: TokenizerCheckpoint, newcomers: Tensor, config: DriftConfig | None = None
) -> SidDrift:
    everything, trained, now = grown(tokenizer, newcomers)
    return drift(tokenizer, everything, trained, now, config or DriftConfig())


def perplexity(codes: list[int]) -> float:
    shares = [count / len(codes) for count in Counter(codes).values()]
    return math.exp(-sum(share * math.log(share) for share in shares))


def test_newcomers_of_the_same_making_are_no_reason(tokenizer, tmp_path) -> None:
    report = report_of(tokenizer, items(NEW, seed=1))
    assert (report.verdict, report.reasons) == (KEEP, [])
    assert report.figures["reconstruction_first_ratio"] == pytest.approx(1, abs=0.3)
    report.save(tmp_path / "drift")
    assert SidDrift.load(tmp_path / "drift").fingerprint == report.fingerprint


def test_foreign_newcomers_make_a_full_retraining_due_and_the_reasons_name_figure_and_limit(
    tokenizer,
) -> None:
    report = report_of(tokenizer, items(NEW, seed=1, group=1))
    assert report.verdict == DUE
    assert report.checks.filter("beyond")["figure"].to_list() == ["reconstruction_first_ratio"]
    first = report.figures["reconstruction_first_ratio"]
    assert first > 1.35 and f"{first:.2f} times as far; at most 1.35" in report.reasons[0]
    words = markdown_table(report)
    assert words.startswith(f"**{DUE}**") and f"{report.reasons[0]} | {first:.3g} | 1.35 | beyond |" in words
    assert len(rows(report)) == len(report.checks) == table(report).row_count


def test_an_exact_copy_of_the_catalogue_has_its_figures(tokenizer) -> None:
    report = report_of(tokenizer, BEFORE.matrix, DriftConfig(max_new_share=0.6))
    figures, levels = report.figures, report.levels
    assert figures["new_share"] == 0.5
    assert figures["reconstruction_ratio"] == pytest.approx(1) == figures["perplexity_ratio"]
    assert levels["perplexity_known"].to_list() == pytest.approx(levels["perplexity_newcomers"].to_list())
    assert figures["collision_share_with_known"] == 1 and figures["unseen_share"] == 0


def test_figures_are_those_counted_item_by_item(tokenizer) -> None:
    newcomers = torch.cat([items(NEW, seed=1), items(5, seed=2, group=1)])
    everything, trained, now = grown(tokenizer, newcomers)
    figures = drift(tokenizer, everything, trained, now, DriftConfig()).figures
    names = [tuple(codes) for codes in now.codes["codes"].to_list()]
    old, new = names[:KNOWN], names[KNOWN:]
    assert figures["collision_share_known"] == sum(old.count(name) > 1 for name in old) / KNOWN
    assert figures["collision_share_newcomers"] == sum(names.count(name) > 1 for name in new) / 45
    assert figures["collision_share_with_known"] == sum(name in old for name in new) / 45
    assert figures["collision_share_among_newcomers"] == sum(new.count(name) > 1 for name in new) / 45
    seen = [{name[level] for name in old} for level in (0, 1)]
    unseen = sum(any(name[level] not in seen[level] for level in (0, 1)) for name in new)
    assert figures["unseen_share"] == unseen / 45
    assert figures["perplexity_first_newcomers"] == pytest.approx(perplexity([name[0] for name in new]))
    assert figures["fullest_bucket"] == max(Counter(names).values())
    errors = prefix_errors(load_tokenizer(tokenizer), everything.matrix, padded_codes(now))
    assert figures["reconstruction_newcomers"] == pytest.approx(float(errors[KNOWN:, -1].mean()), rel=1e-5)
    assert figures["reconstruction_first_known"] == pytest.approx(float(errors[:KNOWN, 0].mean()), rel=1e-5)
    # What is expected is the distance to the mean of the others in the bucket, both of length 1.
    apart = []
    for item in range(KNOWN):
        others = [row for row in range(KNOWN) if row != item and old[row][0] == old[item][0]]
        middle = torch.nn.functional.normalize(everything.matrix[others].mean(dim=0), dim=0)
        apart.append(float((everything.matrix[item] - middle).square().sum()))
    assert figures["reconstruction_first_expected"] == pytest.approx(sum(apart) / KNOWN, rel=0.02)


def test_room_is_counted_by_bucket(tokenizer) -> None:
    twins = BEFORE.matrix[:1].repeat(50, 1)
    report = report_of(tokenizer, twins, DriftConfig(min_newcomers=51, crowded=0.7, max_fullest=0.7))
    buckets = len({tuple(codes) for codes in assign(tokenizer, BEFORE, SIDS).codes["codes"].to_list()})
    full = report.figures["fullest_bucket"]
    assert full > 50 and report.figures["fullest_share"] == full / 64
    assert report.figures["crowded_share"] == 1 / buckets
    assert report.checks.filter("beyond")["figure"].to_list() == ["fullest_share", "crowded_share"]


def test_a_bucket_that_stood_full_at_the_training_is_no_drift(tokenizer) -> None:
    """Neither on a night without newcomers nor when they go elsewhere; it is when they enter it."""
    crowd = embeddings_of(torch.cat([BEFORE.matrix[:1].repeat(54, 1), BEFORE.matrix]))
    crowded = replace(tokenizer, embeddings=crowd.fingerprint)
    trained = assign(crowded, crowd, SIDS)
    codes = trained.codes["codes"].to_list()
    elsewhere = next(item for item, code in enumerate(codes) if code != codes[0])
    found = []
    for newcomers in ([], [elsewhere], [elsewhere, 0]):
        everything = embeddings_of(torch.cat([crowd.matrix, crowd.matrix[newcomers]]))
        now = extend(crowded, everything, trained, SIDS, crowd)
        found.append(drift(crowded, everything, trained, now, DriftConfig(max_fullest=0.9)).reasons)
    assert found[:2] == [[], []] and "fullest bucket with newcomers has" in found[2][0]


def test_few_newcomers_are_reported_and_have_no_say(tokenizer) -> None:
    foreign = items(5, seed=1, group=1)
    report = report_of(tokenizer, foreign)
    assert report.verdict == KEEP and report.figures["reconstruction_first_ratio"] > 1.35
    assert report.figures["perplexity_first_known"] <= 5  # held against five known items, not against all
    assert report_of(tokenizer, foreign, DriftConfig(min_newcomers=5)).verdict == DUE
    nobody = report_of(tokenizer, foreign[:0])
    assert nobody.verdict == KEEP and nobody.figures["new_share"] == 0
    assert nobody.levels["reconstruction_newcomers"].null_count() == 2


def test_drift_adds_up_over_extensions(tokenizer) -> None:
    """Two steps of a sixth each: neither is beyond the limit, the sum since the training is."""
    first = embeddings_of(torch.cat([BEFORE.matrix, items(40, seed=1)]))
    last = embeddings_of(torch.cat([first.matrix, items(40, seed=2)]))
    trained = assign(tokenizer, BEFORE, SIDS)
    middle = extend(tokenizer, first, trained, SIDS, BEFORE)
    now = extend(tokenizer, last, middle, SIDS, first)
    assert drift(tokenizer, last, middle, now, DriftConfig()).figures["new_share"] == 40 / 280
    whole = drift(tokenizer, last, trained, now, DriftConfig())
    assert whole.figures["new_share"] == 80 / 280
    assert whole.checks.filter("beyond")["figure"].to_list() == ["new_share"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_code_is_unseen_on_its_level_or_where_levels_share_it_everywhere(shared: bool) -> None:
    torch.manual_seed(0)
    module = build_tokenizer(
        DvaeConfig(vocabulary=8, positions=2, length="fixed", hidden=8, decoder_hidden=8)
        if shared
        else RkMeansConfig(codebook_sizes=[8, 8]),
        6,
    )
    assert isinstance(module, Dvae) == shared
    everything = embeddings_of(torch.randn(4, 6))
    checkpoint = checkpoint_of(module, embeddings="e", steps=0, metrics={})
    codes = torch.tensor([[0, 1], [1, 1], [1, 0], [2, 1]])
    trained = codes_to_table(codes[:2], [8, 8], 8, checkpoint.fingerprint, shared=shared)
    now = codes_to_table(codes, [8, 8], 8, checkpoint.fingerprint, trained, shared=shared)
    report = drift(checkpoint, everything, trained, now, DriftConfig(min_newcomers=1))
    assert report.figures["unseen_share"] == (0.5 if shared else 1.0)
    assert report.levels["unseen_share"].to_list() == ([0.5, 0] if shared else [0.5, 0.5])


def evaluation(
    targets: list[int], ranks: list[int | None], cold: int, method: str = "mine"
) -> EvaluationReport:
    frame = pl.DataFrame(
        {
            "method": [method] * len(targets),
            "seen": ["kept"] * len(targets),
            "user_id": range(len(targets)),
            "target": targets,
            "rank": ranks,
        },
        schema=EvaluationReport.SCHEMAS["ranks"],
    )
    metrics = pl.DataFrame(
        [(method, "kept", "all", "R@10", 0.5, None, None)],
        schema=EvaluationReport.SCHEMAS["metrics"],
        orient="row",
    )
    return EvaluationReport(
        ranks=frame, metrics=metrics, split="s", details={"cold": {"items": NEW, "targets": cold}}
    )


def test_recall_lost_on_newcomers_is_what_they_cost_over_all_users(tokenizer) -> None:
    everything, trained, now = grown(tokenizer, items(NEW, seed=1))
    targets = [0, 1, 2, 3, 4, 5, KNOWN, KNOWN + 1]
    found = evaluation(targets, [1, 10, 3, 4, 11, None, 2, None], cold=2)
    report = drift(tokenizer, everything, trained, now, DriftConfig(max_recall_lost=0.05), found)
    assert report.figures["recall_known"] == 4 / 6 and report.figures["recall_newcomers"] == 1 / 2
    assert report.figures["recall_chance"] == 10 / (KNOWN + NEW)
    assert report.figures["recall_lost"] == pytest.approx(1 - (5 / 8) / (4 / 6))
    assert (
        report.verdict == DUE and "R@10 is 0.6667 on known targets, 0.5000 on newcomers" in report.reasons[0]
    )
    assert report.provenance.parents["EvaluationReport"] == found.fingerprint
    assert drift(tokenizer, everything, trained, now, DriftConfig(), found).verdict == KEEP
    nobody = evaluation(targets[:6], [1] * 6, cold=0)
    assert "recall_newcomers" not in drift(tokenizer, everything, trained, now, DriftConfig(), nobody).figures


def test_what_is_not_of_one_catalogue_is_refused(tokenizer) -> None:
    everything, trained, now = grown(tokenizer, items(NEW, seed=1))
    with pytest.raises(ArtifactError, match="take those of the grown table"):
        drift(tokenizer, BEFORE, trained, now, DriftConfig())
    with pytest.raises(ArtifactError, match="take those of the grown table"):
        drift(replace(tokenizer, steps=1), everything, trained, now, DriftConfig())
    with pytest.raises(ArtifactError, match="does not extend"):
        drift(tokenizer, BEFORE, now, trained, DriftConfig())
    with pytest.raises(ArtifactError, match=r"1 cold targets and items up to 200, the tables 2 newcomers"):
        drift(tokenizer, everything, trained, now, DriftConfig(), evaluation([200, 200], [1, 2], cold=1))
    with pytest.raises(ValueError, match="of one recommender, this one has baselines alone"):
        drift(tokenizer, everything, trained, now, DriftConfig(), evaluation([0], [1], 0, "popularity"))


def test_recall_beyond_what_was_ranked_is_refused(tokenizer) -> None:
    """Places that nobody ranked are misses: recall at 50 of lists of 20 would be recall at 20 under another name."""
    everything, trained, now = grown(tokenizer, items(NEW, seed=1))
    found = evaluation([0, KNOWN], [1, 2], cold=1)
    ranked = replace(found, provenance=replace(found.provenance, config={"beams": 20}))
    with pytest.raises(ValueError, match=r"recall_at 50 looks beyond the 20 places .* raise evaluate\.beams"):
        drift(tokenizer, everything, trained, now, DriftConfig(recall_at=50), ranked)
    drift(tokenizer, everything, trained, now, DriftConfig(recall_at=20), ranked)


@pytest.mark.parametrize("codes", [64, 256])
def test_what_came_to_a_real_shop_is_no_reason_and_films_are(codes: int) -> None:
    """As a pipeline does it: the encoder and the codebooks are those of the day, and read what came later."""
    known = ingest(IngestConfig(until="2011-10-01")).catalog
    shop = ingest(IngestConfig(), known).catalog.items
    films = ingest(IngestConfig(source=SampleSource(name="movietweetings"))).catalog.items.head(240)
    encoder = fit_encoder(known, LsaConfig(dim=128))

    def read(catalog: ItemCatalog) -> ContentEmbeddings:
        return assemble([encode_shard(encoder, catalog, 0, 1)], catalog, encoder)

    def readable(rows: pl.DataFrame) -> ItemCatalog:
        """The known items and behind them those of which the encoder knows a word."""
        dumb = unreadable(encoder, ItemCatalog(items=rows))
        kept = rows.filter(~pl.col("item_id").is_in(dumb.implode()))
        return ItemCatalog(items=kept.with_columns(item_id=pl.int_range(pl.len(), dtype=pl.UInt32)))

    before = read(known)
    stage = TokenizerStage(model=RkMeansConfig(codebook_sizes=[codes] * 3))
    tokenizer = train_tokenizer(before, stage)
    trained = assign(tokenizer, before, SidConfig(suffix_size=256))
    verdicts = {}
    ids = pl.int_range(len(known.items), len(known.items) + len(films), dtype=pl.UInt32)
    among = pl.concat([known.items, films.with_columns(item_id=ids)])
    for name, listed in (("gifts", shop), ("films", among)):
        everything = read(readable(listed))
        now = extend(tokenizer, everything, trained, SidConfig(suffix_size=256), before)
        verdicts[name] = drift(tokenizer, everything, trained, now, DriftConfig())
    assert (verdicts["gifts"].verdict, verdicts["gifts"].reasons) == (KEEP, [])
    assert verdicts["gifts"].figures["newcomers"] == 384  # of one of 385 the encoder knows no word
    assert "reconstruction_first_ratio" in verdicts["films"].checks.filter("beyond")["figure"].to_list()
