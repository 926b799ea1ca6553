"""Composition is a contract: any tokenizer under any recommender, frozen or moving, unless one sentence refuses it.

Every legal pair is trained on the planted log, small and short, and what comes out of it is held to the same laws.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from components.artifacts import RecommenderCheckpoint, SequenceSplit, SidTable, TokenizerCheckpoint
from components.data.batches import held_out_rows, pad, prefix_rows
from components.folders import ArtifactError
from components.recommenders.build import RecommenderConfig, build_recommender, load_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.exact import exact_ranker
from components.recommenders.intrr import IntrrConfig, alignment
from components.recommenders.tiger import TigerConfig
from components.seams import Ranking, SequenceBatch
from components.tokenizers.build import TokenizerConfig, load_tokenizer
from components.tokenizers.dvae import DvaeConfig
from components.tokenizers.live_dvae import LiveSource
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.rqvae import RqVaeConfig
from components.tokenizers.sids import SidConfig, assign, space_of, table_symbols
from components.tokenizers.trie import build_trie
from components.training.joint import JointConfig, JointStage, live_source, train_jointly
from components.training.loop import LoopConfig
from components.training.recommender import (
    OptimConfig,
    RecommenderStage,
    ValidationConfig,
    item_facts,
    train_recommender,
)
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage
from workflows.config import AblationConfig, PipelineConfig

SIZE: dict[str, Any] = {
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "head_dim": 8,
    "hidden": 32,
    "dropout": 0.0,
    "max_history": 5,
}
ONE_TOKEN: dict[str, Any] = SIZE | {"uid_dim": 8, "ran_hidden": 16}
DVAE: dict[str, Any] = {
    "vocabulary": 8,
    "positions": 3,
    "hidden": 16,
    "decoder_hidden": 16,
    "dropout": 0.0,
    "price": 20.0,
}
TOKENIZERS: dict[str, TokenizerConfig] = {
    "rkmeans": RkMeansConfig(codebook_sizes=[8, 6]),
    "rqvae": RqVaeConfig(codebook_sizes=[8, 6], hidden=[16], latent_dim=8),
    "dvae fixed": DvaeConfig(**DVAE, length="fixed"),
    "dvae variable": DvaeConfig(**DVAE),
}
RECOMMENDERS: dict[str, RecommenderConfig] = {
    "causal": CausalConfig(**SIZE),
    "tiger": TigerConfig(**SIZE),
    "intrr": IntrrConfig(**ONE_TOKEN),
    "intrr codewords": IntrrConfig(**ONE_TOKEN, reads="codewords"),
    "intrr flat": IntrrConfig(**ONE_TOKEN, reads="flat"),
    "intrr autoregressive": IntrrConfig(**ONE_TOKEN, writes="autoregressive"),
    "intrr text": IntrrConfig(**ONE_TOKEN, text=True),
}
JOINT = JointStage(tokenizer_lr=0.02, collapse=None)


class Pair(NamedTuple):
    """A tokenizer and a recommender, by name."""

    tokenizer: str
    recommender: str


class Case(NamedTuple):
    """A pair and how it is trained."""

    pair: Pair
    method: str


EVERY = [Pair(tokenizer, recommender) for tokenizer in TOKENIZERS for recommender in RECOMMENDERS]
REFUSED = [Pair("dvae variable", "tiger")]
"""The only two kinds that do not fit: an encoder-decoder reads a history as a rectangle."""
LEGAL = [pair for pair in EVERY if pair not in REFUSED]
CASES = [Case(pair, method) for pair in LEGAL for method in ("static", "joint")]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([*case.pair, case.method]))
every_pair = pytest.mark.parametrize("pair", LEGAL, ids="-".join)


class Named(NamedTuple):
    """A trained tokenizer and the names that it gives the planted items."""

    checkpoint: TokenizerCheckpoint
    sids: SidTable


class Trained(NamedTuple):
    """What training a pair leaves behind."""

    sids: SidTable
    """The table that the recommender was trained with in the end."""
    recommender: RecommenderCheckpoint
    losses: list[float]
    """Mean recommendation loss of each epoch."""


@pytest.fixture(scope="module")
def split(tiny) -> SequenceSplit:
    """A few training users: some items have no training events."""
    few = replace(tiny.split, train=tiny.split.train.head(64))
    assert not bool(item_facts(few, tiny.embeddings).trained.all())
    return few


@pytest.fixture(scope="module")
def named(tiny) -> dict[str, Named]:
    made = {}
    for name, model in TOKENIZERS.items():
        loop = LoopConfig(epochs=40, validate_every=40)
        checkpoint = train_tokenizer(
            tiny.embeddings, TokenizerStage(model=model, loop=loop, batch_size=40), split=tiny.split
        )
        made[name] = Named(checkpoint, assign(checkpoint, tiny.embeddings, SidConfig(suffix_size=120)))
    lengths = made["dvae variable"].sids.codes["codes"].list.len()
    assert lengths.n_unique() > 1  # else it is another fixed one
    return made


def stage(recommender: str) -> RecommenderStage:
    model = RECOMMENDERS[recommender]
    return RecommenderStage(
        model=model,
        loop=LoopConfig(epochs=2, log_every=1000),
        batch_size=64 if isinstance(model, TigerConfig) else 16,
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        validation=ValidationConfig(users=16, beams=10),
        device="cpu",
    )


@pytest.fixture(scope="module")
def train(tiny, split, named) -> Callable[[Case], Trained]:
    """Train a pair, once for all laws."""

    @functools.cache
    def train(case: Case) -> Trained:
        checkpoint, sids = named[case.pair.tokenizer]
        recipe, logged = stage(case.pair.recommender), []

        def log(_: int, values) -> None:
            if "train/loss" in values:
                beside = values.get("train/alignment", 0)
                logged.append(values.get("train/recommendation", values["train/loss"] - beside))

        if case.method == "static":
            return Trained(sids, train_recommender(split, sids, tiny.embeddings, recipe, log), logged)
        config = JointConfig(recommender=recipe, joint=JOINT)
        joint = train_jointly(split, tiny.embeddings, checkpoint, sids, config, log)
        return Trained(joint.sids, joint.recommender, logged)

    return train


def training_batch(split: SequenceSplit) -> SequenceBatch:
    return pad(prefix_rows(split.train, SIZE["max_history"]), torch.arange(32).numpy())


def by_item(ranking: Ranking) -> Tensor:
    """Return the scores in the order of the items."""
    return ranking.scores.gather(1, ranking.items.argsort(dim=1))


def live_pair(tiny, split, named, pair: Pair, weights: dict[str, Tensor]) -> tuple[LiveSource, Any]:
    """Return the tokenizer of a pair as a live source, and the recommender with these weights above it."""
    torch.manual_seed(0)
    checkpoint, sids = named[pair.tokenizer]
    config = JointConfig(recommender=stage(pair.recommender), joint=JOINT)
    live, _ = live_source(load_tokenizer(checkpoint), tiny.embeddings.matrix, sids, config)
    recommender = build_recommender(
        RECOMMENDERS[pair.recommender], live.space, item_facts(split, tiny.embeddings)
    )
    recommender.load_state_dict(weights)
    return live.train(), recommender


@every_case
def test_training_lowers_the_loss(train, case: Case) -> None:
    first, second = train(case).losses
    assert math.isfinite(first) and second < 0.97 * first


@every_case
def test_what_was_trained_loads_back_and_ranks_every_item_once(
    train, split, case: Case, tmp_path: Path
) -> None:
    """Log-probabilities of all items make a distribution; where it is a chain, it can be had without a beam."""
    sids, checkpoint, _ = train(case)
    checkpoint.save(tmp_path / "recommender")
    recommender = load_recommender(RecommenderCheckpoint.load(tmp_path / "recommender"), sids)
    symbols, users = table_symbols(sids), pad(held_out_rows(split.valid), torch.arange(8).numpy())
    with torch.no_grad():
        catalogue = recommender.catalogue(symbols, build_trie(symbols))
        beam = recommender.rank(users, catalogue, len(symbols), exclude_seen=False)
        everything = torch.arange(len(symbols)).expand_as(beam.items)
        assert torch.equal(beam.items.sort(dim=1).values, everything)
        torch.testing.assert_close(beam.scores.exp().sum(dim=1), torch.ones(len(beam.scores)))
        exact = exact_ranker(recommender, catalogue)
        assert (exact is not None) == getattr(recommender.config, "scores_exactly", False)
        if exact is not None:
            scored = exact.rank(users, catalogue, len(symbols), exclude_seen=False)
            torch.testing.assert_close(by_item(scored), by_item(beam), rtol=0, atol=1e-5)


def test_items_are_read_after_loading_as_in_training_though_the_table_has_lost_its_shortest_names(
    tiny, split, named, train
) -> None:
    """Any code may come to be a whole name while a dvae moves: a walk weighs suffixes too, whatever is left."""
    pair = Pair("dvae variable", "intrr")
    live, trained = live_pair(tiny, split, named, pair, train(Case(pair, "joint")).recommender.weights)
    live.follow(live.codes.clamp(min=0))
    table, symbols = live.table("t" * 64), live.symbols
    assert live.space.shortest == 1 and space_of(table).one_length
    checkpoint = replace(
        train(Case(pair, "joint")).recommender, weights=trained.state_dict(), sids=table.fingerprint
    )
    users = pad(held_out_rows(split.valid), torch.arange(8).numpy())
    with torch.no_grad():
        before, after = (
            module.rank(users, module.catalogue(symbols, build_trie(symbols)), 20, exclude_seen=False)
            for module in (trained.eval(), load_recommender(checkpoint, table))
        )
    assert torch.equal(after.items, before.items) and torch.equal(after.scores, before.scores)


@every_pair
def test_a_recommender_trained_jointly_refuses_the_table_that_it_started_from(train, named, pair) -> None:
    (_, start), result = named[pair.tokenizer], train(Case(pair, "joint"))
    assert result.sids.codes["codes"].to_list() != start.codes["codes"].to_list()
    with pytest.raises(ArtifactError, match="symbols mean other items"):
        load_recommender(result.recommender, start)


@every_pair
def test_the_recommendation_alone_reaches_every_codebook_and_the_alignment_reaches_none(
    tiny, split, named, train, pair: Pair
) -> None:
    """Codes follow what is predicted, never what the items' own vectors find easy."""
    live, recommender = live_pair(tiny, split, named, pair, train(Case(pair, "static")).recommender.weights)
    users = training_batch(split)
    loss = recommender.loss(users, live.tokens(users.unique))
    aligned = getattr(recommender.config, "reads", None) == "ran"
    assert list(loss.beside) == (["alignment"] if aligned else [])
    for term in loss.beside.values():
        pulled = torch.autograd.grad(
            term, list(live.trained_parameters()), retain_graph=True, allow_unused=True
        )
        assert pulled == (None,) * len(pulled)
    loss.total.backward()
    for name, book in live.codebooks.items():
        assert book.grad is not None and 1e-4 < float(book.grad.norm()) < math.inf, name


