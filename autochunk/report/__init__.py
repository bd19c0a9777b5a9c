"""What people and scripts are shown of results.

``records`` turns results into plain data; ``tables`` and ``text`` draw, and ``progress`` tells of a
tune while it runs.
"""

from __future__ import annotations

from autochunk.report.progress import TuneProgress

__all__ = ["TuneProgress"]
