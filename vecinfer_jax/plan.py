"""What a model with a cache will take of a device's memory, before anything is allocated there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vecinfer_jax.bench import random_calibration
from vecinfer_jax.caches import allocated_bytes
from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.errors import InputError
from vecinfer_jax.generation.engine import CAPACITY_STEP, round_up
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.models.decoder import layer_shape, param_shapes

# Kept free beside weights and caches: the runtime, a step's activations and logits.
RESERVE = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of decoding `batch` sequences of up to `tokens` tokens.

    cache_bytes: by kind, as the caches allocate them. bits_per_element: true bits of a coded element, mean of layers.
    memory:      of the device; fits: whether weights, caches and `RESERVE` do.
    most_tokens: a sequence, at this batch, that would fit; 0 where the weights alone do not.
    """

    method: str
    batch: int
    tokens: int
    weights_bytes: int
    cache_bytes: dict[str, int]
    bits_per_element: float
    memory: int
    fits: bool
    most_tokens: int


def plan(
    config: ModelConfig, method: CacheMethod, *, batch: int, tokens: int, memory: int, dtype: Any = jnp.bfloat16
) -> Plan:
    """Counts what a model, its cache and a step need.

    Raises `InputError` for numbers below 1.
    """
    for name, value in (("batch", batch), ("tokens", tokens), ("memory", memory)):
        if value < 1:
            raise InputError(f"{name}={value} must be 1 or more")
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(param_shapes(config, dtype)))
    held = cache_bytes(config, method, batch, tokens, dtype)
    free = memory - weights - RESERVE
    # Allocated bytes grow linearly beyond the window.
    base = 2**16
    low, high = (cache_bytes(config, method, batch, n, dtype)["total"] for n in (base, 2 * base))
    each = (high - low) / base
    most = base + (free - low) / each
    most = max(0, int(most) // CAPACITY_STEP * CAPACITY_STEP)
    layers = range(config.num_layers)
    bits = [method.for_layer(i, len(layers)).bits_per_element(layer_shape(config, i, dtype)) for i in layers]
    return Plan(
        method=repr(method),
        batch=batch,
        tokens=tokens,
        weights_bytes=weights,
        cache_bytes=held,
        bits_per_element=sum(bits) / len(bits),
        memory=memory,
        fits=held["total"] <= free,
        most_tokens=most if most >= base else _search(config, method, batch, dtype, free, base),
    )


def cache_bytes(config: ModelConfig, method: CacheMethod, batch: int, tokens: int, dtype: Any) -> dict[str, int]:
    """What the caches of all layers would allocate, by kind."""
    n = config.num_layers
    calibration = [random_calibration(config, method, i, dtype) or None for i in range(n)]

    def init() -> Any:
        return tuple(
            method.for_layer(i, n).init(
                layer_shape(config, i, dtype),
                batch,
                round_up(tokens, CAPACITY_STEP),
                calibration[i],
            )
            for i in range(n)
        )

    return allocated_bytes(jax.eval_shape(init))


def _search(config: ModelConfig, method: CacheMethod, batch: int, dtype: Any, free: int, above: int) -> int:
    """The most tokens below `above` that fit, where windows make up much of a cache."""
    low, high = 0, above // CAPACITY_STEP
    while low + 1 < high:
        middle = (low + high) // 2
        fits = cache_bytes(config, method, batch, middle * CAPACITY_STEP, dtype)["total"] <= free
        low, high = (middle, high) if fits else (low, middle)
    return low * CAPACITY_STEP


def device_memory() -> int | None:
    """Bytes that the default device lets a process have; None where it does not say (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
