"""The steps that workflows share, wired once. These functions build nodes; they are no tasks."""

from typing import NamedTuple

from flytekit.core.promise import Promise

from tasks.data import ingest, split
from tasks.evaluation import evaluate_baselines, evaluate_recommender
from tasks.model import log_model
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
    return prepare(config, run_id, log, catalog)


def prepare(config: Promise, run_id: Promise, log: Promise, catalog: Promise) -> Data:
    """Split data that was read and embed the items, with an encoder that is fitted to them."""
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
    data = read_data(config, run_id)
    tokenizer, sids = learn_names(config, run_id, data)
    return check_names("two-stage", config, run_id, data, tokenizer, sids)


def learn_names(config: Promise, run_id: Promise, data: Data) -> tuple[Promise, Promise]:
    """Learn codebooks and give every item its SID: tokenizer and table."""
    tokenizer = fit_tokenizer(
        embeddings=data.embeddings, split=data.split, config=config.tokenizer, run_id=run_id
    )
    sids = assign_sids(
        tokenizer=tokenizer,
        embeddings=data.embeddings,
        split=data.split,
        catalog=data.catalog,
        config=config.sids,
        run_id=run_id,
    )
    return tokenizer, sids


def check_names(
    name: str, config: Promise, run_id: Promise, data: Data | Named, tokenizer: Promise, sids: Promise
) -> Named:
    """Describe collisions and let the run end where the SIDs have collapsed."""
    collisions = analyze_collisions(
        name=name,
        tokenizer=tokenizer,
        sids=sids,
        catalog=data.catalog,
        embeddings=data.embeddings,
        log=data.log,
        config=config.collisions,
        run_id=run_id,
    )
    return Named(
        data.log, data.catalog, data.split, data.encoder, data.embeddings, tokenizer, sids, collisions
    )


class Evaluated(NamedTuple):
    """A trained recommender and the reports on it and on the baselines."""

    recommender: Promise
    baselines: Promise
    report: Promise


def train_and_evaluate(config: Promise, run_id: Promise, named: Named) -> Evaluated:
    """Train on the frozen SIDs once they have passed the gate, and evaluate beside the baselines."""
    recommender = fit_recommender(
        split=named.split,
        sids=named.sids,
        embeddings=named.embeddings,
        config=config.recommender,
        run_id=run_id,
    )
    named.collisions >> recommender
    return evaluate("two-stage", config, run_id, named, recommender)


def evaluate(name: str, config: Promise, run_id: Promise, named: Named, recommender: Promise) -> Evaluated:
    """Evaluate a recommender beside the baselines."""
    baselines = evaluate_baselines(split=named.split, config=config.evaluate, run_id=run_id)
    report = evaluate_recommender(
        name=name,
        recommender=recommender,
        sids=named.sids,
        split=named.split,
        baselines=baselines,
        catalog=named.catalog,
        config=config.evaluate,
        run_id=run_id,
    )
    return Evaluated(recommender, baselines, report)


def bundle(name: str, run_id: Promise, named: Named, recommender: Promise) -> Promise:
    """Log a recommender with all that serving it needs."""
    return log_model(
        name=name,
        catalog=named.catalog,
        split=named.split,
        encoder=named.encoder,
        tokenizer=named.tokenizer,
        sids=named.sids,
        recommender=recommender,
        run_id=run_id,
    )
