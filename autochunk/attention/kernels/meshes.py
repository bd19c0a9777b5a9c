"""Over which axes of a mesh the dims of arrays are sharded, where XLA partitions a program.

Inside a ``shard_map`` over some axes of a mesh, XLA partitions the program of a group of devices:
of those that differ along the other axes alone. It numbers the devices of a group in an order of
its own, which an array tells whose sharding is known (``FreeAxes.chart``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]

# Dims of these stay whole.
_WHOLE = {"keys", "key features", "value features"}


def is_mixed(mesh: AbstractMesh) -> bool:
    """Whether ``shard_map`` has some mesh axes and XLA partitions the others."""
    return bool(mesh.manual_axes) and set(mesh.manual_axes) != set(mesh.axis_names)


def mesh_without_devices(array: jax.Array) -> AbstractMesh:
    """An array's mesh, if its program is lowered for devices that are not here; else none."""
    mesh = jax.typeof(array).sharding.mesh
    there = mesh.abstract_device is not None or mesh.manual_axes
    return AbstractMesh((), ()) if there else mesh


class Places(NamedTuple):
    """The devices among which a program is partitioned.

    Attributes:
      mesh: all devices, with each mesh axis split into parts of prime sizes. A dim that was
        reshaped to two may have its mesh axis split between these: of four devices for eight query
        heads, two are for two key heads and two for the queries of each.
      group: the devices that shardings are of, in the order in which XLA numbers them.
      named: whether the axes of the group are axes of the mesh, over which sums can be taken.
    """

    mesh: Mesh
    group: Mesh
    named: bool = True

    @classmethod
    def of_all(cls, mesh: Mesh, array: jax.ShapeDtypeStruct) -> Places:
        """All devices of a mesh; if it is empty, the devices of an array."""
        if not mesh.empty:
            mesh = _refined(mesh)
            return cls(mesh, mesh)
        assert array.sharding is not None
        devices = sorted(array.sharding.device_set, key=lambda device: device.id)
        mesh = Mesh(np.array(devices), ("devices",))
        return cls(mesh, mesh, named=False)

    def mesh_axes(
        self, arrays: Sequence[tuple[jax.ShapeDtypeStruct, Sequence[str]]]
    ) -> dict[str, Axes]:
        """The mesh axes that each factor is sharded over, as in the first array sharded by it.

        Arrays come with the factors of their dims.
        """
        over: dict[str, Axes] = {}
        used: set[str] = set()
        for array, factors in arrays if self.named else []:
            spec = _axes_of_dims(self.group, self.own(array))
            for factor, size, axes in zip(factors, array.shape, spec, strict=True):
                shares = math.prod(self.group.shape[axis] for axis in axes)
                stays = factor.replace("_", " ") in _WHOLE or factor.startswith("one")
                # XLA would pad uneven shares with rows that do not exist.
                fits = axes and size % shares == 0 and not stays
                if fits and factor not in over and not used & {*axes}:
                    over[factor] = axes
                    used |= {*axes}
        return over

    def own(self, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The array with its sharding as one over the group's devices."""
        return array if self.group.size == self.mesh.size else _within(self.group, array)


class FreeAxes(NamedTuple):
    """The axes of a mesh that a ``shard_map`` over the others leaves to XLA."""

    mesh: Mesh | AbstractMesh
    axes: Axes

    @classmethod
    def around(cls, context: Any) -> FreeAxes | None:
        """Those where something is lowered; None if it is in no ``shard_map``."""
        around = context.module_context.axis_context
        if not (manual := getattr(around, "manual_axes", None)):
            return None
        return cls(around.mesh, tuple(one for one in around.mesh.axis_names if one not in manual))

    @property
    def devices(self) -> int | None:
        """How many devices a group has; None if the mesh has no devices."""
        return math.prod(self._sizes) if isinstance(self.mesh, Mesh) else None

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.mesh.shape[axis] for axis in self.axes)

    @property
    def factors(self) -> Axes:
        """A name of its own for each axis, as a factor of a sharding rule."""
        return tuple(f"axis{number}" for number, _ in enumerate(self.axes))

    def chart(self) -> jax.Array:
        """An array with an element for each device of a group, at the device's place."""
        assert isinstance(self.mesh, Mesh)
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names)
        spread = NamedSharding(mesh, PartitionSpec(*self.axes))
        # With a mesh in force arrays might have shardings in their types.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            chart = jnp.zeros(self._sizes, jnp.int32)
            return jnp.asarray(jax.lax.with_sharding_constraint(chart, spread))

    def places(self, chart: jax.ShapeDtypeStruct) -> Places:
        """The devices of a group, in the order that the chart tells."""
        assert isinstance(self.mesh, Mesh)
        mesh, count = _refined(self.mesh), math.prod(self._sizes)
        devices = mesh.devices.reshape(-1)[:count]  # any: what matters is how many, and their order
        unknown = Mesh(devices, ("devices",))
        sharding: Any = _within(unknown, chart).sharding
        numbers = np.full(chart.shape, -1)
        for number, place in enumerate(sharding.devices_indices_map(chart.shape).values()):
            numbers[place] = number
        names = [name for name, axis in _parts(self.mesh).items() if axis[0] in self.axes]
        numbers = numbers.reshape([mesh.shape[name] for name in names])
        order = np.argsort([-one for one in _steps(numbers)], kind="stable")
        numbers = numbers.transpose(order)
        if not np.array_equal(numbers.reshape(-1), np.arange(count)):
            return Places(mesh, unknown, named=False)
        return Places(mesh, Mesh(devices.reshape(numbers.shape), [names[one] for one in order]))


