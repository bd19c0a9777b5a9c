"""autochunk: attention that never holds more logits than it should, tuned once for each machine.

``autochunk tune`` measures this machine; ``MultiHeadAttention(..., max_chunk_size_mb="auto")`` and ``dot_product_attention`` run what was found best.
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

# Loaded when first asked for, so that importing autochunk is quick and pulls in neither optuna nor sqlitedict.
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
