"""A parquet file of histories becomes a parquet file of answers, a part of the rows at a time."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from components.config import Config
from components.recommenders.serving import ANSWER, BundleRanker, RequestError, check_histories


class ScoreConfig(Config):
    """How a file of histories is scored."""

    k: int = Field(10, ge=1)
    """Length of the lists."""
    exclude_seen: bool = True
    """Leave out the items of each history."""
    decode: Literal["beam", "exact"] = "beam"
    """Beam search, or the scores of all items where the recommender has them."""
    rows: int = Field(4096, ge=1)
    """Rows that are read, ranked and written at once; sets the memory, not the answers."""


class Scored(NamedTuple):
    """What a file of histories held."""

    rows: int
    """Histories."""
    entries: int
    """Entries of all histories."""
    ignored: int
    """Of these: ids that the catalogue lacks, and nulls."""
    popular: int
    """Histories without any known item, answered by popularity."""


def score_file(
    ranker: BundleRanker,
    source: Path,
    target: Path,
    config: ScoreConfig,
    progress: Callable[[str], None] = lambda _: None,
) -> Scored:
    """Answer every history of a parquet file; memory is that of ``config.rows`` rows, however long the file.

    Parameters
    ----------
    ranker : BundleRanker
        What answers.
    source : Path
        Parquet with a column ``history`` (lists of raw item ids, oldest first); other columns are kept as they are.
    target : Path
        Parquet to write: the columns of ``source``, then those of ``BundleRanker.recommend``, in the order of the rows.
        It stands there whole or not at all.
    config : ScoreConfig
        What to answer.
    progress : callable
        Gets a line of text about ten times, and at the end.

    Raises
    ------
    ValueError
        ``source`` is no parquet, has no column ``history`` or one of another type, or has a column of the answer
        already; or the model cannot answer as ``config`` asks. The message names the file.
    OSError
        The disk is full or not writable; nothing stands at ``target``.
    """
    parquet = _open(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    draft = Path(name)
    try:
        with parquet, os.fdopen(descriptor, "wb") as file:
            scored = _score(ranker, parquet, file, config, progress)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.rename(target)
    except RequestError as error:
        raise ValueError(f"{source}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return scored


def _open(source: Path) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: not a parquet file that can be read: {error}") from error
    names = parquet.schema_arrow.names
    problem = ""
    if "history" not in names:
        problem = f"no column history among {names}; it holds one list of item ids a row"
    elif clash := [name for name in ANSWER if name in names]:
        problem = f"columns {clash} are what scoring adds; rename them"
    if problem:
        parquet.close()
        raise ValueError(f"{source}: {problem}")
    return parquet


def _score(
    ranker: BundleRanker,
    parquet: pq.ParquetFile,
    file: BinaryIO,
    config: ScoreConfig,
    progress: Callable[[str], None],
) -> Scored:
    total, scored = max(1, parquet.metadata.num_rows), Scored(0, 0, 0, 0)
    # Parts of the file's own arrow table: columns that are kept do not pass through another library's types.
    empty = parquet.schema_arrow.empty_table()
    with pq.ParquetWriter(file, _answered(ranker, empty, config)[0].schema, compression="zstd") as writer:
        for batch in parquet.iter_batches(batch_size=config.rows):
            table, figures = _answered(ranker, pa.Table.from_batches([batch]), config)
            writer.write_table(table)
            before, scored = scored, Scored(*map(sum, zip(scored, figures, strict=True)))
            if scored.rows * 10 // total > before.rows * 10 // total:
                progress(f"{scored.rows:,} of {total:,} rows")
    return scored


def _answered(ranker: BundleRanker, table: pa.Table, config: ScoreConfig) -> tuple[pa.Table, Scored]:
    """Return a table with its answers beside it, and what it held."""
    looked_up = ranker.look_up(check_histories(pl.Series("history", table["history"])))
    answer = ranker.answer(looked_up, config.k, exclude_seen=config.exclude_seen, decode=config.decode)
    for name in ANSWER:
        table = table.append_column(name, answer[name].to_arrow())
    given, known = looked_up.given, looked_up.known
    figures = (len(given), given.sum(), (given - known).sum(), (known == 0).sum())
    return table, Scored(*map(int, figures))
