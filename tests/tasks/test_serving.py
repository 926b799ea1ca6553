"""The logged model behind MLflow's own server: real process, real HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch

from components.artifacts import Bundle
from components.data.splits import SplitConfig
from components.embeddings import LsaConfig, fit_encoder
from components.folders import ArtifactError, Provenance
from components.recommenders.causal import CausalConfig
from components.recommenders.serving import BundleRanker
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender
from tasks.model import REQUIREMENTS, log_model, measure_model, requirements
from tasks.tracking import open_store, start_pipeline

SIZES: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "hidden": 32}
STARTS_WITHIN = 120.0


class Answer(NamedTuple):
    status: int
    body: Any


Post = Callable[..., Answer]


@pytest.fixture(scope="module")
def bundle(tiny, module_home) -> Bundle:
    """The planted items and a recommender, logged as a model."""
    stage = RecommenderStage(model=CausalConfig(**SIZES), loop=LoopConfig(epochs=1), device="cpu")
    return log_model(
        name="tiny",
        catalog=tiny.catalog,
        split=tiny.split,
        encoder=fit_encoder(tiny.catalog, LsaConfig(dim=16)),
        tokenizer=tiny.tokenizer,
        sids=tiny.sids,
        recommender=train_recommender(tiny.split, tiny.sids, tiny.embeddings, stage, lambda *_: None),
    )


@pytest.fixture(scope="module")
def uri(bundle) -> str:
    client = open_store()
    experiment = client.get_experiment_by_name("stages").experiment_id
    (model,) = client.search_logged_models([experiment])
    return str(model.model_uri)


@pytest.fixture(scope="module")
def server(uri: str, module_home: Path) -> Iterator[str]:
    """What the README starts, on a free port, far from the checkout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(sys.executable).parent
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{module_home / 'mlflow.db'}",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    command = [folder / "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    log = module_home / "server.log"
    with log.open("w") as lines:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=module_home,
            env=environment,
            stdout=lines,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + STARTS_WITHIN
        while not answers(f"{address}/ping"):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()  # the server has asked the kernel to be told of its parent's end
        process.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == HTTPStatus.OK
    except OSError:
        return False


@pytest.fixture(scope="module")
def post(server: str) -> Post:
    def send(body: Any, content_type: str = "application/json") -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{server}/invocations", data, {"Content-Type": content_type}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return Answer(response.status, json.load(response))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode())

    return send


def records(*histories: Any, **params: Any) -> dict[str, Any]:
    return {"dataframe_records": [{"history": history} for history in histories]} | (
        {"params": params} if params else {}
    )


@pytest.fixture(scope="module")
def ids(tiny) -> list[str]:
    return tiny.catalog.items["raw_id"].to_list()


def test_a_request_brings_ids_names_scores_and_warnings(tiny, post: Post, ids: list[str]) -> None:
    status, body = post(records(ids[:2], [ids[9], "x"], [], None, k=3))
    assert status == HTTPStatus.OK and list(body) == ["predictions"]
    names = dict(zip(ids, tiny.catalog.items["title"], strict=True))
    for row in body["predictions"]:
        assert list(row) == ["items", "titles", "scores", "warning"]
        assert len(row["items"]) == len(set(row["items"])) == 3
        assert row["titles"] == [names[item] for item in row["items"]]
        assert row["scores"] == sorted(row["scores"], reverse=True) and max(row["scores"]) < 0
    popular = "the history is empty, so these are the most popular items"
    assert [row["warning"] for row in body["predictions"]] == [
        "",
        "ignored 1 unknown item: 'x'",
        popular,
        popular,
    ]


def test_the_forms_in_which_mlflow_takes_tables_mean_the_same(post: Post, ids: list[str]) -> None:
    asked = {"k": 2, "exclude_seen": False}
    wanted = post(records(ids[:3], ids[5:8], **asked))
    assert wanted.status == HTTPStatus.OK
    table = {"columns": ["history"], "data": [[ids[:3]], [ids[5:8]]]}
    for form in (
        {"dataframe_split": table},
        {"inputs": {"history": [ids[:3], ids[5:8]]}},
        {"inputs": [{"history": ids[:3]}, {"history": ids[5:8]}]},
    ):
        assert post(form | {"params": asked}) == wanted


