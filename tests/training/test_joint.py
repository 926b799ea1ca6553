"""Two-stage and joint training on the planted log: they learn, they agree, they repeat themselves."""

import re
from dataclasses import replace

import pytest
import torch

from components.artifacts import RecommenderCheckpoint, SidTable
from components.data.batches import held_out_rows
from components.data.planted import best_recall
from components.exploration import GumbelConfig, NoNoiseConfig, SdudFrqudConfig
from components.folders import ArtifactError
from components.metrics.ranking import contributions, ranks_in_lists
from components.metrics.sids import CollapseError
from components.recommenders.build import load_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.decoding import rank_rows
from components.recommenders.tiger import TigerConfig
from components.seams import Catalogue, SequenceBatch
from components.tokenizers.build import load_tokenizer
from components.tokenizers.sids import SidConfig, assign, assign_codes, table_symbols
from components.tokenizers.sources import LiveSids
from components.tokenizers.trie import build_trie
from components.training.joint import (
    CollapseConfig,
    JointConfig,
    JointStage,
    PathsConfig,
    RefreshConfig,
    target_counts,
    train_jointly,
)
from components.training.loop import LoopConfig
from components.training.recommender import OptimConfig, RecommenderStage, train_recommender

STAGE = RecommenderStage(
    model=CausalConfig(dim=32, layers=1, heads=2, head_dim=16, hidden=64),
    loop=LoopConfig(epochs=2, log_every=5),
    batch_size=32,
    optim=OptimConfig(lr=5e-3, warmup_steps=10),
    device="cpu",
)


LEARNS = STAGE.model_copy(
    update={"loop": LoopConfig(epochs=8), "optim": OptimConfig(lr=1e-2, warmup_steps=10)}
)


def _ignore(step, values) -> None:
    pass


def _recall(split, checkpoint: RecommenderCheckpoint, sids: SidTable) -> float:
    rows = held_out_rows(split.test)
    symbols = table_symbols(sids)
    ranking = rank_rows(
        load_recommender(checkpoint, sids),
        rows,
        Catalogue(symbols, build_trie(symbols)),
        128,
        10,
        exclude_seen=False,
    )
    return float(contributions(ranks_in_lists(ranking.items.numpy(), rows.target), ["R@10"]).mean())


def _popularity(split) -> float:
    counts = torch.bincount(torch.tensor(split.train["sequence"].explode().to_list()))
    top = set(counts.topk(10).indices.tolist())
    return sum(target in top for target in split.test["target"]) / len(split.test)


@pytest.fixture(scope="module")
def joint(tiny):
    return train_jointly(
        tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, JointConfig(recommender=STAGE), _ignore
    )


def test_both_stages_find_the_planted_structure(tiny) -> None:
    """The next group is known, the item in it only by popularity: 0.81 is the most, popularity has 0.39."""
    frozen = train_recommender(tiny.split, tiny.sids, tiny.embeddings, LEARNS, _ignore)
    joint = train_jointly(
        tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, JointConfig(recommender=LEARNS), _ignore
    )
    for recommender, sids in ((frozen, tiny.sids), (joint.recommender, joint.sids)):
        recall = _recall(tiny.split, recommender, sids)
        assert _popularity(tiny.split) + 0.2 < recall < best_recall(10) + 0.05


def test_tokenizer_table_and_recommender_are_of_one_epoch(tiny, joint) -> None:
    joint.recommender.check_sids(joint.sids)
    assert joint.sids.tokenizer == joint.tokenizer.fingerprint
    codes = load_tokenizer(joint.tokenizer).encode(tiny.embeddings.matrix)
    assert codes.tolist() == joint.sids.codes["codes"].to_list()
    with pytest.raises(ArtifactError, match="its symbols mean other items"):
        load_recommender(joint.recommender, tiny.sids)


def test_same_seed_same_bytes(tiny, joint) -> None:
    again = train_jointly(
        tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, JointConfig(recommender=STAGE), _ignore
    )
    assert again.sids.fingerprint == joint.sids.fingerprint
    assert again.recommender.fingerprint == joint.recommender.fingerprint
    other = train_jointly(
        tiny.split,
        tiny.embeddings,
        tiny.tokenizer,
        tiny.sids,
        JointConfig(recommender=STAGE.model_copy(update={"seed": 1})),
        _ignore,
    )
    assert other.recommender.fingerprint != joint.recommender.fingerprint


