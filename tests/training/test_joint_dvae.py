"""Joint training of a dvae: it learns, names follow, lengths change, and a resumed run is the unbroken one."""

from typing import Any, NamedTuple

import pytest
import torch

from components.artifacts import SidTable, TokenizerCheckpoint
from components.exploration import SdudFrqudConfig
from components.folders import ArtifactError
from components.recommenders.build import load_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.tiger import TigerConfig
from components.tokenizers.build import load_tokenizer
from components.tokenizers.dvae import DvaeConfig
from components.tokenizers.sids import SidConfig, assign
from components.training import joint
from components.training.joint import (
    CollapseConfig,
    JointConfig,
    JointResult,
    JointStage,
    RefreshConfig,
    check_collapse,
    live_source,
    train_jointly,
)
from components.training.joint_figures import table_figures
from components.training.loop import Halt, LoopConfig
from components.training.recommender import OptimConfig, RecommenderStage, train_recommender
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage

CAUSAL = CausalConfig(dim=32, layers=1, heads=2, head_dim=16, hidden=64)
TIGER = TigerConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32, max_history=5)
STAGE = RecommenderStage(
    model=CAUSAL,
    loop=LoopConfig(epochs=2, log_every=5),
    batch_size=32,
    optim=OptimConfig(lr=5e-3, warmup_steps=10),
    device="cpu",
)
SETTINGS: dict[str, Any] = {
    "vocabulary": 12,
    "positions": 3,
    "hidden": 16,
    "decoder_hidden": 16,
    "dropout": 0.0,
}
FAST = JointStage(tokenizer_lr=0.02)


class Named(NamedTuple):
    """A trained dvae and its names of the planted items."""

    tokenizer: TokenizerCheckpoint
    sids: SidTable


def _named(tiny, **settings) -> Named:
    stage = TokenizerStage(
        model=DvaeConfig(**SETTINGS | settings), loop=LoopConfig(epochs=40, validate_every=40), batch_size=32
    )
    tokenizer = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    return Named(tokenizer, assign(tokenizer, tiny.embeddings, SidConfig(suffix_size=120)))


@pytest.fixture(scope="module")
def variable(tiny) -> Named:
    named = _named(tiny, price=20.0)
    assert len(named.sids.codes["codes"].list.len().unique()) > 1
    return named


@pytest.fixture(scope="module")
def fixed(tiny) -> Named:
    return _named(tiny, length="fixed")


def trained(
    tiny, named: Named, stage: JointStage = FAST, recipe: RecommenderStage = STAGE, **hooks
) -> tuple[JointResult, list[dict[str, float]], list[dict[str, float]]]:
    """Train jointly; return the result with what was logged at each epoch's end, and between."""
    epochs: list[dict[str, float]] = []
    steps: list[dict[str, float]] = []

    def log(step, values) -> None:
        (epochs if "epoch" in values else steps).append(dict(values))

    config = JointConfig(recommender=recipe, joint=stage)
    return (
        train_jointly(tiny.split, tiny.embeddings, named.tokenizer, named.sids, config, log, **hooks),
        epochs,
        steps,
    )


@pytest.fixture(scope="module")
def run(tiny, variable):
    return trained(tiny, variable, FAST.model_copy(update={"suffix_cost": 1.0}))


@pytest.mark.parametrize(
    ("which", "model"), [("variable", CAUSAL), ("fixed", CAUSAL), ("fixed", TIGER)], ids=str
)
def test_training_lowers_the_loss_and_its_three_results_are_of_one_epoch(
    tiny, request, which: str, model
) -> None:
    named = request.getfixturevalue(which)
    size = 256 if model is TIGER else 32
    recipe = STAGE.model_copy(update={"model": model, "batch_size": size})
    result, epochs, steps = trained(tiny, named, recipe=recipe)
    assert steps[-1]["train/recommendation"] < 0.9 * steps[0]["train/recommendation"]
    assert epochs[-1]["sids/churn_since_start"] > 0.05
    result.recommender.check_sids(result.sids)
    assert result.sids.tokenizer == result.tokenizer.fingerprint
    load_recommender(result.recommender, result.sids)
    names = assign(result.tokenizer, tiny.embeddings, SidConfig(suffix_size=120))
    assert names.codes["codes"].to_list() == result.sids.codes["codes"].to_list()
    assert names.codes["codes"].to_list() != named.sids.codes["codes"].to_list()


