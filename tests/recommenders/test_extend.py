"""The law of an extended recommender: among old symbols nothing changes, and new items can be written."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from components.artifacts import ContentEmbeddings, RecommenderCheckpoint, SidTable
from components.exploration import GumbelConfig
from components.folders import ArtifactError
from components.recommenders.build import RecommenderConfig, build_recommender, load_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.exact import exact_ranker
from components.recommenders.extend import extend_recommender
from components.recommenders.intrr import Intrr, IntrrConfig
from components.recommenders.tiger import TigerConfig
from components.seams import ItemFacts, Ranking, SequenceBatch
from components.tokenizers.extend import extend
from components.tokenizers.sids import SidConfig, codes_to_table, space_of, table_symbols
from components.tokenizers.trie import PrefixTrie, build_trie
from components.training.joint import JointConfig, JointStage, train_jointly
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage

SIZE: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "hidden": 32, "dropout": 0.0}
SMALL = SIZE | {"uid_dim": 6, "ran_hidden": 12}
OLD, ALL = 12, 19
READS = ("ran", "uid", "codewords", "uid_codewords", "flat")
CONFIGS: dict[str, RecommenderConfig] = {
    "causal": CausalConfig(**SIZE),
    "tiger": TigerConfig(**SIZE),
    **{f"intrr {reads}": IntrrConfig(**SMALL, reads=reads) for reads in READS},
    **{f"intrr {reads} text": IntrrConfig(**SMALL, reads=reads, text=True) for reads in READS[:2]},
    "intrr autoregressive": IntrrConfig(**SMALL, writes="autoregressive"),
    "intrr hstu": IntrrConfig(**SMALL, backbone="hstu"),
}
CASES = [pytest.param(config, False, id=name) for name, config in CONFIGS.items()]
CASES += [
    pytest.param(config, True, id=f"{name}, unequal lengths")
    for name, config in CONFIGS.items()
    if name != "tiger"
]
every_case = pytest.mark.parametrize(("config", "unequal"), CASES)
VECTORS = torch.randn(ALL, 5, generator=torch.Generator().manual_seed(4))


def embeddings_of(x_ND: Tensor) -> ContentEmbeddings:
    return ContentEmbeddings(
        vectors={"vectors": x_ND.contiguous()}, encoder="lsa", revision="1", normalised=False, catalog="c"
    )


def tables(unequal: bool = False) -> tuple[SidTable, SidTable]:
    """Random names; newcomers share buckets with old items, and open some of their own."""
    codes = torch.randint(4, (ALL, 3), generator=torch.Generator().manual_seed(5))
    codes[OLD : OLD + 3] = codes[:3]
    if unequal:
        codes[1::3, 1:] = -1
        codes[2::3, 2:] = -1
    old = codes_to_table(codes[:OLD], [4, 4, 4], 6, "t", shared=unequal)
    return old, codes_to_table(codes, [4, 4, 4], 6, "t", old, shared=unequal)


def trained(config: RecommenderConfig, table: SidTable) -> RecommenderCheckpoint:
    """Random weights that tell items apart; training never met item 4."""
    torch.manual_seed(0)
    facts = ItemFacts(torch.arange(OLD) != 4, VECTORS[:OLD])
    model = build_recommender(config, space_of(table), facts)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.5)
    return RecommenderCheckpoint(
        weights=model.state_dict(),
        config=config.model_dump(mode="json"),
        sids=table.fingerprint,
        step=1,
        epoch=0,
        metrics={},
    )


def histories(items: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(items, (6, 5), generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (6, 1), generator=generator)
    return SequenceBatch(torch.arange(items), ids, mask, ids[:, 0])


@torch.no_grad()
def rank_all(model: Any, symbols: Tensor, batch: SequenceBatch) -> tuple[PrefixTrie, Tensor]:
    """Log-probabilities (B, N) of all items, by a beam that is wide enough for them."""
    trie = build_trie(symbols)
    ranking: Ranking = model.rank(batch, model.catalogue(symbols, trie), 4 * len(symbols), exclude_seen=False)
    found = torch.full((len(batch.items), len(symbols)), torch.nan)
    for row, items, scores in zip(found, ranking.items, ranking.scores, strict=True):
        row[items[items >= 0]] = scores[items >= 0]
    return trie, found


def conditionals(trie: PrefixTrie, p_BN: Tensor, old: int) -> Tensor:
    """How the steps of old items divide the probability of their node among children with old items: (B, n, S)."""
    nodes = len(trie.symbol)
    parent = torch.cat([torch.tensor([-1]), torch.arange(nodes).repeat_interleave(trie.num_children)])
    mass_BM = torch.zeros(len(p_BN), nodes).double()
    mass_BM[:, trie.path[:, -1]] = p_BN.double()
    for node in range(nodes - 1, 0, -1):
        mass_BM[:, parent[node]] += mass_BM[:, node]
    with_old = trie.path[:old, 1:].unique()
    siblings_BM = torch.zeros_like(mass_BM).index_add_(1, parent[with_old], mass_BM[:, with_old])
    share_BM = mass_BM[:, 1:] / siblings_BM[:, parent[1:]]
    return share_BM[:, trie.path[:old, 1:] - 1]


@every_case
def test_old_symbols_share_what_newcomers_leave_them_as_before(
    config: RecommenderConfig, unequal: bool
) -> None:
    old, grown = tables(unequal)
    before = trained(config, old)
    after = load_recommender(extend_recommender(before, old, grown, embeddings_of(VECTORS)), grown)
    trie, log_p = rank_all(load_recommender(before, old), table_symbols(old), histories(OLD))
    more, log_q = rank_all(after, table_symbols(grown), histories(OLD))
    for distribution in (log_p, log_q):  # every item is written, newcomers too
        torch.testing.assert_close(distribution.exp().sum(dim=1), torch.ones(6))
    expected = conditionals(trie, log_p.exp(), OLD)
    torch.testing.assert_close(conditionals(more, log_q.exp(), OLD), expected, rtol=1e-4, atol=1e-5)
    assert bool((log_q[:, :OLD] < log_p + 1e-5).all()) and bool(
        (log_q[:, OLD:].exp().sum(dim=1) > 1e-3).all()
    )


@every_case
def test_over_the_old_items_alone_it_ranks_bit_by_bit_as_before(
    config: RecommenderConfig, unequal: bool
) -> None:
    old, grown = tables(unequal)
    before = trained(config, old)
    after = load_recommender(extend_recommender(before, old, grown, embeddings_of(VECTORS)), grown)
    _, expected = rank_all(load_recommender(before, old), table_symbols(old), histories(OLD))
    _, found = rank_all(after, table_symbols(grown)[:OLD], histories(OLD))
    assert torch.equal(found, expected)


@every_case
def test_it_comes_back_from_disk_and_knows_its_table(
    config: RecommenderConfig, unequal: bool, tmp_path
) -> None:
    old, grown = tables(unequal)
    extended = extend_recommender(trained(config, old), old, grown, embeddings_of(VECTORS))
    extended.save(tmp_path / "extended")
    again = RecommenderCheckpoint.load(tmp_path / "extended")
    _, found = rank_all(load_recommender(again, grown), table_symbols(grown), histories(ALL))
    assert bool(found.isfinite().all())
    with pytest.raises(ArtifactError, match="its symbols mean other items"):
        load_recommender(again, old)


@pytest.mark.parametrize("reads", READS[:4])
@pytest.mark.parametrize("text", [False, True])
def test_a_newcomer_is_read_as_an_item_that_training_never_met(reads: str, text: bool) -> None:
    if text and reads == "codewords":
        return
    old, grown = tables()
    config = IntrrConfig(**SMALL, reads=reads, text=text)  # type: ignore[arg-type]
    before = trained(config, old)
    x_ND = VECTORS.clone()
    x_ND[OLD] = x_ND[
        4
    ]  # item 4 had no training events; let a newcomer have its content, and read its symbols
    module = load_recommender(extend_recommender(before, old, grown, embeddings_of(x_ND)), grown)
    assert isinstance(module, Intrr)
    symbols = table_symbols(grown)
    symbols[OLD] = symbols[4]
    with torch.no_grad():
        trie = build_trie(table_symbols(grown))
        tokens = module.catalogue(symbols, trie).items
    assert tokens is not None
    torch.testing.assert_close(tokens[OLD], tokens[4])
    assert module.trained.tolist() == [item != 4 and item < OLD for item in range(ALL)]


def test_exact_scores_know_the_newcomers_too() -> None:
    old, grown = tables()
    config = IntrrConfig(**SMALL)
    module = load_recommender(
        extend_recommender(trained(config, old), old, grown, embeddings_of(VECTORS)), grown
    )
    symbols = table_symbols(grown)
    with torch.no_grad():
        catalogue = module.catalogue(symbols, build_trie(symbols))
        exact = exact_ranker(module, catalogue)
        assert exact is not None
        found = exact.rank(histories(ALL), catalogue, ALL, exclude_seen=False)
    _, beam = rank_all(module, symbols, histories(ALL))
    torch.testing.assert_close(torch.empty(6, ALL).scatter_(1, found.items, found.scores), beam)


def test_what_does_not_extend_the_recommenders_table_is_refused() -> None:
    old, grown = tables()
    before = trained(IntrrConfig(**SMALL, text=True), old)
    with pytest.raises(ArtifactError, match="its symbols mean other items"):
        extend_recommender(before, grown, grown, embeddings_of(VECTORS))
    with pytest.raises(ArtifactError, match="does not extend"):
        extend_recommender(before, old, replace(grown, tokenizer="another"), embeddings_of(VECTORS))
    with pytest.raises(ArtifactError, match="embeddings of 18 items, SidTable of 19"):
        extend_recommender(before, old, grown, embeddings_of(VECTORS[:-1]))
    with pytest.raises(ArtifactError, match="item 2 and 0 more have other vectors"):
        moved = VECTORS.clone()
        moved[2] = moved[3]
        extend_recommender(before, old, grown, embeddings_of(moved))


@pytest.mark.parametrize(
    "model", [CausalConfig(**SIZE), IntrrConfig(**SMALL, reads="uid_codewords", text=True)]
)
def test_what_was_trained_jointly_is_extended_likewise(model: RecommenderConfig, tiny) -> None:
    stage = RecommenderStage(model=model, loop=LoopConfig(epochs=1), batch_size=64, device="cpu")
    config = JointConfig(recommender=stage, joint=JointStage(exploration=GumbelConfig()))
    joint = train_jointly(
        tiny.split, tiny.embeddings, tiny.tokenizer, tiny.sids, config, lambda step, values: None
    )
    x_ND = torch.cat(
        [tiny.embeddings.matrix, torch.nn.functional.normalize(tiny.embeddings.matrix[:9].roll(1, 1))]
    )
    grown_embeddings = replace(tiny.embeddings, vectors={"vectors": x_ND}, catalog="grown")
    grown = extend(joint.tokenizer, grown_embeddings, joint.sids, SidConfig(suffix_size=32), tiny.embeddings)
    extended = extend_recommender(joint.recommender, joint.sids, grown, grown_embeddings)
    before = load_recommender(joint.recommender, joint.sids)
    _, expected = rank_all(before, table_symbols(joint.sids), histories(120))
    _, found = rank_all(load_recommender(extended, grown), table_symbols(grown)[:120], histories(120))
    assert torch.equal(found, expected)
    _, everything = rank_all(load_recommender(extended, grown), table_symbols(grown), histories(129))
    torch.testing.assert_close(everything.exp().sum(dim=1), torch.ones(6))