def test_resumed_joint_run_equals_an_unbroken_one(tiny) -> None:
    """Running shares, learned noise, its stream, the moving table and its occupancy all belong to the state."""
    stage = JointStage(
        exploration=SdudFrqudConfig(momentum=0.9, ratio=1.0, scaling="detached"),
        suffix_cost=1.0,
        tokenizer_lr=0.02,
    )
    recipe = STAGE.model_copy(update={"loop": LoopConfig(epochs=3, log_every=100)})
    states: list = []
    unbroken, *_ = _logged(tiny, stage, recipe, save=states.append)
    resumed, *_ = _logged(tiny, stage, recipe, resume=states[0])
    assert unbroken.recommender.epoch > 1
    assert resumed.recommender.fingerprint == unbroken.recommender.fingerprint
    assert resumed.tokenizer.fingerprint == unbroken.tokenizer.fingerprint
    assert resumed.sids.fingerprint == unbroken.sids.fingerprint != tiny.sids.fingerprint


def test_high_tokenizer_lr_moves_items_and_the_figures_say_so(tiny) -> None:
    logged: list[dict[str, float]] = []
    config = JointConfig(recommender=STAGE, joint=JointStage(tokenizer_lr=0.1))
    result = train_jointly(
        tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, config, lambda _, v: logged.append(dict(v))
    )
    last = [values for values in logged if "epoch" in values][-1]
    assert last["sids/churn_since_start"] > 0.2
    assert any("train/agree/drawn_nearest/level3" in values for values in logged)
    assert result.sids.fingerprint != tiny.sids.fingerprint


def test_with_historical_routing_the_recommendation_loss_leaves_the_codes_alone(tiny) -> None:
    stage = JointStage(
        routing="historical",
        tokenizer_lr=0.1,
        codebook_weight=0,
        commitment_weight=0,
        latent_reconstruction_weight=0,
    )
    result = train_jointly(
        tiny.split,
        tiny.embeddings,
        tiny.tokenizer,
        tiny.sids,
        JointConfig(recommender=STAGE, joint=stage),
        _ignore,
    )
    for name, value in tiny.tokenizer.weights.items():
        assert torch.equal(result.tokenizer.weights[name], value), name


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_tiger_trains_jointly_too(tiny, tau: float) -> None:
    model = TigerConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32, max_history=5)
    stage = STAGE.model_copy(update={"model": model, "loop": LoopConfig(epochs=1), "batch_size": 256})
    config = JointConfig(recommender=stage, joint=JointStage(exploration=GumbelConfig(tau=tau)))
    result = train_jointly(tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, config, _ignore)
    result.recommender.check_sids(result.sids)


def test_paths_that_a_recommender_cannot_split_are_refused_in_the_config() -> None:
    paths = PathsConfig(history=True, teacher_forcing=False)
    with pytest.raises(ValueError, match="switch the gradient paths history and teacher_forcing"):
        JointConfig(recommender=STAGE, joint=JointStage(paths=paths))


def test_a_table_that_the_first_refresh_would_replace_is_refused(tiny) -> None:
    balanced = assign(tiny.tokenizer, tiny.embeddings, SidConfig(assignment="sinkhorn", suffix_size=64))
    with pytest.raises(ArtifactError, match="% of the items have other codes in the SidTable"):
        train_jointly(
            tiny.split, tiny.embeddings, tiny.tokenizer, balanced, JointConfig(recommender=STAGE), _ignore
        )


def test_a_table_is_never_validated_without_the_codebooks_that_made_it() -> None:
    with pytest.raises(ValueError, match="refresh.every 2 must divide validate_every 1 and epochs 2"):
        JointConfig(recommender=STAGE, joint=JointStage(refresh=RefreshConfig(every=2)))


