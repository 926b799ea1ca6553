"""Where stages and methods meet: the tuples they pass and the protocols they keep. No logic.

Shapes: B batch, T items of a history, U unique items of a batch, N items of the catalogue, L levels,
S = L + 1 steps of a SID (its codes, then the suffix), K codes of a codebook, Z latent width, D model width,
V symbols (all codes of all levels, then all suffixes), W beams.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from components.artifacts import SidTable


class SymbolSpace(NamedTuple):
    """How codes and suffixes become the symbols that a recommender reads and writes.

    Symbols are numbered level by level, the suffixes last: a step of the string writes into one contiguous
    range, so logits of a step are a slice.
    """

    codebook_sizes: tuple[int, ...]
    suffix_size: int

    @property
    def num_levels(self) -> int:
        """Levels of content codes; the suffix is not one."""
        return len(self.codebook_sizes)

    @property
    def num_steps(self) -> int:
        """Symbols of a SID: its levels and the suffix."""
        return self.num_levels + 1

    @property
    def num_symbols(self) -> int:
        """V."""
        return sum(self.codebook_sizes) + self.suffix_size

    def range(self, step: int) -> tuple[int, int]:
        """First symbol of a step, and the one after its last."""
        sizes = (*self.codebook_sizes, self.suffix_size)
        start = sum(sizes[:step])
        return start, start + sizes[step]


class ItemTokens(NamedTuple):
    """What a recommender sees of items: the symbols of their SIDs."""

    symbols: Tensor
    """(U, S) long, symbols of the whole space."""
    weights: tuple[Tensor, ...] | None = None
    """One (U, K) a level: the one-hot code in value, the soft assignment in gradient. None: hard codes."""


class Quantized(NamedTuple):
    """One pass of latents through the codebooks."""

    codes: Tensor
    """(U, L) long, codes drawn with exploration noise."""
    greedy: Tensor
    """(U, L) long, nearest codes on the same residuals, without noise."""
    probabilities: tuple[Tensor, ...]
    """One (U, K) a level: the soft assignment, with gradient to codebooks and latents."""
    latents: Tensor
    """(U, Z) quantised latents, with gradient through the soft assignment."""
    losses: dict[str, Tensor]
    """Unweighted scalars: ``codebook``, ``commitment`` and ``latent_reconstruction``."""


class SequenceBatch(NamedTuple):
    """Histories, left-aligned and padded on the right, and the item that follows each."""

    items: Tensor
    """(B, T) long, item ids oldest first; padding repeats item 0 and is masked."""
    mask: Tensor
    """(B, T) bool, True where there is an item."""
    target: Tensor
    """(B,) long, item ids."""


class RecommenderLoss(NamedTuple):
    """Cross-entropy of the next item's symbols."""

    total: Tensor
    """Scalar, mean over targets and steps, in nats."""
    steps: Tensor
    """(S,) mean cross-entropy of each step, detached; its sum is the cost of an item."""


class Ranking(NamedTuple):
    """The best items of each user."""

    items: Tensor
    """(B, k) long item ids, best first; -1 where the catalogue has no more."""
    scores: Tensor
    """(B, k) log-probabilities, -inf beside -1."""


class Exploration(Protocol):
    """How much noise an assignment gets. One assignment function serves all kinds."""

    surrogate: bool
    """False: hard codes, no gradient from the recommender to the codes."""
    tau: float
    """Temperature of the soft assignment; larger spreads the gradient over more codes."""

    def noise(self, greedy: Tensor, level: int) -> Tensor:
        """Return the noise scale, >= 0, (U, 1) for the noise-free codes (U,) of a level."""
        ...


class SidSource(Protocol):
    """Where a recommender gets its items' tokens: a frozen table, or a tokenizer that is still learning."""

    space: SymbolSpace

    def tokens(self, item_ids: Tensor) -> ItemTokens:
        """Return the tokens of distinct items (U,)."""
        ...

    def table(self) -> SidTable:
        """Return the table that decoding uses."""
        ...


class Recommender(Protocol):
    """Predict the next item by writing its SID."""

    def loss(self, batch: SequenceBatch, sids: SidSource) -> RecommenderLoss:
        """Return the training loss of a batch."""
        ...

    def rank(self, batch: SequenceBatch, sids: SidSource, k: int) -> Ranking:
        """Return the k best items of each history, best first."""
        ...
