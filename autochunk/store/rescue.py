"""SQLite files as such: opened without surprises, looked over for damage, and mended.

To mend one is to keep it under another name and to bring over whatever is whole in it. Nothing here
knows what a profile is. A damaged file is copied aside and its content replaced in place, in one
transaction: were it renamed, programs that have it open would take the new file's journal for the
old one's. Whoever is killed in between leaves the damage for the next one to find.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from autochunk.store import pages
from autochunk.text import one_line

# How many rows at most are looked for one by one between damages: it takes some seconds. There may
# be many lone trees.
_MOST_LOOK_UPS, _OF_A_LONE_TREE = 200_000, 10_000


class Row(NamedTuple):
    """One row as the bytes in the file: texts need not be UTF-8 there."""

    rowid: int
    key: bytes | None
    value: bytes | None


class Mended(NamedTuple):
    """What was done about a damaged file.

    Attributes:
      damage: what was wrong.
      aside: where it is kept.
      rows: how many were rescued, by table.
    """

    damage: str
    aside: Path
    rows: dict[str, int]


_MAKE_TABLE = 'CREATE TABLE IF NOT EXISTS "{}" (key TEXT PRIMARY KEY, value BLOB)'
ROW = "rowid, CAST(key AS BLOB), CAST(value AS BLOB)"


def connect(path: Path, seconds: float) -> sqlite3.Connection:
    """Opens a file that exists, and waits up to ``seconds`` for others' locks.

    Opened for writing but never created: after a crash in mid-commit the first to open the file
    must be able to roll it back.
    """
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=seconds, isolation_level=None
    )


def make_tables(path: Path, tables: Iterable[str], seconds: float) -> None:
    """Makes what sqlitedict would make at its first use.

    It would with ``synchronous`` off, so that a power cut may cost the file.
    """
    with contextlib.closing(connect(path, seconds)) as file:
        for table in tables:
            file.execute(_MAKE_TABLE.format(table))


def is_damage(error: BaseException) -> bool:
    """Whether SQLite said that the file is damaged, or no database."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def must_reopen(error: BaseException) -> bool:
    """Whether a write failed, without effect, because of another program.

    It held the file for long, or put another one in its place.
    """
    moved = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_DBMOVED
    return moved or is_busy(error)


def is_busy(error: BaseException) -> bool:
    """Whether SQLite waited in vain for another program's lock."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _code(error: BaseException) -> int:
    """SQLite's primary error code, without what extended codes add; 0 for another error."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def damage(path: Path, seconds: float, check: str = "quick_check") -> str:
    """What is wrong with a file, in words; empty for a sound one.

    ``integrity_check`` also compares indexes with tables, and takes several times as long.
    """
    try:
        with contextlib.closing(connect(path, seconds)) as file:
            (verdict,) = file.execute(f"PRAGMA {check}(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return one_line(str(error))
    return "" if verdict == "ok" else one_line(" ".join(str(verdict).split()))


def mend(
    path: Path, tables: Iterable[str], whole: Callable[[str, Row], bool], seconds: float
) -> Mended | None:
    """Keeps a damaged file's content under another name, and only its whole rows in the file.

    None if the file is sound.

    Args:
      path: the file; of a symbolic link, what it leads to.
      tables: those to rescue, each of a column ``key`` and a column ``value``.
      whole: whether a row of a table is to be kept.
      seconds: how long to wait for others: for their locks, and for one that is mending the file
        already.

    Raises:
      OSError, sqlite3.Error: it could not be done; the file is as it was.
    """
    tables, path = tuple(tables), path.resolve()
    with _alone(path.parent, seconds):
        wrong = damage(path, seconds, "integrity_check")
        if not wrong:
            return None
        with _held(path, seconds) as (file, content):
            kept = _whole_rows(file, content, tables, whole)
            aside = _keep(path, content)
            try:
                _refill(file, path, kept, seconds)
            except BaseException:
                if path.read_bytes() == content:  # nothing was changed, and nothing need be kept
                    aside.unlink()
                raise
    return Mended(wrong, aside, {table: len(kept[table]) for table in tables})


def _whole_rows(
    file: sqlite3.Connection,
    content: bytes,
    tables: Iterable[str],
    whole: Callable[[str, Row], bool],
) -> dict[str, list[Row]]:
    """What is to be kept: what SQLite finds, and what lies where nothing leads to any more.

    Of the latter it is not known which table it was of, but by what it is.
    """
    kept = {table: [row for row in _rows(file, table) if whole(table, row)] for table in tables}
    known = {table: {row.key for row in rows} for table, rows in kept.items()}
    for tree in pages.lone_trees(content):
        for row in _rows(tree, pages.TABLE, _OF_A_LONE_TREE):
            table = next((table for table in kept if whole(table, row)), None)
            if table is not None and row.key not in known[table]:
                known[table].add(row.key)
                kept[table].append(row)
    return kept


@contextlib.contextmanager
def _alone(folder: Path, seconds: float) -> Iterator[None]:
    """Lets one at a time, of all processes and threads, mend a file of a folder.

    It locks the folder, because to open and close the file itself would drop SQLite's locks on it.

    Raises:
      OSError: the lock was not had in time, or this system has none.
    """
    if sys.platform == "win32":
        raise OSError("a damaged file is set aside on POSIX systems only")
    import fcntl

    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another process has been rescuing a store in {folder} for {seconds:g} s"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _held(path: Path, seconds: float) -> Iterator[tuple[sqlite3.Connection, bytes]]:
    """A damaged file and its bytes, while others are kept from it.

    Where they cannot be, the damage to its first page keeps them from it.
    """
    with contextlib.closing(connect(path, seconds)) as file:
        content = _exclusive(file)
        if content is not None:
            yield file, content
            return
    # Not while SQLite has the file open here: closing it drops all locks that this process has on
    # it.
    content = path.read_bytes()
    with contextlib.closing(connect(path, seconds)) as file:
        with contextlib.suppress(sqlite3.Error):
            file.execute("PRAGMA writable_schema = ON")  # reads a file that was cut short
        yield file, content


def _exclusive(file: sqlite3.Connection) -> bytes | None:
    """Locks a file for as long as it is open; its bytes, or None where damage prevents it."""
    try:
        for statement in ("PRAGMA locking_mode = EXCLUSIVE", "BEGIN EXCLUSIVE", "ROLLBACK"):
            file.execute(statement)
        return file.serialize()
    except sqlite3.DatabaseError as error:
        if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR):
            raise
        return None


