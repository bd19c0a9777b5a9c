"""autochunk: attention that never holds more logits than it should, tuned once for each machine.

``autochunk tune`` measures this machine; ``MultiHeadAttention(..., max_chunk_size_mb="auto")`` and
``dot_product_attention`` run what was found best.

Where things are; each room imports only from those above it, which ``tests/test_imports.py``
holds::

    errors, workload, plan, device   the words: a call, how it runs, where
    store/         what is remembered
      profile        measurements, and how a choice follows from them
      database       the user's own profiles in one SQLite file; rescue mends it
      bundle         profiles as a file that travels; merge takes it in, remote fetches it
      layers         the places that profiles come from
      resolve        the answer to "auto", and why; agree makes it one for all processes of a program
    attention/     what runs in the model
      kernels/       the attention itself, for a given plan: jax only
      op, haiku      the function and the module
    tuner/         what measures
      tune           the loop over workloads; presets and effort say which, and how hard
      search         the loop over one workload's plans; study keeps what is measured, alone or with other machines
      probe, worker  the measuring process, from outside and from inside; measure is how it measures
      bench, verify  what tuning bought; whether it still holds
    doctor, report, cli   what people see
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autochunk.attention.haiku import MultiHeadAttention
    from autochunk.attention.op import dot_product_attention
    from autochunk.device import Device, detect
    from autochunk.plan import Plan
    from autochunk.store.database import ProfileStore
    from autochunk.store.profile import Measurement, Profile
    from autochunk.store.resolve import Resolution, resolve, use
    from autochunk.tuner.tune import tune
    from autochunk.workload import Workload

__version__ = "0.1.0"

# Loaded when first asked for, so that importing autochunk is quick and pulls in neither optuna nor
# sqlitedict.
_HOMES = {
    "Device": "autochunk.device",
    "Measurement": "autochunk.store.profile",
    "MultiHeadAttention": "autochunk.attention.haiku",
    "Plan": "autochunk.plan",
    "Profile": "autochunk.store.profile",
    "ProfileStore": "autochunk.store.database",
    "Resolution": "autochunk.store.resolve",
    "Workload": "autochunk.workload",
    "detect": "autochunk.device",
    "dot_product_attention": "autochunk.attention.op",
    "resolve": "autochunk.store.resolve",
    "tune": "autochunk.tuner.tune",
    "use": "autochunk.store.resolve",
}

__all__ = [
    "Device",
    "Measurement",
    "MultiHeadAttention",
    "Plan",
    "Profile",
    "ProfileStore",
    "Resolution",
    "Workload",
    "__version__",
    "detect",
    "dot_product_attention",
    "resolve",
    "tune",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
