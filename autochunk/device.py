"""The Device that a result belongs to.

A profile answers only on a device whose hard fields are equal; the soft ones (versions, and how
memory is handed out) say whether it may have gone stale.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autochunk import host, nvidia
from autochunk.errors import DeviceError

_GIB = 2**30


class Device(BaseModel):
    """Fingerprint of the device that measurements were taken on.

    Attributes:
      platform: "cpu", "gpu" or "tpu", as in jax.
      kind: the accelerator's name, or for a CPU vendor/family/model/stepping, a hash of its
        instruction-set flags and its cache sizes.
      cores: CPU cores this process may use (affinity and cgroup quota); 0 on accelerators.
      memory_gib: memory of the device in GiB, rounded; on CPU the lesser of the machine's and the
        cgroup's, on a GPU (or a slice of one) all that it has, whoever uses it.
      jax, jaxlib, driver, cuda, cudnn: versions; recorded, and compared for staleness only. ""
        where there is none.
      allocator, huge_pages: how memory is handed out to programs on a CPU, by ``host.allocator``
        and ``host.huge_pages``; compared for staleness only, where both are known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: str = Field(pattern=r"^[a-z_]{1,100}$")
    # No text that could pass for another part of a key.
    kind: str = Field(min_length=1, max_length=200, pattern=r"^[^|\x00-\x1f\x7f]*$")
    cores: int = Field(ge=0)
    memory_gib: int = Field(ge=0)
    jax: str = ""
    jaxlib: str = ""
    driver: str = ""
    cuda: str = ""
    cudnn: str = ""
    allocator: str = Field(default="", max_length=1000)
    huge_pages: str = Field(default="", max_length=100)

    @field_validator("kind")
    @classmethod
    def _no_key_items(cls, value: str) -> str:
        if "cores=" in value or "memory=" in value:
            raise ValueError(
                f"{value!r} has cores= or memory= in it, which are fields of their own"
            )
        return value

    @property
    def key(self) -> str:
        """The hard fields as one text; equal texts mean that profiles are shared."""
        cores = f" cores={self.cores}" if self.cores else ""
        return f"{self.platform} {self.kind}{cores} memory={self.memory_gib}GiB"

    def stale_reasons(self, now: Device) -> list[str]:
        """Why results of this device may no longer hold on ``now``, the same device today.

        Empty if they do, or if it is another device. Only minor versions of jaxlib and cuDNN count:
        jaxlib's were seen to move the best slice on CPU, and cuDNN's kernels are candidates
        themselves; patch releases, jax and the driver were not seen to matter. Where
        an allocator kept freed buffers the best plan was seen to be another.
        """
        if self.key != now.key:
            return []
        versions = (("jaxlib", self.jaxlib, now.jaxlib), ("cuDNN", self.cudnn, now.cudnn))
        changed = [one for one in versions if _minor(one[1]) != _minor(one[2])]
        conditions = (
            ("allocator", self.allocator, now.allocator),
            ("huge pages", self.huge_pages, now.huge_pages),
        )
        changed += [one for one in conditions if all(one) and one[1] != one[2]]
        return [
            f"measured with {name} {then or 'unknown'}, this is {today or 'unknown'}"
            for name, then, today in changed
        ]


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def detect(jax_device: Any = None) -> Device:
    """The device that jax computes on by default, or the given ``jax.Device``.

    Initialises jax's backend.

    Raises:
      DeviceError: jax has no usable device.
    """
    return _describe(jax_device or default_device())


def default_device() -> Any:
    """The ``jax.Device`` that jax computes on where nothing else is asked for.

    ``JAX_DEFAULT_DEVICE`` may set it. Initialises jax's backend.

    Raises:
      DeviceError: jax has no usable device.
    """
    import jax

    config: Any = jax.config  # some versions annotate what it has, others do not
    try:
        chosen = config.jax_default_device or jax.local_devices()[0]
        return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen
    except RuntimeError as error:
        raise DeviceError(f"jax finds no device to compute on: {error}") from error


@functools.lru_cache(maxsize=32)
def _describe(jax_device: Any) -> Device:
    versions = {
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    if jax_device.platform == "cpu":
        return Device(
            platform="cpu",
            kind=host.cpu_kind(),
            cores=host.usable_cores(),
            memory_gib=round(host.cpu_memory_bytes() / _GIB),
            allocator=host.allocator()[:1000],
            huge_pages=host.huge_pages(),
            **versions,
        )
    memory = (jax_device.memory_stats() or {}).get("bytes_limit", 0)
    if jax_device.platform == "gpu":
        # Jax's own limit follows its settings for preallocation; the GPU's memory does not.
        memory = (nvidia.gpu_memory(jax_device.local_hardware_id or 0) or (memory, 0))[0]
        versions |= {
            "driver": nvidia.driver_version(),
            "cuda": nvidia.cuda_version(jax_device),
            "cudnn": nvidia.cudnn_version(),
        }
    return Device(
        platform=jax_device.platform,
        kind=jax_device.device_kind,
        cores=0,
        memory_gib=round(memory / _GIB),
        **versions,
    )
