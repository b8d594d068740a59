"""The mesh, and what of a model goes along which of its axes.

`data` splits the batch, `context` the cached tokens and the tokens of a prompt, `model` the heads and weights. Devices
may belong to several processes, once `jax.distributed.initialize` has run in each of them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vecinfer_jax.caches.base import NO_AXES, MeshAxes
from vecinfer_jax.caches.stripes import MERGES
from vecinfer_jax.errors import InputError
from vecinfer_jax.models.config import ModelConfig

AXES = ("data", "context", "model")
# Cached tokens of a device's rows together from which splitting them saves more than the merge costs: 2-bit attention
# over two H200s is slower at half as many (benchmarks/parallel.py).
SPLIT_FROM = 131072


def make_mesh(data: int = 1, context: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first data * context * model devices (of all processes, unless others are given).

    Raises `InputError` where there are fewer.
    """
    sizes = (data, context, model)
    for name, size in zip(AXES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"mesh axis {name}={size!r} needs a whole number of devices, 1 or more")
    there, wanted = list(jax.devices() if devices is None else devices), math.prod(sizes)
    if wanted > len(there):
        raise InputError(f"a mesh of {data} x {context} x {model} wants {wanted} devices, there are {len(there)}")
    return Mesh(np.asarray(there[:wanted]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> Mesh:
    """A mesh from "data=1,context=2,model=1"; an axis left out is 1. Raises `InputError`."""
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise InputError(f"a mesh has no axis {name!r}; its axes are {', '.join(AXES)}")
        if name in sizes or not size.isdecimal():
            raise InputError(f"mesh axis {part.strip()!r} needs one whole number of devices, as in context=2")
        sizes[name] = int(size)
    return make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model and its caches lie on a mesh.

    mesh:       with axes among `AXES`.
    merge:      by which collective the parts of a decoding step's attention meet (`caches.stripes.MERGES`).
    split_from: caches for fewer tokens (capacity times a device's rows) are not split over `context`; there, all of its
                devices then hold and do the same.
    """

    mesh: Mesh
    merge: str = "gather"
    split_from: int = SPLIT_FROM

    def __post_init__(self) -> None:
        unknown = [name for name in self.mesh.axis_names if name not in AXES]
        if unknown:
            raise InputError(f"a mesh has no axis {unknown[0]!r}; its axes are {', '.join(AXES)}")
        if self.merge not in MERGES:
            raise InputError(f"merge={self.merge!r} is unknown; choose from {', '.join(MERGES)}")
        if not isinstance(self.split_from, int) or self.split_from < 0:
            raise InputError(f"split_from={self.split_from!r} must be a whole number of tokens, 0 or more")

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 where the mesh has none of that name."""
        return self.mesh.shape.get(axis, 1)

    def check(self, config: ModelConfig) -> None:
        """Raises `InputError` where the model cannot be split so."""
        devices = self.size("model")
        for what, count in (("KV heads", config.num_kv_heads), ("feed-forward channels", config.intermediate_size)):
            if count % devices:
                raise InputError(
                    f"{count} {what} cannot be split over a model axis of {devices}: choose one that divides"
                )

    def rows(self, batch: int) -> int:
        """Rows of a batch on one device. Raises `InputError` where they are not the same number on all."""
        if batch % self.size("data"):
            raise InputError(
                f"a batch of {batch} cannot be split over a data axis of {self.size('data')}: choose one that divides"
            )
        return batch // self.size("data")

    def axes(self, batch: int, capacity: int) -> MeshAxes:
        """What caches for `batch` rows of `capacity` tokens are split over."""
        return self._axes(data=True, context=self.rows(batch) * capacity >= self.split_from)

    def axes_of_texts(self, batch: int, context: bool) -> MeshAxes:
        """What texts are split over that evaluation and calibration run; tokens only where `context`.

        A batch that the data axis does not divide is run as a whole by every one of its devices.
        """
        return self._axes(data=batch % self.size("data") == 0, context=context)

    def _axes(self, data: bool, context: bool) -> MeshAxes:
        def named(axis: str, wanted: bool = True) -> str | None:
            return axis if wanted and self.size(axis) > 1 else None

        return dataclasses.replace(
            NO_AXES,
            data=named("data", data),
            context=named("context", context),
            model=named("model"),
            shards=self.size("context") if context else 1,
            merge=self.merge,
        )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an array whose axes are split so; names that the mesh does not have split nothing."""
        return NamedSharding(self.mesh, PartitionSpec(*(a if a in self.mesh.axis_names else None for a in axes)))


def layout_of(mesh: Mesh | Layout) -> Layout:
    """A mesh's layout with the defaults, or the layout itself. Raises `InputError` for anything else."""
    if isinstance(mesh, Layout):
        return mesh
    if isinstance(mesh, Mesh):
        return Layout(mesh)
    raise InputError(f"mesh={mesh!r} is no mesh: make one with vecinfer_jax.parallel.make_mesh(context=2)")
