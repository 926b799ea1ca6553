"""Train a tokenizer on content vectors alone: the first stage of two, and the start of joint training."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from components.artifacts import ContentEmbeddings, SequenceSplit, TokenizerCheckpoint
from components.data.splits import training_counts, warm_items
from components.folders import Provenance
from components.seeding import seed_everything
from components.tokenizers.build import checkpoint_of
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.quantize import reconstruct
from components.tokenizers.rkmeans import RkMeans, RkMeansConfig
from components.tokenizers.rqvae import RqVae, RqVaeConfig
from components.training.dvae import train_dvae
from components.training.loop import Log, State, cosine, device_of, fit
from components.training.tokenizer_stage import TokenizerStage

NOT_ELIGIBLE = 100.0
"""Taken off the score of early epochs; eligible ones score at least -1 for collisions, about -1 otherwise."""


def train_tokenizer(
    embeddings: ContentEmbeddings,
    config: TokenizerStage,
    log: Log = lambda step, values: None,
    save: Callable[[State], None] = lambda state: None,
    resume: State | None = None,
    split: SequenceSplit | None = None,
) -> TokenizerCheckpoint:
    """Fit codebooks, and where the tokenizer has them encoder and decoder, to content vectors.

    Parameters
    ----------
    embeddings : ContentEmbeddings
        One vector an item.
    config : TokenizerStage
        The tokenizer and how to train it.
    log : callable
        Receives a step and named figures.
    save, resume
        A resumable state after every validation, and one to go on from; only gradient descent has any.
    split : SequenceSplit, optional
        Its cold items are left out, as if they were not there yet. Its training events say how popular items are, for
        tokenizers that weigh items by interactions.

    Returns
    -------
    TokenizerCheckpoint
        Its figures are over the items that it was fitted to. Those of ``rqvae`` and ``rkmeans`` have latents of root
        mean square 1 over these, and their ``metrics`` hold ``reconstruction`` (mean squared error where the target has
        mean square 1: the scaled content vector), ``collision_rate`` (share of items whose codes another item has too),
        ``largest_bucket``, and ``codes_in_use/l`` and ``perplexity/l`` for each level l from 1; for ``dvae`` see
        ``training.dvae.describe_names``.

    Raises
    ------
    ValueError
        Fewer items than codes of a level, all-zero vectors, or collapsed latents; a tokenizer that weighs items by
        interactions got no split, or the price rule finds no price above 0.
    ArtifactError
        Embeddings and split are of different catalogues.
    FloatingPointError
        The loss is no longer finite.
    """
    generator = seed_everything(config.seed)
    device = device_of(config.device)
    x_ND = embeddings.matrix.to(device)
    counts_N, parents = torch.ones(len(x_ND), device=device), {"ContentEmbeddings": embeddings.fingerprint}
    if split is not None:
        parents["SequenceSplit"] = split.fingerprint
    if config.model.by_interactions or (split is not None and config.model.kind == "dvae"):
        setting = f"tokenizer.model of kind {config.model.kind}, which counts items by interactions,"
        counts_N = torch.from_numpy(training_counts(split, len(x_ND), setting)).float().to(device)
    warm = warm_items(split, len(x_ND))
    if not warm.all():
        kept_N = torch.from_numpy(warm).to(device)
        x_ND, counts_N = x_ND[kept_N], counts_N[kept_N]
    steps = 0
    tokenizer: RkMeans | RqVae | Dvae
    match config.model:
        case RkMeansConfig():
            kmeans = tokenizer = RkMeans(config.model, x_ND.shape[1]).to(device)
            kmeans.fit(x_ND, config.seed, counts_N if config.model.by_interactions else None)
            metrics = describe_fit(kmeans.eval(), x_ND)
        case RqVaeConfig():
            rqvae = tokenizer = RqVae(config.model, x_ND.shape[1])
            rqvae.draw_weights(generator)
            steps = _descend(rqvae.to(device), x_ND, config, generator, log, save, resume)
            rqvae.fold_scale(x_ND)
            metrics = describe_fit(rqvae.eval(), x_ND)
        case DvaeConfig():
            dvae, result = train_dvae(config.model, x_ND, counts_N, config, generator, log, save, resume)
            tokenizer, steps, metrics = dvae.eval(), result.step, result.metrics
    log(steps, metrics)
    return checkpoint_of(
        tokenizer,
        embeddings=embeddings.fingerprint,
        steps=steps,
        metrics=metrics,
        provenance=Provenance(
            config=config.model_dump(mode="json"),
            parents=parents,
            seed=config.seed,
        ),
    )


def _descend(
    tokenizer: RqVae,
    x_ND: Tensor,
    config: TokenizerStage,
    generator: torch.Generator,
    log: Log,
    save: Callable[[State], None],
    resume: State | None,
) -> int:
    """Train by gradient descent and leave the kept epoch in the module; return the steps it took."""
    model = tokenizer.config
    tokenizer.standardise(x_ND)
    tokenizer.fit_codebooks(x_ND, config.seed)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps_per_epoch = -(-len(x_ND) // config.batch_size)
    schedule = cosine(optimizer, config.warmup_steps, config.loop.epochs * steps_per_epoch)

    def batches(epoch: int) -> Iterator[Tensor]:
        if model.revive_every is not None and epoch > 0 and epoch % model.revive_every == 0:
            tokenizer.revive(x_ND, generator)
        order_N = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
        yield from (x_ND[rows_B] for rows_B in torch.split(order_N, config.batch_size))

    def step(x_BD: Tensor) -> dict[str, Tensor]:
        terms = tokenizer.losses(x_BD)
        loss = terms["reconstruction"] + terms["codebook"] + model.commitment * terms["commitment"]
        return {"loss": loss, **terms}

    def validate(epoch: int) -> dict[str, float]:
        figures = describe_fit(tokenizer, x_ND)
        progress = epoch / config.loop.epochs
        # Before an epoch is eligible a later one always counts as better, so patience starts to count there.
        score = -figures[config.keep] if progress >= config.keep_from else progress - NOT_ELIGIBLE
        return {**figures, "keep/score": score}

    result = fit(
        {"tokenizer": tokenizer},
        optimizer,
        schedule,
        batches,
        step,
        validate,
        config.loop,
        select="keep/score",
        generator=generator,
        log=log,
        save=save,
        resume=resume,
    )
    tokenizer.load_state_dict(result.best["tokenizer"])
    return result.step


@torch.no_grad()
def describe_fit(tokenizer: RqVae | RkMeans, x_ND: Tensor) -> dict[str, float]:
    """Tokenize these items and say how well their codes describe them and how evenly they are used."""
    codes_NL = tokenizer.encode(x_ND)
    quantised_NZ = reconstruct(codes_NL, list(tokenizer.codebooks))
    rebuilt_ND = tokenizer.decoder(quantised_NZ) if isinstance(tokenizer, RqVae) else quantised_NZ
    _, sizes = torch.unique(codes_NL, dim=0, return_counts=True)
    figures = {
        "reconstruction": float((rebuilt_ND - x_ND * tokenizer.input_scale).square().mean()),
        "collision_rate": float(sizes[sizes > 1].sum()) / len(codes_NL),
        "largest_bucket": float(sizes.max()),
    }
    for level, size in enumerate(tokenizer.codebook_sizes):
        share_K = torch.bincount(codes_NL[:, level], minlength=size).double() / len(codes_NL)
        figures[f"codes_in_use/{level + 1}"] = float((share_K > 0).sum())
        figures[f"perplexity/{level + 1}"] = float(torch.special.entr(share_K).sum().exp())
    return figures
