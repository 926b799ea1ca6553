"""Where items' tokens come from: a frozen table, or a tokenizer that is still learning.

A live source sends the gradient through the current soft assignment. What the recommender reads is by default
the code of the table ("table forward"), so that noise never changes it; otherwise the code drawn now. ``LiveSids`` is
that of residual quantisation, ``live_dvae.LiveDvae`` that of a dvae.
Shapes: U items, N items of the catalogue, L levels, K codes, Z latent width, S steps.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.artifacts import SidTable
from components.exploration import ExplorationConfig, build_exploration, pick
from components.folders import Provenance
from components.seams import BatchTokens, Exploration, ItemTokens, Quantized, SymbolSpace, Tokenizer
from components.tokenizers.quantize import residual_codes, squared_distances, straight_through
from components.tokenizers.sids import (
    AssignmentRule,
    assign_codes,
    codes_to_table,
    space_of,
    symbol_counts,
    table_symbols,
)

SCALE_ROWS = 4096
"""The logit scales are found on about so many items: more do not move them by a percent."""


class FrozenSids(nn.Module):
    """Tokens of a fixed table."""

    symbols: Tensor

    def __init__(self, table: SidTable) -> None:
        super().__init__()
        self.space = space_of(table)
        self._table = table
        self.register_buffer("symbols", table_symbols(table))

    def tokens(self, item_ids: Tensor) -> BatchTokens:
        """Return hard tokens (U, S), the same for every path."""
        hard = ItemTokens(self.symbols[item_ids])
        return BatchTokens(hard, hard, hard)

    def table(self) -> SidTable:
        """Return the table."""
        return self._table


class Paths(NamedTuple):
    """The ways on which the recommendation loss may reach the codes."""

    history: bool = True
    teacher_forcing: bool = True
    target: bool = True
    target_weight: float = 1.0
    """Factor on the gradient that goes through the target."""


def explore(
    z_UZ: Tensor,
    codebooks: Sequence[Tensor],
    scales: Tensor,
    exploration: Exploration,
    tau: float,
    generator: torch.Generator | None,
    follow: Tensor | None = None,
) -> Quantized:
    """Quantise latents level by level with exploration noise and a soft assignment.

    Parameters
    ----------
    z_UZ : Tensor
        Latents.
    codebooks : sequence of Tensor
        One (K, Z) a level.
    scales : Tensor
        (L,), the logits of a level are minus the squared distances divided by its scale.
    exploration : Exploration
        How much noise; not asked where there is no generator.
    tau : float
        Temperature of the soft assignment, > 0.
    generator : torch.Generator, optional
        Where noise is drawn from; None: no noise.
    follow : Tensor, optional
        (U, L) codes that the residual subtracts; by default the codes drawn here.

    Returns
    -------
    Quantized
        The losses are means over items, levels and coordinates.

    References
    ----------
    DIGER (arXiv 2601.19711), section 3; the authors' gradient-fix release for the routing of gradients.
    """
    residual, total = z_UZ, torch.zeros_like(z_UZ)
    codes, greedy, probabilities, noises = [], [], [], []
    codebook_loss = commitment = z_UZ.new_zeros(())
    for level, codebook_KZ in enumerate(codebooks):
        logits_UK = -squared_distances(residual, codebook_KZ) / scales[level]
        best_U = logits_UK.detach().argmax(dim=-1)
        silent = generator is None
        noise_U1 = logits_UK.new_zeros(len(best_U), 1) if silent else exploration.noise(best_U, level)
        code_U, soft_UK = pick(logits_UK, noise_U1, tau, generator)
        word_UZ = straight_through(code_U, soft_UK) @ codebook_KZ
        codebook_loss = codebook_loss + F.mse_loss(word_UZ, residual.detach())
        commitment = commitment + F.mse_loss(residual, word_UZ.detach())
        total = total + word_UZ
        residual = residual - (word_UZ if follow is None else codebook_KZ[follow[:, level]])
        codes.append(code_U)
        greedy.append(best_U)
        probabilities.append(soft_UK)
        noises.append(noise_U1.detach()[:, 0])
    return Quantized(
        torch.stack(codes, dim=1),
        torch.stack(greedy, dim=1),
        tuple(probabilities),
        torch.stack(noises, dim=1),
        {
            "codebook": codebook_loss / len(codebooks),
            "commitment": commitment / len(codebooks),
            "latent_reconstruction": F.mse_loss(total, z_UZ),
        },
    )


@torch.no_grad()
def logit_scales(z_NZ: Tensor, codebooks: Sequence[Tensor], top_probability: float) -> Tensor:
    """Find the scale of each level at which the best code has a given mean probability.

    With unit Gumbel noise this is also how often a sampled code equals the nearest one. Without such a scale
    noise is either without effect or a uniform draw, depending on the size of the latents. The probability is
    that at tau 1, whatever tau is used: a scale that made up for tau would turn it into less noise.

    Parameters
    ----------
    z_NZ : Tensor
        Latents of the whole catalogue.
    codebooks : sequence of Tensor
        One (K, Z) a level.
    top_probability : float
        Wanted mean of the largest probability, above 1/K and below 1.

    Returns
    -------
    Tensor
        (L,) float32.

    Raises
    ------
    ValueError
        The wanted probability cannot be reached on some level: it is out of range, or codewords coincide.
    """
    residual, scales = z_NZ[:: max(1, len(z_NZ) // SCALE_ROWS)], []
    for level, codebook_KZ in enumerate(codebooks):
        if not 1 / len(codebook_KZ) < top_probability < 1:
            raise ValueError(
                f"top_probability must lie between 1/{len(codebook_KZ)} (level {level + 1}) and 1, "
                f"got {top_probability}"
            )
        distance_NK = squared_distances(residual, codebook_KZ)
        low, high = -20.0, 20.0  # of log scale; the mean top probability falls as the scale grows
        for _ in range(50):
            middle = (low + high) / 2
            top = torch.softmax(-distance_NK / math.exp(middle), dim=-1).amax(dim=-1).mean()
            low, high = (middle, high) if float(top) > top_probability else (low, middle)
        if abs(float(top) - top_probability) > 0.01 * top_probability:
            raise ValueError(
                f"level {level + 1}: no logit scale gives top_probability {top_probability}, the nearest is "
                f"{float(top):.3f}; codewords coincide, or the latents are far from a root mean square of 1"
            )
        scales.append(math.exp((low + high) / 2))
        residual = residual - codebook_KZ[distance_NK.argmin(dim=-1)]
    return torch.tensor(scales, dtype=torch.float32, device=z_NZ.device)


class LiveTable(nn.Module):
    """The table of a live source, and the stream of its noise: what follows a tokenizer in training.

    Buffers hold the table, so the state of a live source is tokenizer, table and noise **of one moment**.
    """

    codes: Tensor
    suffix: Tensor
    starts: Tensor

    def __init__(self, table: SidTable, space: SymbolSpace, generator: torch.Generator) -> None:
        super().__init__()
        self.space, self.generator = space, generator
        symbols = table_symbols(table)
        last = symbol_counts(symbols)[:, None] - 1
        starts, codes = torch.tensor(space.starts), symbols.scatter(1, last, -1)[:, :-1]
        self.register_buffer("codes", torch.where(codes < 0, -1, codes - starts[:-1]))
        self.register_buffer("suffix", symbols.gather(1, last)[:, 0] - space.num_codes)
        self.register_buffer("starts", starts)

    def get_extra_state(self) -> Tensor:
        """Return the state of the noise, so that a resumed run draws what an unbroken one would."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Set the state of the noise."""
        self.generator.set_state(state.cpu())

    @property
    def symbols(self) -> Tensor:
        """The table as symbols (N, S), -1 behind the suffix of a shorter SID."""
        return self.write(self.codes, self.suffix)

    def write(self, codes_UL: Tensor, suffix_U: Tensor) -> Tensor:
        """Return the symbols (U, S) of codes, -1 behind the last, and suffixes (U,)."""
        symbols = F.pad(torch.where(codes_UL < 0, -1, codes_UL + self.starts[:-1]), (0, 1), value=-1)
        length_U1 = (codes_UL >= 0).sum(dim=1, keepdim=True)
        return symbols.scatter(1, length_U1, suffix_U[:, None] + self.space.num_codes)

    @torch.no_grad()
    def follow(self, codes_NL: Tensor) -> Tensor:
        """Give every item these codes; one that has them already keeps its suffix.

        Returns
        -------
        Tensor
            (N,) bool, items whose codes changed.

        Raises
        ------
        OverfullBucket
            More items share codes than there are suffixes; the table is then as it was.
        """
        moved = (codes_NL != self.codes).any(dim=1)
        if not bool(moved.any()):
            return moved
        table = codes_to_table(
            codes_NL,
            list(self.space.codebook_sizes),
            self.space.suffix_size,
            "",
            self.table(),
            shared=self.space.shared,
        )
        self.codes, suffix = codes_NL, torch.from_numpy(table.codes["suffix"].to_numpy().astype("int64"))
        self.suffix = suffix.to(codes_NL.device)
        return moved

    def table(self, tokenizer: str = "", provenance: Provenance | None = None) -> SidTable:
        """Return the table as an artefact; ``tokenizer`` is the fingerprint of the weights that made it."""
        frame = pl.DataFrame({"codes": self.codes.cpu().numpy(), "suffix": self.suffix.cpu().numpy()}).select(
            item_id=pl.int_range(pl.len(), dtype=pl.UInt32),
            codes=pl.col("codes").arr.to_list().list.filter(pl.element() >= 0).cast(pl.List(pl.UInt16)),
            suffix=pl.col("suffix").cast(pl.UInt16),
        )
        return SidTable(
            codes=frame,
            codebook_sizes=list(self.space.codebook_sizes),
            suffix_size=self.space.suffix_size,
            shared=self.space.shared,
            tokenizer=tokenizer,
            provenance=provenance or Provenance(),
        )


