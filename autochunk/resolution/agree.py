"""Agreement.

In a program of several JAX processes, what process 0 knows answers "auto" on all of them.

With different plans they would compile different programs and wait without end. So at
its first "auto" process 0 publishes what its layers hold for its device in the key-value store of
JAX's distributed runtime, and every other process waits for that, for a limited time. It is done
once: a store that changes later changes nothing for the processes that run. A program of one
process never comes here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from typing import Any

import autochunk
from autochunk.errors import AgreementError

LIMIT_SECONDS = 120.0
"""How long a process waits for process 0's profiles."""

_PIECE_BYTES = 512 * 2**10  # of what is published; the runtime's messages are not for megabytes


def several_processes() -> bool:
    """Whether this is one of several JAX processes that run one program."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process's profiles are the ones that answer."""
    import jax

    return jax.process_index() == 0


def agreed(topic: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns on process 0 (JSON data), on every process.

    Args:
      topic: names what is agreed upon; every process must ask for the same.
      make: called on process 0 only.

    Raises:
      AgreementError: process 0 did not ask within LIMIT_SECONDS, could not make it, or runs another
        version of autochunk.
    """
    import jax

    client = runtime()
    if is_first():
        _publish(client, topic, make)
    return _receive(client, topic, jax.process_index(), jax.process_count())


def runtime() -> Any:
    """The connection to the program's processes.

    Another one after ``jax.distributed.shutdown`` and a new ``initialize``.
    """
    from jax._src import distributed  # jax has no public name for its key-value store

    return distributed.global_state.client


def _publish(client: Any, topic: str, make: Callable[[], Any]) -> None:
    if _published(client, topic):  # before this process was restarted by itself
        return
    header: dict[str, Any] = {"autochunk": autochunk.__version__}
    try:
        content = gzip.compress(json.dumps(make()).encode(), mtime=0)
    except Exception as error:
        client.key_value_set_bytes(
            _key(topic),
            json.dumps(header | {"error": f"{type(error).__name__}: {error}"[:1000]}).encode(),
        )
        raise
    pieces = [
        content[start : start + _PIECE_BYTES] for start in range(0, len(content), _PIECE_BYTES)
    ]
    for number, piece in enumerate(pieces):
        # a process that died here may have left some
        client.key_value_set_bytes(_key(topic, number), piece, allow_overwrite=True)
    # Last: who finds it finds the pieces, too.
    client.key_value_set_bytes(
        _key(topic),
        json.dumps(
            header | {"pieces": len(pieces), "sha256": hashlib.sha256(content).hexdigest()}
        ).encode(),
    )


def _published(client: Any, topic: str) -> bool:
    import jax

    try:
        client.key_value_try_get_bytes(_key(topic))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _receive(client: Any, topic: str, process: int, count: int) -> Any:
    import jax

    def get(*part: int) -> bytes:
        try:
            return bytes(
                client.blocking_key_value_get_bytes(_key(topic, *part), int(LIMIT_SECONDS * 1000))
            )
        except jax.errors.JaxRuntimeError as error:
            raise AgreementError(
                f"process {process} of {count} waited {LIMIT_SECONDS:g} s for the profiles of "
                'process 0, which has not come to an "auto" of its own '
                f"({str(error).splitlines()[0][:200]}). All processes must trace the same "
                "calls; to do without profiles pin "
                "them: autochunk.use(max_chunk_size_mb=..., chunk_size=...)"
            ) from error

    header = json.loads(get())
    if header["autochunk"] != autochunk.__version__:
        raise AgreementError(
            f"process {process} of {count} runs autochunk {autochunk.__version__}, process 0 runs "
            f"{header['autochunk']}; install one version"
        )
    if "error" in header:
        raise AgreementError(f"process 0 of {count} could not read its profiles: {header['error']}")
    content = b"".join(get(number) for number in range(header["pieces"]))
    if hashlib.sha256(content).hexdigest() != header["sha256"]:
        raise AgreementError(
            f"process {process} of {count} received other profiles than process 0 sent; start the "
            "program again"
        )
    return json.loads(gzip.decompress(content))


def _key(topic: str, *part: int) -> str:
    return "/".join(["autochunk", topic, *(f"piece {number}" for number in part)])
