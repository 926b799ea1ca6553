import os
import re
import shutil
from concurrent import futures
from dataclasses import replace
from typing import Annotated

import boto3
import grpc
import pytest
from flyteidl.service import dataproxy_pb2, dataproxy_pb2_grpc
from flytekit import FlyteContextManager, task
from flytekit.configuration.file import get_config_file
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.models.core.types import BlobType
from flytekit.models.literals import Blob, BlobMetadata, Literal, LiteralMap, Scalar
from moto.server import ThreadedMotoServer

from components.artifacts import (
    Bundle,
    ContentEmbeddings,
    RecommenderCheckpoint,
    SidTable,
    TokenizerCheckpoint,
)
from components.config import Config
from components.embeddings import LsaConfig, fit_encoder
from components.folders import Artifact, ArtifactError
from components.recommenders.serving import training_popularity
from tasks import runtime
from tasks.flyte_types import by_content
from tasks.model import log_bundle
from tasks.references import locate
from tasks.runs import BUNDLE, CHAMPION, everywhere_one_store, open_store
from tasks.store import local, publish, stored_at
from tasks.tracking import finish_pipeline, start_pipeline, tracked


class Settings(Config):
    """None."""


@task
def count(sids: SidTable) -> int:
    return sids.num_items


seen: list[str] = []


@task(cache=runtime.cached("1"))
def cached_count(sids: Annotated[SidTable, by_content]) -> int:
    seen.append(sids.fingerprint)
    return sids.num_items


def made(stage: str, outputs: list[Artifact], parents: list[Artifact], run_id: str = "") -> str:
    with tracked(stage, None, run_id, parents) as run:
        run.output(*outputs)
    return run.run_id


@pytest.fixture
def chain(flyte_home, tiny):
    """Runs of four stages: embeddings, tokenizer, table, and a recommender that knows nothing."""
    recommender = RecommenderCheckpoint(
        weights={}, config={}, sids=tiny.sids.fingerprint, step=0, epoch=0, metrics={}
    )
    return {
        "embed": made("assemble_embeddings", [tiny.embeddings], [tiny.catalog]),
        "fit": made("fit_tokenizer", [tiny.tokenizer], [tiny.embeddings, tiny.split]),
        "assign": made("assign_sids", [tiny.sids], [tiny.tokenizer, tiny.embeddings]),
        "train": made("fit_recommender", [recommender], [tiny.split, tiny.sids, tiny.embeddings]),
    }


def at(name: str, kind: type[Artifact]) -> str:
    return kind.load(local(locate(name, kind.kind()))).fingerprint


def test_a_run_stands_for_what_it_made_and_for_what_that_came_from(chain, tiny):
    assert at(f"mlflow:{chain['assign']}", SidTable) == tiny.sids.fingerprint
    assert at(f"mlflow:{chain['train']}", SidTable) == tiny.sids.fingerprint
    assert at(f"mlflow:{chain['train']}", TokenizerCheckpoint) == tiny.tokenizer.fingerprint
    assert at(f"mlflow:{chain['train']}", ContentEmbeddings) == tiny.embeddings.fingerprint


def test_a_run_knows_nothing_of_what_came_after_it(chain):
    with pytest.raises(
        ArtifactError, match="'fit_tokenizer' neither made .* kind SidTable nor came from one"
    ):
        locate(f"mlflow:{chain['fit']}", "SidTable")


def test_a_stage_takes_a_run_in_place_of_a_folder_and_its_result_is_cached_by_content(chain, tiny):
    seen.clear()
    assert count(sids=f"mlflow:{chain['train']}") == tiny.sids.num_items
    cached_count(sids=f"mlflow:{chain['assign']}")
    cached_count(sids=f"mlflow:{chain['train']}")
    cached_count(sids=stored_at("SidTable", tiny.sids.fingerprint))
    assert seen == [tiny.sids.fingerprint]


def test_a_run_is_linked_to_the_runs_that_it_read_from(chain):
    run = open_store().get_run(chain["assign"])
    assert run.data.tags["read_from.TokenizerCheckpoint"] == chain["fit"]
    assert run.data.tags["read_from.ContentEmbeddings"] == chain["embed"]
    assert f"/runs/{chain['fit']}" in run.data.tags["mlflow.note.content"]
    sources = {i.dataset.name: i.dataset.source for i in run.inputs.dataset_inputs}
    assert str(stored_at("TokenizerCheckpoint", "")) in sources["TokenizerCheckpoint"]


def test_a_run_stands_for_what_it_read_itself_also_if_no_run_made_it(chain, tiny):
    """Not for another of the kind, further up."""
    by_hand = replace(tiny.sids, suffix_size=64)
    scored = made("analyze", [], [by_hand, tiny.tokenizer])
    assert at(f"mlflow:{scored}", SidTable) == by_hand.fingerprint