def test_resumed_joint_run_of_a_dvae_equals_an_unbroken_one(tiny, variable) -> None:
    """Moving lengths, the noise of message and own loss, running shares and learned scales belong to the state."""
    stage = JointStage(
        exploration=SdudFrqudConfig(momentum=0.9, ratio=1.0, scaling="detached"),
        suffix_cost=1.0,
        tokenizer_lr=0.02,
    )
    loop = LoopConfig(epochs=3, log_every=100)
    recipe = STAGE.model_copy(update={"loop": loop, "model": CAUSAL.model_copy(update={"max_tokens": 40})})
    states: list = []
    unbroken, *_ = trained(tiny, variable, stage, recipe, save=states.append)
    resumed, *_ = trained(tiny, variable, stage, recipe, resume=states[0])
    assert unbroken.recommender.epoch > 1
    assert resumed.recommender.fingerprint == unbroken.recommender.fingerprint
    assert resumed.tokenizer.fingerprint == unbroken.tokenizer.fingerprint
    assert resumed.sids.fingerprint == unbroken.sids.fingerprint != variable.sids.fingerprint


def test_joint_training_of_a_dvae_without_gradient_is_the_two_stage_run_bit_for_bit(tiny, variable) -> None:
    """Its own loss draws samples and yet takes nothing from the stream of the recommender's dropout."""
    recipe = STAGE.model_copy(update={"model": CAUSAL.model_copy(update={"dropout": 0.1})})
    frozen = train_recommender(tiny.split, variable.sids, tiny.embeddings, recipe, lambda *_: None)
    stage = JointStage(routing="historical", tokenizer_weight=0, tokenizer_lr=0.1)
    both, epochs, _ = trained(tiny, variable, stage, recipe)
    assert epochs[-1]["codebook_gradient/recommendation/shared"] == 0
    for name, value in frozen.weights.items():
        assert torch.equal(value, both.recommender.weights[name]), name
    for name, value in variable.tokenizer.weights.items():
        assert torch.equal(value, both.tokenizer.weights[name]), name


def test_the_recommendation_loss_leaves_stop_decoder_and_encoder_as_they_were(tiny, variable) -> None:
    result, *_ = trained(tiny, variable, FAST.model_copy(update={"tokenizer_weight": 0}))
    before = load_tokenizer(variable.tokenizer).state_dict()
    after = load_tokenizer(result.tokenizer).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"codebook", "log_logit_scale", "log_residual_scale", "norm.weight"}


@pytest.mark.parametrize("encoder", [False, True])
def test_by_its_own_loss_all_of_a_dvae_learns_but_what_reads_content(tiny, variable, encoder: bool) -> None:
    stage = FAST.model_copy(update={"routing": "historical", "train_encoder": encoder})
    result, *_ = trained(tiny, variable, stage)
    still = {
        name.split(".")[0]
        for name, value in variable.tokenizer.weights.items()
        if torch.equal(value, result.tokenizer.weights[name])
    }
    assert still == ({"price"} if encoder else {"price", "read", "read_for_stop"})


