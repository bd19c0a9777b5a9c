"""What XLA itself tries out for a GPU, kept from one measuring process to the next."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import platformdirs

from autochunk import nvidia

_FLAG = "--xla_gpu_per_fusion_autotune_cache_dir"


def environment() -> dict[str, str]:
    """Variables by which a process keeps, and finds, which kernels XLA found best for each fusion.

    XLA times several for each, which is most of what compiling takes on a GPU. Empty without a GPU,
    where no folder can be made, and where the user's own flags say something of it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not nvidia.gpu_uuids() or "autotune_cache" in flags:
        return {}
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where the user has no home directory
        return {}
    return {"XLA_FLAGS": f"{flags} {_FLAG}={folder}".strip()}


def _folder() -> Path:
    """One for each version: another one's kernels may be others."""
    version = importlib.metadata.version("jaxlib")
    return platformdirs.user_cache_path("autochunk").expanduser() / f"xla-autotuning-{version}"
