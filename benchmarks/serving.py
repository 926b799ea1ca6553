"""Latency and throughput of a served model over HTTP, by the number of clients that ask at once.

``mlflow models serve`` runs the model that ``log_model`` logs. Clients are threads of a process of their own, each
with one connection that is kept open; each asks again as soon as it is answered (a closed loop). The servers that are
compared run side by side and are asked in turn, so what else the machine does falls on all of them. Beside them stands
the ranker itself, without a server.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --rounds 5
"""

import argparse
import http.client
import importlib.util
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
import torch
from machine import processor

from components.artifacts import Bundle, ItemCatalog, RecommenderCheckpoint, SequenceSplit
from components.config import load_preset
from components.data.ingest import ingest
from components.data.splits import hold_out
from components.embeddings import encode_items, fit_encoder
from components.recommenders.build import build_recommender
from components.recommenders.serving import BEAMS, BundleRanker, read_histories, training_popularity
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.sids import assign, space_of
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage
from tasks.model import log_bundle
from tasks.tracking import tracked
from workflows.config import PipelineConfig

ROUNDS, REQUESTS, WARM_UP, K = 5, 96, 16, 10
CLIENTS, WORKERS, MANY = (1, 8, 32), (1, 2), 32
STARTS_WITHIN = 180.0
UVLOOP = importlib.util.find_spec("uvloop") is not None
RESULT = Path(__file__).parent / "results" / "serving.md"

History = list[str]


class Arm(NamedTuple):
    """Who asks whom for how much."""

    workers: int
    """Processes of the server; 0: no server, the ranker in this process."""
    clients: int
    histories: int
    """Histories of a request."""
    loop: str = "auto"
    """Event loop of the server, as uvicorn names them; auto is uvloop where that is installed."""


class Load(NamedTuple):
    """What clients met."""

    seconds: list[float]
    """From each request to its whole answer."""
    elapsed: float
    """From the first request of any client to the last answer."""


@dataclass
class Met:
    """Loads of an arm, over the rounds."""

    loads: list[Load] = field(default_factory=list)

    def milliseconds(self, quantile: float) -> float:
        """Return a quantile over the requests of all rounds."""
        return 1e3 * float(np.quantile([s for load in self.loads for s in load.seconds], quantile))

    def rate(self) -> float:
        """Return requests a second, median over the rounds."""
        return statistics.median(len(load.seconds) / load.elapsed for load in self.loads)


def make_bundle(config: PipelineConfig) -> tuple[Bundle, SequenceSplit]:
    """Bundle the sample's items, SIDs of their texts, and a recommender of random weights.

    What decoding costs follows from shapes: trained weights cost the same.
    """
    log, catalog = ingest(config.ingest)
    split = hold_out(log, catalog, config.split)
    embeddings = encode_items(catalog, config.embedding.encoder)
    tokenizer = train_tokenizer(
        embeddings,
        TokenizerStage(model=RkMeansConfig(codebook_sizes=config.tokenizer.model.codebook_sizes)),
    )
    sids = assign(tokenizer, embeddings, config.sids)
    torch.manual_seed(0)
    model = config.recommender.model
    recommender = RecommenderCheckpoint(
        weights=build_recommender(model, space_of(sids)).state_dict(),
        config=model.model_dump(mode="json"),
        sids=sids.fingerprint,
        step=0,
        epoch=0,
        metrics={},
    )
    bundle = Bundle(
        catalog=catalog,
        encoder=fit_encoder(catalog, config.embedding.encoder),
        tokenizer=tokenizer,
        sids=sids,
        recommender=recommender,
        popularity=training_popularity(split, catalog),
    )
    return bundle, split


def raw_histories(split: SequenceSplit, catalog: ItemCatalog) -> list[History]:
    """Return the histories of all test users as clients know them."""
    names = catalog.items["raw_id"]
    return [names.gather(history).to_list() for history in split.test["history"]]


