"""Register a model and, if it is good enough, make it the champion."""

import time
from contextlib import suppress
from typing import Annotated

import polars as pl
import torch
from flytekit import task
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.artifacts import Bundle, EvaluationReport, ItemCatalog, Promotion, SequenceSplit
from components.config import require
from components.folders import Provenance
from components.metrics import report as reporting
from components.metrics.promotion import CHAMPION, Decision, PromoteConfig, decide
from components.metrics.report import EvaluateConfig, RankFn
from components.recommenders.serving import BundleRanker
from components.seams import Ranking
from components.training.loop import device_of
from tasks import runtime
from tasks.flyte_types import by_content
from tasks.model import find_logged, log_bundle
from tasks.references import locate
from tasks.runs import BUNDLE, DIGEST
from tasks.store import fetch
from tasks.tracking import StageRun, everywhere_one_store, tracked

DECISION, REASON = "sidflow.decision", "sidflow.reason"
"""Tags of a registered version: pending, promoted, refused, abandoned or failed; and why."""
PENDING = "pending"
_GLANCE = 0.5
"""Seconds between two looks at the promotions that began earlier."""


@task(**runtime.GPU)
def promote(
    bundle: Annotated[Bundle, by_content],
    report: Annotated[EvaluationReport, by_content],
    split: Annotated[SequenceSplit, by_content],
    config: PromoteConfig,
    run_id: str = "",
) -> Annotated[Promotion, by_content]:
    """Register a model, compare it with the champion on the same test users, and move the alias if it passes.

    Promotions of one model are decided one after the other, in the order of their version numbers: each meets the
    champion that the one before it left.

    Args:
        bundle: Folder of the Bundle.
        report: Folder of the EvaluationReport of its recommender.
        split: Folder of the SequenceSplit that the report is about.
        config: Registered model, metric and margin, a YAML file or JSON. Keys: make keys SECTION=promote.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("promote", config, run_id, [bundle, report, split]) as run:
        require(
            report.split == split.fingerprint and split.catalog == bundle.catalog.fingerprint,
            "promote: bundle, report and split must be of one catalogue and one split; take them of the same run",
        )
        champion = _champion(run.client, config)
        if champion is not None and champion.tags.get(BUNDLE) == bundle.fingerprint:
            kept = Decision(False, f"kept: version {champion.version} is the champion already", {})
            return _result(run, config, bundle, report, champion, kept)
        version = _register(run, bundle, config)
        try:
            _wait_for_earlier(run, version, config)
            champion = _champion(run.client, config)
            if champion is not None:
                report = _with_champion(bundle, split, report, config)
            decision = decide(report, config, f"version {champion.version}" if champion else "")
            if decision.promoted:
                run.client.set_registered_model_alias(config.model, config.alias, version.version)
        except BaseException as error:
            _note(run.client, version, "failed", f"failed: {error}")
            raise
        _note(run.client, version, "promoted" if decision.promoted else "refused", decision.reason)
        return _result(run, config, bundle, report, version, decision)


def _champion(client: MlflowClient, config: PromoteConfig) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(config.model, config.alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            return None
        raise


def _register(run: StageRun, bundle: Bundle, config: PromoteConfig) -> ModelVersion:
    """Add a version that is pending: its number is its place in the queue."""
    logged = find_logged(run.client, bundle)
    if logged is not None:
        model_id, maker = logged.model_id, logged.source_run_id
    else:
        model_id, maker = log_bundle(run, bundle).removeprefix("models:/"), run.run_id
    with suppress(MlflowException):  # it is there already
        run.client.create_registered_model(config.model)
    with everywhere_one_store():
        version = run.client.create_model_version(
            config.model,
            f"models:/{model_id}",
            run_id=maker,
            model_id=model_id,
            tags={DECISION: PENDING, BUNDLE: bundle.fingerprint, "sidflow.promotion_run": run.run_id},
        )
    run.client.log_inputs(run.run_id, models=[LoggedModelInput(model_id)])
    run.say(f"{config.model} version {version.version}")
    return version


def _wait_for_earlier(run: StageRun, mine: ModelVersion, config: PromoteConfig) -> None:
    """Return once every promotion with a lower number has decided; one that never will is taken for dead."""
    told = False
    while True:
        found = run.client.search_model_versions(f"name = '{config.model}'", max_results=1000)
        oldest = time.time() * 1000 - config.patience_minutes * 60_000
        earlier = [
            version
            for version in found
            if int(version.version) < int(mine.version) and version.tags.get(DECISION) == PENDING
        ]
        for version in earlier:
            if version.creation_timestamp < oldest:
                _note(
                    run.client,
                    version,
                    "abandoned",
                    f"abandoned: no decision in {config.patience_minutes:g} minutes",
                )
        waiting = [int(version.version) for version in earlier if version.creation_timestamp >= oldest]
        if not waiting:
            return
        if not told:
            run.say(f"waiting for the promotion of version {', '.join(map(str, sorted(waiting)))}")
            told = True
        time.sleep(_GLANCE)


def _with_champion(
    bundle: Bundle, split: SequenceSplit, report: EvaluationReport, config: PromoteConfig
) -> EvaluationReport:
    """Let the champion rank the same test users, as it would answer them, and set it beside the new model."""
    name = f"mlflow:{config.model}@{config.alias}"
    champion = Bundle.load(fetch(locate(name, "Bundle")))
    settings = EvaluateConfig.model_validate(report.details["config"])
    ranks = answers_of(BundleRanker(champion, device_of("auto")), bundle.catalog, settings.beams)
    return reporting.evaluate_recommender(CHAMPION, ranks, split, settings, report)


def answers_of(ranker: BundleRanker, catalog: ItemCatalog, beams: int) -> RankFn:
    """Rank held-out rows of one catalogue with a model of another: items are the same where their raw ids are.

    What the model does not know it leaves out of a history, and cannot list.
    """
    items = catalog.items.select("raw_id", "item_id")

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        numbered = frame.with_row_index("row")
        names = (
            numbered.select("row", item_id="history")
            .explode("item_id")
            .join(items, on="item_id", maintain_order="left")
        )
        histories = names.group_by("row", maintain_order=True).agg("raw_id")["raw_id"]
        k = min(beams, ranker.num_items)
        answer = ranker.recommend(histories, k, exclude_seen=exclude_seen).with_row_index("row")
        listed = (
            answer.select("row", raw_id="items", score="scores")
            .explode("raw_id", "score")
            .join(items, on="raw_id", how="left", maintain_order="left")
            .with_columns(place=pl.int_range(pl.len()).over("row"))
            .drop_nulls("raw_id")
        )
        at = torch.from_numpy(listed.select("row", "place").cast(pl.Int64).to_numpy(writable=True))
        found, scores = torch.full((len(frame), beams), -1), torch.full((len(frame), beams), -torch.inf)
        found[at[:, 0], at[:, 1]] = torch.from_numpy(
            listed["item_id"].fill_null(-1).cast(pl.Int64).to_numpy(writable=True)
        )
        scores[at[:, 0], at[:, 1]] = torch.from_numpy(
            listed["score"].cast(pl.Float32).to_numpy(writable=True)
        )
        return Ranking(found, scores)

    return rank


def _model_id(version: ModelVersion) -> str:
    """Return the logged model behind a version; the registry keeps it in the address alone."""
    return str(version.source).removeprefix("models:/")


def _note(client: MlflowClient, version: ModelVersion, decision: str, reason: str) -> None:
    for key, value in ((DECISION, decision), (REASON, reason)):
        client.set_model_version_tag(version.name, version.version, key, value[:5000])
    client.update_model_version(version.name, version.version, description=reason[:5000])


def _result(
    run: StageRun,
    config: PromoteConfig,
    bundle: Bundle,
    report: EvaluationReport,
    version: ModelVersion,
    decision: Decision,
) -> Promotion:
    """Say what was decided, in the run, on the logged model and as an artefact."""
    result = Promotion(
        model=config.model,
        alias=config.alias,
        version=int(version.version),
        promoted=decision.promoted,
        reason=decision.reason,
        figures=decision.figures,
        bundle=bundle.fingerprint,
        split=report.split,
        provenance=Provenance(config=config.model_dump(mode="json"), parents={"Bundle": bundle.fingerprint}),
    )
    now = int(time.time() * 1000)
    about = {
        "dataset_name": "SequenceSplit",
        "dataset_digest": report.split[:DIGEST],
        "model_id": _model_id(version),
    }
    run.client.log_batch(
        run.run_id, metrics=[Metric(name, value, now, 0, **about) for name, value in result.figures.items()]
    )
    run.mark("promotion", decision.reason)
    run.output(result)
    return result
