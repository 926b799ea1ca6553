"""SASRec trained on the full softmax: a causal transformer over item ids, the strong baseline that knows no text.

It differs from the first SASRec in its loss, cross-entropy over all items in place of one sampled negative, and
in its blocks, which are the ones that every decoder-only model here uses.

Shapes: B batch, T items of a history, D width, N items of the catalogue, P predicted items, U users.
"""

import math

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from components.artifacts import SasRecCheckpoint, SequenceSplit
from components.folders import ArtifactError
from components.recommenders.backbones import CausalStack, StackConfig
from components.recommenders.full_ranking import flatten
from components.recommenders.item_encoders import append_target
from components.seams import SequenceBatch


class SasRecConfig(StackConfig):
    """SASRec: one vector an item, read and predicted by the same table."""

    dim: int = Field(64, ge=1)
    """Width D of the model and of an item's vector."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    hidden: int = Field(128, ge=1)
    """Width of the feed-forward layer."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Dropout on the input and on residual branches."""
    max_history: int = Field(50, ge=1)
    """Latest items of a history that are read."""


class SasRec(nn.Module):
    """Item vectors and learned places, a causal stack, and the item vectors again as the output layer.

    References
    ----------
    W.-C. Kang and J. McAuley, "Self-attentive sequential recommendation", ICDM 2018: the model.
    A. Klenitskiy and A. Vasilev, "Turning dross into gold loss: is BERT4Rec really better than SASRec?",
    RecSys 2023: the loss.
    """

    def __init__(self, config: SasRecConfig, num_items: int) -> None:
        super().__init__()
        self.config, self.num_items = config, num_items
        self.items = nn.Parameter(torch.randn(num_items, config.dim) * 0.02)
        self.place = nn.Parameter(torch.randn(config.max_history, config.dim) * 0.1)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = CausalStack(config)

    def loss(self, batch: SequenceBatch) -> Tensor:
        """Return the mean cross-entropy over all items after the first of each window, target included.

        Parameters
        ----------
        batch : SequenceBatch
            Windows of at most ``max_history`` items and the item that follows each.

        Returns
        -------
        Tensor
            Scalar, in nats an item; log N is a uniform guess.
        """
        items, present = append_target(batch)
        ids_BT = batch.unique[items]
        predicted = present[:, 1:]
        return F.cross_entropy(self._logits(self._read(ids_BT[:, :-1])[predicted]), ids_BT[:, 1:][predicted])

    @torch.no_grad()
    def scores(self, histories: pl.Series) -> NDArray[np.float64]:
        """Return (U, N) log-probabilities of the next item, without dropout.

        The latest ``max_history`` items are read. An empty history says nothing: its items all score log(1/N).
        """
        events = flatten(histories)
        length = np.minimum(histories.list.len().to_numpy().astype(np.int64), self.config.max_history)
        recent = events.ages < self.config.max_history
        rows = events.rows[recent]
        # Padding is item 0, on the right: no item attends to what comes after it.
        ids_UT = np.zeros((len(length), max(1, length.max(initial=0))), dtype=np.int64)
        ids_UT[rows, length[rows] - 1 - events.ages[recent]] = events.items[recent]
        last = torch.from_numpy(np.maximum(length - 1, 0)).to(self.items.device)
        training = self.training
        try:
            hidden = self.eval()._read(torch.from_numpy(ids_UT).to(self.items.device))
        finally:
            self.train(training)
        logits_UN = self._logits(hidden[torch.arange(len(last), device=last.device), last])
        # Doubles: rounding must not tie items that the model tells apart.
        scores: NDArray[np.float64] = logits_UN.double().log_softmax(dim=-1).cpu().numpy()
        scores[length == 0] = -math.log(self.num_items)
        return scores

    def _read(self, ids_BT: Tensor) -> Tensor:
        """Return what the stack makes of each item and all before it, (B, T, D)."""
        # Small vectors keep the first logits small; scaled up, they are not drowned by the places on the way in.
        x_BTD = F.embedding(ids_BT, self.items) * math.sqrt(self.config.dim) + self.place[: ids_BT.shape[1]]
        return self.stack(self.dropout(x_BTD))[0]

    def _logits(self, hidden_PD: Tensor) -> Tensor:
        return F.linear(hidden_PD, self.items)


def load_sasrec(checkpoint: SasRecCheckpoint, split: SequenceSplit) -> SasRec:
    """Rebuild a trained SASRec for the split that it was trained on, in evaluation mode.

    Raises
    ------
    ArtifactError
        Another split, a configuration that this version does not know, or weights that do not fit it.
    """
    checkpoint.check_split(split)
    try:
        config = SasRecConfig.model_validate(checkpoint.config)
    except ValidationError as error:
        raise ArtifactError(f"SasRecCheckpoint.config is not one this sidflow knows: {error}") from error
    model = SasRec(config, checkpoint.num_items)
    try:
        model.load_state_dict(checkpoint.weights, strict=True)
    except RuntimeError as error:
        raise ArtifactError(f"SasRecCheckpoint: weights do not fit its configuration: {error}") from error
    return model.eval()
