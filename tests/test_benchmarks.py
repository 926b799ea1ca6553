"""What the benchmarks time is what training does."""

from types import ModuleType

import pytest
import torch

from components.recommenders.causal import CausalConfig
from components.recommenders.tiger import TigerConfig
from components.tokenizers.rqvae import RqVaeConfig
from components.tokenizers.sids import SidConfig, assign
from components.training import joint, recommender
from components.training.joint import JointConfig, JointStage, train_jointly
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender
from components.training.tokenizer import TokenizerStage, train_tokenizer

SIZES = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "hidden": 32, "max_history": 5}
STAGE = RecommenderStage(
    model=CausalConfig(**SIZES), loop=LoopConfig(epochs=1, clip_norm=0.1), batch_size=64, device="cpu"
)


def _ignore(step, values) -> None:
    pass


@pytest.fixture(scope="module")
def joint_step(benchmark_script) -> ModuleType:
    return benchmark_script("joint_step")


@pytest.fixture(scope="module")
def stages(tiny, joint_step):
    """The planted log behind a tokenizer that has an encoder."""
    model = RqVaeConfig(codebook_sizes=[8, 8, 8], hidden=[16], latent_dim=8)
    stage = TokenizerStage(model=model, loop=LoopConfig(epochs=4, validate_every=4), device="cpu")
    tokenizer = train_tokenizer(tiny.embeddings, stage)
    return joint_step.Stages(
        tiny.split, tiny.embeddings, tokenizer, assign(tokenizer, tiny.embeddings, SidConfig(suffix_size=64))
    )


def test_the_timed_steps_of_an_epoch_train_what_the_loop_trains(joint_step, stages) -> None:
    both = JointConfig(recommender=STAGE)
    frozen = train_recommender(stages.split, stages.sids, stages.embeddings, STAGE, _ignore)
    moved = train_jointly(*stages, both, _ignore).recommender
    for module, train, trained in (
        (
            recommender,
            lambda: train_recommender(stages.split, stages.sids, stages.embeddings, STAGE, _ignore),
            frozen,
        ),
        (joint, lambda: train_jointly(*stages, both, _ignore), moved),
    ):
        arm = joint_step.stopped_at_the_loop(module, train)
        for batch in arm.batches(0):
            joint_step.advance(arm, batch, STAGE.loop.clip_norm)
        for name, value in arm.modules["recommender"].state_dict().items():
            assert torch.equal(value, trained.weights[name]), name


@pytest.mark.parametrize("model", [CausalConfig(**SIZES), TigerConfig(**SIZES)], ids=["causal", "tiger"])
def test_all_arms_start_from_one_recommendation_loss(joint_step, stages, model) -> None:
    arms = joint_step.build_arms(stages, STAGE.model_copy(update={"model": model}), JointStage())
    losses = joint_step.first_losses(arms, next(arms[joint_step.FROZEN].batches(0)))
    assert list(losses.values()) == pytest.approx([losses[joint_step.FROZEN]] * len(arms), abs=1e-5)


def test_every_occurrence_has_a_row_of_its_own_and_names_the_same_item(joint_step, stages) -> None:
    batch = next(joint_step.frozen_arm(stages, STAGE).batches(0))
    spread = joint_step.every_occurrence(batch)
    assert len(spread.unique) == int(batch.mask.sum()) + len(batch.target) > len(batch.unique)
    rows = torch.cat([spread.items[batch.mask], spread.target])
    assert len(rows.unique()) == len(rows)
    assert torch.equal(spread.unique[spread.items], batch.unique[batch.items])
    assert torch.equal(spread.unique[spread.target], batch.unique[batch.target])


def test_the_encoder_runs_in_the_arms_that_say_so_and_learns_in_one(joint_step, stages) -> None:
    arms = joint_step.build_arms(stages, STAGE, JointStage())
    batch = next(arms[joint_step.FROZEN].batches(0))
    runs, learns = {}, {}
    for name in (joint_step.GUMBEL, joint_step.ENCODER_FORWARD, joint_step.ENCODER_TRAINED):
        encoder = arms[name].modules["sids"].tokenizer.encoder
        seen: list[int] = []
        encoder.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
        joint_step.advance(arms[name], batch, STAGE.loop.clip_norm)
        runs[name] = seen
        learns[name] = any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())
    assert list(runs.values()) == [[], [len(batch.unique)], [len(batch.unique)]]
    assert list(learns.values()) == [False, False, True]


@pytest.fixture(scope="module")
def packing(benchmark_script) -> ModuleType:
    return benchmark_script("packing")


def test_packed_arms_train_the_same_pairs_from_batches_of_one_size(tiny, packing) -> None:
    """Lengths are what they say, no batch is over the budget, and an epoch has the same pairs in every arm."""
    stage = STAGE.model_copy(update={"batch_tokens": 300})
    arms = packing.build_arms(tiny.split, stage)
    codes = {name: packed.counts - 1 for name, packed in arms.items()}
    assert set(codes[packing.FIVE].tolist()) == {5} and set(codes[packing.THREE].tolist()) == {3}
    assert set(codes[packing.UNEQUAL].tolist()) == {1, 2, 3, 4, 5}
    mean = sum(k * share for k, share in enumerate(packing.LENGTHS[packing.UNEQUAL], start=1))
    assert mean == pytest.approx(2, abs=0.05)
    for packed in arms.values():
        batches = list(packed.arm.batches(0))
        assert max(int(packing.row_lengths(batch, packed.counts).sum()) for batch in batches) <= 300
        assert sum(map(packing.training_pairs, batches)) == tiny.split.num_training_targets


def test_packed_arms_are_timed_in_turn_after_the_warm_up(tiny, packing) -> None:
    arms = packing.build_arms(tiny.split, STAGE.model_copy(update={"batch_tokens": 300}))
    before = {name: packed.arm.modules["recommender"].out.weight.clone() for name, packed in arms.items()}
    packing.measure(arms, 2, STAGE.loop.clip_norm)
    for name, packed in arms.items():
        assert len(packed.rates) == len(packed.pairs) == 2 and min(packed.rates) > 0
        assert not torch.equal(packed.arm.modules["recommender"].out.weight, before[name])
        assert 0 < sum(packed.symbols) <= sum(packed.positions)
