"""The SQLite file of a store: tables of texts by key, locks, durability, and what can go wrong.

Nothing here knows what the texts say. sqlitedict is the table format and writes; its pickle default
would run whatever a file tells it to (CVE-2024-35515), so that texts are all it is given. The file
is opened for each operation and closed again, so that nothing is held across a fork.
autocommit=True, because with False a commit that fails leaves sqlitedict waiting for ever; DELETE
journal, because WAL was seen to lose concurrent opens. sqlitedict ignores its ``timeout`` and turns
``synchronous`` off; both are set by pragma on its connection. EXTRA, which outlasts a power cut
right after the commit too, makes the statement that stores a profile 10 times as slow as OFF:
1.4 ms on an SSD, of 3 for a whole ``put``.

Reading goes through sqlite3 itself: sqlitedict waits for ever on a damaged page. A look-up must not
take longer as the store grows, so that only writers look the whole file over first; one that finds
damage sets the file aside and goes on with all rows that are whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlitedict

from autochunk.errors import StoreError, StoreWarning
from autochunk.store import rescue
from autochunk.store.rescue import Row
from autochunk.text import one_line

_BUSY_MILLISECONDS = 30_000
_BRIEF_MILLISECONDS = 2_000

# Conditions on rows.
OF_KEY = "WHERE key = ?"
IN_RANGE = "WHERE key >= ? AND key < ?"
ENDING = f"{IN_RANGE} AND key LIKE '%' || ?"
BEYOND_NEWEST = 'WHERE rowid IN (SELECT rowid FROM "{}" ORDER BY rowid DESC LIMIT -1 OFFSET ?)'
AMONG = "WHERE key IN (SELECT value FROM json_each(?))"  # one statement: sqlitedict commits each
UNCHANGED = "WHERE rowid = ? AND CAST(value AS BLOB) IS ?"

_REPLACE_UNLESS_CHANGED = """
    REPLACE INTO "{table}" (key, value)
    SELECT key, value FROM json_each(?)
    WHERE NOT EXISTS (
        SELECT 1 FROM json_each(?) AS was LEFT JOIN "{table}" AS now ON now.key = was.key
        WHERE hex(now.value) != was.value
    )
