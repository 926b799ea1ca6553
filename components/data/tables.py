"""Named columns out of csv and parquet files."""

import csv
from collections.abc import Iterator
from typing import Any

import polars as pl

from components.data.files import Fetched, gather, numbered_lines
from components.data.raw import DataError, Malformed

CSV_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def read_columns(
    file: Fetched, columns: dict[str, str | None], separator: str, malformed: Malformed
) -> tuple[pl.DataFrame, int]:
    """Read some columns of a table under the names of their roles.

    Parameters
    ----------
    file : Fetched
        A file that ends in .csv, .tsv (both also .gz) or .parquet.
    columns : dict
        Role to the column's name in the file; null for a role that the file does not have.
    separator : str
        Between the fields of a .csv.
    malformed : {"fail", "skip"}
        What becomes of csv lines with another number of fields than the header, bad quotes or bad UTF-8.

    Returns
    -------
    table : pl.DataFrame
        One column a role, text if it came from csv and null where the file has none, and ``order`` (u64): the
        line in a csv, the row, from 1, in a parquet file.
    skipped : int
        Number of lines left out.

    Raises
    ------
    DataError
        Another ending, a missing or doubled column, a damaged file, or a malformed line.
    """
    named = {role: column for role, column in columns.items() if column is not None}
    if file.name.endswith(CSV_ENDINGS):
        table, ragged = _read_csv(file, named, "\t" if ".tsv" in file.name else separator, malformed)
    elif file.name.endswith(".parquet"):
        table, ragged = _read_parquet(file, named), 0
    else:
        raise DataError(f"{file.name}: a table ends in .parquet, {', '.join(CSV_ENDINGS)}")
    absent = [pl.lit(None, pl.String).alias(role) for role, column in columns.items() if column is None]
    return table.with_columns(absent), ragged


def _read_parquet(file: Fetched, named: dict[str, str]) -> pl.DataFrame:
    try:
        _check_columns(file.name, list(named.values()), list(pl.read_parquet_schema(file.path)))
        table = pl.read_parquet(file.path, columns=list(dict.fromkeys(named.values())))
    except pl.exceptions.ComputeError as error:
        raise DataError(f"{file.name}: not a whole parquet file ({error}); fetch it again") from error
    return table.select(
        *(pl.col(column).alias(role) for role, column in named.items()),
        pl.int_range(1, pl.len() + 1, dtype=pl.UInt64).alias("order"),
    )


def _read_csv(
    file: Fetched, named: dict[str, str], separator: str, malformed: Malformed
) -> tuple[pl.DataFrame, int]:
    records = _csv_records(file, separator)
    _, header = next(records, (0, []))
    if isinstance(header, Exception):
        raise DataError(f"{file.name} line 1: the header cannot be read: {header}")
    width = len(header)
    _check_columns(file.name, list(named.values()), header)
    places = [header.index(column) for column in named.values()]

    def parse(number: int, record: list[str] | Exception) -> tuple[Any, ...]:
        if isinstance(record, Exception):
            raise ValueError(str(record))
        if len(record) != width:
            raise ValueError(f"{len(record)} fields, the header has {width}")
        return (*(record[place] for place in places), number)

    schema = pl.Schema({role: pl.String for role in named} | {"order": pl.UInt64})
    return gather(records, parse, schema, file.name, malformed)


def _csv_records(file: Fetched, separator: str) -> Iterator[tuple[int, list[str] | Exception]]:
    """Yield (line number, fields), or an error in place of the fields, so that reading can go on after it."""
    number = 0

    def decode(numbered: tuple[int, bytes]) -> str:
        nonlocal number
        number, line = numbered
        return line.decode("utf-8-sig" if number == 1 else "utf-8")

    # map, unlike a generator, goes on after an exception.
    reader = csv.reader(map(decode, numbered_lines(file)), delimiter=separator, strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except (csv.Error, UnicodeDecodeError) as error:
            yield number, error
        else:
            if record:
                yield number, record


def _check_columns(name: str, wanted: list[str], found: list[str]) -> None:
    missing = [column for column in wanted if column not in found]
    if missing:
        raise DataError(
            f"{name}: no column {missing[0]!r}; the file has {found}; name its columns in the configuration"
        )
    twice = [column for column in wanted if found.count(column) > 1]
    if twice:
        raise DataError(f"{name}: the header names {twice[0]!r} twice; rename one of them")