def test_instances_mean_the_same_where_mlflow_can_read_them(post: Post, ids: list[str]) -> None:
    """It makes arrays of records, and of lists of unequal length it cannot; columns it takes as they are."""
    wanted = post(records(ids[:3], ids[5:7], k=2))
    assert wanted.status == HTTPStatus.OK
    assert post({"instances": {"history": [ids[:3], ids[5:7]]}, "params": {"k": 2}}) == wanted
    alike = [{"history": ids[:3]}, {"history": ids[5:8]}]
    assert post({"instances": alike, "params": {"k": 2}}) == post(records(ids[:3], ids[5:8], k=2))
    status, said = post({"instances": [{"history": ids[:3]}, {"history": ids[5:7]}]})
    assert status == HTTPStatus.BAD_REQUEST and "inhomogeneous shape" in said


def test_a_null_in_a_history_is_named_and_not_read_as_an_item(post: Post, ids: list[str]) -> None:
    """MLflow's own check of string lists would have cut the id to one letter."""
    with_null, without = (post(records(row, k=2)).body["predictions"][0] for row in ([ids[0], None], ids[:1]))
    assert with_null.pop("warning") == "ignored nulls in the history: 1"
    assert without.pop("warning") == "" and with_null == without


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"history: [a]", "Ensure that input is a valid JSON formatted string"),
        (b'{"dataframe_records": [{"history": ["a"', "Ensure that input is a valid JSON formatted string"),
        (b"\xff\xfe", "Ensure that input is a valid JSON formatted string"),
        ([["a"]], "Received a list"),
        ({"history": ["a"]}, "The input must be a JSON dictionary with exactly one of the input fields"),
        ({"dataframe_records": [{"past": ["a"]}]}, "the request has no rows, or they have no column history"),
        ({"dataframe_records": []}, "the request has no rows, or they have no column history"),
        (
            {"messages": [{"role": "user", "content": "tea"}]},
            "the request has no rows, or they have no column history",
        ),
        (records("a"), "history must be a list of item ids, which are strings; row 0 holds 'a'"),
        (records(["a"], 7), "history must be a list of item ids, which are strings; row 1 holds 7"),
        (records([22423]), "history must be a list of item ids, which are strings; row 0 holds [22423]"),
        (records({"a": 1}), "history must be a list of item ids, which are strings; row 0 holds {'a': 1}"),
        (
            records(["a"], k="ten"),
            "Can not safely convert `<class 'str'>` to `DataType.long` for value `ten`",
        ),
        (records(["a"], k=0), "k must be a whole number from 1 to 120, the items of the catalogue; got 0"),
        (
            records(["a"], k=121),
            "k must be a whole number from 1 to 120, the items of the catalogue; got 121",
        ),
        (
            records(["a"], k=None),
            "k must be a whole number from 1 to 120, the items of the catalogue; got None",
        ),
        (records(["a"], exclude_seen="no"), "Can not safely convert `<class 'str'>` to `DataType.boolean`"),
        (records(["a"], decode="exact"), "decode must be one of beam for this model, got 'exact'"),
        (records(["a"]) | {"params": [1]}, "Parameters must be a dictionary"),
    ],
)
def test_a_malformed_request_is_a_400_that_says_what_is_wrong(post: Post, body: Any, said: str) -> None:
    status, text = post(body)
    assert status == HTTPStatus.BAD_REQUEST
    answer = json.loads(text)
    assert said in answer["message"] and "stack_trace" not in answer and "Traceback" not in text
    if said[0].islower():  # sentences of sidflow stand alone
        assert answer["message"].startswith(said)


def test_the_server_outlives_what_it_refuses(post: Post, ids: list[str]) -> None:
    assert post(records(["a"], k=0)).status == HTTPStatus.BAD_REQUEST
    assert post(b"history\n[a]", "text/csv").status == HTTPStatus.BAD_REQUEST
    assert post(b"a", "text/plain").status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    assert post(records(ids[:2])).status == HTTPStatus.OK


def test_a_parameter_that_the_signature_lacks_is_mlflows_to_drop(post: Post, ids: list[str]) -> None:
    """It never reaches the model: the server writes a line into its log and answers as if it were not there."""
    assert post(records(ids[:2], kk=3)) == post(records(ids[:2]))