"""

_T = TypeVar("_T")

# sqlitedict logs the stack of every failed statement; the same failures reach the caller as
# StoreError.
logging.getLogger("sqlitedict").setLevel(logging.CRITICAL + 1)

# Closing a file drops all locks that SQLite has on it in this process: nobody else may have a file
# open that is being made.
_making = threading.Lock()

# Files whose locks this process has already waited for in vain while it traced.
_given_up: set[Path] = set()


class Database:
    """One file of tables of texts by key, made when something is first stored.

    Every method raises StoreError where the file cannot be read or written.

    Args:
      path: the file.
      tables: their names; of the first it is said how many rows were rescued.
      whole: whether a row of a table is to be kept when a damaged file is mended.
      cure: what a user may do about an error, in words.
      briefly: others' locks are waited for shortly, and once that was in vain no more in this
        process: they may be those of a machine that is gone.
    """

    def __init__(
        self,
        path: Path,
        tables: tuple[str, ...],
        whole: Callable[[str, Row], bool],
        cure: str,
        *,
        briefly: bool = False,
    ) -> None:
        self.path = path
        self._tables = tables
        self._is_whole = whole
        self._cure = cure
        self._briefly = briefly

    # --- Reading ----------------------------------------------------------------------------------

    def rows(self, table: str, where: str = "", *values: str) -> list[Row]:
        """Rows of a table, as of one moment and by key."""
        select = f'SELECT {rescue.ROW} FROM "{table}" {where} ORDER BY key'
        return [Row(*row) for row in self._select(table, select, *values)]

    def keys(self, table: str, where: str = "", *values: str) -> list[bytes | None]:
        """Their keys alone, as bytes: texts need not be UTF-8 in the file."""
        select = f'SELECT CAST(key AS BLOB) FROM "{table}" {where} ORDER BY key'
        return [key for (key,) in self._select(table, select, *values)]

    def count(self, table: str) -> int:
        """How many rows a table has."""
        found = self._select(table, f'SELECT count(*) FROM "{table}"')
        return int(found[0][0]) if found else 0

    def _select(self, table: str, statement: str, *values: str) -> list[Any]:
        """All rows of a query, as of one moment; none where there is no such table, or no file."""
        if not self._exists():
            return []
        with self._errors("read"), contextlib.closing(self._connect()) as file:
            file.execute("BEGIN")
            known = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
            there = file.execute(known, (table,)).fetchone()
            return file.execute(statement, values).fetchall() if there else []

    # --- Writing ----------------------------------------------------------------------------------

    def put(self, table: str, key: str, value: str, *, mend: bool = True) -> None:
        """Stores a row in place of an earlier one.

        Without ``mend`` a damaged file is left where it is, and is a StoreError.
        """
        self._write(table, lambda opened: opened.update({key: value}), mend=mend)

    def replace(
        self,
        table: str,
        rows: Mapping[str, str],
        expected: Mapping[str, bytes],
        *,
        mend: bool = True,
    ) -> int:
        """Stores values by key in place of earlier ones, all or none; how many.

        None unless the value of each key in ``expected`` still is as it says: no bytes where there
        is no row. ``mend`` is as for ``put``.
        """
        statement = _REPLACE_UNLESS_CHANGED.format(table=table)
        was = {key: value.hex().upper() for key, value in expected.items()}  # as hex() writes it
        values = json.dumps(rows), json.dumps(was)
        return self._write(table, lambda opened: _change(opened, statement, *values), mend=mend)

    def delete(
        self, table: str, where: str, values: Callable[[], Iterable[tuple[object, ...]]]
    ) -> int:
        """Deletes rows by a condition, once for each tuple of values in it; how many there were."""
        statement = f'DELETE FROM "{table}" {where}'

        def action(opened: Any) -> int:
            return sum(_change(opened, statement, *each) for each in values())

        return self._write(table, action) if self._exists() else 0

    def check_writable(self) -> None:
        """Raises StoreError if nothing could be stored; mends what is damaged."""
        self._write(self._tables[0], lambda _: None)
        with self._errors("write"), contextlib.closing(self._connect()) as file:
            # the folder must take a journal, too
            for statement in ("BEGIN IMMEDIATE", "PRAGMA user_version = 1", "ROLLBACK"):
                file.execute(statement)

    def _write(self, table: str, action: Callable[[Any], _T], *, mend: bool = True) -> _T:
        """What an action comes to on the table as a sqlitedict.

        Done again where others had the file for long or put a new one in its place.
        """
        deadline = time.monotonic() + self._seconds()
        with self._errors("write"):
            while True:
                self._make()
                if damage := rescue.damage(self.path, self._seconds()):
                    if not mend:
                        raise sqlite3.DatabaseError(f"it is damaged ({damage})")
                    self._mend()
                try:
                    rescue.make_tables(self.path, self._tables, self._seconds())
                    with _table(self.path, table, self._seconds()) as opened:
                        return action(opened)
                except sqlite3.Error as error:
                    # Damage in an index quick_check does not see; who walks into it does.
                    mended = mend and rescue.is_damage(error) and self._mend()
                    busy = rescue.must_reopen(error) and time.monotonic() <= deadline
                    if not mended and not busy:
                        raise

    # --- The file ---------------------------------------------------------------------------------

    def _seconds(self) -> float:
        """How long others' locks are waited for."""
        if not self._briefly:
            return _BUSY_MILLISECONDS / 1000
        return 0.0 if self.path in _given_up else _BRIEF_MILLISECONDS / 1000

    def _connect(self) -> sqlite3.Connection:
        return rescue.connect(self.path, self._seconds())

    def _exists(self) -> bool:
        with self._errors("read"):
            return self.path.exists()

    def _make(self) -> None:
        """Makes the file if there is none.

        For its owner alone; SQLite gives its journal the same permissions.
        """
        path = self.path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _making, contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            path.chmod(0o600)  # whatever the umask

    def _mend(self) -> bool:
        """Sets a damaged file aside and goes on with its whole rows.

        False if the file is sound, as after another process did it.
        """
        mended = rescue.mend(self.path, self._tables, self._is_whole, self._seconds())
        if mended:
            first = self._tables[0]
            warnings.warn(
                f"the profile store {self.path} was damaged ({mended.damage}); it is kept as "
                f"{mended.aside}, and {mended.rows[first]} {first} were rescued from it into a new "
                "store",
                StoreWarning,
                stacklevel=2,
            )
        return mended is not None

    @contextlib.contextmanager
    def _errors(self, task: Literal["read", "write"]) -> Iterator[None]:
        """Says what SQLite and the system say as a StoreError with a cure."""
        try:
            yield
        except StoreError:
            raise
        except (OSError, sqlite3.Error, RuntimeError) as error:
            # sqlitedict's thread has left its connection in one, which would stay open
            traceback.clear_frames(error.__traceback__)
            if self._briefly and rescue.is_busy(error):
                _given_up.add(self.path)
            cure = self._cure
            if rescue.is_damage(error) and task == "read":
                cure = f"`autochunk tune` sets it aside and rescues what is whole in it; or {cure}"
            raise StoreError(
                f"cannot {task} the profile store {self.path}: {one_line(str(error))}; {cure}"
            ) from error


@contextlib.contextmanager
def _table(path: Path, name: str, seconds: float) -> Iterator[Any]:
    """A table as a sqlitedict, closed on leaving."""
    options = {
        "autocommit": True,
        "journal_mode": "DELETE",
        "encode": str,
        "decode": str,
        "outer_stack": False,
    }
    with sqlitedict.SqliteDict(str(path), tablename=name, flag="c", **options) as table:
        table.conn.select_one(f"PRAGMA busy_timeout = {int(1000 * seconds)}")
        table.conn.select_one("PRAGMA synchronous = EXTRA")
        yield table


def _change(table: Any, statement: str, *values: object) -> int:
    """Runs one statement, a transaction of its own; how many rows it stored or deleted."""
    # RETURNING would be asked for rows after the commit, and an error then stops sqlitedict for
    # ever.
    table.conn.select_one(statement, values)
    (count,) = table.conn.select_one("SELECT changes()")
    return int(count)
