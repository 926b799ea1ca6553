"""From a file as stored to numbered records: fetching, digest, gzip, and what becomes of malformed ones."""

import gzip
import hashlib
import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import polars as pl
from pydantic import Field

from components.config import Config
from components.data.raw import DataError, Malformed

BLOCK = 200_000
R = TypeVar("R")


class SourceFile(Config):
    """One input file."""

    path: str = Field(min_length=1)
    """Local path, or a URI that fsspec opens (``s3://...``); a name ending in .gz is unpacked."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Digest that the stored bytes must have; null takes any."""


class Fetched(NamedTuple):
    """A source file that lies on this machine."""

    path: Path
    record: dict[str, Any]
    """``{"name", "sha256", "bytes"}``; the name has no folder, so equal files count as equal anywhere."""

    @property
    def name(self) -> str:
        """Name in messages and in the log."""
        return str(self.record["name"])


@contextmanager
def fetch(file: SourceFile) -> Iterator[Fetched]:
    """Bring a file to this machine if it is elsewhere, hash it, and compare the digest with the pinned one.

    Raises
    ------
    FileNotFoundError
        No such file.
    DataError
        The digest is not the pinned one.
    """
    if "://" not in file.path:
        yield _hashed(Path(file.path), file)
        return
    name = file.path.rsplit("/", 1)[-1]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        try:
            with fsspec.open(file.path, "rb") as remote, copy.open("wb") as local:
                shutil.copyfileobj(remote, local, length=1 << 20)
        except FileNotFoundError:
            raise FileNotFoundError(f"{file.path}: no such file") from None
        yield _hashed(copy, file)


def _hashed(path: Path, file: SourceFile) -> Fetched:
    if not path.is_file():
        raise FileNotFoundError(f"{file.path}: no such file (looked at {path.absolute()})")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if file.sha256 not in (None, digest):
        raise DataError(
            f"{file.path}: sha256 is {digest}, pinned is {file.sha256}; "
            "the file was changed, or the pin is of another"
        )
    return Fetched(path, {"name": path.name, "sha256": digest, "bytes": path.stat().st_size})


def numbered_lines(file: Fetched) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a plain or gzipped file, without holding it in memory.

    Raises
    ------
    DataError
        The gzip is cut off or damaged.
    """
    number = 0
    try:
        with _unpacked(file.path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file.name}: the gzip is cut off or damaged somewhere after line {number} ({error}); "
            "fetch the file again"
        ) from error


def _unpacked(path: Path) -> io.BufferedReader:
    if path.suffix != ".gz":
        return path.open("rb")
    return io.BufferedReader(gzip.open(path), 1 << 16)


def gather(
    records: Iterator[tuple[int, R]],
    parse: Callable[[int, R], tuple[Any, ...]],
    schema: pl.Schema,
    name: str,
    malformed: Malformed,
    unit: str = "line",
) -> tuple[pl.DataFrame, int]:
    """Parse numbered records into a frame, block by block.

    Parameters
    ----------
    records : iterator of (int, record)
        Line numbers, or numbers of another unit, from 1, and what stands there.
    parse : callable
        Turns number and record into a row of ``schema``; raises ``ValueError`` where the record is malformed.
    schema : pl.Schema
        Columns of the result.
    name : str
        File name for messages.
    malformed : {"fail", "skip"}
        Stop at the first malformed record, or leave such records out and count them.
    unit : str
        What the numbers count, for messages.

    Returns
    -------
    frame : pl.DataFrame
        The rows, in order.
    skipped : int
        Number of records left out.

    Raises
    ------
    DataError
        A record is malformed and ``malformed`` is "fail".
    """
    frames, rows, skipped = [schema.to_frame()], [], 0
    for number, record in records:
        try:
            rows.append(parse(number, record))
        except ValueError as error:
            if malformed == "fail":
                raise DataError(
                    f"{name} {unit} {number}: {error}; "
                    "mend it, or set malformed to skip to count and leave out such"
                ) from error
            skipped += 1
        if len(rows) == BLOCK:
            frames.append(_frame(rows, schema))
            rows = []
    frames.append(_frame(rows, schema))
    return pl.concat(frames), skipped


def _frame(rows: list[tuple[Any, ...]], schema: pl.Schema) -> pl.DataFrame:
    columns = zip(*rows, strict=True) if rows else ([] for _ in schema)
    return pl.DataFrame([pl.Series(n, c, t) for (n, t), c in zip(schema.items(), columns, strict=True)])
