"""The served model: a table of histories in, ranked items with names, scores and warnings out.

MLflow copies this file into the model and runs it when the model is loaded, so it may import components,
which travel with the model, but no other module of tasks.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc import PythonModel, PythonModelContext

from components.artifacts import Bundle
from components.recommenders.serving import BundleRanker, RequestError, read_histories
from components.training.loop import device_of


class BadRequest(MlflowException):  # type: ignore[misc]
    """A request that cannot be answered; MLflow's server makes it an HTTP 400."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=BAD_REQUEST)

    def serialize_as_json(self) -> str:
        """Return the body of the answer: the sentence alone, where the server would print all data before it."""
        return json.dumps({"error_code": self.error_code, "message": str(self)})


class SidRecommender(PythonModel):  # type: ignore[misc]
    """Rank the items of a Bundle for histories of raw item ids."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle that the model carries; runs once."""
        self.ranker = BundleRanker(Bundle.load(Path(context.artifacts["bundle"])), device_of("auto"))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Rank items for every row.

        Parameters
        ----------
        context : PythonModelContext
            Not used: everything was loaded before.
        model_input : pandas.DataFrame
            Column ``history``: lists of raw item ids, oldest first.
        params : dict, optional
            ``k``, ``exclude_seen`` and ``decode`` of ``BundleRanker.recommend``.

        Returns
        -------
        pandas.DataFrame
            ``items``, ``titles``, ``scores`` and ``warning`` as ``BundleRanker.recommend`` returns them.

        Raises
        ------
        BadRequest
            There is no column ``history``, or the ranker refuses what is asked.
        """
        if "history" not in model_input:  # MLflow leaves out other columns, and with them the rows
            raise BadRequest(
                "the request has no rows, or they have no column history: one list of item ids a row"
            )
        try:
            histories = read_histories(model_input["history"].to_list())
            answer = self.ranker.recommend(histories, **(params or {}))
        except RequestError as error:
            raise BadRequest(str(error)) from error
        return pd.DataFrame(answer.to_dict(as_series=False))


mlflow.models.set_model(SidRecommender())
