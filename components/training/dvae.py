"""Train the discrete VAE: items drawn by interactions, two warm-ups, and the price rule before it where asked for.

Shapes: N items, T positions, D content width, B draws of a step.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from components.tokenizers import stopping
from components.tokenizers.dvae import Dvae, DvaeConfig, Names
from components.training.loop import FitResult, Log, State, constant, fit
from components.training.tokenizer_stage import TokenizerStage


def warm(progress: float, warmup: float) -> float:
    """Return how far the warm-up is, 0 to 1 along half a cosine, when ``progress`` of all steps are done."""
    return 0.5 * (1 - math.cos(math.pi * min(1.0, progress / warmup)))


def train_dvae(
    model: DvaeConfig,
    x_ND: Tensor,
    counts_N: Tensor,
    config: TokenizerStage,
    generator: torch.Generator,
    log: Log,
    save: Callable[[State], None],
    resume: State | None,
) -> tuple[Dvae, FitResult]:
    """Return the trained tokenizer and its last epoch; with ``price: auto`` a probe is trained first and priced.

    The metrics of that epoch are those of ``describe_names``.

    The probe has one length and reconstructs every prefix alike. Its mean gain at ``typical_length``, as items are
    drawn, becomes the price; ``price/predicted_item`` and ``price/predicted_draw`` are the mean lengths that are best
    for the probe's codes at that price. Its curves are logged below ``probe/``. A state that is saved says which of the
    two runs it is of.

    Raises
    ------
    ValueError
        No price above 0 keeps a typical interaction at ``typical_length``.
    """
    price = model.price if resume is None else resume["price"]
    if model.length == "fixed":
        price = 0.0  # nothing has to be paid for
    if price == "auto":
        probe_config = model.model_copy(update={"length": "fixed", "reconstruct": "every"})

        def save_probe(state: State) -> None:
            save(state | {"price": "auto"})

        def log_probe(step: int, values: Mapping[str, float]) -> None:
            # The line of progress shows what bears no slash.
            plain = {"epoch": values["epoch"], "probe_loss": values["loss"]} if "epoch" in values else {}
            log(step, plain | {f"probe/{name}": value for name, value in values.items()})

        probe = Dvae(probe_config, x_ND.shape[1]).to(x_ND.device)
        _descend(probe, x_ND, counts_N, config, generator, log_probe, save_probe, resume)
        names = probe.names(x_ND)
        errors_T = weighted(names.errors, draws(model, counts_N))
        gain = float(errors_T[model.typical_length - 1] - errors_T[model.typical_length])
        price = stopping.price_for(gain, model.beta, 1 - model.smoothing, model.surprise)
        if price <= 0:
            raise ValueError(
                f"tokenizer.model.price auto: code {model.typical_length + 1} gains {gain:.4f} of squared error, less "
                f"than a full code costs without any price, so lengths would fall below typical_length "
                f"{model.typical_length}; lower beta or typical_length, or set a price"
            )
        best_NT = stopping.optimal_log_pmf(
            names.errors, names.divergences, price, model.beta, 1 - model.smoothing
        )
        best_N = stopping.argmax_length(best_NT).float()
        log(
            0,
            {
                "price/auto": price,
                "price/gain": gain,
                "price/predicted_item": float(best_N.mean()),
                "price/predicted_draw": float(weighted(best_N, counts_N)),
            },
        )
        resume = None
    tokenizer = Dvae(model, x_ND.shape[1]).to(x_ND.device)
    tokenizer.price.fill_(price)

    def save_priced(state: State) -> None:
        save(state | {"price": price})

    return tokenizer, _descend(tokenizer, x_ND, counts_N, config, generator, log, save_priced, resume)


def _descend(
    tokenizer: Dvae,
    x_ND: Tensor,
    counts_N: Tensor,
    config: TokenizerStage,
    generator: torch.Generator,
    log: Log,
    save: Callable[[State], None],
    resume: State | None,
) -> FitResult:
    """Train to the last epoch, which is the one that is kept."""
    model = tokenizer.config
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps_an_epoch = -(-len(x_ND) // config.batch_size)
    total = config.loop.epochs * steps_an_epoch
    schedule = constant(optimizer, config.warmup_steps)
    drawn_by = draws(model, counts_N).double().cpu()  # the generator lives there
    taken = 0

    def batches(epoch: int) -> Iterator[Tensor]:
        nonlocal taken
        taken = epoch * steps_an_epoch
        rows = torch.multinomial(
            drawn_by, steps_an_epoch * config.batch_size, replacement=True, generator=generator
        )
        yield from (x_ND[rows_B] for rows_B in torch.split(rows.to(x_ND.device), config.batch_size))

    def step(x_BD: Tensor) -> dict[str, Tensor]:
        nonlocal taken
        ready = warm(taken / total, model.warmup)
        taken += 1
        terms = tokenizer.losses(
            x_BD,
            model.tau_start + (model.tau_end - model.tau_start) * ready,
            all_prefixes=model.lengths_learn == "after_warmup" and ready < 1,
        )
        return {"loss": total_loss(terms, model.beta * ready), **terms}

    def validate(epoch: int) -> dict[str, float]:
        return {**describe_names(tokenizer, tokenizer.names(x_ND), counts_N), "keep/score": float(epoch)}

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
    return result._replace(metrics={n: v for n, v in result.metrics.items() if n != "keep/score"})


def total_loss(terms: Mapping[str, Tensor], beta: float) -> Tensor:
    """Return reconstruction plus beta times all that is in nats: the price stands inside beta."""
    return terms["reconstruction"] + beta * (terms["vocabulary"] + terms["length"])


def draws(model: DvaeConfig, counts_N: Tensor) -> Tensor:
    """Return how often each item (N,) is drawn in training, up to a factor."""
    return counts_N if model.by_interactions else torch.ones_like(counts_N)


def weighted(values: Tensor, counts_N: Tensor) -> Tensor:
    """Return the mean over items of (N, ...) by interaction."""
    share_N = (counts_N / counts_N.sum()).to(values)
    return torch.tensordot(share_N, values, dims=1)


def describe_names(tokenizer: Dvae, names: Names, counts_N: Tensor) -> dict[str, float]:
    """Say how well the names describe the items, how long they are, and what the price rule makes of it.

    "item" is the mean over items, "draw" the mean over interactions. Reconstruction is the squared error of the unit
    vector at the name's own length.
    """
    config = tokenizer.config
    length_N = tokenizer.lengths(names, "argmax")
    error_N = names.errors.gather(1, length_N[:, None] - 1)[:, 0]
    reached_NT = torch.arange(config.positions, device=length_N.device) < length_N[:, None]
    codes_NT = names.codes.masked_fill(~reached_NT, -1)
    _, bucket_N, sizes = torch.unique(codes_NT, dim=0, return_inverse=True, return_counts=True)
    figures = {
        "reconstruction/item": float(error_N.mean()),
        "reconstruction/draw": float(weighted(error_N, counts_N)),
        "collision_rate": float((sizes[bucket_N] > 1).float().mean()),
        "distinct_share": len(sizes) / len(codes_NT),
        "largest_bucket": float(sizes.max()),
    }
    for t in range(config.positions):
        used = codes_NT[reached_NT[:, t], t]
        share_V = torch.bincount(used, minlength=config.vocabulary).double() / max(1, len(used))
        figures[f"perplexity/{t + 1}"] = float(torch.special.entr(share_V).sum().exp()) if len(used) else 0.0
        figures[f"prefix_error/{t + 1}"] = float(weighted(names.errors[:, t], counts_N))
        if config.length == "variable":
            figures[f"length_share/{t + 1}"] = float((length_N == t + 1).float().mean())
    if config.length == "fixed":
        return figures
    length = length_N.float()
    errors_T = weighted(names.errors, counts_N)
    figures |= {
        "price": float(tokenizer.price),
        "price/alpha": 1 - math.exp(-float(tokenizer.price)),
        "length/item": float(length.mean()),
        "length/draw": float(weighted(length, counts_N)),
        "length/entropy": float(stopping.entropy(names.log_q).mean()),
        # The rule of the price on this model's own mean errors: where a typical interaction should stop.
        "length/rule_draw": float(
            stopping.rule_length(
                errors_T, float(tokenizer.price), config.beta, 1 - config.smoothing, config.surprise
            )
        ),
    }
    rules: tuple[stopping.LengthRule, ...] = ("optimum", "median")
    for rule in rules:
        other = tokenizer.lengths(names, rule)
        figures[f"length/{rule}_item"] = float(other.float().mean())
        figures[f"length/{rule}_draw"] = float(weighted(other.float(), counts_N))
        figures[f"length/agrees_with_{rule}"] = float((other == length_N).float().mean())
    return figures
