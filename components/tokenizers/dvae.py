"""Discrete VAE whose names have the length they are worth: codes, a learned stop, a decoder for every prefix.

Popular items get short names because training draws items by their interactions and each token has one price.
Shapes: B rows, N items, D content width, T positions, V codes, H width of encoder and codebook, G of the decoder.
"""

import math
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.tokenizers import stopping
from components.tokenizers.prefix_models import (
    PrefixSum,
    PrefixTransformer,
    StopMlp,
    StopTransformer,
    check_width,
)

ROWS = 8192
"""Items that are named at once: the logits of a position take ROWS x V x 4 bytes."""


class DvaeConfig(Config):
    """Discrete VAE with soft Gumbel samples; one codebook for all positions.

    Published (T 5, V 4096, batch 8192 interactions, lr 1e-3, tens of thousands of steps): ``codebook_std`` 0.02,
    ``residual_scale`` 0.2, ``network`` transformer, ``tau_end`` 0.5 or 0.7, ``free_nats`` 2.0, ``price`` 0.3 to 12,
    ``warmup`` one epoch of interactions. The defaults are for runs of a few thousand steps, in which the published
    start leaves all positions with the same information.
    """

    kind: Literal["dvae"] = "dvae"
    vocabulary: int = Field(128, ge=2, le=65536)
    """Codes V, shared by all positions."""
    positions: int = Field(4, ge=2, le=255)
    """Longest name T, in codes."""
    length: Literal["variable", "fixed"] = "variable"
    """variable: each item stops where its next code is not worth the price. fixed: all T codes, the control."""
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Only for variable: what a code costs, in nats (lambda). auto: found by the price rule on a fixed-length run that
    is trained first, which takes as long again."""
    typical_length: int = Field(2, ge=1)
    """Only for price auto: codes after which a typical interaction should stop."""
    reconstruct: Literal["last", "every"] = "last"
    """Only for fixed: reconstruct from all T codes alone, as published, or from every prefix alike."""
    sampling: Literal["interactions", "uniform"] = "interactions"
    """How training items are drawn: by their training interactions, or each alike, which is the control."""
    network: Literal["transformer", "sum"] = "sum"
    """Decoder and stop head. transformer: as published. sum: weighted sums of the prefix and a layer each, several
    times faster on a CPU and ahead in short runs."""
    hidden: int = Field(64, ge=1)
    """Width H of the encoder and of a codeword."""
    decoder_hidden: int = Field(128, ge=2)
    """Width G of the decoder."""
    decoder_layers: int = Field(2, ge=1)
    """Only for network transformer: layers of the decoder."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the input, the query of the codebook, and inside decoder and stop head."""
    codebook_std: float = Field(1.0, gt=0)
    """Spread of the first codewords."""
    residual_scale: float = Field(0.5, gt=0)
    """First share of a codeword that is taken off the residual; learned for each position."""
    logit_scale: float = Field(5.0, gt=0)
    """First scale of the cosine logits; learned for each position."""
    tau_start: float = Field(1.0, gt=0)
    """Temperature of the soft samples at the start."""
    tau_end: float = Field(0.6, gt=0)
    """Temperature after the warm-up."""
    beta: float = Field(0.002, gt=0)
    """Factor on everything that is in nats, after the warm-up: twice the variance of the reconstruction."""
    warmup: float = Field(0.35, gt=0, le=0.9)
    """Share of the steps over which beta rises from 0 and the temperature falls, both along a cosine."""
    lengths_learn: Literal["after_warmup", "from_start"] = "after_warmup"
    """after_warmup: first all prefixes are reconstructed alike, and lengths start to learn once a code costs its full
    price. from_start: as published; while beta is small the longest names are the best, and short runs stay there."""
    free_nats: float | None = Field(None, ge=0)
    """Information that a code may carry without cost, for each item and position; null: 0.24 ln V."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the reconstruction that all prefixes get alike; without it lengths get stuck at T."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length == "variable" and self.price == "auto" and self.typical_length >= self.positions:
            raise ValueError(
                f"typical_length {self.typical_length} must be below positions {self.positions}: the price rule "
                "looks at the gain of the code after it"
            )
        if self.free >= math.log(self.vocabulary):
            raise ValueError(
                f"free_nats {self.free:g} must be below ln(vocabulary) = {math.log(self.vocabulary):.2f}: no code "
                "would ever cost anything"
            )
        if self.network == "transformer":
            check_width("hidden", self.hidden)
            check_width("decoder_hidden", self.decoder_hidden)
        return self

    @property
    def by_interactions(self) -> bool:
        """Whether training needs to know how often items were interacted with."""
        return self.sampling == "interactions"

    @property
    def free(self) -> float:
        """Free bits in nats."""
        return stopping.free_nats(self.vocabulary) if self.free_nats is None else self.free_nats

    @property
    def surprise(self) -> float:
        """Most that a code costs beside the price, in nats."""
        return math.log(self.vocabulary) - self.free

    @property
    def codebook_sizes(self) -> list[int]:
        """Codes of each position."""
        return [self.vocabulary] * self.positions


class Message(NamedTuple):
    """One pass of items through the encoder."""

    embedded: Tensor
    """(B, T, G) soft samples as the decoder reads them."""
    divergences: Tensor
    """(B, T) KL of each code's distribution, without noise and temperature, to the uniform one, in nats."""
    hazards: Tensor
    """(B, T - 1) logits of stopping after token l."""


