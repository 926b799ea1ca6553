"""A headless Chromium for pages, and every kind of page made of items with awkward names."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch

from components.artifacts import (
    EvaluationReport,
    ItemCatalog,
    RecommenderCheckpoint,
    SequenceSplit,
    SidDrift,
    SidTable,
)
from components.data.splits import SplitConfig, hold_out
from components.metrics.ablation import Measured, ablate, run_name
from components.metrics.compare import CompareConfig, compare
from components.metrics.drift import DriftConfig, drift
from components.metrics.figures import ablation_figure
from components.metrics.report import EvaluateConfig, evaluate_baselines, evaluate_recommender
from components.metrics.sids import CollisionConfig, analyze
from components.metrics.windows import Window, over_windows
from components.pages.ablation import ablation_page
from components.pages.data import data_page, split_page
from components.pages.embeddings import embeddings_page
from components.pages.html import Html
from components.pages.names import churn_page, drift_page
from components.pages.results import comparison_page, results_page
from components.pages.sids import collisions_page, sids_page
from components.pages.training import training_page
from components.pages.windows import windows_page
from components.seams import Ranking
from components.tokenizers.extend import extend
from components.tokenizers.matching import churn, rename
from components.tokenizers.sids import SidConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
INTO_PIPES = """
import os, sys
read, write = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
os.dup2(read, 3), os.dup2(write, 4)
os.set_inheritable(3, True), os.set_inheritable(4, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from file 3 and writes answers to file 4."""
TYPES = {"Stylesheet": "text/css", "Image": "image/svg+xml"}
AWKWARD = [
    "<script>console.error('let in')</script>",
    "<img src=\"http://example.com/x.png\" onerror='console.error(1)'>",
    "He said \"yes\" & 'no' </title></style></svg>",
    "כובע אדום עם שרוכים (מידה 3)",
    "\u202eright-to-left override",
    "W" * 400,
    "long " * 200,
    "",
    None,
    "🫖 tea\tpot\nfor two",
]


class Seen(NamedTuple):
    """What one page did while it was open."""

    requests: list[str]
    """Addresses that it asked for, its own left out. None of them was let out of the browser."""
    said: list[str]
    """Errors and warnings of the console, and exceptions."""
    answer: Any
    """What the script that was run in it returned."""


class Browser:
    """One tab of a Chromium, over its debugging pipe."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._rest, self._number = b"", 0
        self._session: dict[str, str] = {}
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": answer["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])

    def open(
        self, page: Path, script: str = "null", *, dark: bool = False, width: int = 1280, picture: str = ""
    ) -> Seen:
        """Open a file, run a script in it once it has loaded, and take a picture of all of it if one is wanted."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._happened(self._read())
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        if picture:
            whole = self.call("Page.getLayoutMetrics")["cssContentSize"] | {"scale": 1}
            shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=whole)
            Path(picture).write_bytes(base64.b64decode(shot["data"]))
        requests = [url for url in self._requests() if url != page.as_uri() and not url.startswith("data:")]
        return Seen(requests, list(self._said()), answer["result"].get("value"))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and wait for its answer."""
        number = self._ask(method, params)
        while (answer := self._read()).get("id") != number:
            self._happened(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _ask(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        return self._number

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._receive, 1 << 20)
            assert part, "chromium has closed its pipe"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _happened(self, event: dict[str, Any]) -> None:
        """Keep an event. Requests are answered here: files from the disk, all others with nothing."""
        if "method" not in event:
            return  # the answer to an answer
        self._events.append(event)
        if event["method"] == "Fetch.requestPaused":
            params = event["params"]
            if params["request"]["url"].startswith("file:"):
                self._ask("Fetch.continueRequest", {"requestId": params["requestId"]})
            else:
                kind = {"name": "Content-Type", "value": TYPES.get(params["resourceType"], "text/plain")}
                answer = {"requestId": params["requestId"], "responseCode": 200, "responseHeaders": [kind]}
                self._ask("Fetch.fulfillRequest", answer)

    def _requests(self) -> Iterator[str]:
        for event in self._events:
            match event["method"]:
                case "Network.requestWillBeSent":
                    yield event["params"]["request"]["url"]
                case "Network.webSocketCreated":
                    yield event["params"]["url"]

    def _said(self) -> Iterator[str]:
        for event in self._events:
            params = event["params"]
            match event["method"]:
                case "Runtime.consoleAPICalled":
                    yield str([part.get("value", part.get("description")) for part in params["args"]])
                case "Runtime.exceptionThrown":
                    yield params["exceptionDetails"]["text"]
                case "Log.entryAdded":
                    yield params["entry"]["text"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium with a profile of its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to have the pages opened")
    folder = tmp_path_factory.mktemp("chromium")
    its_input, send = os.pipe()
    receive, its_output = os.pipe()
    start = [sys.executable, "-c", INTO_PIPES, str(its_input), str(its_output)]
    with (folder / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            [*start, CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            pass_fds=(its_input, its_output),
            stdout=log,
            stderr=log,
        )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(send, receive)
    finally:
        os.close(send)
        os.close(receive)
        process.terminate()
        process.wait(20)


class Material(NamedTuple):
    """What pages are made of: the planted items, some with awkward names, and lists of a made-up method."""

    catalog: ItemCatalog
    split: SequenceSplit
    items_Uk: np.ndarray
    """(U, 20): the target of every third test user stands on place 3, that of others nowhere."""


@pytest.fixture(scope="session")
def material(tiny) -> Material:
    titles = tiny.catalog.items["title"].to_list()
    titles[: len(AWKWARD)] = AWKWARD
    catalog = replace(tiny.catalog, items=tiny.catalog.items.with_columns(title=pl.Series(titles)))
    split = hold_out(tiny.log, catalog, SplitConfig(cold_share=0.1))
    targets = split.test["target"].to_numpy().astype(int)
    items_Uk = (targets[:, None] + np.arange(1, 21)) % catalog.num_items
    items_Uk[::3, 2] = targets[::3]
    return Material(catalog, split, items_Uk)


HISTORY = [
    (step, {"epoch": step / 10, "loss": 3 / step, "train/loss": 2 / step, "sids/perplexity/level1": 7.0}
     | {"sids/perplexity/level2": 5 + step % 7, "sids/churn": 1 / step, "train/level1": 1.0, "nan": np.nan})
    for step in range(10, 60, 10)
]  # fmt: skip


@pytest.fixture(scope="session")
def pages(tiny, material: Material) -> dict[str, Html]:
    """Every kind of page."""
    catalog, split, items_Uk = material
    events = torch.bincount(torch.from_numpy(tiny.log.events["item_id"].to_numpy().astype(int)))
    config = EvaluateConfig(resamples=100)
    ranking = Ranking(torch.from_numpy(items_Uk), torch.zeros(items_Uk.shape))
    baselines = evaluate_baselines(split, config)
    report = evaluate_recommender("<b>mine</b>", lambda *_: ranking, split, config, baselines)
    comparison = compare([report], CompareConfig(resamples=100))
    windows = [
        Window(until="2024-01-01", events=9, items=5, test_users=3),
        Window(until="2024-02-01", skipped="no user has <an> event"),
    ]
    collisions = analyze(tiny.sids, catalog, CollisionConfig(), events=events, embeddings=tiny.embeddings)
    trained = RecommenderCheckpoint(weights={}, config={}, sids=collisions.sids, step=1, epoch=1, metrics={})
    arms = ablate(
        [
            Measured(arm, "two_stage", against, seed, named(report, run_name(arm, seed)), collisions, trained)
            for arm, against in (("plain", None), ("<new>", "plain"))
            for seed in (0, 1)
        ]
    )
    return {
        "data": data_page(tiny.log, catalog),
        "split": split_page(split, tiny.log, catalog),
        "embeddings": embeddings_page(replace(tiny.embeddings, catalog=catalog.fingerprint), catalog),
        "training": training_page(
            "Joint <training>", HISTORY, {"loss": 0.1}, 40, [("epoch", "4")], "why <it> stopped"
        ),
        "sids": sids_page(tiny.sids, catalog, split),
        "collisions": collisions_page(collisions, catalog),
        "results": results_page("<b>mine</b>", report, split, catalog, items_Uk, "kept"),
        "comparison": comparison_page(comparison),
        "ablation": ablation_page(arms, ablation_figure(arms)),
        "windows": windows_page(windows, over_windows(windows, [comparison])),
        "drift": drift_page(grown_by_twins(tiny)),
        "churn": churn_page(churn(tiny.sids, relabelled(tiny.sids), tiny.sids)),
    }


def named(report: EvaluationReport, name: str) -> EvaluationReport:
    """The report under another name of the method."""
    method = pl.col("method").replace("<b>mine</b>", name)
    return replace(
        report, ranks=report.ranks.with_columns(method), metrics=report.metrics.with_columns(method)
    )


def grown_by_twins(tiny) -> SidDrift:
    """A report beyond two limits: every third item came twice."""
    both = torch.cat([tiny.embeddings.matrix, tiny.embeddings.matrix[::3]])
    grown = replace(tiny.embeddings, vectors={"vectors": both})
    now = extend(tiny.tokenizer, grown, tiny.sids, SidConfig(suffix_size=32), tiny.embeddings)
    return drift(tiny.tokenizer, grown, tiny.sids, now, DriftConfig(max_new_share=0.2))


def relabelled(table: SidTable) -> SidTable:
    return rename(table, [torch.arange(8).roll(level) for level in range(3)], table.tokenizer, table)