def test_an_attempt_that_failed_stands_for_nothing(chain, tiny):
    pipeline = start_pipeline("two_stage", "sidflow", Settings())
    with pytest.raises(RuntimeError), tracked("assign_sids", None, pipeline) as run:
        run.output(tiny.sids)
        raise RuntimeError("lost")
    made("assign_sids", [tiny.sids], [], pipeline)
    other = replace(tiny.sids, suffix_size=64)
    with pytest.raises(RuntimeError), tracked("assign_sids", None, pipeline) as run:
        run.output(other)
        raise RuntimeError("lost")
    assert at(f"mlflow:{pipeline}", SidTable) == tiny.sids.fingerprint


def test_a_pipeline_stands_for_its_stages_and_for_those_that_the_cache_answered(chain, tiny):
    pipeline = start_pipeline("joint", "sidflow", Settings())
    finish_pipeline(pipeline, [tiny.sids])  # no stage ran: all of them came from the cache
    assert at(f"mlflow:{pipeline}", SidTable) == tiny.sids.fingerprint
    assert at(f"mlflow:{pipeline}", TokenizerCheckpoint) == tiny.tokenizer.fingerprint


def test_a_pipeline_stands_for_the_last_of_several_that_were_made_of_one_another(chain, tiny):
    """As joint training, matching and extending do with the table before."""
    pipeline = start_pipeline("joint", "sidflow", Settings())
    other = replace(tiny.sids, suffix_size=64)
    made("assign_sids", [tiny.sids], [tiny.tokenizer], pipeline)
    made("fit_jointly", [other], [tiny.tokenizer, tiny.sids], pipeline)
    assert at(f"mlflow:{pipeline}", SidTable) == other.fingerprint


def test_a_pipeline_that_opened_the_champion_stands_for_its_own_stages(chain, tiny):
    """Its run names the stages of the training as well, which are where the champion came from."""
    pipeline = start_pipeline("new_items", "sidflow", Settings())
    open_store().set_tag(pipeline, CHAMPION, "mlflow:shop/1")
    grown = replace(tiny.sids, suffix_size=64)
    made("extend_sids", [grown], [tiny.sids, tiny.tokenizer], pipeline)
    finish_pipeline(pipeline, [grown])
    assert at(f"mlflow:{pipeline}", SidTable) == grown.fingerprint


def test_two_tables_of_one_pipeline_must_be_told_apart(chain, tiny, live_sids):
    pipeline = start_pipeline("joint", "sidflow", Settings())
    other = replace(tiny.sids, suffix_size=64)
    runs = [
        made("assign_sids", [tiny.sids], [], pipeline),
        made("fit_jointly", [other, tiny.tokenizer], [], pipeline),
    ]
    with pytest.raises(ArtifactError, match="2 artefacts of the kind SidTable; name the stage") as raised:
        locate(f"mlflow:{pipeline}", "SidTable")
    assert re.findall(r"mlflow:(\w{32}) \((\w+)\)", str(raised.value)) == [
        (runs[0], "assign_sids"),
        (runs[1], "fit_jointly"),
    ]
    assert at(f"mlflow:{runs[1]}", SidTable) == other.fingerprint
    assert at(f"mlflow:{pipeline}", TokenizerCheckpoint) == tiny.tokenizer.fingerprint


def test_a_registered_model_stands_for_the_run_that_logged_it(chain, tiny, monkeypatch):
    client = open_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # the registry looks for the model there
    client.create_registered_model("shop")
    train = client.get_run(chain["train"]).info
    model = client.create_logged_model(train.experiment_id, "shop", train.run_id)
    version = client.create_model_version("shop", model.model_uri, run_id=train.run_id).version
    client.set_registered_model_alias("shop", "champion", version)
    assert at("mlflow:shop@champion", SidTable) == tiny.sids.fingerprint
    assert at(f"mlflow:shop/{version}", SidTable) == tiny.sids.fingerprint
    for wrong in ("mlflow:shop@nobody", "mlflow:shop/7", "mlflow:other@champion"):
        with pytest.raises(ValueError, match="no such registered model, alias or version.*models: shop"):
            locate(wrong, "SidTable")