@pytest.mark.parametrize("recommender", ["intrr", "intrr text", "intrr autoregressive"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_alignment_of_a_joint_run_is_to_the_table_of_today(
    tiny, split, named, train, tokenizer: str, recommender: str
) -> None:
    """Codebooks in reverse order: each item's code c becomes K - 1 - c, and no more than that."""
    pair = Pair(tokenizer, recommender)
    live, model = live_pair(tiny, split, named, pair, train(Case(pair, "static")).recommender.weights)
    model.ran.scale = 4.0  # walks decided enough to tell tables apart
    users, old = training_batch(split), live.symbols
    levels, is_code = live.space.num_levels, (old >= 0) & (old < live.space.num_codes)
    ends = torch.tensor([sum(live.space.codes(level)) - 1 for level in range(levels)] + [0])
    new = torch.where(is_code, ends - old, old)
    read_U = torch.bincount(users.items[users.mask], minlength=len(users.unique))

    def found() -> Tensor:
        return model.loss(users, live.tokens(users.unique)).beside["alignment"]

    def expected(table: Tensor) -> Tensor:
        symbols = table[users.unique]
        walk = model.walk(users.unique, symbols)
        return model.config.alignment * alignment(walk, symbols, live.space, read_U)

    with torch.no_grad():
        before = found()
        torch.testing.assert_close(before, expected(old))
        for book in live.codebooks.values():
            book.copy_(book.flip(0))
        assert bool(live.refresh().all())
        torch.testing.assert_close(found(), expected(new))
        assert abs(float(found() - before)) > 0.01


Settings = dict[str, dict[str, Any]]
"""Sections of a pipeline, as a preset has them."""


def settings(tokenizer: str, recommender: str, **sections: dict[str, Any]) -> Settings:
    models = {
        "tokenizer": {"model": TOKENIZERS[tokenizer].model_dump(mode="json")},
        "recommender": {"model": RECOMMENDERS[recommender].model_dump(mode="json")},
    }
    return models | sections


def reading_with(**choices: Any) -> dict[str, Any]:
    return {"recommender": {"model": choices}}


@pytest.mark.parametrize("pair", EVERY, ids="-".join)
def test_settings_are_accepted_for_exactly_the_pairs_that_can_be_trained(pair: Pair) -> None:
    both = settings(*pair)
    if pair in LEGAL:
        PipelineConfig.model_validate(both).check_joint()
        return
    with pytest.raises(ValueError, match="recommender.model.kind tiger.*tokenizer.model.*length=fixed"):
        PipelineConfig.model_validate(both)


class Illegal(NamedTuple):
    """Settings that do not fit together, and words that the refusal must have: the keys, and what to take instead."""

    settings: Settings
    words: list[str]
    jointly: bool = False
    """Whether the two-stage run of these settings is sound."""


def drawn(kind: str, **more: Any) -> Illegal:
    return Illegal(
        settings("dvae fixed", "causal", joint={"exploration": {"kind": kind, **more}}),
        [f"joint.exploration {kind}", "forward=sample", "dvae", "take kind none or gumbel"],
        jointly=True,
    )


def exactly(recommender: str, **choices: Any) -> Illegal:
    chosen = RECOMMENDERS[recommender].model_copy(update=choices).model_dump(mode="json")
    return Illegal(
        settings("rkmeans", "causal", evaluate={"decode": "exact"}) | reading_with(**chosen),
        [
            "evaluate.decode=exact",
            "recommender.model.kind intrr",
            "writes=ran and context=last",
            "decode=beam",
        ],
    )


ILLEGAL = {
    "lengths under tiger": Illegal(
        settings("dvae variable", "tiger"),
        [
            "recommender.model.kind tiger",
            "tokenizer.model",
            "take kind causal",
            "tokenizer.model.length=fixed",
        ],
    ),
    "drawn codes of a dvae, ste": drawn("ste"),
    "drawn codes of a dvae, sample": drawn("gumbel", forward="sample"),
    "no encoder to train": Illegal(
        settings("rkmeans", "intrr", joint={"train_encoder": True}),
        ["joint.train_encoder", "tokenizer.model.kind rkmeans", "take kind rqvae"],
        jointly=True,
    ),
    "too few tokens, one length": Illegal(
        settings("rqvae", "causal") | reading_with(kind="causal", max_tokens=2),
        ["recommender.model.max_tokens 2", "longest SID of tokenizer.model, 3 symbols", "raise it"],
    ),
    "too few tokens, longest name": Illegal(
        settings("dvae variable", "causal") | reading_with(kind="causal", max_tokens=3),
        ["recommender.model.max_tokens 3", "longest SID of tokenizer.model, 4 symbols", "raise it"],
    ),
    "exactly, causal": exactly("causal"),
    "exactly, tiger": exactly("tiger"),
    "exactly, prefix_sum": exactly("intrr", context="prefix_sum"),
    "exactly, autoregressive": exactly("intrr autoregressive"),
    "causal by another name": Illegal(
        reading_with(kind="intrr", reads="flat", writes="autoregressive"),
        ["recommender.model", "reads=flat", "writes=autoregressive", "kind causal"],
    ),
    "hstu has no cache": Illegal(
        reading_with(kind="intrr", backbone="hstu", writes="autoregressive"),
        ["recommender.model", "writes=autoregressive", "backbone=transformer or writes=ran"],
    ),
    "text without a vector, codewords": Illegal(
        reading_with(kind="intrr", text=True, reads="codewords"),
        ["recommender.model", "text", "reads=codewords", "take reads ran, uid or uid_codewords"],
    ),
    "text without a vector, flat": Illegal(
        reading_with(kind="intrr", text=True, reads="flat"),
        ["recommender.model", "text", "reads=flat", "take reads ran, uid or uid_codewords"],
    ),
    "choices of codes that move": Illegal(
        {"recommender": {"normalise": "children"}},
        ["recommender.normalise=children", "codes that move", "take range"],
        jointly=True,
    ),
    "walks held to drawn codes": Illegal(
        settings("rkmeans", "intrr", joint={"exploration": {"kind": "gumbel", "forward": "sample"}}),
        [
            "recommender.model.alignment",
            "joint.exploration.forward=sample",
            "take forward=table, or alignment 0",
        ],
        jointly=True,
    ),
    "history alone, where items are read without codes": Illegal(
        settings("rkmeans", "intrr", joint={"paths": {"teacher_forcing": False, "target": False}}),
        ["joint.paths", "history alone", "reads=ran", "open teacher_forcing or target", "uid_codewords"],
    ),
    "no path at all": Illegal(
        settings(
            "rkmeans",
            "causal",
            joint={"paths": {"history": False, "teacher_forcing": False, "target": False}},
        ),
        ["joint.paths", "all closed", "joint.routing=historical"],
    ),
    "suffix cost without a gradient": Illegal(
        settings("rkmeans", "intrr", joint={"suffix_cost": 1.0, "routing": "historical"}),
        ["joint.suffix_cost", "joint.routing end_to_end", "set it to 0"],
    ),
}


@pytest.mark.parametrize("illegal", ILLEGAL.values(), ids=ILLEGAL)
def test_what_does_not_fit_is_refused_in_a_sentence_before_anything_runs(illegal: Illegal) -> None:
    """As a pipeline, and as an arm of an ablation whose other settings are sound."""
    read = functools.partial(PipelineConfig.model_validate, illegal.settings)
    check = read().check_joint if illegal.jointly else read
    with pytest.raises(ValueError) as alone:
        check()

    shared = {"evaluate": illegal.settings.get("evaluate", {})} | reading_with(kind="intrr")
    changed = {
        f"{section}.{key}": value
        for section, values in illegal.settings.items()
        if section != "evaluate"
        for key, value in values.items()
    }
    arm = {"name": "unfit", "method": "joint"}
    AblationConfig.model_validate(shared | {"arms": [arm]})
    with pytest.raises(ValueError, match="arm 'unfit': ") as among_others:
        AblationConfig.model_validate(shared | {"arms": [arm | {"settings": changed}]})
    for refusal in (str(alone.value), str(among_others.value)):
        assert [word for word in illegal.words if word not in refusal] == [], refusal
