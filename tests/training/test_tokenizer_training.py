"""Laws of the tokenizer stage: seeded, resumable, logged, and the kept epoch is the one it says."""

from dataclasses import replace

import pytest
import torch

from components.artifacts import ContentEmbeddings, SequenceSplit, TokenizerCheckpoint
from components.data.splits import SplitConfig, hold_out
from components.folders import ArtifactError
from components.tokenizers.build import load_tokenizer
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.rqvae import RqVaeConfig
from components.tokenizers.sids import SidConfig, assign
from components.training.loop import LoopConfig
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage

RQVAE = RqVaeConfig(codebook_sizes=[8, 8], hidden=[32], latent_dim=8)
STAGE = TokenizerStage(model=RQVAE, loop=LoopConfig(epochs=12, validate_every=2), batch_size=64, lr=3e-3)
KMEANS = TokenizerStage(model=RkMeansConfig(codebook_sizes=[8, 8]))


@pytest.fixture(scope="module")
def embeddings() -> ContentEmbeddings:
    """300 unit vectors in two layers of clusters: 8 groups of 8."""
    g = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(8, 16, generator=g), 0.4 * torch.randn(8, 16, generator=g)
    number = torch.arange(300)
    x_ND = coarse[number % 8] + fine[number // 8 % 8] + 0.05 * torch.randn(300, 16, generator=g)
    x_ND = torch.nn.functional.normalize(x_ND, dim=1)
    return ContentEmbeddings(
        vectors={"vectors": x_ND}, encoder="precomputed", revision="1", normalised=True, catalog="c"
    )


@pytest.mark.parametrize("stage", [STAGE, KMEANS], ids=["rqvae", "rkmeans"])
def test_equal_seeds_give_equal_bytes(embeddings: ContentEmbeddings, stage: TokenizerStage) -> None:
    first = train_tokenizer(embeddings, stage)
    assert train_tokenizer(embeddings, stage).fingerprint == first.fingerprint
    other = train_tokenizer(embeddings, stage.model_copy(update={"seed": 1}))
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("stage", [STAGE, KMEANS], ids=["rqvae", "rkmeans"])
def test_metrics_are_those_of_the_kept_weights(embeddings: ContentEmbeddings, stage: TokenizerStage) -> None:
    checkpoint = train_tokenizer(embeddings, stage)
    x_ND, tokenizer = embeddings.matrix, load_tokenizer(checkpoint)
    with torch.no_grad():
        assert float(tokenizer.latents(x_ND).square().mean().sqrt()) == pytest.approx(1, abs=1e-6)
    codes = [tuple(row) for row in tokenizer.encode(x_ND).tolist()]
    together = sum(codes.count(row) > 1 for row in codes)
    assert checkpoint.metrics["collision_rate"] == pytest.approx(together / 300)
    assert checkpoint.metrics["largest_bucket"] == max(codes.count(row) for row in codes)
    for level in range(2):
        used = [row[level] for row in codes]
        assert checkpoint.metrics[f"codes_in_use/{level + 1}"] == len(set(used))
        assert 1 <= checkpoint.metrics[f"perplexity/{level + 1}"] <= len(set(used)) + 1e-9
    assert checkpoint.embeddings == embeddings.fingerprint
    assert checkpoint.input_dim == 16


def test_rkmeans_finds_the_planted_layers(embeddings: ContentEmbeddings) -> None:
    metrics = train_tokenizer(embeddings, KMEANS).metrics
    assert metrics["perplexity/1"] > 7
    assert metrics["reconstruction"] < 0.1


def test_training_lowers_the_losses_and_logs_them(embeddings: ContentEmbeddings) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    loop = LoopConfig(epochs=30, validate_every=10, log_every=10)
    checkpoint = train_tokenizer(
        embeddings,
        STAGE.model_copy(update={"loop": loop}),
        lambda step, values: seen.append((step, dict(values))),
    )
    losses = [values["train/reconstruction"] for _, values in seen if "train/reconstruction" in values]
    assert losses[-1] < 0.5 * losses[0]
    assert {"train/loss", "train/codebook", "train/commitment"} <= set().union(
        *(values for _, values in seen)
    )
    assert [values["epoch"] for _, values in seen if "epoch" in values] == [10, 20, 30]
    assert seen[-1] == (checkpoint.steps, checkpoint.metrics)


@pytest.mark.parametrize("keep", ["collision_rate", "reconstruction"])
def test_the_best_eligible_epoch_is_kept(embeddings: ContentEmbeddings, keep: str) -> None:
    seen: list[dict[str, float]] = []
    stage = STAGE.model_copy(update={"keep": keep, "keep_from": 0.5})
    checkpoint = train_tokenizer(embeddings, stage, lambda _, values: seen.append(dict(values)))
    figures = {values["epoch"]: values[keep] for values in seen if "epoch" in values}
    eligible = {epoch: value for epoch, value in figures.items() if epoch >= 6}
    best = min(eligible, key=lambda epoch: (eligible[epoch], epoch))
    assert checkpoint.steps == best * 5
    assert checkpoint.metrics[keep] == pytest.approx(eligible[best], abs=1e-4)


def test_patience_never_keeps_an_epoch_that_is_not_eligible(embeddings: ContentEmbeddings) -> None:
    loop = LoopConfig(epochs=12, validate_every=1, patience=1)
    checkpoint = train_tokenizer(embeddings, STAGE.model_copy(update={"loop": loop, "keep_from": 0.75}))
    assert checkpoint.steps >= 9 * 5


def test_an_interrupted_run_goes_on_to_the_same_weights(embeddings: ContentEmbeddings) -> None:
    whole = train_tokenizer(embeddings, STAGE)
    states: list[dict[str, object]] = []

    class Stopped(Exception):
        pass

    def save(state: dict[str, object]) -> None:
        states.append(state)
        if len(states) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        train_tokenizer(embeddings, STAGE, save=save)
    assert train_tokenizer(embeddings, STAGE, resume=states[-1]).fingerprint == whole.fingerprint


def test_every_setting_changes_the_result(embeddings: ContentEmbeddings) -> None:
    def trained(**model: object) -> TokenizerCheckpoint:
        loop = LoopConfig(epochs=4, validate_every=4)
        stage = STAGE.model_copy(update={"model": RQVAE.model_copy(update=model), "loop": loop})
        return replace(train_tokenizer(embeddings, stage), config={})

    usual = trained().fingerprint
    assert trained(commitment=1.0).fingerprint != usual
    assert trained(kmeans_iterations=1).fingerprint != usual
    assert trained().fingerprint == usual


def test_embeddings_that_cannot_be_told_apart_stop_the_stage() -> None:
    same = ContentEmbeddings(
        vectors={"vectors": torch.ones(40, 8)}, encoder="e", revision="1", normalised=False, catalog="c"
    )
    with pytest.raises(ValueError, match="collapsed latents"):
        train_tokenizer(same, STAGE)


DVAE = {
    "kind": "dvae",
    "vocabulary": 8,
    "positions": 2,
    "typical_length": 1,
    "hidden": 8,
    "decoder_hidden": 8,
}
KINDS = {
    "rqvae": RQVAE,
    "rkmeans": RkMeansConfig(codebook_sizes=[8, 8]),
    "rkmeans by interactions": RkMeansConfig(codebook_sizes=[8, 8], weights="interactions"),
    "dvae": DVAE | {"price": 1.0},
    "dvae drawn alike": DVAE | {"price": 1.0, "sampling": "uniform"},
}


def short(model: object) -> TokenizerStage:
    loop = LoopConfig(epochs=4, validate_every=2)
    return TokenizerStage.model_validate({"model": model, "loop": loop, "batch_size": 32})


@pytest.fixture(scope="module")
def cold(tiny) -> SequenceSplit:
    return hold_out(tiny.log, tiny.catalog, SplitConfig(cold_share=0.2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_does_not_depend_on_cold_items_and_all_items_are_named(
    tiny, cold: SequenceSplit, kind: str
) -> None:
    def trained(matrix: torch.Tensor) -> TokenizerCheckpoint:
        checkpoint = train_tokenizer(changed(matrix), short(KINDS[kind]), split=cold)
        return replace(checkpoint, embeddings="")

    def changed(matrix: torch.Tensor) -> ContentEmbeddings:
        return replace(tiny.embeddings, vectors={"vectors": matrix})

    x_ND, items = tiny.embeddings.matrix, cold.cold["item_id"].to_list()
    other_ND = x_ND.clone()
    other_ND[items] = 100 * torch.randn(len(items), x_ND.shape[1])
    usual = trained(x_ND)
    assert trained(other_ND).fingerprint == usual.fingerprint
    warm_ND = x_ND.clone()
    warm_ND[cold.train["sequence"][0][0]] *= -1
    assert trained(warm_ND).fingerprint != usual.fingerprint

    checkpoint = train_tokenizer(tiny.embeddings, short(KINDS[kind]), split=cold)
    assert assign(checkpoint, tiny.embeddings, SidConfig(suffix_size=128), split=cold).num_items == len(x_ND)
    assert checkpoint.provenance.parents["SequenceSplit"] == cold.fingerprint


@pytest.mark.parametrize("kind", ["rqvae", "rkmeans"])
def test_a_tokenizer_is_fitted_as_if_cold_items_were_not_there_yet(
    tiny, cold: SequenceSplit, kind: str
) -> None:
    warm = torch.ones(len(tiny.embeddings.matrix), dtype=torch.bool)
    warm[cold.cold["item_id"].to_list()] = False
    alone = replace(tiny.embeddings, vectors={"vectors": tiny.embeddings.matrix[warm]})
    before = train_tokenizer(alone, short(KINDS[kind]))
    after = train_tokenizer(tiny.embeddings, short(KINDS[kind]), split=cold)
    assert replace(after, embeddings="").fingerprint == replace(before, embeddings="").fingerprint
    everyone = train_tokenizer(tiny.embeddings, short(KINDS[kind]))
    assert (
        train_tokenizer(tiny.embeddings, short(KINDS[kind]), split=tiny.split).fingerprint
        == everyone.fingerprint
    )
    assert replace(everyone, embeddings="").fingerprint != replace(before, embeddings="").fingerprint


def test_a_split_of_another_catalogue_is_refused(embeddings: ContentEmbeddings, tiny) -> None:
    with pytest.raises(ArtifactError, match="the SequenceSplit has 120 items, the ContentEmbeddings 300"):
        train_tokenizer(embeddings, STAGE, split=tiny.split)
