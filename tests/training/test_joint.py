"""Two-stage and joint training on the planted log: they learn, they agree, they repeat themselves."""

import pytest
import torch

from components.artifacts import RecommenderCheckpoint, SidTable
from components.data.batches import held_out_rows
from components.data.planted import best_recall
from components.exploration import GumbelConfig, NoNoiseConfig
from components.folders import ArtifactError
from components.metrics.ranking import contributions, ranks_in_lists
from components.recommenders.build import load_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.decoding import rank_rows
from components.recommenders.tiger import TigerConfig
from components.tokenizers.build import load_tokenizer
from components.tokenizers.sids import SidConfig, assign, table_symbols
from components.tokenizers.trie import build_trie
from components.training.joint import JointConfig, JointStage, PathsConfig, RefreshConfig, train_jointly
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
        load_recommender(checkpoint, sids), rows, symbols, build_trie(symbols), 128, 10, exclude_seen=False
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
    frozen = train_recommender(tiny.split, tiny.sids, LEARNS, _ignore)
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


def test_resumed_joint_run_equals_an_unbroken_one(tiny, joint) -> None:
    states: list = []
    train_jointly(
        tiny.split,
        tiny.embeddings,
        tiny.tokenizer,
        tiny.sids,
        JointConfig(recommender=STAGE),
        _ignore,
        save=states.append,
    )
    resumed = train_jointly(
        tiny.split,
        tiny.embeddings,
        tiny.tokenizer,
        tiny.sids,
        JointConfig(recommender=STAGE),
        _ignore,
        resume=states[0],
    )
    assert resumed.recommender.fingerprint == joint.recommender.fingerprint
    assert resumed.sids.fingerprint == joint.sids.fingerprint


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
    fewer = tiny.split.__class__(
        **{f: getattr(tiny.split, f) for f in ("train", "valid", "test", "protocol", "log", "catalog")},
        num_items=tiny.split.num_items + 1,
    )
    with pytest.raises(ArtifactError, match="names 120 items, the SequenceSplit has 121"):
        train_recommender(fewer, tiny.sids, STAGE, _ignore)


def test_joint_without_gradient_is_the_two_stage_run_bit_for_bit(tiny) -> None:
    """Same seed, same start, same batches: what a pair of arms differs by is the method alone."""
    stage = JointStage(
        routing="historical", codebook_weight=0, commitment_weight=0, latent_reconstruction_weight=0
    )
    frozen = train_recommender(tiny.split, tiny.sids, STAGE, _ignore)
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
