"""Bundle what serving needs and log it as an MLflow model."""

import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import mlflow
from flytekit import task
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array

import components
from components.artifacts import (
    Bundle,
    ContentEncoder,
    ItemCatalog,
    RecommenderCheckpoint,
    SequenceSplit,
    SidTable,
    TokenizerCheckpoint,
)
from components.folders import ArtifactError, Provenance
from components.recommenders.serving import training_popularity
from tasks import runtime
from tasks.flyte_types import by_content
from tasks.runs import BUNDLE, DIGEST, everywhere, kinds, open_store
from tasks.store import keep, stored_at
from tasks.tracking import StageRun, allowed, fluent, tracked

REQUIREMENTS = (
    "torch",
    "polars",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
)
"""What the model imports when it serves; pinned to the versions that trained it."""

# The model itself checks that a history is a list of strings or nothing: of ["a", null] MLflow's Array(string) makes
# ["a", "n"], and the number 2 it turns into a string.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "history", required=False)]),
    outputs=Schema(
        [
            ColSpec(Array(DataType.string), "items"),
            ColSpec(Array(DataType.string), "titles"),
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(DataType.string, "warning"),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("k", DataType.long, 10),
            ParamSpec("exclude_seen", DataType.boolean, True),
            ParamSpec("decode", DataType.string, "beam"),
        ]
    ),
)


def requirements() -> list[str]:
    """Pin what the model imports to public versions: a build of one's own, as 2.13.0+cpu, is in no package index."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def log_bundle(run: StageRun, bundle: Bundle) -> str:
    """Log a bundle as a pyfunc model of a run, without pickling anything, and return its ``models:/`` URI."""
    with fluent(run), warnings.catch_warnings():
        # Examples are checked with pandas calls that pandas 3 warns about; the signature stands without one.
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        model = mlflow.pyfunc.log_model(
            name="recommender",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"bundle": str(keep(bundle))},
            code_paths=[str(Path(components.__file__).parent)],
            signature=SIGNATURE,
            pip_requirements=requirements(),
            metadata={BUNDLE: bundle.fingerprint},
            tags={BUNDLE: bundle.fingerprint} | kinds("part", bundle.parts.values()),
        )
    return str(model.model_uri)


def measure_model(run_id: str, bundle: Bundle, figures: Mapping[str, float]) -> None:
    """Tie a logged model to a run, and figures to both and to the data set that they are about, for MLflow's own pages.

    Parameters
    ----------
    run_id : str
        Run that the figures come from; empty does nothing.
    bundle : Bundle
        What was logged, now or in the execution that Flyte's cache answered from.
    figures : mapping of str to float
        Metrics by name, on the split that the bundle came from.

    Raises
    ------
    ArtifactError
        The bundle does not say which split that is.
    """
    if not run_id:
        return
    client = open_store()
    run, model = StageRun(client, run_id, "pipeline"), find_logged(client, bundle)
    if model is None:
        run.mark(
            "model_not_logged",
            f"MLflow has no logged model of Bundle {bundle.fingerprint[:12]}: no figures there",
        )
        return
    split = bundle.provenance.parents.get("SequenceSplit")
    if split is None:
        raise ArtifactError(
            f"Bundle {bundle.fingerprint[:12]} names no SequenceSplit among its parents, so nobody can say what its "
            "figures were measured on: bundle it again (log_model)"
        )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    run.dataset("SequenceSplit", split, str(stored_at("SequenceSplit", split)), "evaluation")
    about = {"model_id": model.model_id, "dataset_name": "SequenceSplit", "dataset_digest": split[:DIGEST]}
    now = int(time.time() * 1000)
    client.log_batch(
        run_id, metrics=[Metric(allowed(name), value, now, 0, **about) for name, value in figures.items()]
    )


def find_logged(client: MlflowClient, bundle: Bundle) -> LoggedModel | None:
    """Return the logged model that holds a bundle, wherever it was logged."""
    query = f"tags.`{BUNDLE}` = '{bundle.fingerprint}'"
    found = client.search_logged_models(everywhere(client), query, max_results=1)
    return found[0] if found else None


@task(**runtime.CPU, cache=runtime.cached("3"))
def log_model(
    name: str,
    catalog: Annotated[ItemCatalog, by_content],
    split: Annotated[SequenceSplit, by_content],
    encoder: Annotated[ContentEncoder, by_content],
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    recommender: Annotated[RecommenderCheckpoint, by_content],
    run_id: str = "",
) -> Annotated[Bundle, by_content]:
    """Bundle encoder, tokenizer, table and recommender, and log them as a model that MLflow can serve.

    Args:
        name: What to call the method.
        catalog: Folder of the ItemCatalog.
        split: Folder of the SequenceSplit, whose training events say what is popular.
        encoder: Folder of the ContentEncoder.
        tokenizer: Folder of the TokenizerCheckpoint.
        sids: Folder of the SidTable of that tokenizer.
        recommender: Folder of the RecommenderCheckpoint of that table.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    parts = [catalog, split, encoder, tokenizer, sids, recommender]
    with tracked(f"log_model {name}", None, run_id, parts) as run:
        provenance = Provenance(parents={part.kind(): part.fingerprint for part in parts})
        bundle = Bundle(
            catalog=catalog,
            encoder=encoder,
            tokenizer=tokenizer,
            sids=sids,
            recommender=recommender,
            popularity=training_popularity(split, catalog),
            provenance=provenance,
        )
        uri = log_bundle(run, bundle)
        run.output(bundle)
        run.say(f"mlflow.pyfunc.load_model({uri!r})")
        return bundle
