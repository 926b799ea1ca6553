"""What the benchmarks time is what training and ranking do."""

import io
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from components.config import load_preset
from components.recommenders.causal import CausalConfig
from components.recommenders.tiger import TigerConfig
from components.tokenizers.rqvae import RqVaeConfig
from components.tokenizers.sids import SidConfig, assign
from components.training import joint, recommender
from components.training.joint import JointConfig, JointStage, train_jointly
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage
from workflows.config import AblationConfig

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


@pytest.fixture(scope="module")
def recommenders(benchmark_script) -> ModuleType:
    return benchmark_script("recommenders")


@pytest.fixture(scope="module")
def costed(tiny, recommenders):
    """Random SIDs of the planted items, and every recommender in one small size."""
    sids = recommenders.random_sids(tiny.split.num_items)
    models = recommenders.models(STAGE.model, max_history=5)
    return sids, models


def test_recommenders_that_are_compared_are_of_one_size(recommenders, costed) -> None:
    _, models = costed
    assert list(models) == ["causal", "tiger", "intrr"] == [model.kind for model in models.values()]
    for model in models.values():
        assert {name: getattr(model, name) for name in SIZES} == SIZES


def test_an_epoch_has_the_same_pairs_for_every_recommender(tiny, recommenders, costed) -> None:
    sids, models = costed
    for name, model in models.items():
        arm = recommenders.training_arm(tiny.split, sids, model, STAGE)
        pairs = sum(recommenders.training_pairs(arm, batch) for batch in arm.batches(0))
        assert pairs == tiny.split.num_training_targets, name


def test_recommenders_train_in_turn_and_are_timed_after_the_warm_up(tiny, recommenders, costed) -> None:
    sids, models = costed
    arms = {name: recommenders.training_arm(tiny.split, sids, model, STAGE) for name, model in models.items()}
    before = {name: arm.modules["recommender"].symbols.weight.clone() for name, arm in arms.items()}
    spent = recommenders.time_training(arms, 2, dict.fromkeys(arms, STAGE.loop.clip_norm))
    for name, arm in arms.items():
        assert len(spent[name].cpu) == len(spent[name].wall) == len(spent[name].done) == 2
        assert min(spent[name].cpu) > 0 and min(spent[name].done) > 0
        assert not torch.equal(arm.modules["recommender"].symbols.weight, before[name])


def test_peak_memory_is_that_of_the_steps_and_not_of_the_process_that_asks(
    tiny, recommenders, costed, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "recommenders", recommenders)  # a fresh process looks it up by name
    sids, models = costed
    limit = 2**30
    assert np.ones(limit, dtype=np.uint8).all()  # the peak of this process is above the limit from here on
    stage = STAGE.model_copy(update={"batch_size": 8})
    peak = recommenders.alone(recommenders.peak_of_training, tiny.split, sids, models["causal"], stage, 2)
    assert 0 < peak.before < peak.after < limit


def test_timed_requests_are_ranked_by_every_recommender(tiny, recommenders, costed) -> None:
    decoders = recommenders.decoders(tiny.split, *costed)
    assert list(decoders) == ["causal", "tiger", "intrr", recommenders.EXACT]
    items, request = tiny.split.num_items, recommenders.Request(users=2, history=4, beams=3)
    spent = recommenders.time_decoding(decoders, [request], items, 2)
    assert {name: len(arm.wall) for name, arm in spent[request].items()} == dict.fromkeys(decoders, 2)
    assert all(set(arm.done) == {request.users} for arm in spent[request].values())

    batch = recommenders.random_batch(request, items)
    assert batch.mask.shape == (2, 4) and bool(batch.mask.all())
    with torch.inference_mode():
        for name, rank in decoders.items():
            assert rank(batch, 3).items.shape == (2, 3), name
        beam, exact = (decoders[name](batch, items) for name in ("intrr", recommenders.EXACT))
    torch.testing.assert_close(beam.scores, exact.scores, atol=1e-5, rtol=1e-5)


def test_the_table_sets_every_recommender_against_causal(recommenders) -> None:
    spent = {
        name: recommenders.Spent([s] * 3, [s] * 3, [4] * 3) for name, s in (("causal", 0.5), ("tiger", 1))
    }
    peaks = {"causal": recommenders.Peak(2**20, 2**21), "tiger": recommenders.Peak(2**20, 2**22)}
    decoded = {recommenders.Request(4, 8, 10): {**spent, "intrr exact": spent["causal"]}}
    assert [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in recommenders.table(spent, peaks, decoded)
    ] == [
        ["", "causal", "tiger", "intrr exact", "tiger / causal", "intrr exact / causal"],
        ["---"] * 6,
        ["training, pairs per CPU-second", "8", "4", "-", "0.50", "-"],
        ["training, peak memory MiB", "2", "4", "-", "2.00", "-"],
        ["of it added by the steps", "1", "3", "-", "3.00", "-"],
        [
            "ms p50 / p95, 4 users, 8 items, 10 beams",
            *["500.0 / 500.0", "1000.0 / 1000.0", "500.0 / 500.0"],
            "2.00",
            "1.00",
        ],
        ["users per CPU-second, 4 users, 8 items, 10 beams", "8", "4", "8", "0.50", "1.00"],
    ]


def test_arms_of_a_preset_are_timed_and_laid_beside_what_they_reach(benchmark_script) -> None:
    script = benchmark_script("arms")
    whole = load_preset(AblationConfig, "recommenders")
    wanted = [arm for arm in whole.arms if arm.name in ("causal", "uid", "sasrec")]
    arms = script.build_arms(whole.model_copy(update={"arms": wanted}))
    arms = script.measure(arms, 2)
    assert list(arms) == ["causal", "uid", "sasrec"]
    assert arms["uid"].parameters > 2 * arms["causal"].parameters
    assert arms["sasrec"].pairs == 2 * arms["causal"].pairs  # 10 epochs and 5
    for each in arms.values():
        assert len(each.seen.cpu) == 2 and script.cost(each) == each.pairs / each.seen.rate() > 0
    lines = script.table(arms, {"uid": (0.125, 0.001)})
    assert lines[2].startswith("| causal |") and "| 1.00 |" in lines[2]
    assert lines[3].endswith("| .1250 ± .0010 |") and lines[4].endswith("|  |")
    script.draw(arms, {"uid": (0.125, 0.001), "itemknn": (0.2, None)}, "title").savefig(io.BytesIO())
