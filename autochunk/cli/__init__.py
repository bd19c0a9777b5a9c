"""The ``autochunk`` command: reads arguments, calls the library, prints; no logic of its own.

Commands are in files by what they are about; ``options`` has what several of them take, and
``printing`` how they print. Their docstrings are their help; the first line alone stands in the
list of commands, so it is short.
"""

from __future__ import annotations

import os
from typing import Any

import click

import autochunk
from autochunk.cli.comparing import bench
from autochunk.cli.looking import doctor, evaluate, explain, show
from autochunk.cli.measuring import tune
from autochunk.cli.moving import export, forget, import_
from autochunk.cli.printing import prepare_streams
from autochunk.cli.reporting import report
from autochunk.cli.sharing import sync, watch
from autochunk.errors import AutochunkError
from autochunk.text import printable


class _Commands(click.Group):
    """Turns autochunk's own errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutochunkError as error:
            raise click.ClickException(printable(str(error))) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(autochunk.__version__, package_name="autochunk")
def main() -> None:
    """Attention for JAX within a memory limit, tuned once for each machine.

    First: autochunk tune --effort quick. Then look at what it found: autochunk show.
    """
    prepare_streams()
    # What only looks at a GPU must not take three quarters of its memory, as jax does unless told.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


for _command in (
    *(tune, bench, show, explain, evaluate, report, doctor),
    *(sync, watch, export, import_, forget),
):
    main.add_command(_command)
