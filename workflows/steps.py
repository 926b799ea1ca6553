"""The steps that workflows share, wired once. These functions build nodes; they are no tasks."""

from typing import NamedTuple

from flytekit.core.promise import Promise

from tasks.data import ingest, split
from tasks.evaluation import evaluate_baselines, evaluate_recommender
from tasks.recommender import fit_recommender
from tasks.tokenizer import analyze_collisions, assign_sids, fit_tokenizer
from workflows.embed_items import embed_items


class Data(NamedTuple):
    """What no method changes: the data, split, and a vector for every item."""

    log: Promise
    catalog: Promise
    split: Promise
    encoder: Promise
    embeddings: Promise


def read_data(config: Promise, run_id: Promise) -> Data:
    """Read and split the data and embed the items."""
    log, catalog = ingest(config=config.ingest, run_id=run_id)
    held = split(log=log, catalog=catalog, config=config.split, run_id=run_id)
    encoder, embeddings = embed_items(catalog=catalog, config=config.embedding, run_id=run_id)
    return Data(log, catalog, held, encoder, embeddings)


class Named(NamedTuple):
    """Items with semantic IDs, and all that they came from."""

    log: Promise
    catalog: Promise
    split: Promise
    encoder: Promise
    embeddings: Promise
    tokenizer: Promise
    sids: Promise
    collisions: Promise


def name_items(config: Promise, run_id: Promise) -> Named:
    """Read the data, embed the items, learn codebooks and give every item its SID."""
    log, catalog, held, encoder, embeddings = read_data(config, run_id)
    tokenizer = fit_tokenizer(embeddings=embeddings, split=held, config=config.tokenizer, run_id=run_id)
    sids = assign_sids(
        tokenizer=tokenizer,
        embeddings=embeddings,
        split=held,
        catalog=catalog,
        config=config.sids,
        run_id=run_id,
    )
    collisions = analyze_collisions(
        name="two-stage",
        tokenizer=tokenizer,
        sids=sids,
        catalog=catalog,
        embeddings=embeddings,
        log=log,
        config=config.collisions,
        run_id=run_id,
    )
    return Named(log, catalog, held, encoder, embeddings, tokenizer, sids, collisions)


class Evaluated(NamedTuple):
    """A trained recommender and the reports on it and on the baselines."""

    recommender: Promise
    baselines: Promise
    report: Promise


def train_and_evaluate(config: Promise, run_id: Promise, named: Named) -> Evaluated:
    """Train on the frozen SIDs once they have passed the gate, and evaluate beside the baselines."""
    baselines = evaluate_baselines(split=named.split, config=config.evaluate, run_id=run_id)
    recommender = fit_recommender(
        split=named.split,
        sids=named.sids,
        embeddings=named.embeddings,
        config=config.recommender,
        run_id=run_id,
    )
    named.collisions >> recommender
    report = evaluate_recommender(
        name="two-stage",
        recommender=recommender,
        sids=named.sids,
        split=named.split,
        baselines=baselines,
        catalog=named.catalog,
        config=config.evaluate,
        run_id=run_id,
    )
    return Evaluated(recommender, baselines, report)