def test_many_clients_at_once_get_what_each_would_get_alone(post: Post, ids: list[str]) -> None:
    requests = [records(ids[i : i + 2], ["x"], k=1 + i % 7) for i in range(16)]
    alone = [post(request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(post, requests)) == alone
    assert {answer.status for answer in alone} == {HTTPStatus.OK}


def test_the_model_in_this_process_answers_as_the_server(
    uri: str, post: Post, ids: list[str], module_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{module_home / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(uri)
    here = model.predict(pd.DataFrame({"history": [ids[:3], None]}), params={"k": 4})
    assert here.to_dict("records") == post(records(ids[:3], None, k=4)).body["predictions"]


def test_figures_without_a_logged_model_or_a_split_are_not_lost_in_silence(bundle: Bundle) -> None:
    pipeline = start_pipeline("two_stage", "measured", SplitConfig())
    measure_model(
        pipeline, replace(bundle, popularity=bundle.popularity.with_columns(pl.col("events") + 1)), {}
    )
    said = open_store().get_run(pipeline).data.tags["sidflow.model_not_logged"]
    assert said.startswith("MLflow has no logged model of Bundle")
    with pytest.raises(ArtifactError, match="names no SequenceSplit among its parents"):
        measure_model(pipeline, replace(bundle, provenance=Provenance()), {})


ALONE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sklearn", "scipy", "faiss", "flytekit", "tasks", "matplotlib"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import mlflow.pyfunc, pandas
answer = mlflow.pyfunc.load_model(sys.argv[1]).predict(pandas.DataFrame({"history": [[sys.argv[2]]]}))
assert len(answer["items"][0]) == 10, answer
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_model_asks_for_what_it_imports_and_for_no_more(
    uri: str, ids: list[str], module_home: Path
) -> None:
    """In a process without what is not listed; and everything that is listed is imported."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{module_home / 'mlflow.db'}"}
    command = [sys.executable, "-c", ALONE, uri, ids[0]]
    done = subprocess.run(
        command, cwd=module_home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout.splitlines()[-1])
    assert {name.replace("pyyaml", "yaml") for name in REQUIREMENTS} <= set(imported)


def test_pinned_versions_are_those_of_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.model.version", lambda name: "2.13.0+cpu")
    assert requirements()[0] == "torch==2.13.0" and "+" not in "".join(requirements())


def test_the_bundle_of_the_model_knows_what_is_popular(tiny, bundle: Bundle) -> None:
    assert bundle.popularity["events"].sum() == tiny.split.train["sequence"].list.len().sum()
    assert bundle.provenance.parents["SequenceSplit"] == tiny.split.fingerprint


def test_the_benchmark_times_whole_answers_and_nothing_else(
    benchmark_script, tiny, bundle: Bundle, server: str, ids: list[str]
) -> None:
    script = benchmark_script("serving")
    port = int(server.rsplit(":", 1)[1])
    load = script.ask(port, [[ids[:2]], [ids[2:4], ids[5:7]], [ids[:1]]] * 2, 3)
    assert len(load.seconds) == 6 and 0 < max(load.seconds) <= load.elapsed < sum(load.seconds)
    with pytest.raises(RuntimeError, match="request 0: 400"):
        script.ask(port, [[[7]]], 1)

    arms = [script.Arm(1, 1, 1), script.Arm(1, 4, 1), script.Arm(1, 1, 4), script.Arm(0, 1, 1)]
    histories = script.raw_histories(tiny.split, bundle.catalog)
    with ThreadPoolExecutor(1) as here:
        ranker = BundleRanker(bundle, torch.device("cpu"))
        met = script.measure(arms, here, {(1, "auto"): port}, ranker, histories, rounds=2, count=8)
    assert [[len(load.seconds) for load in met[arm].loads] for arm in arms] == [[8, 8]] * 4


def test_requests_of_the_benchmark_go_round_the_users(benchmark_script) -> None:
    script = benchmark_script("serving")
    users, arm = [["a"], ["b"], ["c"]], script.Arm(1, 1, 2)
    assert script.requests(users, arm, 2) == [[["a"], ["b"]], [["c"], ["a"]]]
    assert script.requests(users, arm, 1, first=5) == [[["c"], ["a"]]]


def test_rates_of_the_benchmark_are_histories_a_second(benchmark_script) -> None:
    script = benchmark_script("serving")
    met = {
        script.Arm(1, 1, 1): script.Met([script.Load([0.1, 0.1], 0.2), script.Load([0.3, 0.3], 0.6)]),
        script.Arm(2, 8, 1): script.Met([script.Load([0.4] * 8, 0.4)]),
        script.Arm(2, 1, 1, "asyncio"): script.Met([script.Load([0.5], 0.5)]),
        script.Arm(0, 1, 32): script.Met([script.Load([0.5], 0.5)]),
    }
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in script.table(met)[2:]] == [
        ["server, 1 worker", "1", "1", "200.0", "300.0", "6.7", "7", "1.00"],
        ["server, 2 workers", "8", "1", "400.0", "400.0", "20.0", "20", "3.00"],
        ["server, 2 workers, asyncio", "1", "1", "500.0", "500.0", "2.0", "2", "0.30"],
        ["ranker, no server", "1", "32", "500.0", "500.0", "2.0", "64", "9.60"],
    ]
