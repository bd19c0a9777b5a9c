"""``python -m autochunk.cli``, where the ``autochunk`` command is not on the path."""

from __future__ import annotations

from autochunk.cli import main

if __name__ == "__main__":
    main()
