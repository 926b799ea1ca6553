"""Where stages and methods meet: the tuples they pass and the protocols they keep. No logic.

Shapes: B batch, T items of a history, U unique items of a batch, N items of the catalogue, L levels,
S = L + 1 steps of the longest SID (its codes, then the suffix), K codes of a codebook, Z latent width, D model
width, V symbols (all codes, then all suffixes), W beams.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from components.artifacts import SidTable

if TYPE_CHECKING:
    from components.tokenizers.trie import PrefixTrie


class SymbolSpace(NamedTuple):
    """How codes and suffixes become the symbols that a recommender reads and writes.

    Symbols are numbered level by level, the suffixes last; levels that share one codebook share its symbols.
    What a step of the string may write is one contiguous range, so logits of a step are a slice.
    """

    codebook_sizes: tuple[int, ...]
    suffix_size: int
    shared: bool = False
    """All levels read one codebook: code 3 is the same symbol on each."""
    shortest: int | None = None
    """Codes of the shortest SID, whose suffix may come after so many; None: all SIDs have all levels."""

    @property
    def num_levels(self) -> int:
        """Levels of content codes; the suffix is not one."""
        return len(self.codebook_sizes)

    @property
    def num_steps(self) -> int:
        """Symbols of the longest SID: its levels and the suffix."""
        return self.num_levels + 1

    @property
    def num_codes(self) -> int:
        """Symbols that are codes; the suffixes follow."""
        return self.codebook_sizes[0] if self.shared else sum(self.codebook_sizes)

    @property
    def num_symbols(self) -> int:
        """V."""
        return self.num_codes + self.suffix_size

    @property
    def one_length(self) -> bool:
        """Whether every SID has all levels."""
        return self.shortest in (None, self.num_levels)

    def codes(self, level: int) -> tuple[int, int]:
        """First symbol that is a code of a level, and the one after the last."""
        start = 0 if self.shared else sum(self.codebook_sizes[:level])
        return start, start + self.codebook_sizes[level]

    @property
    def starts(self) -> list[int]:
        """First symbol that each step may write."""
        return [self.range(step)[0] for step in range(self.num_steps)]

    def range(self, step: int) -> tuple[int, int]:
        """First symbol that a step may write, and the one after its last.

        The last step writes suffixes alone. An earlier one writes codes, and suffixes too once the shortest SID
        may end there, for which all levels share their codes.
        """
        if step == self.num_levels:
            return self.num_codes, self.num_symbols
        start, stop = self.codes(step)
        ends = not self.one_length and self.shortest is not None and step >= self.shortest
        return start, self.num_symbols if ends else stop


class ItemFacts(NamedTuple):
    """What is known of the catalogue's items beside their SIDs; row = item id."""

    trained: Tensor
    """(N,) bool, items that training reads; of the others only content is known."""
    vectors: Tensor
    """(N, X) float32, content vectors."""


class Choices(NamedTuple):
    """What might stand in place of one symbol of an item's SID, after the same beginning, and lead on to an item."""

    columns: Tensor
    """(U, F) long, places among the symbols that the step may write."""
    real: Tensor
    """(U, F) bool, False in padding."""
    own: Tensor
    """(U,) long, which of them is the item's. Rows of items whose SID has ended before are not to be read."""


class ItemTokens(NamedTuple):
    """What a recommender sees of items: the symbols of their SIDs."""

    symbols: Tensor
    """(U, S) long, symbols of the whole space; -1 after the suffix of a SID that is shorter than S."""
    weights: tuple[Tensor, ...] | None = None
    """One (U, K) a level: the one-hot code in value, the soft assignment in gradient. Rows of items whose SID has no
    code on a level are not to be read. None: hard codes."""
    choices: tuple[Choices, ...] | None = None
    """One a step: what a predicted symbol is normalised over. None: all symbols that the step may write."""


class Quantized(NamedTuple):
    """One pass of latents through the codebooks."""

    codes: Tensor
    """(U, L) long, codes drawn with exploration noise; -1 where the item's SID has no code on the level."""
    greedy: Tensor
    """(U, L) long, nearest codes on the same residuals, without noise; -1 likewise."""
    probabilities: tuple[Tensor, ...]
    """One (U, K) a level: the soft assignment, with gradient to codebooks and latents."""
    noise: Tensor
    """(U, L) noise scale that each item got on each level, 0 where it explored nothing."""
    losses: dict[str, Tensor]
    """Unweighted scalars: ``codebook``, ``commitment`` and ``latent_reconstruction``; of a dvae its own terms."""


