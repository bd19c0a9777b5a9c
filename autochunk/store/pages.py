"""Pages of an SQLite file that nothing leads to any more, and the rows on them.

Where the first page is damaged, or another that leads to others, SQLite finds nothing of what lies
behind. What is left tells enough: a page of a table is known by its first byte, and one that no
other names is the top of a tree, which SQLite itself reads under a first page that is made for it.
By "Database File Format", https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

TABLE = "found"
_MAKE_TABLE = f"CREATE TABLE {TABLE} (key TEXT, value BLOB)"

_MAGIC = b"SQLite format 3\0"
_USUAL_SIZE = 4096  # of pages, in files that were made without another in mind
_INTERIOR, _LEAF = 5, 13  # first bytes of a table's pages
_TREES = (2, _INTERIOR, 10, _LEAF)  # and of an index's


def lone_trees(content: bytes) -> Iterator[sqlite3.Connection]:
    """For each tree of rows that no page leads to, a database whose ``TABLE`` it is.

    Each is to be used before the next is asked for. Trees that are whole are among them: nothing
    but the first page names their tops.
    """
    size = _page_size(content)
    pages = [content[start : start + size] for start in range(0, len(content) - size + 1, size)]
    tops = _tops(pages)
    if not tops:
        return
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as file:
        file.deserialize(_first_page(size, len(pages)) + b"".join(pages[1:]))
        for top in tops:
            file.execute("PRAGMA writable_schema = ON")
            file.execute("UPDATE sqlite_master SET rootpage = ?", (top,))
            file.execute("PRAGMA writable_schema = RESET")
            yield file


def _page_size(content: bytes) -> int:
    """By the file's header, unless that is damaged."""
    size = int.from_bytes(content[16:18]) if content.startswith(_MAGIC) else 0
    size = 65_536 if size == 1 else size
    return size if size >= 512 and size.bit_count() == 1 else _USUAL_SIZE


def _first_page(size: int, pages: int) -> bytes:
    """Of a file of so many pages with one table and nothing deleted."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as file:
        file.execute(f"PRAGMA page_size = {size}")
        file.execute(_MAKE_TABLE)
        page = file.serialize()[:size]
    return page[:28] + pages.to_bytes(4) + page[32:]


def _tops(pages: list[bytes]) -> list[int]:
    """Numbers, from 1, of a table's pages that no other page leads to."""
    free = {number for page in pages[1:] for number in _freed(page, len(pages))}
    used = {
        number: page for number, page in enumerate(pages, 1) if number > 1 and number not in free
    }
    led_to = {child for page in used.values() if page[0] == _INTERIOR for child in _children(page)}
    return [
        number
        for number, page in used.items()
        if page[0] in (_INTERIOR, _LEAF) and number not in led_to
    ]


def _children(page: bytes) -> Iterator[int]:
    """The pages that an interior page leads to."""
    cells = min(int.from_bytes(page[3:5]), len(page) // 2 - 6)
    starts = [int.from_bytes(page[at : at + 2]) for at in range(12, 12 + 2 * cells, 2)]
    for start in (*starts, 8):
        yield int.from_bytes(page[start : start + 4])


def _freed(page: bytes, count: int) -> list[int]:
    """The pages that were deleted, where a page is a list of such; what is on them is no more.

    No page of text passes for one: the number of entries would be in the thousands of millions.
    """
    following, entries = int.from_bytes(page[:4]), int.from_bytes(page[4:8])
    if page[0] in _TREES or following > count or entries > len(page) // 4 - 2:
        return []
    found = [int.from_bytes(page[at : at + 4]) for at in range(8, 8 + 4 * entries, 4)]
    return found if all(1 < number <= count for number in found) else []