def attach(
    symbols_US: Tensor, codes_UL: Tensor, probabilities: Sequence[Tensor], paths: Paths
) -> BatchTokens:
    """Return tokens that read ``codes`` on every path, and send gradient to the soft assignment on the open ones.

    Parameters
    ----------
    symbols_US : Tensor
        What is read and written.
    codes_UL : Tensor
        The codes among these symbols; -1 behind the last.
    probabilities : sequence of Tensor
        One (U, K) a level, the soft assignment.
    paths : Paths
        The ways that are open.
    """
    hard = ItemTokens(symbols_US)
    if not (paths.history or paths.teacher_forcing or paths.target):
        return BatchTokens(hard, hard, hard)

    def soft(weight: float) -> ItemTokens:
        levels = zip(codes_UL.clamp(min=0).T, probabilities, strict=True)
        return ItemTokens(symbols_US, tuple(straight_through(code_U, weight * p) for code_U, p in levels))

    plain = soft(1.0)
    target = plain if paths.target_weight == 1 else soft(paths.target_weight)
    return BatchTokens(
        plain if paths.history else hard,
        plain if paths.teacher_forcing else hard,
        target if paths.target else hard,
    )


class LiveSids(LiveTable):
    """Tokens of a residual tokenizer in training: codes of a table that is refreshed, gradient of the assignment."""

    scales: Tensor
    _latents: Tensor | None
    _x_ND: Tensor | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        x_ND: Tensor,
        table: SidTable,
        exploration: ExplorationConfig,
        paths: Paths,
        rule: AssignmentRule,
        *,
        residual: Literal["sampled", "table"],
        top_probability: float,
        logit_scale: float | None,
        train_encoder: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__(table, space_of(table), generator)
        self.tokenizer = tokenizer
        self.exploration = build_exploration(exploration, self.space.codebook_sizes)
        self.tau, self.forward_codes = exploration.tau, exploration.forward
        self.paths, self.rule = paths, rule
        self.residual, self.train_encoder = residual, train_encoder
        if train_encoder and not any(name.startswith("encoder.") for name, _ in tokenizer.named_parameters()):
            raise ValueError(
                "train_encoder is set, but this tokenizer has no encoder: take rqvae, or unset it"
            )
        self.register_buffer("_x_ND", x_ND if train_encoder else None, persistent=False)
        self.register_buffer(
            "_latents", None if train_encoder else tokenizer.latents(x_ND).detach(), persistent=False
        )
        if logit_scale is None:
            scales = logit_scales(self.latents(), list(tokenizer.codebooks), top_probability)
        else:
            scales = torch.full((self.space.num_levels,), logit_scale)
        self.register_buffer("scales", scales)

    def latents(self, item_ids: Tensor | None = None) -> Tensor:
        """Return the latents of items (U, Z), by default of all: computed once while the encoder is frozen."""
        if self._latents is not None:
            return self._latents if item_ids is None else self._latents[item_ids]
        assert self._x_ND is not None
        return self.tokenizer.latents(self._x_ND if item_ids is None else self._x_ND[item_ids])

    def assign(self, item_ids: Tensor) -> tuple[BatchTokens, Quantized]:
        """Pass items (U,) through the tokenizer once; return their tokens and the pass itself.

        Noise is drawn in training mode only.
        """
        z_UZ = self.latents(item_ids)
        table_UL = self.codes[item_ids]
        follow = table_UL if self.residual == "table" else None
        generator = self.generator if self.training else None
        q = explore(
            z_UZ, list(self.tokenizer.codebooks), self.scales, self.exploration, self.tau, generator, follow
        )
        code_UL = q.codes if self.training and self.forward_codes == "sample" else table_UL
        symbols = self.write(code_UL, self.suffix[item_ids])
        return attach(symbols, code_UL, q.probabilities, self.paths), q

    def tokens(self, item_ids: Tensor) -> BatchTokens:
        """Return the tokens of distinct items (U,)."""
        return self.assign(item_ids)[0]

    @torch.no_grad()
    def assigned(self) -> Tensor:
        """Return the codes (N, L) that the rule of the table gives all items now."""
        return assign_codes(self.latents(), list(self.tokenizer.codebooks), self.rule)

    def refresh(self) -> Tensor:
        """Re-assign every item by the rule of the table; return (N,) bool, items whose codes changed (``follow``)."""
        return self.follow(self.assigned())

    @torch.no_grad()
    def nearest(self) -> Tensor | None:
        """Return the nearest codes (N, L) of all items where the table's own are others; else None."""
        if self.rule.assignment == "nearest":
            return None
        return residual_codes(self.latents(), list(self.tokenizer.codebooks))

    @property
    def codebooks(self) -> dict[str, Tensor]:
        """What gives items their codes, by level."""
        return {f"level{level + 1}": book for level, book in enumerate(self.tokenizer.codebooks)}

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what joint training moves: the codebooks, and the encoder unless it is frozen."""
        wanted = ("codebooks.", "encoder.") if self.train_encoder else ("codebooks.",)
        yield from (p for name, p in self.tokenizer.named_parameters() if name.startswith(wanted))
