"""SASRec: what it scores, what it learns, and that a run can be repeated and resumed."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import SasRecCheckpoint, SequenceSplit
from components.config import describe
from components.data.batches import Rows, pad
from components.data.planted import best_recall
from components.folders import ArtifactError
from components.recommenders.full_ranking import rank_exactly
from components.recommenders.popularity import Popularity
from components.recommenders.sasrec import SasRec, SasRecConfig, load_sasrec
from components.training.loop import LoopConfig
from components.training.recommender import OptimConfig
from components.training.sasrec import SasRecStage, train_sasrec, validate

N = 12
SMALL = SasRecConfig(dim=8, layers=2, heads=2, head_dim=4, hidden=16, dropout=0.3, max_history=4)
STAGE = SasRecStage(
    model=SasRecConfig(dim=32, layers=1, heads=2, head_dim=16, hidden=64, dropout=0.1),
    loop=LoopConfig(epochs=3),
    batch_size=32,
    optim=OptimConfig(lr=1e-2, warmup_steps=10),
    validation_users=100,
    device="cpu",
)
HISTORY = st.lists(st.integers(0, N - 1), max_size=9)


def _ignore(step, values) -> None:
    pass


def _lists(values: list[list[int]]) -> pl.Series:
    return pl.Series(values, dtype=pl.List(pl.UInt32))


def _batch(*windows: list[int]):
    """Pad windows whose last item is the target."""
    ends = np.cumsum([len(window) for window in windows])
    flat = np.concatenate(windows).astype(np.int64)
    starts = ends - [len(window) for window in windows]
    return pad(Rows(flat, starts, ends - 1, flat[ends - 1]), np.arange(len(windows)))


@pytest.fixture(scope="module")
def model() -> SasRec:
    """Random weights, large enough that items and places make a difference."""
    torch.manual_seed(0)
    model = SasRec(SMALL, N)
    with torch.no_grad():
        model.items.normal_(std=0.5)
        model.place.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def trained(tiny) -> SasRecCheckpoint:
    return train_sasrec(tiny.split, STAGE, _ignore)


def test_the_loss_is_the_cross_entropy_over_the_whole_catalogue(model: SasRec) -> None:
    windows = [[3, 1, 4, 1], [5, 9]]
    surprise = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor(window[:-1])
            x = model.items[ids] * np.sqrt(8) + model.place[: len(ids)]
            hidden = model.stack(x[None])[0][0].numpy()
            logits = hidden @ model.items.numpy().T
            surprise += [np.log(np.exp(z).sum()) - z[t] for z, t in zip(logits, window[1:], strict=True)]
        assert model.loss(_batch(*windows)).item() == pytest.approx(np.mean(surprise), rel=1e-5)


def test_each_item_is_predicted_from_the_items_before_it_alone(model: SasRec) -> None:
    """Ranking sees nothing but the past; if training saw more, the two would differ."""
    window = [7, 2, 2, 10, 0]
    alone = [-model.scores(_lists([window[:at]]))[0, window[at]] for at in range(1, len(window))]
    with torch.no_grad():
        for end in range(2, len(window) + 1):
            assert model.loss(_batch(window[:end])).item() == pytest.approx(
                np.mean(alone[: end - 1]), rel=1e-4
            )


def test_padding_in_a_training_batch_changes_no_loss(model: SasRec) -> None:
    windows = [[1, 2], [3, 4, 5], [6, 7, 8, 9, 10]]
    with torch.no_grad():
        alone = [model.loss(_batch(window)).item() * (len(window) - 1) for window in windows]
        together = model.loss(_batch(*windows)).item() * 7
    assert together == pytest.approx(sum(alone), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(histories=st.lists(HISTORY, min_size=1, max_size=5))
def test_a_history_scores_the_same_alone_and_among_longer_ones(
    model: SasRec, histories: list[list[int]]
) -> None:
    together = model.scores(_lists(histories))
    for row, history in zip(together, histories, strict=True):
        np.testing.assert_allclose(model.scores(_lists([history]))[0], row, rtol=1e-5, atol=1e-5)


def test_only_the_latest_items_are_read_and_their_order_counts(model: SasRec) -> None:
    longer, cut, turned = model.scores(_lists([[8, 9, 1, 2, 3, 4], [1, 2, 3, 4], [4, 2, 3, 1]]))
    np.testing.assert_allclose(longer, cut, rtol=1e-5)
    assert not np.allclose(cut, turned, atol=1e-2)


def test_scores_are_log_probabilities_and_an_empty_history_says_nothing(model: SasRec) -> None:
    scores = model.scores(_lists([[], [3], [4, 5]]))
    assert scores.shape == (3, N) and scores.dtype == np.float64
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-9)
    np.testing.assert_allclose(scores[0], -np.log(N))
    assert model.scores(_lists([[], []])).tolist() == [scores[0].tolist()] * 2
    assert np.ptp(scores[1]) > 0.1


def test_scores_are_free_of_dropout_and_leave_the_mode_as_it_was(model: SasRec) -> None:
    expected = model.scores(_lists([[1, 2]]))
    assert not model.training
    model.train()
    try:
        assert np.array_equal(model.scores(_lists([[1, 2]])), expected)
        assert model.training and model.stack.training
    finally:
        model.eval()


def test_fresh_weights_know_nothing() -> None:
    torch.manual_seed(0)
    windows = torch.randint(1000, (8, 51)).tolist()
    with torch.no_grad():
        loss = SasRec(SasRecConfig(), 1000).eval().loss(_batch(*windows))
    assert loss.item() == pytest.approx(np.log(1000), abs=0.1)


def test_every_weight_learns_and_unmet_items_are_pushed_away() -> None:
    torch.manual_seed(0)
    model = SasRec(SMALL, N)
    model.loss(_batch([1, 2, 3, 1, 2], [4, 5])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert bool(model.items.grad[11].any())


def test_ranks_follow_the_scores_and_seen_items_can_be_left_out(tiny, trained: SasRecCheckpoint) -> None:
    model, test = load_sasrec(trained, tiny.split), tiny.split.test.head(60)
    scores = model.scores(test["history"])
    for exclude in (False, True):
        exact = rank_exactly(model, test["history"], test["target"], k=20, exclude_seen=exclude, batch_size=7)
        rows = zip(scores, test["history"], test["target"], exact.ranks, exact.items, strict=True)
        for score, history, target, rank, items in rows:
            left_out = set(history) if exclude else set()
            order = [item for item in np.argsort(-score, kind="stable").tolist() if item not in left_out]
            assert items.tolist() == order[:20]
            assert rank == (0 if target in left_out else order.index(target) + 1)


def test_training_finds_the_planted_structure(tiny) -> None:
    """The next group is known, the item in it only by popularity: 0.81 is the most, popularity has 0.39."""
    test = tiny.split.test
    stage = STAGE.model_copy(update={"loop": LoopConfig(epochs=8)})
    model = load_sasrec(train_sasrec(tiny.split, stage, _ignore), tiny.split)
    popularity = Popularity.fit(tiny.split.train["sequence"], tiny.split.num_items)
    found, floor = (validate(scorer, test)["valid_R@10"] for scorer in (model, popularity))
    assert floor + 0.2 < found < best_recall(10) + 0.05


def test_same_seed_same_bytes(tiny, trained: SasRecCheckpoint) -> None:
    torch.manual_seed(123)  # whatever ran before
    assert train_sasrec(tiny.split, STAGE, _ignore).fingerprint == trained.fingerprint
    other = train_sasrec(tiny.split, STAGE.model_copy(update={"seed": 1}), _ignore)
    assert other.fingerprint != trained.fingerprint


def test_a_resumed_run_equals_an_unbroken_one(tiny, trained: SasRecCheckpoint) -> None:
    states: list = []
    train_sasrec(tiny.split, STAGE, _ignore, save=states.append)
    torch.manual_seed(123)  # the process is another one
    epochs: list[float] = []
    resumed = train_sasrec(
        tiny.split,
        STAGE,
        lambda step, values: epochs.append(values["epoch"]) if "epoch" in values else None,
        resume=states[0],
    )
    assert epochs == [2, 3]
    assert resumed.fingerprint == trained.fingerprint


def test_the_kept_weights_are_those_of_the_best_validated_epoch(tiny) -> None:
    logged: dict[int, float] = {}
    stage = STAGE.model_copy(  # no dropout and a high rate: the last epochs overfit
        update={
            "model": STAGE.model.model_copy(update={"dropout": 0.0}),
            "loop": LoopConfig(epochs=6),
            "optim": OptimConfig(lr=2e-2, warmup_steps=1),
        }
    )
    kept = train_sasrec(
        tiny.split,
        stage,
        lambda _, values: (
            logged.update({values["epoch"]: values["valid_N@10"]}) if "epoch" in values else None
        ),
    )
    assert len(logged) == 6
    assert kept.epoch == max(logged, key=lambda epoch: (logged[epoch], -epoch)) < 6
    sample = tiny.split.valid.sample(100, seed=0, shuffle=True)
    again = validate(load_sasrec(kept, tiny.split), sample)
    assert again == kept.metrics and again["valid_N@10"] == logged[kept.epoch]


def test_training_reads_no_test_target(tiny, trained: SasRecCheckpoint) -> None:
    blind = dataclasses.replace(tiny.split, test=tiny.split.test.head(1))
    again = train_sasrec(blind, STAGE, _ignore)
    assert again.metrics == trained.metrics
    for name, value in trained.weights.items():
        assert torch.equal(value, again.weights[name]), name


def _of_items(split: SequenceSplit, num_items: int) -> SequenceSplit:
    return dataclasses.replace(split, num_items=num_items)


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(tiny, trained: SasRecCheckpoint) -> None:
    with pytest.raises(
        ArtifactError, match="scores 120 items, the SequenceSplit has 121: .* train SASRec on"
    ):
        load_sasrec(trained, _of_items(tiny.split, 121))
    other = dataclasses.replace(tiny.split, test=tiny.split.test.head(1))
    with pytest.raises(ArtifactError, match="it may have learned test targets; train SASRec on this split"):
        load_sasrec(trained, other)
    narrow = dataclasses.replace(trained, config=trained.config | {"dim": 16})
    with pytest.raises(ArtifactError, match="weights do not fit its configuration"):
        load_sasrec(narrow, tiny.split)
    fewer = {name: value for name, value in trained.weights.items() if name != "place"}
    with pytest.raises(ArtifactError, match=r'weights do not fit its configuration.*\n.*"place"'):
        load_sasrec(dataclasses.replace(trained, weights=fewer), tiny.split)
    unknown = dataclasses.replace(trained, config=trained.config | {"depth": 3})
    with pytest.raises(ArtifactError, match=r"config is not one this sidflow knows.*\n.*depth"):
        load_sasrec(unknown, tiny.split)


def test_every_setting_is_explained() -> None:
    assert [line for line in describe(SasRecStage) if ": " not in line and not line.endswith(":")] == []