@contextmanager
def served(uri: str, workers: int, loop: str, log: Path) -> Iterator[int]:
    """Serve a model on a free port of this machine until the block ends; yields the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    scripts = Path(sys.executable).parent
    command = [str(scripts / "mlflow"), "models", "serve", "-m", uri, "--env-manager", "local"]
    with log.open("w") as lines:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)],
            env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "UVICORN_LOOP": loop},
            stdout=lines,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + STARTS_WITHIN
        while not _alive(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not come up:\n{log.read_text()}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


def _alive(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def requests(histories: Sequence[History], arm: Arm, count: int, first: int = 0) -> list[list[History]]:
    """Return the histories of so many requests, one user after the other from the ``first``, then from the start."""
    users = [histories[number % len(histories)] for number in range(first, first + count * arm.histories)]
    return [users[begin : begin + arm.histories] for begin in range(0, len(users), arm.histories)]


def ask(port: int, asked: Sequence[Sequence[History]], clients: int) -> Load:
    """Send every request once, ``clients`` of them at a time, after ``WARM_UP`` that are not timed.

    Raises
    ------
    RuntimeError
        A request was not answered in full.
    """
    bodies = [
        json.dumps({"dataframe_records": [{"history": each} for each in some], "params": {"k": K}})
        for some in asked
    ]
    local = threading.local()

    def send(number: int) -> tuple[float, float]:
        if not hasattr(local, "connection"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            local.connection = connections.enter_context(closing(connection))
        began = time.perf_counter()
        local.connection.request("POST", "/invocations", bodies[number], {"Content-Type": "application/json"})
        response = local.connection.getresponse()
        body = response.read()
        ended = time.perf_counter()
        if response.status != http.HTTPStatus.OK or body.count(b'"warning"') != len(asked[number]):
            raise RuntimeError(f"request {number}: {response.status} {body[:500]!r}")
        return began, ended

    with ExitStack() as connections, ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, (number % len(bodies) for number in range(max(WARM_UP, clients)))))
        times = list(pool.map(send, range(len(bodies))))
    began, ended = zip(*times, strict=True)
    return Load([end - begin for begin, end in times], max(ended) - min(began))


def recommend(ranker: BundleRanker, asked: Sequence[Sequence[History]]) -> Load:
    """Answer every request here, one after the other."""
    seconds = []
    for histories in [*asked[:WARM_UP], *asked]:
        began = time.perf_counter()
        ranker.recommend(read_histories(histories), K)
        seconds.append(time.perf_counter() - began)
    return Load(seconds[-len(asked) :], sum(seconds[-len(asked) :]))


def arms(workers: Sequence[int], clients: Sequence[int]) -> list[Arm]:
    """Return what is compared: servers, numbers of clients and event loops, and many histories at once, with and
    without a server."""
    many = [Arm(workers[0], 1, MANY), Arm(0, 1, 1), Arm(0, 1, MANY)]
    other = [Arm(workers[-1], clients[0], 1, "asyncio")] if UVLOOP else []
    return [Arm(w, c, 1) for w in workers for c in clients] + other + many


def measure(
    which: Sequence[Arm],
    elsewhere: Executor,
    ports: dict[tuple[int, str], int],
    ranker: BundleRanker,
    histories: Sequence[History],
    rounds: int,
    count: int,
) -> dict[Arm, Met]:
    """Take every arm through so many rounds, in turn; who comes first changes from round to round.

    Every arm is timed over ``count`` requests a round. Clients run ``elsewhere``, which is to be another process.
    """
    met = {arm: Met() for arm in which}
    for number in range(rounds):
        for place in range(len(which)):
            arm = which[(number + place) % len(which)]
            asked = requests(histories, arm, count, number * count * arm.histories)
            if arm.workers:
                load = elsewhere.submit(ask, ports[arm.workers, arm.loop], asked, arm.clients).result()
            else:
                load = recommend(ranker, asked)
            met[arm].loads.append(load)
    return met


def table(met: dict[Arm, Met]) -> list[str]:
    """Return the lines of the result's table; ratios are to one client who sends one history to one process."""
    first = met[Arm(min(arm.workers for arm in met if arm.workers), 1, 1)]
    lines = [
        "| answered by | clients | histories a request | ms p50 | ms p95 | requests/s | histories/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, loads in met.items():
        who = f"server, {arm.workers} worker{'s' * (arm.workers > 1)}" if arm.workers else "ranker, no server"
        who += f", {arm.loop}" * (arm.loop != "auto")
        rate = loads.rate() * arm.histories
        lines.append(
            f"| {who} | {arm.clients} | {arm.histories} | {loads.milliseconds(0.5):.1f} | "
            f"{loads.milliseconds(0.95):.1f} | {loads.rate():.1f} | {rate:.0f} | {rate / first.rate():.2f} |"
        )
    return lines


def commit() -> str:
    """Name the commit that is measured, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty=, with changes that are not committed"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Measure all arms, print the result and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds (default {ROUNDS})")
    parser.add_argument("--smoke", action="store_true", help="one round of few requests, and no result file")
    arguments = parser.parse_args()
    rounds, count = (1, 4) if arguments.smoke else (arguments.rounds, REQUESTS)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]

    config = load_preset(PipelineConfig, "quickstart", ["recommender.device=cpu"])
    bundle, split = make_bundle(config)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        os.environ |= {"SIDFLOW_HOME": folder, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        mlflow.create_experiment("stages", f"file://{folder}/mlartifacts")
        with tracked("log_model") as run:
            uri = log_bundle(run, bundle)
        began = time.monotonic()
        compared = arms(WORKERS, CLIENTS)
        servers = dict.fromkeys((arm.workers, arm.loop) for arm in compared if arm.workers)
        ports = {
            (workers, loop): running.enter_context(
                served(uri, workers, loop, Path(folder) / f"{workers}-{loop}.log")
            )
            for workers, loop in servers
        }
        started = (time.monotonic() - began) / len(servers)
        elsewhere = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        met = measure(
            compared,
            running.enter_context(elsewhere),
            ports,
            BundleRanker(bundle, torch.device("cpu")),
            raw_histories(split, bundle.catalog),
            rounds,
            count,
        )

    model = config.recommender.model
    stamp = commit()
    lines = [
        "# A served model: latency and throughput by clients at once",
        "",
        "`mlflow models serve --env-manager local`, asked over HTTP on the same machine by threads of another process. "
        f"Every client keeps one connection open and asks again as soon as it is answered. Lists of {K}, seen items "
        "excluded. The ratio is that of histories a second to one client who sends one history to one worker.",
        "",
        *table(met),
        "",
        f"{rounds} rounds of {count} requests an arm, each after a warm-up; arms take turns, their order rotated, "
        "servers side by side. p50 and p95 over the requests of all rounds, rates the median over rounds. A server "
        f"answers {started:.0f} s after it is started.",
        "",
        f"Data: the {config.ingest.source.name} sample, {bundle.catalog.num_items:,} items, histories of "
        f"{len(split.test):,} test customers, {float(split.test['history'].list.len().mean()):.0f} items on average, "
        f"of which the latest {model.max_history} are read. Model: {model.kind}, d {model.dim}, layers {model.layers}, "
        f"{model.heads} heads x {model.head_dim}, random weights (costs are of shapes alone), residual k-means SIDs of "
        f"{len(config.tokenizer.model.codebook_sizes)} codes, {BEAMS} beams. One thread a process for "
        f"torch; uvicorn runs on {'uvloop' if UVLOOP else 'asyncio'} unless another loop is named.",
        "",
        f"Machine: {processor()}, {os.cpu_count()} cores, which clients and servers share, load {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after. Python {platform.python_version()}, torch {torch.__version__}, MLflow "
        f"{mlflow.__version__}. Date: {date.today().isoformat()}. Commit: {stamp}. Command: "
        f"`OMP_NUM_THREADS=1 python benchmarks/serving.py --rounds {rounds}`.",
    ]
    print("\n".join(lines))
    if not arguments.smoke:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