class Names(NamedTuple):
    """What the trained encoder says of items, without noise."""

    codes: Tensor
    """(N, T) long, all positions."""
    log_q: Tensor
    """(N, T) log-probability of each length; for fixed length 0 at T and -inf before."""
    errors: Tensor
    """(N, T) squared error D_l of the unit vector after l codes, in [0, 4]."""
    divergences: Tensor
    """(N, T) cost of each token beside the price: its KL to the uniform code beyond the free bits, in nats."""


class Dvae(nn.Module):
    """Encoder with a residual in its own space, one codebook, stop head and prefix decoder.

    Parameters
    ----------
    config : DvaeConfig
        Sizes, start values and weights.
    input_dim : int
        Width D of the content vectors.

    References
    ----------
    Khrylchenko (arXiv 2602.16375), sections 3.2 to 3.4. The network ``sum`` is ours.
    """

    price: Tensor

    def __init__(self, config: DvaeConfig, input_dim: int) -> None:
        super().__init__()
        self.config, self.input_dim = config, input_dim
        self.codebook_sizes = config.codebook_sizes
        V, T, H = config.vocabulary, config.positions, config.hidden
        self.register_buffer("price", torch.tensor(0.0 if config.price == "auto" else float(config.price)))
        self.dropout = nn.Dropout(config.dropout)
        self.read = nn.Sequential(nn.Linear(input_dim, H), nn.LayerNorm(H), nn.GELU())
        self.codebook = nn.Parameter(torch.randn(V, H) * config.codebook_std)
        self.norm = nn.RMSNorm(H)
        self.log_logit_scale = nn.Parameter(torch.full((T,), math.log(config.logit_scale)))
        self.log_residual_scale = nn.Parameter(torch.full((T - 1,), math.log(config.residual_scale)))
        self.table = nn.Parameter(torch.randn(V, config.decoder_hidden) * V**-0.5)
        transformer = config.network == "transformer"
        self.decoder = (
            PrefixTransformer(config.decoder_hidden, config.decoder_layers, config.dropout, input_dim)
            if transformer
            else PrefixSum(T, config.decoder_hidden, config.dropout, input_dim)
        )
        if config.length == "variable":
            self.read_for_stop = nn.Sequential(nn.Linear(input_dim, H), nn.LayerNorm(H), nn.GELU())
            stop = StopTransformer if transformer else StopMlp
            self.stop = stop(T, H, config.dropout)

    def message(self, x_BD: Tensor, tau: float) -> Message:
        """Draw soft samples for unit vectors, each position conditioned on the soft samples before it."""
        u_BH = self.read(self.dropout(x_BD))
        unit_VH = F.normalize(self.codebook, dim=1)
        embedded, divergences, residuals = [], [], []
        for t in range(self.config.positions):
            logits_BV = self.logits(self.dropout(u_BH), unit_VH, t)
            weights_BV = F.gumbel_softmax(logits_BV, tau)
            embedded.append(weights_BV @ self.table)
            divergences.append(self._divergence(logits_BV.log_softmax(dim=1)))
            if t + 1 < self.config.positions:
                u_BH = self.subtract(u_BH, weights_BV @ self.codebook, t)
                residuals.append(u_BH)
        hazards = self._hazards(x_BD, residuals)
        return Message(torch.stack(embedded, dim=1), torch.stack(divergences, dim=1), hazards)

    def logits(self, u_BH: Tensor, unit_VH: Tensor, t: int) -> Tensor:
        """Return the logits (B, V) of position t, from 0, given the state after the codes before it.

        ``unit_VH`` is the codebook with rows of length 1, which all positions share.
        """
        return self.log_logit_scale[t].exp() * (F.normalize(u_BH, dim=1) @ unit_VH.T)

    def subtract(self, u_BH: Tensor, word_BH: Tensor, t: int) -> Tensor:
        """Return the state (B, H) after position t: a share of its codeword taken off, and scaled back."""
        rest: Tensor = self.norm(u_BH - self.log_residual_scale[t].exp() * word_BH)
        return rest

    def decode(self, embedded_BTG: Tensor) -> Tensor:
        """Return the reconstruction (B, T, D) of every prefix, a unit vector, from embedded tokens."""
        return F.normalize(self.decoder(embedded_BTG), dim=-1)

    def losses(self, x_BD: Tensor, tau: float = 0.6, *, all_prefixes: bool = False) -> dict[str, Tensor]:
        """Return the unweighted terms of the training loss.

        Parameters
        ----------
        x_BD : Tensor
            Content vectors, drawn as ``config.sampling`` says.
        tau : float
            Temperature of the soft samples.
        all_prefixes : bool
            Leave lengths alone: every prefix counts alike, and every code as reached.

        Returns
        -------
        dict of str to Tensor
            ``reconstruction``: squared error of the unit vector, summed over coordinates, expected over lengths
            (smoothed). ``vocabulary``: nats of codes beyond the free bits, as far as they are reached. ``length``:
            price times expected length, less the entropy of the length; 0 where no length is learned.
        """
        x_BD = F.normalize(x_BD, dim=1)
        config, message = self.config, self.message(x_BD, tau)
        paid_BT = F.relu(message.divergences - config.free)
        error_BT = (x_BD[:, None] - self.decode(message.embedded)).square().sum(dim=-1)
        if config.length == "fixed" or all_prefixes:
            last_alone = config.length == "fixed" and config.reconstruct == "last"
            return {
                "reconstruction": (error_BT[:, -1] if last_alone else error_BT).mean(),
                "vocabulary": paid_BT.sum(dim=1).mean(),
                "length": x_BD.new_zeros(()),
            }
        log_q_BT = stopping.log_pmf(message.hazards)
        smooth_BT = (1 - config.smoothing) * log_q_BT.exp() + config.smoothing / config.positions
        length_B = self.price * stopping.expected(log_q_BT) - stopping.entropy(log_q_BT)
        return {
            "reconstruction": (smooth_BT * error_BT).sum(dim=1).mean(),
            "vocabulary": (stopping.survival(message.hazards) * paid_BT).sum(dim=1).mean(),
            "length": length_B.mean(),
        }

    @torch.no_grad()
    def names(self, x_ND: Tensor) -> Names:
        """Name items greedily, without noise and dropout, whatever mode the module is in."""
        training = self.training
        self.eval()
        parts = [self._name(rows) for rows in torch.split(F.normalize(x_ND, dim=1), ROWS)]
        self.train(training)
        return Names(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the codes (N, T) long of all positions; ``lengths`` says how many of them count."""
        return self.names(x_ND).codes

    def lengths(self, names: Names, rule: stopping.LengthRule) -> Tensor:
        """Return how many codes (N,) each name has: the argmax or the median of the learned posterior, or the argmax
        of the best posterior for these codes (``stopping.optimal_log_pmf``), which needs no stop head.
        """
        config = self.config
        if config.length == "fixed":
            return torch.full_like(names.codes[:, 0], config.positions)
        match rule:
            case "argmax":
                return stopping.argmax_length(names.log_q)
            case "median":
                return stopping.median_length(names.log_q)
            case "optimum":
                best = stopping.optimal_log_pmf(
                    names.errors, names.divergences, float(self.price), config.beta, 1 - config.smoothing
                )
                return stopping.argmax_length(best)

    def _name(self, x_ND: Tensor) -> Names:
        u_NH = self.read(x_ND)
        unit_VH = F.normalize(self.codebook, dim=1)
        codes, divergences, residuals = [], [], []
        for t in range(self.config.positions):
            log_p = self.logits(u_NH, unit_VH, t).log_softmax(dim=1)
            codes.append(log_p.argmax(dim=1))
            divergences.append(self._divergence(log_p))
            if t + 1 < self.config.positions:
                u_NH = self.subtract(u_NH, self.codebook[codes[-1]], t)
                residuals.append(u_NH)
        codes_NT = torch.stack(codes, dim=1)
        error_NT = (x_ND[:, None] - self.decode(self.table[codes_NT])).square().sum(dim=-1)
        if self.config.length == "fixed":
            log_q = torch.full_like(error_NT, -math.inf)
            log_q[:, -1] = 0
        else:
            log_q = stopping.log_pmf(self._hazards(x_ND, residuals))
        return Names(codes_NT, log_q, error_NT, F.relu(torch.stack(divergences, dim=1) - self.config.free))

    def _divergence(self, log_p_BV: Tensor) -> Tensor:
        return math.log(self.config.vocabulary) + (log_p_BV.exp() * log_p_BV).sum(dim=1)

    def _hazards(self, x_BD: Tensor, residuals: list[Tensor]) -> Tensor:
        if self.config.length == "fixed":
            return x_BD.new_zeros(len(x_BD), 0)
        first_BH = self.read_for_stop(self.dropout(x_BD))
        hazards: Tensor = self.stop(torch.stack([first_BH, *residuals], dim=1))
        return hazards