def _rows(file: sqlite3.Connection, table: str, most: int = _MOST_LOOK_UPS) -> list[Row]:
    """Rows of a table that can still be read.

    From the front to the first damage, from the back to the last, and one by one between.
    """
    found: dict[int, Row] = {}
    select = f'SELECT {ROW} FROM "{table}" NOT INDEXED'
    low = _scan(file, f"{select} ORDER BY rowid", found)
    high = _scan(file, f"{select} ORDER BY rowid DESC", found)
    between = range(low + 1, min(high, low + most)) if low and high else ()
    for rowid in {*between, *_indexed(file, table)} - found.keys():
        _scan(file, f"{select} WHERE rowid = {rowid}", found)
    return [found[rowid] for rowid in sorted(found)]


def _scan(file: sqlite3.Connection, select: str, found: dict[int, Row]) -> int | None:
    """Adds rows up to the first that cannot be read; the last rowid that could."""
    last = None
    with contextlib.suppress(sqlite3.Error):
        for values in file.execute(select):
            row = Row(*values)
            found[row.rowid] = row
            last = row.rowid
    return last


def _indexed(file: sqlite3.Connection, table: str) -> set[int]:
    """What rows there are by the index of keys, as far as it can be read.

    That is all that is known of those beyond damage at either end of the table.
    """
    rowids: set[int] = set()
    select = f'SELECT rowid FROM "{table}" INDEXED BY "sqlite_autoindex_{table}_1"'
    for order in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.Error):
            for (rowid,) in file.execute(f"{select} ORDER BY key {order}"):
                rowids.add(rowid)
    return rowids


def _keep(path: Path, content: bytes) -> Path:
    """A file beside ``path`` with its bytes, owner and permissions, under a name that was free."""
    name = f"{path.name}.damaged-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    aside = next(beside for beside in map(path.with_name, names) if not beside.exists())
    handle, status = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), path.stat()
    try:
        with open(handle, "wb") as file:
            aside.chmod(status.st_mode & 0o777)
            with contextlib.suppress(PermissionError):  # root may mend a user's file
                os.chown(aside, status.st_uid, status.st_gid)
            file.write(content)
            file.flush()
            os.fsync(handle)
    except BaseException:
        aside.unlink()
        raise
    return aside


def _refill(
    file: sqlite3.Connection, path: Path, rows: Mapping[str, Iterable[Row]], seconds: float
) -> None:
    """Replaces all that is in a file that is held."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as new:
        _fill(new, rows)
        try:
            new.backup(file)
            return
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
    # Not even its first page is a database's. Of no bytes it is an empty one, also for those who
    # have it open and wait.
    file.close()
    os.truncate(path, 0)
    with contextlib.closing(connect(path, seconds)) as empty:
        _fill(empty, rows)


def _fill(file: sqlite3.Connection, rows: Mapping[str, Iterable[Row]]) -> None:
    """Adds rows to the tables of a sound file, beside what others may have stored in it by now."""
    for table, kept in rows.items():
        file.execute(_MAKE_TABLE.format(table))
        insert = f'INSERT OR IGNORE INTO "{table}" VALUES (CAST(? AS TEXT), CAST(? AS TEXT))'
        file.execute("BEGIN IMMEDIATE")
        file.executemany(insert, [(row.key, row.value) for row in kept])
        file.execute("COMMIT")
