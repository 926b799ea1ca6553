"""A dvae in training as a source of tokens: the table's names in value, a soft message in gradient.

Lengths are frozen: between two refreshes an item has the name and the suffix of the table. At position t of it the
message is onehot(c_t) + P_t - sg(P_t) with P_t = softmax((logits_t + noise * gumbel) / tau), where the logits are those
of the encoder after the table's codes c_1 .. c_(t-1): every position is soft in the context that its own name gives it.
The suffix is hard, and behind it there is no message. So the recommendation loss reaches codebook, scales and shares of
the residual; when to stop is learned from the dvae's own loss alone.
Shapes: U items, N items of the catalogue, T positions, V codes, H width of encoder and codebook.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.artifacts import SidTable
from components.exploration import ExplorationConfig, build_exploration, pick
from components.seams import BatchTokens, Quantized
from components.tokenizers.dvae import Dvae
from components.tokenizers.sids import AssignmentRule, name_items, space_of
from components.tokenizers.sources import LiveSids, LiveTable, Paths, attach

READERS = ("read.", "read_for_stop.")
"""The parts of a dvae that read content vectors: its encoder, as far as that can be frozen."""


class LiveDvae(LiveTable):
    """Tokens of a dvae in training: names of a table that is refreshed, gradient of the soft message.

    Parameters
    ----------
    tokenizer : Dvae
        Where training starts. Its readers of content need no gradient from here on, unless they are trained.
    x_ND : Tensor
        Content vectors of all items.
    table : SidTable
        The names that this dvae gives the items by ``rule``.
    exploration : ExplorationConfig
        Noise on the logits of the message; with ``forward: table``.
    paths : Paths
        The ways on which the recommendation loss may reach the codes.
    rule : AssignmentRule
        How items are named at a refresh; its ``length`` says where a name stops.
    train_encoder : bool
        Train the readers of content too.
    generator : torch.Generator
        Where all noise comes from, that of the dvae's own loss included.

    Raises
    ------
    ValueError
        Codes that are drawn shall be read.

    References
    ----------
    Straight-through message and exploration of DIGER (arXiv 2601.19711), sections 3.2 and 3.3, on the network of
    Khrylchenko (arXiv 2602.16375). The combination is ours.
    """

    _x_ND: Tensor
    _states: Tensor | None

    def __init__(
        self,
        tokenizer: Dvae,
        x_ND: Tensor,
        table: SidTable,
        exploration: ExplorationConfig,
        paths: Paths,
        rule: AssignmentRule,
        *,
        train_encoder: bool,
        generator: torch.Generator,
    ) -> None:
        check_forward(exploration)
        space = space_of(table)
        if tokenizer.config.length == "variable":
            # Lengths move: the table of a later epoch may hold shorter names than this one.
            space = space._replace(shortest=1)
        super().__init__(table, space, generator)
        self.tokenizer = tokenizer
        self.exploration = build_exploration(exploration, space.codebook_sizes)
        self.tau, self.paths, self.rule = exploration.tau, paths, rule
        for name, parameter in tokenizer.named_parameters():
            # Also against the clipping of gradients, which counts all that have one.
            parameter.requires_grad_(train_encoder or not name.startswith(READERS))
        self.register_buffer("_x_ND", x_ND, persistent=False)
        states = None if train_encoder else tokenizer.read(F.normalize(x_ND, dim=1)).detach()
        self.register_buffer("_states", states, persistent=False)

    def assign(self, item_ids: Tensor) -> tuple[BatchTokens, Quantized]:
        """Pass items (U,) through the dvae once; return their tokens and the pass itself.

        The message has noise in training mode only, and no dropout. The losses of the pass are those of
        ``Dvae.losses`` at the last temperature; its codes are -1 behind the end of a name.
        """
        code_UT = self.codes[item_ids]
        quantized = self._message(item_ids, code_UT)
        symbols = self.write(code_UT, self.suffix[item_ids])
        return attach(symbols, code_UT, quantized.probabilities, self.paths), quantized

    def _message(self, item_ids: Tensor, code_UT: Tensor) -> Quantized:
        dvae, x_UD = self.tokenizer, self._x_ND[item_ids]
        u_UH = dvae.read(F.normalize(x_UD, dim=1)) if self._states is None else self._states[item_ids]
        unit_VH = F.normalize(dvae.codebook, dim=1)
        generator = self.generator if self.training else None
        codes, greedy, probabilities, noises = [], [], [], []
        for t, code_U in enumerate(code_UT.T):
            if t:
                u_UH = dvae.subtract(u_UH, dvae.codebook[code_UT[:, t - 1].clamp(min=0)], t - 1)
            logits_UV = dvae.logits(u_UH, unit_VH, t)
            ended_U = code_U < 0
            best_U = logits_UV.detach().argmax(dim=1).masked_fill(ended_U, -1)
            noise_U1 = (
                logits_UV.new_zeros(len(best_U), 1)
                if generator is None
                else self.exploration.noise(best_U, t)
            )
            drawn_U, soft_UV = pick(logits_UV, noise_U1, self.tau, generator)
            codes.append(drawn_U.masked_fill(ended_U, -1))
            greedy.append(best_U)
            probabilities.append(soft_UV)
            noises.append(noise_U1.detach()[:, 0])
        return Quantized(
            torch.stack(codes, dim=1),
            torch.stack(greedy, dim=1),
            tuple(probabilities),
            torch.stack(noises, dim=1),
            self._own_losses(x_UD),
        )

    def _own_losses(self, x_UD: Tensor) -> dict[str, Tensor]:
        """Draw from this source's stream: what the recommender draws is then what it draws on a frozen table."""
        with torch.random.fork_rng([x_UD.device] if x_UD.is_cuda else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
            return self.tokenizer.losses(x_UD, self.tokenizer.config.tau_end)

    def tokens(self, item_ids: Tensor) -> BatchTokens:
        """Return the tokens of distinct items (U,)."""
        return self.assign(item_ids)[0]

    def assigned(self) -> Tensor:
        """Return the codes (N, T) that the rule of the table gives all items now, -1 behind the end of a name."""
        return name_items(self.tokenizer, self._x_ND, self.rule)

    def refresh(self) -> Tensor:
        """Name every item again by the rule of the table; return (N,) bool, items whose codes changed (``follow``)."""
        return self.follow(self.assigned())

    def nearest(self) -> Tensor | None:
        """Return the likeliest codes (N, T) of all items on all positions where names may stop before; else None."""
        return None if self.space.one_length else self.tokenizer.encode(self._x_ND)

    @property
    def codebooks(self) -> dict[str, Tensor]:
        """What gives items their codes: one codebook for all positions."""
        return {"shared": self.tokenizer.codebook}

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what joint training moves: all but the readers of content, and these unless they are frozen."""
        yield from (p for p in self.tokenizer.parameters() if p.requires_grad)


LiveSource = LiveSids | LiveDvae
"""What joint training draws tokens from."""


def check_forward(exploration: ExplorationConfig) -> None:
    """Refuse to read the codes drawn now: how many there are, and the suffix, belong to the table's."""
    if exploration.forward != "table":
        raise ValueError(
            f"joint.exploration {exploration.kind} with forward={exploration.forward} reads the codes drawn now, whose "
            "length and suffix a dvae does not know: take kind none or gumbel, or set forward=table"
        )