class BatchTokens(NamedTuple):
    """The tokens of a batch's unique items, once for each way in which they enter the loss.

    Gradient reaches the codes through those that carry weights: the three paths are three switches.
    """

    history: ItemTokens
    """Read as context."""
    forced: ItemTokens
    """Read as the known beginning of the item being written (teacher forcing)."""
    target: ItemTokens
    """Predicted."""


class SequenceBatch(NamedTuple):
    """Histories, left-aligned and padded on the right, and the item that follows each."""

    unique: Tensor
    """(U,) long, the distinct item ids of the batch, ascending."""
    items: Tensor
    """(B, T) long, indices into ``unique``, oldest first; padding repeats the oldest item and is masked."""
    mask: Tensor
    """(B, T) bool, True where there is an item."""
    target: Tensor
    """(B,) long, indices into ``unique``."""

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """Return the batch on another device."""
        return SequenceBatch(*(t.to(device) for t in self))


class RecommenderLoss(NamedTuple):
    """Cross-entropy of the next item's symbols, and what a recommender asks for beside it."""

    total: Tensor
    """Scalar, mean over all predicted symbols, in nats."""
    steps: Tensor
    """(S,) mean cross-entropy of each step, detached, NaN where nothing is predicted; where all SIDs are of one length,
    the sum is an item's cost."""
    beside: Mapping[str, Tensor] = MappingProxyType({})
    """Further terms of what is minimised, scalars that carry their weight already, by name."""


class Catalogue(NamedTuple):
    """What ranking reads of all items, made once for a table and the weights of a recommender."""

    symbols: Tensor
    """(N, S) long, the table; -1 behind the suffix of a SID that is shorter than S."""
    trie: "PrefixTrie"
    """The tree of these symbols."""
    items: Tensor | None = None
    """(N, D) the vector that each item is read as, where a recommender reads one an item; None where it reads
    symbols."""


class Ranking(NamedTuple):
    """The best items of each user."""

    items: Tensor
    """(B, k) long item ids, best first; -1 where the catalogue has no more."""
    scores: Tensor
    """(B, k) what they are ranked by: log-probabilities (see ``decoding.beam_search``), -inf beside -1."""


class Tokenizer(Protocol):
    """Content vectors to codes by residual quantisation of a latent: what joint training can move.

    ``rqvae`` and ``rkmeans`` are of this kind. A ``dvae`` has one codebook in a space of its own, and a live source of
    its own (``tokenizers.live_dvae``). Every tokenizer is a ``torch.nn.Module``.
    """

    codebooks: nn.ParameterList
    """One (K, Z) a level; what joint training moves."""
    codebook_sizes: list[int]
    """K of each level."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters; those of an encoder are named ``encoder.``."""
        ...

    def latents(self, x_ND: Tensor) -> Tensor:
        """Return the latents (N, Z) that the codebooks quantise; root mean square 1 over the training items."""
        ...

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the nearest codes (N, L) long: level by level on the residual, without noise or gradient."""
        ...

    def losses(self, x_ND: Tensor) -> dict[str, Tensor]:
        """Return the terms of the tokenizer's own loss as named, unweighted scalars."""
        ...


class Exploration(Protocol):
    """How much noise an assignment gets. Every exploration is a ``torch.nn.Module``; one function assigns for all."""

    def noise(self, greedy_U: Tensor, level: int) -> Tensor:
        """Return the noise scale, >= 0, (U, 1) for the noise-free codes (U,) of a level; called level by level."""
        ...

    def weigh(self, loss: Tensor) -> Tensor:
        """Return what the recommendation loss, a scalar in nats a symbol, becomes in the sum that is minimised."""
        ...


class SidSource(Protocol):
    """Where a recommender gets its items' tokens: a frozen table, or a tokenizer that is still learning."""

    space: SymbolSpace

    def tokens(self, item_ids: Tensor) -> BatchTokens:
        """Return the tokens of distinct items (U,)."""
        ...

    def table(self) -> SidTable:
        """Return the table that decoding uses."""
        ...


class Ranker(Protocol):
    """What ranks the catalogue for histories."""

    def rank(self, batch: SequenceBatch, catalogue: Catalogue, beams: int, *, exclude_seen: bool) -> Ranking:
        """Return the ``beams`` best items of each history."""
        ...


class Recommender(Ranker, Protocol):
    """Predict the next item by writing its SID."""

    def loss(self, batch: SequenceBatch, tokens: BatchTokens) -> RecommenderLoss:
        """Return the training loss of a batch; ``tokens`` are those of ``batch.unique``."""
        ...

    def catalogue(self, symbols: Tensor, trie: "PrefixTrie") -> Catalogue:
        """Return what ``rank`` reads of all items: the symbols (N, S) of the table, their tree, what follows from them
        and the weights as they are now.
        """
        ...
