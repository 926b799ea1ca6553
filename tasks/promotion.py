"""Register a model and, if it is good enough, make it the champion."""

import json
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
from tasks.origin import execution_tags
from tasks.references import MLFLOW, locate
from tasks.runs import BUNDLE, DIGEST, UNTIL, all_pages, everywhere_one_store, version_in_use, without_secrets
from tasks.store import fetch
from tasks.tracking import StageRun, tracked

DECISION, REASON, EXECUTION = "sidflow.decision", "sidflow.reason", "sidflow.execution"
"""Tags of a registered version: pending, promoted, refused, abandoned or failed; why; and who registered it."""
FIGURES = "sidflow.figures"
"""Tag of a registered version: what it was compared by, as JSON."""
PENDING = "pending"
NOBODY = "none"
"""Base of a model that was trained when none was in use."""
FIRST_LOOK, LAST_LOOK = 0.2, 10.0
"""Seconds between two looks at the promotions that began earlier, at first and at most."""


@task(**runtime.GPU)
def promote(
    bundle: Annotated[Bundle, by_content],
    report: Annotated[EvaluationReport, by_content],
    split: Annotated[SequenceSplit, by_content],
    config: PromoteConfig,
    run_id: str = "",
    base: str = "",
    until: str = "",
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
        base: Version that the model was built on, or none; if another one is in use by now, the model is refused.
            Leave it out to compare with whatever is in use.
        until: Moment up to which the model knows events.
    """
    with tracked("promote", config, run_id, [bundle, report, split]) as run:
        require(
            report.split == split.fingerprint
            and split.catalog == bundle.catalog.fingerprint
            and report.details.get("recommender") == bundle.recommender.fingerprint,
            "promote: the report must be of this bundle's recommender and of this split, and the split of its "
            "catalogue; take all three of the same run",
        )
        version = _own(run, bundle, config)
        if version is not None and version.tags[DECISION] not in (PENDING, "failed"):
            return _result(run, config, bundle, report, version, _recorded(version))
        champion = version_in_use(run.client, config.model, config.alias)
        if version is None and champion is not None and champion.tags.get(BUNDLE) == bundle.fingerprint:
            return _result(run, config, bundle, report, champion, _kept(champion))
        version = version or _register(run, bundle, config, until)
        try:
            _wait_for_earlier(run, version, config)
            decision = _decide(run, bundle, split, report, version, config, base)
        except BaseException as error:
            _note(run.client, version, "failed", f"failed: {type(error).__name__}: {error}")
            raise
        return _result(run, config, bundle, report, version, decision)


def _decide(
    run: StageRun,
    bundle: Bundle,
    split: SequenceSplit,
    report: EvaluationReport,
    version: ModelVersion,
    config: PromoteConfig,
    base: str,
) -> Decision:
    """Compare with the champion of this moment and move the alias, unless somebody else moved it meanwhile."""
    client = run.client
    while True:
        champion = version_in_use(client, config.model, config.alias)
        if champion is not None and champion.version == version.version:
            # An attempt before this one moved the alias and did not get to say so.
            decision = _recorded(client.get_model_version(version.name, version.version))
            _note(client, version, "promoted", decision.reason)
            return decision._replace(promoted=True)
        if champion is not None and champion.tags.get(BUNDLE) == bundle.fingerprint:
            decision = _kept(champion)
            _note(client, version, "refused", decision.reason)
            return decision
        if base not in ("", str(champion.version) if champion else NOBODY):
            used = f"version {champion.version} is in use" if champion else "no model is in use"
            decision = Decision(
                False, f"refused: built on {base if base == NOBODY else f'version {base}'}, {used}", {}
            )
            _note(client, version, "refused", decision.reason)
            return decision
        both = report if champion is None else _with_champion(bundle, split, report, champion)
        decision = decide(both, config, f"version {champion.version}" if champion else "")
        client.set_model_version_tag(version.name, version.version, FIGURES, json.dumps(decision.figures))
        if not decision.promoted:
            _note(client, version, "refused", decision.reason)
            return decision
        # Nothing here is atomic, so look again at the last moment: at the alias, which people move by hand, and at
        # ourselves, whom a later promotion may have given up.
        if _same(version_in_use(client, config.model, config.alias), champion):
            require(
                _decision(client, version) == PENDING,
                f"promote: version {version.version} was given up by a later promotion after "
                f"promote.patience_minutes {config.patience_minutes:g}: promote it again, with more patience",
            )
            client.set_model_version_tag(version.name, version.version, REASON, decision.reason)
            client.set_registered_model_alias(config.model, config.alias, version.version)
            _note(client, version, "promoted", decision.reason)
            return decision
        run.say(f"@{config.alias} was moved meanwhile: comparing with the new one")


def _kept(champion: ModelVersion) -> Decision:
    return Decision(False, f"kept: version {champion.version}, the champion, is the same model", {})


def _recorded(version: ModelVersion) -> Decision:
    """Return what an attempt before this one decided."""
    promoted, figures = version.tags.get(DECISION) == "promoted", version.tags.get(FIGURES, "{}")
    return Decision(promoted, version.tags.get(REASON, "no reason was noted"), json.loads(figures))


def _same(one: ModelVersion | None, other: ModelVersion | None) -> bool:
    return (one and one.version) == (other and other.version)


def _decision(client: MlflowClient, version: ModelVersion) -> str:
    return str(client.get_model_version(version.name, version.version).tags.get(DECISION, ""))


def _own(run: StageRun, bundle: Bundle, config: PromoteConfig) -> ModelVersion | None:
    """Return the version that an earlier attempt of this very promotion left, one that failed back in the queue."""
    mine = {BUNDLE: bundle.fingerprint, EXECUTION: _execution(run)}
    for version in _versions(run.client, config):
        if mine.items() <= version.tags.items():
            if version.tags.get(DECISION) == "failed":
                run.client.set_model_version_tag(version.name, version.version, DECISION, PENDING)
            run.say(f"{config.model} version {version.version}, which an earlier attempt registered")
            return version
    return None


def _execution(run: StageRun) -> str:
    """Name what all attempts at this promotion have in common."""
    tags = execution_tags("")
    return run.pipeline or (run.run_id if tags["flyte.domain"] == "local" else tags["flyte.execution_id"])


def _versions(client: MlflowClient, config: PromoteConfig) -> list[ModelVersion]:
    return list(all_pages(client.search_model_versions, f"name = '{config.model}'", max_results=1000))


def _register(run: StageRun, bundle: Bundle, config: PromoteConfig, until: str) -> ModelVersion:
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
            tags={
                DECISION: PENDING,
                BUNDLE: bundle.fingerprint,
                EXECUTION: _execution(run),
                "sidflow.promotion_run": run.run_id,
            }
            | ({UNTIL: until} if until else {}),
        )
    run.client.log_inputs(run.run_id, models=[LoggedModelInput(model_id)])
    run.say(f"{config.model} version {version.version}")
    return version


def _wait_for_earlier(run: StageRun, mine: ModelVersion, config: PromoteConfig) -> None:
    """Return once every promotion with a lower number has decided; one that never will is taken for dead.

    Each has its patience from the moment that we saw it at the head of the queue.
    """
    head, since, pause = "", 0.0, FIRST_LOOK
    while True:
        pending = [v for v in _versions(run.client, config) if v.tags.get(DECISION) == PENDING]
        earlier = sorted(
            (v for v in pending if int(v.version) < int(mine.version)), key=lambda v: int(v.version)
        )
        if not earlier:
            return
        first = earlier[0]
        if str(first.version) != head:
            head, since, pause = str(first.version), time.monotonic(), FIRST_LOOK
            run.say(f"waiting for the promotion of version {head}")
        elif time.monotonic() - since > 60 * config.patience_minutes:
            reason = f"abandoned: no decision in {config.patience_minutes:g} minutes"
            _note(run.client, first, "abandoned", reason)
            continue
        time.sleep(pause)
        pause = min(2 * pause, LAST_LOOK)


def _with_champion(
    bundle: Bundle, split: SequenceSplit, report: EvaluationReport, version: ModelVersion
) -> EvaluationReport:
    """Let the champion rank the same test users, as it would answer them, and set it beside the new model."""
    champion = Bundle.load(fetch(locate(f"{MLFLOW}{version.name}/{version.version}", Bundle.kind())))
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
    reason = without_secrets(reason)[:5000]
    client.update_model_version(version.name, version.version, description=reason)
    for key, value in ((REASON, reason), (DECISION, decision)):
        client.set_model_version_tag(version.name, version.version, key, value)


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
