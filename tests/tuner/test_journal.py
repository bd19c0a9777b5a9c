"""Journals that were damaged, by those who were killed while they wrote."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from factories import make_device, make_measurement, start_python
from hypothesis import given
from optuna.trial import TrialState

from autochunk.errors import StorageError
from autochunk.plan import Plan
from autochunk.tuner.study import Journals, Storage, Study, open_private
from autochunk.tuner.study.journal import JournalFile, operations
from autochunk.workload import Workload

WORKLOAD = Workload.parse("t=512,h=4,k=8")
PLANS = [Plan("xla", 16.0), Plan("xla_rows", 16.0), Plan("dense", None)]
WHOLE = b'{"op_code":2,"worker_id":"x","study_id":0,"user_attr":{"found":1}}\n'
TORN = WHOLE[:35]


def open_study(journal: Path) -> Study:
    return Storage(journal).study(make_device(), WORKLOAD, "quick")


def open_own(journal: Path) -> Study:
    return open_private(journal).study(make_device(), WORKLOAD, "quick")


def measure(study: Study, plan: Plan) -> None:
    claim = study.claim([plan])
    assert claim is not None
    with claim:
        claim.done([make_measurement(plan.implementation, plan.max_chunk_size_mb)], None)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a torn end": lambda content: content + TORN,
    "a torn end of one byte": lambda content: content + b"{",
    "a torn line": lambda content: content + TORN + b"\n",
    "a torn line and a whole one": lambda content: content + TORN + WHOLE,
    "two whole ones in a line": lambda content: content[:-1] + WHOLE,
    "no end": lambda content: content[:-1],
    "a blank line": lambda content: content.replace(b"\n", b"\n\n", 1),
    "blanks at the end": lambda content: content + b"\n \n\r\n",
    "blanks at the start": lambda content: b"\n" + content,
    "zeros at the end": lambda content: content + b"\0" * 64,
    "a line of zeros": lambda content: b"\0" * 64 + b"\n" + content,
    "something else": lambda content: b"\xff\xfe{]}\n[1]\n" + content,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
@pytest.mark.parametrize("reopen", [open_study, open_own], ids=["shared", "own"])
def test_a_damaged_journal_goes_on(
    damage: Callable[[bytes], bytes], reopen: Callable[[Path], Study], tmp_path: Path
) -> None:
    """Whoever reads it has what was written whole, and whoever writes to it adds to that.

    Those who had it open before the damage see the same as those who open it later.
    """
    journal = tmp_path / "journal"
    before = open_study(journal)
    measure(before, PLANS[0])
    content = journal.read_bytes()
    at_the_end = damage(content).startswith(content)
    journal.write_bytes(damage(content))
    after = reopen(journal)
    assert list(after.measured()) == PLANS[:1]
    assert after._study.user_attrs.get("found") == (1 if WHOLE in damage(b"\n") else None)
    measure(after, PLANS[1])
    if at_the_end:
        measure(before, PLANS[2])
        assert before.measured() == after.measured()
    assert open_study(journal).measured() == after.measured()
    assert journal.read_bytes().startswith(damage(content))
    assert Storage(journal, make=False).profiles() == ([], 1)


_LOGS = st.builds(
    lambda number, attribute: {"op_code": number, "worker_id": "w", "user_attr": attribute},
    st.integers(0, 9),
    st.dictionaries(st.text(max_size=3), st.text() | st.floats(allow_nan=False) | st.none()),
)


@given(st.lists(st.tuples(_LOGS, st.integers(0, 40) | st.none()), max_size=6))
def test_every_whole_operation_in_a_line_is_found(pieces: list[tuple[Any, int | None]]) -> None:
    """In its order, whatever was torn before and after it; of what is torn nothing is."""
    texts = [json.dumps(log, separators=(",", ":"))[:length] for log, length in pieces]
    whole = [log for (log, _), text in zip(pieces, texts, strict=True) if text.endswith("}}")]
    assert operations("".join(texts).encode() + b"\n") == whole


@given(st.binary(max_size=200))
def test_a_line_of_anything_is_read(line: bytes) -> None:
    """No bytes are an error; what is found are objects."""
    assert all("op_code" in one for one in operations(line))
    operations(b'{"op_code":' + line)


_WRITER = """
import sys
from pathlib import Path
from autochunk.tuner.study.journal import JournalFile
journal = JournalFile(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    journal.append_logs([{"op_code": 4, "worker_id": sys.argv[2], "number": number}] * 2)
"""


def test_writers_go_on_beside_those_that_are_killed(tmp_path: Path) -> None:
    """Three write at once, while halves of lines come from others; all that is whole is read.

    Each writer's operations are in its order, and a reader who looked all the time has them all.
    """
    path = tmp_path / "journal"
    path.write_bytes(WHOLE)
    reader = JournalFile(path)
    writers = [start_python(_WRITER, path, name, 60) for name in "abc"]
    chance = random.Random(1)
    seen: list[dict[str, Any]] = []
    while any(writer.poll() is None for writer in writers):
        with path.open("ab", buffering=0) as file:
            file.write(TORN[: chance.randrange(len(TORN))])
        seen += reader.read_logs(len(seen))
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    seen += reader.read_logs(len(seen))
    assert seen == list(JournalFile(path).read_logs(0))
    for name in "abc":
        mine = [log["number"] for log in seen if log["worker_id"] == name]
        assert mine == sorted([*range(60)] * 2)


def test_a_lock_that_was_taken_away_is_no_error(tmp_path: Path) -> None:
    """A writer that is held up for long finds its lock gone, and has written all the same."""
    path = tmp_path / "journal"
    journal = JournalFile(path)
    with journal._alone():
        path.with_name("journal.lock").unlink()
    journal.append_logs([{"op_code": 4, "worker_id": "a"}])
    assert len(list(journal.read_logs(0))) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"garbage\n\x00\xff\n",
        b'{"op_code": 99, "worker_id": "x"}\n',
        b"[1]\n",
        b"text",
        b"SQLite\0",
    ],
)
def test_a_file_that_is_no_journal(content: bytes, tmp_path: Path) -> None:
    """It is an error of one line, and left as it was."""
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(StorageError, match="is no storage") as error:
        Storage(tmp_path / "journal")
    assert "\n" not in str(error.value)
    assert (tmp_path / "journal").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\n\0\n", b'{"op', TORN])
def test_a_journal_that_was_hardly_begun(content: bytes, tmp_path: Path) -> None:
    """Its first worker was killed with its first line."""
    (tmp_path / "journal").write_bytes(content)
    measure(open_study(tmp_path / "journal"), PLANS[0])
    assert list(open_study(tmp_path / "journal").measured()) == PLANS[:1]


def test_a_journal_of_one_s_own_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    """It saves work, no more."""
    (tmp_path / "journal").write_bytes(b"something else\n")
    assert open_own(tmp_path / "journal").workers() == 0


def test_measurements_that_only_a_newer_version_reads(tmp_path: Path) -> None:
    """They are an error where they are shared; a journal of one's own is begun anew."""
    journals = Journals(tmp_path / "store", make_device(), "quick", None, force=False)
    claim = journals.study(WORKLOAD).claim(PLANS[:1])
    assert claim is not None
    with claim:
        claim._trial.set_user_attr("measurements", ['{"status": "from the future"}'])
        claim._finish(TrialState.PRUNED)
    (journal,) = (tmp_path / "store.unfinished").glob("*.journal")
    with pytest.raises(StorageError, match="newer autochunk; upgrade this one"):
        open_study(journal).measured()
    measure(journals.study(WORKLOAD), PLANS[1])
    assert list(open_study(journal).measured()) == PLANS[1:2]
