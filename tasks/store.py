"""Where artefacts are kept: a folder named by its content on one machine, Flyte's bucket on a cluster."""

import os
from contextlib import suppress
from pathlib import Path

from flytekit import FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider

from components.folders import Artifact, ArtifactError, read_manifest
from tasks.home import home
from tasks.origin import commit

_uploaded: dict[tuple[str, str], str] = {}
"""Addresses in a bucket, by its prefix and fingerprint: what this process uploaded is not uploaded again."""


def is_remote(address: str) -> bool:
    """Say whether an address is not a folder of this machine."""
    return "://" in address and not address.startswith("file://")


def local(address: str) -> Path:
    """Return the folder that a local address, with or without ``file://``, names."""
    return Path(address.removeprefix("file://"))


def stored_at(kind: str, fingerprint: str) -> Path:
    """Return the folder of an artefact in the local store, whether it is there or not."""
    return home() / "artifacts" / kind / fingerprint[:16]


def keep(artifact: Artifact) -> Path:
    """Save an artefact in the local store, unless equal content is there already, and return its folder.

    Raises
    ------
    OSError
        The disk is full or not writable; nothing is left behind.
    """
    folder = stored_at(artifact.kind(), artifact.fingerprint)
    if not (folder / "manifest.json").exists():
        try:
            _signed(artifact).save(folder)
        except ArtifactError:  # another process saved the same content a moment earlier
            if read_manifest(folder)["fingerprint"] != artifact.fingerprint:
                raise
    with suppress(PermissionError):  # a store that others write
        os.utime(folder)  # made again: newest first is a useful order for people
    return folder


def publish(artifact: Artifact, files: FileAccessProvider | None = None) -> str:
    """Put an artefact where this execution keeps its outputs and return its address.

    On one machine that is the local store; where Flyte's raw outputs go to a bucket, it is there, and one process
    uploads equal content once.

    Parameters
    ----------
    artifact : Artifact
        What to keep.
    files : FileAccessProvider, optional
        Flyte's access to files; that of the current context.

    Raises
    ------
    OSError
        The disk is full or not writable; nothing is left behind.
    """
    files = files or FlyteContextManager.current_context().file_access
    if not files.is_remote(files.raw_output_prefix):
        return str(keep(artifact))
    key = (str(files.raw_output_prefix), artifact.fingerprint)
    if key not in _uploaded:
        draft = Path(files.get_random_local_directory())
        _signed(artifact).save(draft)
        _uploaded[key] = str(files.put_raw_data(str(draft)))
    return _uploaded[key]


def fetch(address: str, files: FileAccessProvider | None = None) -> Path:
    """Return a folder of this machine with what lies at an address, downloading it from a bucket."""
    if not is_remote(address):
        return local(address)
    files = files or FlyteContextManager.current_context().file_access
    copy = str(files.get_random_local_directory())
    files.get_data(address, copy, is_multipart=True)
    return Path(copy)


def _signed(artifact: Artifact) -> Artifact:
    """Note the commit of the code with an artefact that does not know it."""
    return artifact.made_by(artifact.provenance.git or commit())