def test_artefacts_of_different_runs_are_refused(tiny, joint) -> None:
    with pytest.raises(ArtifactError, match="take the three of one run"):
        train_jointly(
            tiny.split, tiny.embeddings, joint.tokenizer, tiny.sids, JointConfig(recommender=STAGE), _ignore
        )
    fewer = replace(tiny.split, num_items=tiny.split.num_items + 1)
    with pytest.raises(ArtifactError, match="names 120 items, the SequenceSplit has 121"):
        train_recommender(fewer, tiny.sids, tiny.embeddings, STAGE, _ignore)


def test_joint_without_gradient_is_the_two_stage_run_bit_for_bit(tiny) -> None:
    """Same seed, same start, same batches: what a pair of arms differs by is the method alone."""
    stage = JointStage(
        routing="historical", codebook_weight=0, commitment_weight=0, latent_reconstruction_weight=0
    )
    frozen = train_recommender(tiny.split, tiny.sids, tiny.embeddings, STAGE, _ignore)
    config = JointConfig(recommender=STAGE, joint=stage)
    joint = train_jointly(tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, config, _ignore)
    assert frozen.weights.keys() == joint.recommender.weights.keys()
    for name, value in frozen.weights.items():
        assert torch.equal(value, joint.recommender.weights[name]), name


def test_noise_does_not_change_the_batches(tiny) -> None:
    """The stream of the batches is not the stream of the noise: arms see the same batches in the same order."""
    seen = []
    for exploration in (NoNoiseConfig(), GumbelConfig()):
        states: list = []
        config = JointConfig(recommender=STAGE, joint=JointStage(exploration=exploration))
        train_jointly(
            tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, config, _ignore, save=states.append
        )
        seen.append([state["generator"] for state in states])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_an_encoder_that_is_not_there_cannot_be_trained(tiny) -> None:
    config = JointConfig(recommender=STAGE, joint=JointStage(train_encoder=True))
    with pytest.raises(ValueError, match="this tokenizer has no encoder: take rqvae, or unset it"):
        train_jointly(tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, config, _ignore)


def _logged(tiny, joint: JointStage, recommender: RecommenderStage = STAGE, sids=None, **hooks):
    """Train jointly and return the result with what was logged at each epoch's end, and between."""
    epochs, steps = [], []

    def log(step, values) -> None:
        (epochs if "epoch" in values else steps).append(dict(values))

    config = JointConfig(recommender=recommender, joint=joint)
    sids = sids or assign(tiny.tokenizer, tiny.embeddings, SidConfig(suffix_size=120))  # room for a collapse
    result = train_jointly(tiny.split, tiny.embeddings, tiny.tokenizer, sids, config, log, **hooks)
    return result, epochs, steps


COLLAPSES = JointStage(
    tokenizer_lr=0.3, codebook_weight=0, commitment_weight=0, latent_reconstruction_weight=0
)


def test_collapse_stops_the_run_by_name_and_keeps_the_best_epoch_before_it(tiny) -> None:
    """All codewords run to one point at this rate; the epochs before the fall are what is handed on."""
    gentle = COLLAPSES.model_copy(
        update={"tokenizer_lr": 0.05, "collapse": CollapseConfig(min_perplexity=0.6)}
    )
    recipe = STAGE.model_copy(update={"loop": LoopConfig(epochs=12, log_every=100)})
    result, epochs, _ = _logged(tiny, gentle, recipe)
    assert result.collapsed is not None and len(epochs) < 12
    words = re.match(
        r"epoch (\d+): the codes of level (\d) collapse, perplexity ([\d.]+) of", result.collapsed
    )
    assert words and int(words[1]) == len(epochs)
    assert epochs[-1][f"sids/perplexity/level{words[2]}"] == pytest.approx(float(words[3]), abs=0.05)
    assert result.recommender.epoch < len(epochs)
    assert result.recommender.metrics["collapsed_at_epoch"] == len(epochs)
    result.recommender.check_sids(result.sids)
    codes = load_tokenizer(result.tokenizer).encode(tiny.embeddings.matrix)
    assert codes.tolist() == result.sids.codes["codes"].to_list()
    free = gentle.model_copy(update={"collapse": None})
    unguarded, all_epochs, _ = _logged(tiny, free, recipe)
    assert unguarded.collapsed is None and len(all_epochs) == 12


