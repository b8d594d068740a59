"""What decoding costs on devices that were measured, for predicting it: vecinfer_jax/devices.json.

`benchmarks/devices.py` fits the file to the steps that `benchmarks/step.py` timed. The model of a step is

    weights / (bytes/s) + sum over layers of (layer + a cache's own time + bytes of the cache read / (bytes/s))

with one number a device for the first two, and two for every kind of cache that was measured there. Of several devices
each reads its share of the cache, and a layer takes a merge of their parts more.
"""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from vecinfer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Reading:
    """A kind of cache: its bytes are read at `gb_per_s`, and a layer takes `layer_us` whatever it holds."""

    gb_per_s: float
    layer_us: float


@dataclasses.dataclass(frozen=True)
class Device:
    """name: as JAX gives it; memory: bytes; layer_us: a layer's small kernels; caches: by `CacheMethod.reading()`;
    merge_us: of a layer's parts of attention, by how many devices have one, where that was measured."""

    name: str
    memory: int
    weights_gb_per_s: float
    layer_us: float
    caches: dict[str, Reading]
    merge_us: dict[int, float] = dataclasses.field(default_factory=dict)


@functools.cache
def devices() -> dict[str, Device]:
    """The measured devices by their short names."""
    content = json.loads((resources.files("vecinfer_jax") / "devices.json").read_text(encoding="utf-8"))

    def device(fields: dict[str, Any]) -> Device:
        caches = {key: Reading(**reading) for key, reading in fields["caches"].items()}
        merge_us = {int(count): us for count, us in fields.get("merge_us", {}).items()}
        return Device(**{**fields, "caches": caches, "merge_us": merge_us})

    return {name: device(fields) for name, fields in content.items()}


def device_named(name: str) -> Device:
    """Raises `InputError` for one that was not measured."""
    if name not in devices():
        raise InputError(f"no measurements of a GPU {name!r}; there are those of {', '.join(devices())}")
    return devices()[name]


def device_of_kind(kind: str) -> Device | None:
    """The measured device that JAX calls so."""
    return next((device for device in devices().values() if device.name == kind), None)
