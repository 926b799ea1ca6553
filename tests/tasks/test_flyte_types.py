import shutil
from pathlib import Path
from typing import Annotated

import polars as pl
import pytest
import torch
from click.testing import CliRunner, Result
from flytekit import FlyteContextManager, task, workflow
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.type_engine import TypeEngine
from flytekit.types.directory import FlyteDirectory

from components import artifacts, folders
from components.artifacts import ContentEmbeddings, SidTable
from components.config import Config
from components.folders import Artifact, ArtifactError
from tasks import runtime
from tasks.flyte_types import ArtifactTransformer, by_content
from tasks.store import keep, stored_at

pytestmark = pytest.mark.usefixtures("flyte_home")


class Loop(Config):
    """A section."""

    epochs: int = 3
    """Passes."""


class Settings(Config):
    """Settings with a section."""

    loop: Loop = Loop()
    """Section."""


def vectors(seed: int = 0, rows: int = 4) -> ContentEmbeddings:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    return ContentEmbeddings(vectors={"vectors": x}, encoder="e", revision="r", normalised=False, catalog="c")


def table(tokenizer: str = "t") -> SidTable:
    rows = {"item_id": [0, 1], "codes": [[0, 1], [1, 1]], "suffix": [0, 0]}
    codes = pl.DataFrame(rows, schema=SidTable.SCHEMAS["codes"])
    return SidTable(codes=codes, codebook_sizes=[2, 2], suffix_size=1, shared=False, tokenizer=tokenizer)


runs: list[str] = []


@task
def embed(seed: int) -> Annotated[ContentEmbeddings, by_content]:
    runs.append("embed")
    return vectors(seed % 2)


@task(cache=runtime.cached("1"))
def tokenize(
    embeddings: Annotated[ContentEmbeddings, by_content], run_id: str = ""
) -> Annotated[SidTable, by_content]:
    runs.append("tokenize")
    return table(embeddings.fingerprint)


@task
def epochs(config: Loop) -> int:
    return config.epochs


@workflow
def pipeline(seed: int, run_id: str) -> SidTable:
    return tokenize(embeddings=embed(seed=seed), run_id=run_id)


@workflow
def configured(config: Settings) -> int:
    return epochs(config=config.loop)


def test_every_kind_has_its_own_folder_type():
    kinds = [k for k in vars(artifacts).values() if isinstance(k, type) and issubclass(k, Artifact)]
    kinds.remove(Artifact)
    formats = [TypeEngine.to_literal_type(kind).blob.format for kind in kinds]
    assert formats == [kind.__name__ for kind in kinds]
    assert len(formats) >= 11


def test_an_artefact_survives_the_way_through_two_tasks(flyte_home):
    made = pipeline(seed=0, run_id="a")
    assert made.fingerprint == table(vectors(0).fingerprint).fingerprint
    folder = stored_at("SidTable", made.fingerprint)
    assert folder.is_relative_to(flyte_home)
    assert SidTable.load(folder).codes.equals(made.codes)


def test_equal_content_hits_the_cache_whatever_ran_before_and_whatever_the_run_is_called():
    runs.clear()
    pipeline(seed=0, run_id="a")
    pipeline(seed=2, run_id="b")  # embed makes the same vectors of seed 0 and 2
    assert runs == ["embed", "tokenize", "embed"]
    pipeline(seed=1, run_id="b")
    assert runs[3:] == ["embed", "tokenize"]


def test_a_folder_given_by_hand_is_cached_by_its_content(tmp_path):
    runs.clear()
    vectors(0).save(tmp_path / "one")
    vectors(0).save(tmp_path / "same")
    vectors(1).save(tmp_path / "other")
    first = tokenize(embeddings=FlyteDirectory(str(tmp_path / "one"), remote_directory=False))
    assert tokenize(embeddings=tmp_path / "same").fingerprint == first.fingerprint
    assert tokenize(embeddings=vectors(0)).fingerprint == first.fingerprint
    assert runs == ["tokenize"]
    assert tokenize(embeddings=str(tmp_path / "other")).fingerprint != first.fingerprint


def test_another_kind_is_refused_with_both_named(tmp_path):
    table().save(tmp_path / "sids")
    with pytest.raises(Exception, match="holds the kind SidTable, the kind ContentEmbeddings is wanted"):
        tokenize(embeddings=tmp_path / "sids")


def test_a_folder_that_is_no_artefact_is_refused(tmp_path):
    with pytest.raises(Exception, match="no artefact here"):
        tokenize(embeddings=tmp_path)


def test_something_that_is_no_artefact_at_all_is_refused():
    with pytest.raises(Exception, match="ContentEmbeddings or the name of one is wanted, got 3"):
        tokenize(embeddings=3)