def test_collapse_in_the_first_epoch_leaves_nothing_to_keep(tiny) -> None:
    stage = COLLAPSES.model_copy(update={"collapse": CollapseConfig(min_perplexity=0.99)})
    with pytest.raises(CollapseError, match="epoch 1: .*no earlier epoch was validated"):
        _logged(tiny, stage)


def test_every_epoch_says_how_codes_are_drawn_and_who_pulls_at_them(tiny) -> None:
    stage = JointStage(exploration=SdudFrqudConfig(momentum=0.5, ratio=1.0), suffix_cost=1.0)
    _, epochs, steps = _logged(tiny, stage)
    levels = ("level1", "level2", "level3")
    for level in levels:
        for name in ("drawn_nearest", "nearest_table", "drawn_table"):
            assert 0 <= steps[-1][f"train/agree/{name}/{level}"] <= 1
        assert 0 < steps[-1][f"train/hot_share/{level}"] < 1
        assert 0 < steps[-1][f"train/noise/{level}"] < 1.1
        for epoch in epochs:
            assert epoch[f"codebook_gradient/recommendation/{level}"] > 1e-10
            assert epoch[f"codebook_gradient/quantisation/{level}"] > 1e-10
            assert -1 <= epoch[f"gradient_cosine/{level}"] <= 1
    for name in ("sids/churn", "sids/churn_since_start", "sids/colliding", "sids/largest_bucket"):
        assert all(name in epoch for epoch in epochs)


def test_historical_routing_measures_no_gradient_of_the_recommendation(tiny) -> None:
    _, epochs, _ = _logged(tiny, JointStage(routing="historical"))
    for level in range(1, 4):
        assert epochs[-1][f"codebook_gradient/recommendation/level{level}"] == 0
        assert epochs[-1][f"codebook_gradient/quantisation/level{level}"] > 1e-10


def test_looking_at_gradients_changes_nothing(tiny, joint, monkeypatch) -> None:
    monkeypatch.setattr("components.training.joint.gradient_figures", lambda *_: {"seen": 1.0})
    blind, *_ = _logged(tiny, JointStage(), sids=tiny.sids)
    assert blind.tokenizer.weights.keys() == joint.tokenizer.weights.keys()
    for name, value in (blind.recommender.weights | blind.tokenizer.weights).items():
        assert torch.equal(value, (joint.recommender.weights | joint.tokenizer.weights)[name]), name


def test_a_balanced_table_is_refreshed_by_the_rule_that_made_it(tiny) -> None:
    rule = {"assignment": "sinkhorn", "epsilon": 0.01}
    balanced = assign(tiny.tokenizer, tiny.embeddings, SidConfig(suffix_size=64, **rule))
    stage = JointStage(refresh=RefreshConfig(**rule), tokenizer_lr=0.01)
    result, epochs, steps = _logged(tiny, stage, sids=balanced)
    latents = load_tokenizer(result.tokenizer).latents(tiny.embeddings.matrix)
    codes = assign_codes(latents, list(load_tokenizer(result.tokenizer).codebooks), stage.refresh)
    assert codes.tolist() == result.sids.codes["codes"].to_list()
    assert epochs[-1]["sids/churn_since_start"] > 0
    assert steps[-1]["train/agree/nearest_table/level3"] < 0.95


def test_the_table_rests_between_two_refreshes(tiny, monkeypatch) -> None:
    calls, refresh = [], LiveSids.refresh
    monkeypatch.setattr(LiveSids, "refresh", lambda live: calls.append(1) or refresh(live))
    recipe = STAGE.model_copy(update={"loop": LoopConfig(epochs=4, validate_every=2, log_every=100)})
    _, epochs, _ = _logged(tiny, JointStage(tokenizer_lr=0.02, refresh=RefreshConfig(every=2)), recipe)
    assert len(calls) == len(epochs) == 2
    assert all(epoch["sids/churn"] > 0 for epoch in epochs)


