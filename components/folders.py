"""Artefacts as folders: saving all or nothing, strict loading, and the fingerprint, once for every kind.

A data frame field ``f`` is ``f.parquet``, a dict of tensors ``f.safetensors``, an artefact a folder ``f``;
everything else stands in ``manifest.json`` beside kind, format version, digests and provenance.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import polars as pl
import safetensors.torch
from torch import Tensor

FORMAT_VERSION = 1


class ArtifactError(ValueError):
    """A folder is no artefact, another kind or version of one, damaged, or does not fit its partner."""


@dataclass(frozen=True)
class Provenance:
    """Where an artefact came from. Not part of its fingerprint: equal content is equal, whoever made it."""

    config: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    git: str | None = None


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Base of all artefacts: saving, strict loading and the fingerprint, once for every kind."""

    SCHEMAS: ClassVar[dict[str, pl.Schema]] = {}
    provenance: Provenance = field(default_factory=Provenance, compare=False)

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Artifact.__repr__  # type: ignore[method-assign]  # dataclass would write out the payload

    def __repr__(self) -> str:
        return f"{self.kind()}(fingerprint={self.fingerprint[:16]!r})"

    def __post_init__(self) -> None:
        for name, schema in self.SCHEMAS.items():
            found = getattr(self, name).schema
            if found != schema:
                raise ArtifactError(f"{self.kind()}.{name}: wants columns {dict(schema)}, got {dict(found)}")
        self.check()

    def check(self) -> None:
        """Check the kind's invariants; raise ``ArtifactError`` or ``ValueError`` naming the row and the rule."""

    @classmethod
    def kind(cls) -> str:
        """Name of the kind, as the manifest and error messages spell it."""
        return cls.__name__

    @cached_property
    def _payload(self) -> dict[str, bytes]:
        """Map file names to bytes for frames and tensors; the writers are byte-stable."""
        files = {}
        for name, value in self._values().items():
            if isinstance(value, pl.DataFrame):
                buffer = BytesIO()
                value.write_parquet(buffer, compression="zstd", statistics=False)
                files[f"{name}.parquet"] = buffer.getvalue()
            elif _is_tensors(value):
                files[f"{name}.safetensors"] = safetensors.torch.save(
                    {k: v.detach().contiguous().cpu() for k, v in sorted(value.items())}
                )
        return files

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "provenance"}

    @property
    def parts(self) -> dict[str, "Artifact"]:
        """The artefacts that this one is made of, by field."""
        return {name: value for name, value in self._values().items() if isinstance(value, Artifact)}

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        return {
            "kind": self.kind(),
            "format_version": FORMAT_VERSION,
            "fields": {
                name: value
                for name, value in self._values().items()
                if not isinstance(value, pl.DataFrame | Artifact) and not _is_tensors(value)
            },
            "digests": {
                name: hashlib.sha256(data).hexdigest() for name, data in sorted(self._payload.items())
            },
            "parts": {name: part.fingerprint for name, part in sorted(self.parts.items())},
        }

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over payload and small fields; equal content gives equal fingerprints on every machine."""
        return hashlib.sha256(json.dumps(self._manifest, sort_keys=True).encode()).hexdigest()

    def made_by(self, git: str) -> Self:
        """Return this artefact with the commit of the code noted in its provenance."""
        noted = copy.copy(self)
        object.__setattr__(noted, "provenance", replace(self.provenance, git=git))
        return noted

    @property
    def manifest(self) -> dict[str, Any]:
        """All that ``manifest.json`` holds: everything but frames and tensors."""
        provenance = {f.name: getattr(self.provenance, f.name) for f in fields(Provenance)}
        return self._manifest | {"fingerprint": self.fingerprint, "provenance": provenance}

    def save(self, folder: Path) -> None:
        """Write the artefact to a new folder, all or nothing.

        The files are written and synced beside the target and renamed into place, so a crash or a full disk
        leaves no folder that could be read by mistake.

        Raises
        ------
        ArtifactError
            The folder holds something already.
        OSError
            The disk is full or not writable; nothing stands at ``folder``.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArtifactError(f"{folder}: will not overwrite what stands there; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            self._write(draft)
            draft.rename(folder)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise ArtifactError(
                    f"{folder}: another process wrote there first; name a new folder"
                ) from error
            raise
        _sync(folder.parent)

    def _write(self, folder: Path) -> None:
        for name, data in self._payload.items():
            _write_synced(folder / name, data)
        for name, part in self.parts.items():
            (folder / name).mkdir()
            part._write(folder / name)
        text = json.dumps(self.manifest, indent=1, sort_keys=True, default=dict)
        _write_synced(folder / "manifest.json", text.encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read an artefact of this kind back, checking kind, version, every digest and every invariant.

        Raises
        ------
        ArtifactError
            No artefact, another kind, another format version, or a file that was changed after it was written.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest["kind"] != cls.kind():
            raise ArtifactError(
                f"{folder}: holds the kind {manifest['kind']}, the kind {cls.kind()} is wanted here"
            )
        if manifest["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"{folder}: format version {manifest['format_version']}, this sidflow reads {FORMAT_VERSION}; "
                "run the stage that made it again"
            )
        values = dict(manifest["fields"])
        for name, digest in manifest["digests"].items():
            try:
                data = (folder / name).read_bytes()
            except FileNotFoundError:
                raise ArtifactError(f"{folder}: {name} is missing; the copy is incomplete") from None
            if hashlib.sha256(data).hexdigest() != digest:
                raise ArtifactError(f"{folder}: {name} is not what was written (digest differs)")
            stem, suffix = name.rsplit(".", 1)
            values[stem] = (
                pl.read_parquet(BytesIO(data)) if suffix == "parquet" else safetensors.torch.load(data)
            )
        kinds = get_type_hints(cls)
        for name in manifest["parts"]:
            values[name] = kinds[name].load(folder / name)
        unknown = sorted(values.keys() ^ ({f.name for f in fields(cls)} - {"provenance"}))
        if unknown:
            raise ArtifactError(
                f"{folder}: manifest and {cls.kind()} disagree on the fields {unknown}, as versions of sidflow do; "
                "run the stage that made it again"
            )
        artifact = cls(**values, provenance=Provenance(**manifest["provenance"]))
        if artifact.fingerprint != manifest["fingerprint"]:
            raise ArtifactError(
                f"{folder}: manifest.json was changed after it was written (fingerprint differs)"
            )
        return artifact


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read an artefact's manifest without its payload.

    Raises
    ------
    ArtifactError
        The folder is missing or holds no artefact.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no artefact here (no manifest.json)") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}") from error
    missing = {"kind", "format_version", "fields", "digests", "parts", "fingerprint", "provenance"} - set(
        manifest
    )
    if missing:
        raise ArtifactError(f"{path}: not a sidflow manifest, {sorted(missing)} are missing")
    return dict(manifest)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