def test_a_cached_result_whose_folder_was_deleted_says_what_to_remove(flyte_home):
    made = pipeline(seed=0, run_id="a")
    shutil.rmtree(stored_at("SidTable", made.fingerprint))
    with pytest.raises(TypeError) as raised:
        pipeline(seed=0, run_id="a")
    assert "SidTable is gone" in str(raised.value.__cause__) and "flyte-cache" in str(raised.value.__cause__)


def test_the_same_content_is_written_once(flyte_home):
    context = FlyteContextManager.current_context()
    transformer = ArtifactTransformer(SidTable)
    uris = {
        transformer.to_literal(context, table(), SidTable, None).scalar.blob.uri,
        transformer.to_literal(context, table(), SidTable, None).scalar.blob.uri,
    }
    assert len(uris) == 1
    assert [p.name for p in (flyte_home / "artifacts" / "SidTable").iterdir()] == [table().fingerprint[:16]]


def test_a_remote_prefix_uploads_and_loads_back(tmp_path):
    files = FileAccessProvider(str(tmp_path / "box"), "memory://bucket/run")
    context = FlyteContextManager.current_context()
    remote = context.with_file_access(files).build()
    transformer = ArtifactTransformer(SidTable)
    literal = transformer.to_literal(remote, table(), SidTable, None)
    assert literal.scalar.blob.uri.startswith("memory://bucket/run")
    assert transformer.to_python_value(remote, literal, SidTable).fingerprint == table().fingerprint


def test_a_local_folder_given_by_hand_is_uploaded_for_a_remote_execution(tmp_path):
    table().save(tmp_path / "sids")
    files = FileAccessProvider(str(tmp_path / "box"), "memory://bucket/run")
    remote = FlyteContextManager.current_context().with_file_access(files).build()
    transformer = ArtifactTransformer(SidTable)
    literal = transformer.to_literal(remote, tmp_path / "sids", SidTable, None)
    assert literal.scalar.blob.uri.startswith("memory://bucket/run")
    assert transformer.to_python_value(remote, literal, SidTable).fingerprint == table().fingerprint


def test_a_full_disk_leaves_no_folder_and_no_cache_entry(flyte_home, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(Exception, match="No space left on device"):
        patch.setattr(folders, "_write_synced", full)
        pipeline(seed=0, run_id="a")
    assert not list((flyte_home / "artifacts").rglob("manifest.json"))
    assert pipeline(seed=0, run_id="a").num_items == 2


def test_a_section_of_the_settings_reaches_its_stage():
    assert configured(config=Settings(loop=Loop(epochs=7))) == 7


def test_help_shows_what_a_setting_means_and_no_schema(tmp_path, monkeypatch):
    script = tmp_path / "flow.py"
    script.write_text(
        "from components.config import Config\n"
        "from flytekit import task\n"
        "import tasks.flyte_types\n"
        "from components.artifacts import SidTable\n\n\n"
        "class Settings(Config):\n"
        '    """S."""\n\n'
        "    epochs: int = 3\n"
        '    """Passes."""\n\n\n'
        "@task\n"
        "def stage(sids: SidTable, config: Settings) -> int:\n"
        '    """Do it.\n\n    Args:\n        sids: The table.\n'
        '        config: Settings of the stage.\n    """\n'
        "    return config.epochs * sids.num_items\n"
    )
    table().save(tmp_path / "sids")
    (tmp_path / "good.yaml").write_text("epochs: 5\n")
    (tmp_path / "wrong.yaml").write_text("epoch: 5\n")

    monkeypatch.chdir(tmp_path)
    from flytekit.clis.sdk_in_container.pyflyte import main as pyflyte_command

    def pyflyte(*arguments: str) -> Result:
        return CliRunner().invoke(pyflyte_command, ["run", "flow.py", "stage", *arguments])

    shown = pyflyte("--help").output
    assert "Settings of the stage." in shown
    assert "$defs" not in shown and "properties" not in shown
    done = pyflyte("--sids", "sids", "--config", "good.yaml")
    assert done.exit_code == 0 and done.output.rstrip().endswith("10"), done.output
    refused = pyflyte("--sids", "sids", "--config", "wrong.yaml")
    assert refused.exit_code != 0 and "epoch" in refused.output and "Extra inputs" in refused.output


def test_two_processes_that_save_the_same_content_both_succeed(flyte_home, monkeypatch):
    one = vectors(0)
    real = ContentEmbeddings.save

    def slow(self, folder):
        real(self, folder)  # the other process is done first
        real(self, folder)

    monkeypatch.setattr(ContentEmbeddings, "save", slow)
    assert ContentEmbeddings.load(keep(one)).fingerprint == one.fingerprint


def test_artefact_errors_are_not_swallowed_when_saving_fails(flyte_home):
    folder = stored_at("SidTable", table().fingerprint)
    folder.mkdir(parents=True)
    (folder / "stray").touch()
    with pytest.raises(ArtifactError):
        keep(table())
