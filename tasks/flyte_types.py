"""How artefacts and settings travel between Flyte tasks. Importing this module registers their types.

An artefact is a folder: in a bucket on a cluster, under ``<home>/artifacts/<Kind>/<fingerprint>`` on one
machine (``store``). There the name of a folder is its content, so nothing is written twice and a cached result
never points to a temporary file.
"""

import html
import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args, get_origin

from flytekit import FlyteContext, HashMethod
from flytekit.core.type_engine import TypeEngine, TypeTransformer, TypeTransformerFailedError
from flytekit.extras.pydantic_transformer.transformer import PydanticTransformer
from flytekit.interaction import click_types
from flytekit.models.core.types import BlobType
from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar
from flytekit.models.types import LiteralType
from flytekit.types.directory import FlyteDirectory

from components import artifacts
from components.config import Config
from components.folders import Artifact, ArtifactError, read_manifest
from tasks.home import home
from tasks.references import is_reference, locate
from tasks.store import fetch, is_remote, local, publish

Folder: TypeAlias = str | Path | FlyteDirectory


_found: dict[str, str] = {}
"""Address behind each name given by hand. Flyte asks for the hash of a value right behind its literal, without saying
of which kind it is, and the artefact behind ``mlflow:...`` depends on the kind."""


def _named(value: Folder) -> str:
    """Return how an artefact was named: its own place, not where Flyte would copy it."""
    return str(value.remote_source or value.path) if isinstance(value, FlyteDirectory) else str(value)


def content_of(value: Artifact | Folder) -> str:
    """Return the fingerprint that Flyte caches an artefact by; for a folder in a bucket its address."""
    if isinstance(value, Artifact):
        return value.fingerprint
    address = _found.get(_named(value), _named(value))
    return address if is_remote(address) else str(read_manifest(local(address))["fingerprint"])


by_content = HashMethod(content_of)
"""``Annotated[SidTable, by_content]``: stages that take it are cached by its content, not by its place."""


class ArtifactTransformer(TypeTransformer[Artifact]):
    """Pass artefacts of one kind between tasks as a folder; the blob's format is the name of the kind.

    Flyte does not compare formats, so a miswired workflow compiles: ``Artifact.load`` refuses another kind.
    Artefacts named by hand (``pyflyte run ... --sids FOLDER``, see ``references``) are passed on where they are.
    """

    def __init__(self, kind: type[Artifact]) -> None:
        super().__init__(kind.kind(), kind)
        self.blob_type = BlobType(format=kind.kind(), dimensionality=BlobType.BlobDimensionality.MULTIPART)

    def get_literal_type(self, t: type[Artifact]) -> LiteralType:
        """Return the Flyte type: a folder of this kind."""
        return LiteralType(blob=self.blob_type)

    def assert_type(self, t: type[Artifact], v: Any) -> None:
        """Let artefacts of this kind and folders pass."""
        if not isinstance(v, Folder | self.python_type):
            raise TypeTransformerFailedError(f"a {self.name} or the name of one is wanted, got {v!r}")

    def to_literal(
        self, ctx: FlyteContext, python_val: Artifact | Folder, python_type: type, expected: LiteralType
    ) -> Literal:
        """Store the artefact and return its address; upload where this execution keeps its outputs remote."""
        files = ctx.file_access
        if isinstance(python_val, Artifact):
            uri = publish(python_val, files)
        else:
            uri = _found[_named(python_val)] = locate(_named(python_val), self.name)
            if not is_remote(uri) and files.is_remote(files.raw_output_prefix):
                uri = files.put_raw_data(str(local(uri)))
        return Literal(scalar=Scalar(blob=Blob(metadata=BlobMetadata(type=self.blob_type), uri=uri)))

    def to_python_value(
        self, ctx: FlyteContext, lv: Literal, expected_python_type: type[Artifact]
    ) -> Artifact:
        """Load the artefact, checking kind, version, digests and invariants.

        Raises
        ------
        ArtifactError
            The folder is gone, holds another kind, or was changed.
        """
        uri = lv.scalar.blob.uri
        folder = fetch(uri, ctx.file_access)
        if not folder.is_dir():
            raise ArtifactError(
                f"{folder}: the folder of this {self.name} is gone; if Flyte's cache still remembers it, "
                f"remove {home() / 'flyte-cache'} too and run again"
            )
        return self.python_type.load(folder)  # type: ignore[no-any-return]

    def to_html(self, ctx: FlyteContext, python_val: Artifact, expected_python_type: type[Artifact]) -> str:
        """Show kind and fingerprint in Flyte decks, not the payload."""
        return f"<p>{html.escape(python_val.kind())} <code>{python_val.fingerprint[:16]}</code></p>"


class ConfigTransformer(PydanticTransformer):
    """Pass settings as flytekit passes any pydantic model, but keep their JSON schema out of ``--help``."""

    def __init__(self) -> None:
        TypeTransformer.__init__(self, "sidflow settings", Config, enable_type_assertions=False)

    def get_literal_type(self, t: type[Config]) -> LiteralType:
        """Return the Flyte type with the structure that attribute access needs, and without the schema."""
        full = super().get_literal_type(t)
        return LiteralType(simple=full.simple, structure=full.structure, annotation=full.annotation)


class FolderParam(click_types.DirParamType):
    """An artefact on the command line: a folder, an address in a bucket, or another name of ``references``."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Pass a reference as it is given; folders and addresses are flytekit's."""
        if isinstance(value, str) and is_reference(value):
            return value
        return super().convert(value, param, ctx)


class ListParam(click_types.JsonParamType):
    """A JSON list on the command line. Flytekit would read folders of artefacts as JSON files themselves."""

    def _parse(self, value: Any, param: Any) -> Any:
        # YAML reads an unquoted day as a date, which flytekit cannot write as JSON to validate it.
        return json.loads(json.dumps(super()._parse(value, param), default=str))

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Pass a list of folders as it is given; everything else is flytekit's."""
        item, *_ = (*get_args(self._python_type), None)
        kind = get_args(item)[0] if get_origin(item) is Annotated else item
        if isinstance(kind, type) and issubclass(kind, Artifact):
            return self._parse(value, param)
        return super().convert(value, param, ctx)


# Flytekit has no hook for these: the converter follows from the Flyte type alone.
click_types.DirParamType = FolderParam
click_types.JsonParamType = ListParam

for _kind in vars(artifacts).values():
    if isinstance(_kind, type) and issubclass(_kind, Artifact) and _kind is not Artifact:
        TypeEngine.register(ArtifactTransformer(_kind))
TypeEngine.register(ConfigTransformer())
