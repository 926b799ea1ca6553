"""The served model: a list of histories in, ranked items with scores out.

MLflow copies this file into the model and runs it when the model is loaded, so it may import components,
which travel with the model, but no other module of tasks.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import polars as pl
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from components.artifacts import Bundle
from components.data.batches import held_out_rows
from components.recommenders.build import load_recommender
from components.recommenders.decoding import rank_rows
from components.recommenders.exact import exact_ranker
from components.seams import Ranker
from components.tokenizers.sids import table_symbols
from components.tokenizers.trie import build_trie
from components.training.loop import device_of

BEAMS = 20
BATCH = 128


class SidRecommender(PythonModel):  # type: ignore[misc]
    """Rank the items of a Bundle for histories of raw item ids."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle that the model carries; runs once."""
        bundle = Bundle.load(Path(context.artifacts["bundle"]))
        device = device_of("auto")
        self.items = bundle.catalog.items
        self.recommender = load_recommender(bundle.recommender, bundle.sids).to(device)
        symbols = table_symbols(bundle.sids).to(device)
        with torch.no_grad():
            self.catalogue = self.recommender.catalogue(symbols, build_trie(symbols))
        self.rankers: dict[str, Ranker] = {"beam": self.recommender}
        if (exact := exact_ranker(self.recommender, self.catalogue)) is not None:
            self.rankers["exact"] = exact

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Rank items for every row.

        Parameters
        ----------
        context : PythonModelContext
            Not used: everything was loaded before.
        model_input : pandas.DataFrame
            Column ``history``: lists of raw item ids, oldest first. Ids that the catalogue lacks are ignored.
        params : dict, optional
            ``k``: length of the lists; ``exclude_seen``: leave out the items of the history; ``decode``: beam, or
            exact where the model can score every item.

        Returns
        -------
        pandas.DataFrame
            ``items`` (raw ids, best first), ``titles`` and ``scores`` (log-probabilities,
            see ``decoding.beam_search``), one list a row.

        Raises
        ------
        ValueError
            ``k`` is below 1, the model cannot decode so, or a row has no item of the catalogue.
        """
        wanted: dict[str, Any] = {"k": 10, "exclude_seen": True, "decode": "beam"} | (params or {})
        k = int(wanted["k"])
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        if wanted["decode"] not in self.rankers:
            raise ValueError(
                f"decode must be one of {sorted(self.rankers)} for this model, got {wanted['decode']!r}"
            )
        rows = held_out_rows(self._histories(model_input["history"]))
        ranking = rank_rows(
            self.rankers[wanted["decode"]],
            rows,
            self.catalogue,
            BATCH,
            max(k, BEAMS),
            exclude_seen=bool(wanted["exclude_seen"]),
        )
        best = ranking.items[:, :k].numpy()
        found = best >= 0
        names = self.items.select("raw_id", pl.col("title").fill_null("")).to_numpy()[best]
        scores = ranking.scores[:, :k].double().numpy()
        return pd.DataFrame(
            {
                "items": [row[keep, 0].tolist() for row, keep in zip(names, found, strict=True)],
                "titles": [row[keep, 1].tolist() for row, keep in zip(names, found, strict=True)],
                "scores": [row[keep].tolist() for row, keep in zip(scores, found, strict=True)],
            }
        )

    def _histories(self, histories: pd.Series) -> pl.DataFrame:
        """Translate raw ids to item ids, one row a history."""
        given = pl.DataFrame(
            {"row": range(len(histories)), "raw_id": [list(ids) for ids in histories]},
            schema={"row": pl.UInt32, "raw_id": pl.List(pl.String)},
        )
        known = (
            given.explode("raw_id")
            .join(self.items.select("raw_id", "item_id"), on="raw_id", maintain_order="left")
            .group_by("row", maintain_order=True)
            .agg(history="item_id")
        )
        empty = given.join(known, on="row", how="anti", maintain_order="left")
        if len(empty):
            row, ids = empty.row(0)
            raise ValueError(
                f"row {row}: none of its {len(ids)} history items is in the catalogue; "
                "a history needs at least one known item"
            )
        return known.with_columns(target=pl.lit(0, pl.UInt32))


mlflow.models.set_model(SidRecommender())
