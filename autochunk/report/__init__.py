"""What people and scripts are shown of results.

``records`` turns results into plain data; ``tables`` and ``text`` draw, and ``progress`` tells of a
tune while it runs. For pictures ``sources`` reads, ``curve``, ``overview`` and ``comparison`` make
plain data of it, and ``drawing``, ``terminal`` and ``page`` draw that, each by one library of the
extra ``report``, loaded when it draws.
"""

from __future__ import annotations

from autochunk.report.progress import TuneProgress

__all__ = ["TuneProgress"]