def test_a_registered_model_brings_its_own_files_where_the_store_is_gone(
    flyte_home, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    encoder = fit_encoder(tiny.catalog, LsaConfig(dim=16))
    parts = {"catalog": tiny.catalog, "tokenizer": tiny.tokenizer, "sids": tiny.sids, "encoder": encoder}
    recommender = RecommenderCheckpoint(
        weights={}, config={}, sids=tiny.sids.fingerprint, step=0, epoch=0, metrics={}
    )
    bundle = Bundle(
        **parts, recommender=recommender, popularity=training_popularity(tiny.split, tiny.catalog)
    )
    with tracked("log_model mine") as run:
        uri = log_bundle(run, bundle)
    client = open_store()
    client.create_registered_model("shop")
    with everywhere_one_store():
        version = client.create_model_version(
            "shop", uri, run.run_id, tags={BUNDLE: bundle.fingerprint}
        ).version
    client.set_registered_model_alias("shop", "champion", version)
    shutil.rmtree(flyte_home / "artifacts")
    assert at("mlflow:shop@champion", Bundle) == bundle.fingerprint
    assert at("mlflow:shop@champion", SidTable) == tiny.sids.fingerprint
    assert not (tmp_path / "mlflow.db").exists()
    shutil.rmtree(flyte_home / "mlartifacts")
    with pytest.raises(
        ArtifactError, match="models:/shop/1: its Bundle is not on this machine, and its files at"
    ):
        locate("mlflow:shop@champion", "Bundle")


@pytest.mark.parametrize("name", ["mlflow:", "mlflow:abc", "mlflow:shop@", "mlflow:a@b@c"])
def test_a_misspelt_name_says_how_names_are_spelt(flyte_home, name):
    with pytest.raises(ValueError, match="mlflow:<run id>, or a model by alias or version"):
        locate(name, "SidTable")


def test_a_run_that_is_not_there_is_named_with_the_store(flyte_home):
    with pytest.raises(ValueError, match="is no run of sqlite"):
        locate("mlflow:" + "0" * 32, "SidTable")


def test_an_artefact_that_was_deleted_says_where_it_was(chain, tiny):
    shutil.rmtree(stored_at("SidTable", tiny.sids.fingerprint))
    with pytest.raises(ArtifactError, match="is not on this machine; run .* left it in .*makes it again"):
        locate(f"mlflow:{chain['assign']}", "SidTable")


@pytest.fixture(scope="module")
def bucket():
    """A server that speaks S3, with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "FLYTE_AWS_ENDPOINT": f"http://{host}:{port}",
        "FLYTE_AWS_ACCESS_KEY_ID": "a",
        "FLYTE_AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client(
            "s3",
            endpoint_url=settings["FLYTE_AWS_ENDPOINT"],
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        client.create_bucket(Bucket="flyte")
        yield "s3://flyte"
    server.stop()


@pytest.fixture
def cloud(flyte_home, bucket, tmp_path):
    """An execution whose raw outputs go to the bucket."""
    files = FileAccessProvider(str(tmp_path / "box"), f"{bucket}/raw/{os.urandom(4).hex()}")
    context = FlyteContextManager.current_context()
    with FlyteContextManager.with_context(context.with_file_access(files)):
        yield files


def test_what_a_stage_left_in_a_bucket_is_found_by_its_run_and_by_its_address(cloud, tiny):
    run_id = made("assign_sids", [tiny.sids], [])
    address = locate(f"mlflow:{run_id}", "SidTable")
    assert address.startswith("s3://flyte/raw/")
    assert not stored_at("SidTable", tiny.sids.fingerprint).exists()
    assert count(sids=address) == count(sids=f"mlflow:{run_id}") == tiny.sids.num_items


def test_equal_content_is_uploaded_once(cloud, tiny):
    assert publish(tiny.sids) == publish(tiny.sids)


class DataProxy(dataproxy_pb2_grpc.DataProxyServiceServicer):
    """Answers as Flyte does when it is asked for the outputs of a node."""

    def __init__(self) -> None:
        self.outputs: dict[str, Literal] = {}

    def GetData(self, request, context):
        name = request.flyte_url.rsplit("/", 1)[-1]
        if name in self.outputs:
            return dataproxy_pb2.GetDataResponse(literal=self.outputs[name].to_flyte_idl())
        whole = LiteralMap(literals=self.outputs).to_flyte_idl()
        return dataproxy_pb2.GetDataResponse(literal_map=whole)


@pytest.fixture
def control_plane(tmp_path, monkeypatch):
    server, service = grpc.server(futures.ThreadPoolExecutor(2)), DataProxy()
    dataproxy_pb2_grpc.add_DataProxyServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    config = tmp_path / "flyte.yaml"
    config.write_text(f"admin:\n  endpoint: dns:///127.0.0.1:{port}\n  insecure: true\n")
    monkeypatch.setenv("FLYTECTL_CONFIG", str(config))
    get_config_file.cache_clear()  # flytekit remembers that there was none
    yield service
    get_config_file.cache_clear()
    server.stop(None)


def blob(artifact: Artifact) -> Literal:
    kind = BlobType(format=artifact.kind(), dimensionality=BlobType.BlobDimensionality.MULTIPART)
    return Literal(scalar=Scalar(blob=Blob(BlobMetadata(type=kind), uri=publish(artifact))))


def test_an_output_of_a_flyte_execution_is_found_by_its_uri(flyte_home, control_plane, tiny):
    control_plane.outputs = {"o0": blob(tiny.tokenizer), "o1": blob(tiny.sids)}
    node = "flyte://v1/sidflow/development/f1a2b3/n5/o"
    assert count(sids=f"{node}/o1") == count(sids=node) == tiny.sids.num_items
    with pytest.raises(ArtifactError, match="no outputs of the kind ContentEmbeddings"):
        locate(node, "ContentEmbeddings")
    with pytest.raises(ArtifactError, match="no outputs of the kind SidTable"):
        locate(f"{node}/o0", "SidTable")