def test_batches_are_cut_by_the_lengths_of_the_epoch(tiny, variable, monkeypatch) -> None:
    seen, tables, original = [], [], joint.epoch_batches

    def spy(recommender, train, counts_N, stage, generator):
        seen.append(counts_N.clone())
        return original(recommender, train, counts_N, stage, generator)

    monkeypatch.setattr(joint, "epoch_batches", spy)
    recipe = STAGE.model_copy(update={"model": CAUSAL.model_copy(update={"max_tokens": 20})})
    trained(tiny, variable, FAST, recipe, save=lambda state: tables.append(state["modules"]["sids"]["codes"]))
    first = variable.sids.codes["codes"].list.len().to_torch().long() + 1
    assert torch.equal(seen[0], first)
    assert torch.equal(seen[1], (tables[0] >= 0).sum(dim=1) + 1) and not torch.equal(seen[1], first)


def test_every_epoch_says_how_long_names_are_and_who_pulls_at_the_codebook(run) -> None:
    result, epochs, steps = run
    lengths = torch.tensor(result.sids.codes["codes"].list.len().to_list())
    kept = epochs[result.recommender.epoch - 1]
    assert kept["sids/length"] == pytest.approx(float(lengths.float().mean()))
    for length in (1, 2, 3):
        assert kept[f"sids/length_share/{length}"] == pytest.approx(float((lengths == length).float().mean()))
        codes = [row[length - 1] for row in result.sids.codes["codes"].to_list() if len(row) >= length]
        share = torch.bincount(torch.tensor(codes)).double() / len(codes)
        perplexity = float(torch.special.entr(share).sum().exp())
        assert kept[f"sids/perplexity/level{length}"] == pytest.approx(perplexity)
        assert kept[f"sids/codes_in_use/level{length}"] == len(set(codes))
        for name in ("drawn_nearest", "nearest_table", "drawn_table"):
            assert 0 < steps[-1][f"train/agree/{name}/level{length}"] <= 1
    for part in ("recommendation", "quantisation", "suffix_cost"):
        assert epochs[-1][f"codebook_gradient/{part}/shared"] > 1e-10
    assert -1 <= epochs[-1]["gradient_cosine/shared"] <= 1
    for name in ("reconstruction", "vocabulary", "length", "symbol1", "symbol4"):
        assert f"train/{name}" in steps[-1]


def test_shorter_names_are_no_collapse_and_codes_that_run_together_are_one(tiny, variable) -> None:
    config = JointConfig(recommender=STAGE, joint=FAST)
    live, _ = live_source(load_tokenizer(variable.tokenizer), tiny.embeddings.matrix, variable.sids, config)
    start = table_figures(live)
    short = live.codes.clone()
    short[:, 1:] = -1
    live.follow(short)
    figures = table_figures(live)
    assert figures["sids/length"] == 1
    assert figures["sids/perplexity/level3"] == figures["sids/codes_in_use/level3"] == 0
    check_collapse(1, figures, start, CollapseConfig())
    with torch.no_grad():
        live.tokenizer.codebook[:] = live.tokenizer.codebook[0]
    with pytest.raises(Halt, match="epoch 2: the codes of level 1 collapse"):
        check_collapse(2, table_figures(live), start, CollapseConfig())


def test_a_table_of_another_rule_of_length_is_refused(tiny, variable) -> None:
    other = assign(variable.tokenizer, tiny.embeddings, SidConfig(suffix_size=120, length="optimum"))
    with pytest.raises(ArtifactError, match="than assignment=nearest, length=argmax gives them"):
        trained(tiny, variable._replace(sids=other))
    stage = FAST.model_copy(update={"refresh": RefreshConfig(length="optimum")})
    result, *_ = trained(tiny, variable._replace(sids=other), stage)
    names = assign(result.tokenizer, tiny.embeddings, SidConfig(suffix_size=120, length="optimum"))
    assert names.codes["codes"].to_list() == result.sids.codes["codes"].to_list()


def test_a_dvae_of_variable_length_is_refused_by_a_recommender_of_one(tiny, variable) -> None:
    with pytest.raises(ValueError, match="tiger reads SIDs of one length"):
        trained(tiny, variable, recipe=STAGE.model_copy(update={"model": TIGER}))