def _within(group: Mesh, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An array with its sharding, which JAX takes for one over all devices, as over a group."""
    rank, given = len(array.shape), array.sharding
    sharding: Any = NamedSharding(group, PartitionSpec())
    if given is not None:
        by_number: Any = type(given)
        sharding = by_number(tuple(group.devices.flat), given._to_xla_hlo_sharding(rank))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _parts(mesh: Mesh) -> dict[str, tuple[Any, int]]:
    """The axis and the size of each part of a mesh axis, by the part's name."""
    primes = [(axis, prime) for axis, size in mesh.shape.items() for prime in _primes(size)]
    return {f"{axis} {number}": (axis, prime) for number, (axis, prime) in enumerate(primes)}


def _refined(mesh: Mesh) -> Mesh:
    """The mesh with each axis split into several of prime sizes."""
    parts = _parts(mesh)
    return Mesh(mesh.devices.reshape([size for _, size in parts.values()]), [*parts])


def _primes(size: int) -> list[int]:
    for prime in range(2, size + 1):
        if size % prime == 0:
            return [prime, *_primes(size // prime)]
    return []


def _steps(numbers: np.ndarray[Any, Any]) -> list[Any]:
    """What one step along each dim adds to a number."""
    first = (0,) * numbers.ndim
    return [
        numbers[(*first[:dim], 1, *first[dim + 1 :])] - numbers[first]
        for dim in range(numbers.ndim)
    ]


def _axes_of_dims(mesh: Mesh, array: jax.ShapeDtypeStruct) -> list[Axes]:
    """The mesh axes that each dim is sharded over, the major one first.

    Found from where shares begin, one step along each mesh axis, in an array that any number of
    shares divides. Empty for all dims, if the array is sharded in another way.
    """
    assert array.sharding is not None
    rank, count = len(array.shape), mesh.size
    begin = array.sharding.devices_indices_map((count,) * rank)
    strides: list[dict[str, int]] = [{} for _ in range(rank)]
    for number, axis in enumerate(mesh.axis_names):
        device = mesh.devices[tuple(int(number == other) for other in range(mesh.devices.ndim))]
        for dim, part in enumerate(begin[device] or ()):
            if part.start:
                strides[dim][axis] = part.start
    axes = [tuple(sorted(found, key=found.__getitem__, reverse=True)) for found in strides]
    same = NamedSharding(mesh, PartitionSpec(*axes)).is_equivalent_to(array.sharding, rank)
    return axes if same else [()] * rank
