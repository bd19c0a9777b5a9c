"""Studies: which plans of a workload are measured, and by whom.

Kept by Optuna, which no other room imports. A study is one workload on one kind of device, with one
effort; a trial is one plan. In a journal file of its own a study survives an interruption; in a
storage that several machines share (PostgreSQL, or a journal file on a shared folder) they work on
it together.
"""

from __future__ import annotations

import logging
import warnings

from autochunk.tuner.study.hub import Hub, Shared
from autochunk.tuner.study.journals import Journals
from autochunk.tuner.study.liveness import worker_name
from autochunk.tuner.study.storage import Storage, open_private, study_name
from autochunk.tuner.study.trials import JOINT, LOADING, MOST_DEATHS, Claim, Study

__all__ = [
    "JOINT",
    "LOADING",
    "MOST_DEATHS",
    "Claim",
    "Hub",
    "Journals",
    "Shared",
    "Storage",
    "Study",
    "open_private",
    "study_name",
    "worker_name",
]

# after Optuna is imported, which sets a level of its own
logging.getLogger("optuna").setLevel(logging.ERROR)
# known, and: a plan may have more rounds than the best had time for
_KNOWN = ("WilcoxonPruner", ".*set_metric_names", "The value of `grace_period` might be too small")
for _text in _KNOWN:
    warnings.filterwarnings("ignore", _text)