def test_a_bucket_that_outgrows_its_suffixes_ends_the_run_at_what_was_sound(tiny) -> None:
    """No guard is set: a table that cannot be written is a collapse by itself."""
    stage = COLLAPSES.model_copy(update={"tokenizer_lr": 0.05, "collapse": None})
    recipe = STAGE.model_copy(update={"loop": LoopConfig(epochs=12, log_every=100)})
    _, epochs, _ = _logged(tiny, stage, recipe)
    largest = [int(epoch["sids/largest_bucket"]) for epoch in epochs]
    room = largest[0]
    assert max(largest) > room
    narrow = assign(tiny.tokenizer, tiny.embeddings, SidConfig(suffix_size=room))
    result, epochs, _ = _logged(tiny, stage, recipe, sids=narrow)
    assert f"epoch {len(epochs)}: " in result.collapsed
    assert f"the suffix tells only {room} apart" in result.collapsed
    assert 1 <= result.recommender.epoch < len(epochs) <= 12
    result.recommender.check_sids(result.sids)


def test_a_balanced_table_does_not_hide_codewords_that_run_together(tiny) -> None:
    rule = {"assignment": "sinkhorn", "epsilon": 0.01}
    balanced = assign(tiny.tokenizer, tiny.embeddings, SidConfig(suffix_size=120, **rule))
    stage = COLLAPSES.model_copy(
        update={"refresh": RefreshConfig(**rule), "tokenizer_lr": 0.05, "collapse": CollapseConfig()}
    )
    recipe = STAGE.model_copy(update={"loop": LoopConfig(epochs=12, log_every=100)})
    result, epochs, _ = _logged(tiny, stage, recipe, sids=balanced)
    assert result.collapsed is not None
    level = re.match(r"epoch \d+: the codes of level (\d) collapse", result.collapsed)[1]
    assert epochs[-1][f"sids/perplexity/level{level}"] > epochs[-1][f"sids/nearest_perplexity/level{level}"]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"routing": "historical"}, "needs joint.routing end_to_end"),
        ({"paths": PathsConfig(target=False)}, "needs .* joint.paths.target true"),
        ({"exploration": SdudFrqudConfig(scaling="scaled")}, "scaling=scaled rescales"),
    ],
)
def test_suffix_cost_without_its_counterpart_is_refused(settings, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        JointConfig(recommender=STAGE, joint=JointStage(suffix_cost=1.0, **settings))


def test_suffix_cost_keeps_more_names_apart_where_the_target_alone_merges_them(tiny) -> None:
    """Only recommendation and suffix cost pull: that is the tug of war."""
    distinct = []
    for weight in (0.0, 1.0):
        stage = COLLAPSES.model_copy(update={"tokenizer_lr": 0.02, "collapse": None, "suffix_cost": weight})
        recipe = STAGE.model_copy(update={"loop": LoopConfig(epochs=6, log_every=100)})
        _, epochs, _ = _logged(tiny, stage, recipe)
        distinct.append(epochs[-1]["sids/distinct"])
    assert distinct[1] > distinct[0]


def test_targets_are_counted_once_for_each_time_they_are_predicted() -> None:
    batch = SequenceBatch(
        unique=torch.tensor([3, 5, 9]),
        items=torch.tensor([[0, 1, 1], [2, 2, 2]]),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        target=torch.tensor([2, 0]),
    )
    assert target_counts(batch, "last").tolist() == [1, 0, 1]
    assert target_counts(batch, "all").tolist() == [1, 2, 1]


def test_one_batch_is_learned_by_heart(tiny) -> None:
    """The loss falls by more than a quarter in 25 steps."""
    few = replace(tiny.split, train=tiny.split.train.head(16))
    recipe = STAGE.model_copy(
        update={
            "loop": LoopConfig(epochs=26, validate_every=26, log_every=1),
            "optim": OptimConfig(lr=1e-2, warmup_steps=1),
            "model": STAGE.model.model_copy(update={"dropout": 0.0}),
        }
    )
    _, _, steps = _logged(tiny._replace(split=few), JointStage(), recipe)
    assert steps[25]["train/recommendation"] < 0.75 * steps[0]["train/recommendation"]


def test_a_run_that_never_hits_still_hands_on_a_checkpoint(tiny, monkeypatch) -> None:
    def nothing(self, *_):
        return {"valid_R@10": 0.0, "valid_N@10": 0.0}

    monkeypatch.setattr("components.training.recommender.Validator.__call__", nothing)
    result, *_ = _logged(tiny, JointStage())
    assert result.recommender.epoch == 1
