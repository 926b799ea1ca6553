"""What a recommender is fed: its rows, cut into batches of histories or of symbols, and how many steps that makes."""

from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from components.artifacts import SidTable
from components.data.batches import prefix_rows, training_batches, window_rows
from components.recommenders.build import RecommenderConfig, build_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.tiger import TigerConfig
from components.seams import SequenceBatch
from components.tokenizers.sids import space_of, symbol_counts, table_symbols
from components.training.loop import LoopConfig
from components.training.recommender import (
    OptimConfig,
    RecommenderStage,
    epoch_batches,
    steps_an_epoch,
    train_recommender,
)

SIZE: dict[str, Any] = {
    "dim": 32,
    "layers": 1,
    "heads": 2,
    "head_dim": 16,
    "hidden": 64,
    "dropout": 0.0,
    "max_history": 8,
}


@pytest.fixture(scope="module")
def unequal(tiny) -> SidTable:
    """The SIDs of the planted items, cut after one to three codes at random."""
    lengths = torch.randint(1, 4, (tiny.split.num_items,), generator=torch.Generator().manual_seed(0))
    frame = tiny.sids.codes.with_columns(length=pl.Series(lengths.numpy()))
    codes = frame.select("item_id", codes=pl.col("codes").list.head(pl.col("length"))).with_columns(
        suffix=pl.int_range(pl.len()).over("codes").cast(pl.UInt16)
    )
    return SidTable(
        codes=codes, codebook_sizes=[8, 8, 8], suffix_size=128, shared=True, tokenizer=tiny.sids.tokenizer
    )


def stage(model: RecommenderConfig, **settings: Any) -> RecommenderStage:
    return RecommenderStage(model=model, device="cpu", **{"batch_size": 32} | settings)


def epoch(tiny, sids: SidTable, config: RecommenderStage, seed: int) -> list[SequenceBatch]:
    """The batches of one epoch."""
    recommender = build_recommender(config.model, space_of(sids))
    counts, generator = symbol_counts(table_symbols(sids)), torch.Generator().manual_seed(seed)
    return list(epoch_batches(recommender, tiny.split.train, counts, config, generator)(0))


def symbols_of(batch: SequenceBatch, counts: Tensor) -> Tensor:
    """Symbols of each row, its target left out, and those of the target, (B, 2)."""
    counts = counts[batch.unique]
    return torch.stack([(counts[batch.items] * batch.mask).sum(dim=1), counts[batch.target]], dim=1)


@pytest.mark.parametrize("kind", [CausalConfig, TigerConfig], ids=["causal", "tiger"])
def test_sids_of_one_length_are_batched_by_items_as_ever(tiny, kind: type) -> None:
    config, generator = stage(kind(**SIZE)), torch.Generator().manual_seed(3)
    train = tiny.split.train
    rows = prefix_rows(train, 8) if kind is TigerConfig else window_rows(train, 8, generator)
    expected = list(training_batches(rows, 32, generator))
    for one, other in zip(epoch(tiny, tiny.sids, config, 3), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("max_tokens", [None, 11])
def test_no_batch_and_no_window_is_over_its_budget(tiny, unequal, max_tokens: int | None) -> None:
    counts = symbol_counts(table_symbols(unequal))
    config = stage(CausalConfig(**SIZE, max_tokens=max_tokens), batch_tokens=200)
    batches = epoch(tiny, unequal, config, seed=0)
    read = torch.cat([symbols_of(batch, counts) for batch in batches])
    assert max(int(symbols_of(batch, counts).sum()) for batch in batches) <= 200
    assert read[:, 0].max() <= (max_tokens or 8 * 4)
    predicted = sum(int(batch.mask.sum()) for batch in batches)
    assert predicted == tiny.split.num_training_targets


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (CausalConfig(**SIZE), {}),
        (CausalConfig(**SIZE), {"batch_tokens": 300}),
        (CausalConfig(**SIZE, max_tokens=15), {}),
        (CausalConfig(**SIZE, max_tokens=15), {"batch_tokens": 300}),
    ],
)
def test_the_steps_that_are_planned_are_those_that_are_taken(tiny, unequal, model, settings) -> None:
    """To a few in a hundred, as far as cuts at random allow."""
    config = stage(model, **settings)
    counts = symbol_counts(table_symbols(unequal))
    planned = steps_an_epoch(build_recommender(model, space_of(unequal)), tiny.split.train, counts, config)
    for seed in range(1, 6):
        assert len(epoch(tiny, unequal, config, seed)) == pytest.approx(planned, rel=0.05)


def test_prefixes_have_no_cuts_so_their_steps_are_exact(tiny) -> None:
    config = stage(TigerConfig(**SIZE))
    counts = symbol_counts(table_symbols(tiny.sids))
    recommender = build_recommender(config.model, space_of(tiny.sids))
    planned = steps_an_epoch(recommender, tiny.split.train, counts, config)
    assert planned == -(-tiny.split.num_training_targets // 32) == len(epoch(tiny, tiny.sids, config, 1))


def test_sids_of_unequal_length_can_be_learned(tiny, unequal) -> None:
    """Packed by symbols, under a budget: the loss falls, and rankings are far better than chance."""
    config = stage(
        CausalConfig(**SIZE, max_tokens=20),
        batch_tokens=400,
        loop=LoopConfig(epochs=6),
        optim=OptimConfig(lr=5e-3, warmup_steps=20),
    )
    logged: list[dict[str, float]] = []
    trained = train_recommender(
        tiny.split, unequal, tiny.embeddings, config, lambda step, values: logged.append(dict(values))
    )
    losses = [values["loss"] for values in logged if "loss" in values]
    assert losses[-1] < 0.8 * losses[0]
    assert trained.metrics["valid_R@10"] > 3 * 10 / tiny.split.num_items


def test_tiger_is_not_trained_on_sids_of_unequal_length(tiny, unequal) -> None:
    with pytest.raises(ValueError, match="tiger reads SIDs of one length"):
        train_recommender(
            tiny.split, unequal, tiny.embeddings, stage(TigerConfig(**SIZE)), lambda step, values: None
        )
