"""What a model with a cache will take of a device's memory, before anything is allocated there."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vecinfer_jax.bench import random_calibration
from vecinfer_jax.caches import allocated_bytes
from vecinfer_jax.caches.base import NO_AXES, CacheMethod, MeshAxes
from vecinfer_jax.devices import Device
from vecinfer_jax.errors import InputError
from vecinfer_jax.generation.engine import CAPACITY_STEP, round_up
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.models.decoder import layer_shape, param_shapes
from vecinfer_jax.parallel.shardings import cache_specs, device_share

# Kept free beside weights and caches: the runtime, a step's activations and logits.
RESERVE = 2**30
# Of the models whose steps were timed.
MEASURED_HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of decoding `batch` sequences of up to `tokens` tokens; over several GPUs, those of one of them.

    gpus:          over which the caches' tokens are split; each holds the weights and the windows whole.
    weights_bytes: of the model, and of the copies that a method with transformed values makes.
    cache_bytes: by kind, as the caches allocate them; the total is the device's, "host" is beside it.
    bits_per_element: true bits of a coded element, mean of layers.
    memory:      of the device; fits: whether weights, caches and `RESERVE` do, and the host's part where that is given.
    most_tokens: a sequence, at this batch, that would fit; 0 where the weights alone do not, the model's longest
                 where the caches do not grow in the memory that is limited.
    ms_per_step: predicted milliseconds of a decoding step; None without a device, for caches, dtypes and numbers of
                 GPUs that were not measured, and where it does not fit.
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
    ms_per_step: float | None
    gpus: int = 1


def plan(
    config: ModelConfig,
    method: CacheMethod,
    *,
    batch: int,
    tokens: int,
    memory: int,
    device: Device | None = None,
    dtype: Any = jnp.bfloat16,
    host_memory: int | None = None,
    gpus: int = 1,
) -> Plan:
    """Counts what a model, its cache and a step need, and predicts a step's time on a measured device.

    `host_memory` limits the bytes of caches that lie in the host's memory; None: no limit.

    Raises `InputError` for numbers below 1.
    """
    wanted = {"batch": batch, "tokens": tokens, "memory": memory, "host_memory": host_memory, "gpus": gpus}
    for name, value in wanted.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be 1 or more")
    n = config.num_layers
    copied = sum(_folded(config) for i in range(n) if method.for_layer(i, n).folds_values)
    weights = (_parameters(config) + copied) * jnp.dtype(dtype).itemsize
    held = cache_bytes(config, method, batch, tokens, dtype, gpus)
    free = memory - weights - RESERVE
    limits = {"total": free} | ({} if host_memory is None else {"host": host_memory})
    # Allocated bytes grow linearly beyond the window.
    base = 2**16 * gpus
    low, high = (cache_bytes(config, method, batch, n, dtype, gpus) for n in (base, 2 * base))
    each = {kind: (high[kind] - low[kind]) / base for kind in limits}
    room = [base + (limit - low[kind]) / each[kind] for kind, limit in limits.items() if each[kind]]
    most = max(0, int(min(room, default=0)) // CAPACITY_STEP * CAPACITY_STEP)
    if not room and _within(low, limits):  # nothing grows
        most_tokens = config.max_position
    else:
        most_tokens = most if most >= base else _search(config, method, batch, dtype, limits, base, gpus)
    layers = range(config.num_layers)
    fits = _within(held, limits)
    measured = device is not None and jnp.dtype(dtype).itemsize == 2
    bits = [method.for_layer(i, len(layers)).bits_per_element(layer_shape(config, i, dtype)) for i in layers]
    return Plan(
        method=repr(method),
        batch=batch,
        tokens=tokens,
        weights_bytes=weights,
        cache_bytes=held,
        bits_per_element=sum(bits) / len(bits),
        memory=memory,
        fits=fits,
        most_tokens=most_tokens,
        ms_per_step=milliseconds(config, method, batch, tokens, device, gpus) if measured and device and fits else None,
        gpus=gpus,
    )


def milliseconds(
    config: ModelConfig, method: CacheMethod, batch: int, tokens: int, device: Device, gpus: int = 1
) -> float | None:
    """A decoding step in 16 bits as `vecinfer_jax.devices` models it; None for what was not measured."""
    n = config.num_layers
    merge_us = 0.0 if gpus == 1 else device.merge_us.get(gpus)
    if config.head_dim not in MEASURED_HEAD_DIMS or merge_us is None:
        return None
    alike = Counter(method.for_layer(i, n) for i in range(n))
    total = weights_read(config) / device.weights_gb_per_s / 1e6
    for of_layer, layers in alike.items():
        reading = device.caches.get(of_layer.reading())
        if reading is None:
            return None
        read = bytes_read(dataclasses.replace(config, num_layers=1), of_layer, batch, tokens, gpus)
        total += layers * ((device.layer_us + reading.layer_us + merge_us) / 1e3 + read / reading.gb_per_s / 1e6)
    return total


def bytes_read(config: ModelConfig, method: CacheMethod, batch: int, tokens: int, gpus: int = 1) -> int:
    """Bytes of codes and windows that a step in 16 bits reads; on each of `gpus` over which the tokens are split."""
    held = cache_bytes(config, method, batch, tokens, jnp.bfloat16, gpus)
    return held["codes"] + held["window"]


def weights_read(config: ModelConfig) -> int:
    """Bytes of 16-bit weights that a step reads: all but an embedding that is only looked up in."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return 2 * (_parameters(config) - looked_up)


def _folded(config: ModelConfig) -> int:
    """Parameters of one layer's W_v, b_v and W_o, of which a method that folds its values' transform holds copies."""
    heads = config.num_kv_heads * (config.hidden_size + config.qkv_bias) + config.num_query_heads * config.hidden_size
    return config.head_dim * heads


@functools.lru_cache(maxsize=32)
def _parameters(config: ModelConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(param_shapes(config)))


def cache_bytes(
    config: ModelConfig, method: CacheMethod, batch: int, tokens: int, dtype: Any, gpus: int = 1
) -> dict[str, int]:
    """What the caches of all layers would allocate, by kind; on each of `gpus` over which the tokens are split, and on
    the one host that they share."""
    n = config.num_layers
    calibration = [random_calibration(config, method, i, dtype) or None for i in range(n)]
    axes = MeshAxes(context="context", shards=gpus) if gpus > 1 else NO_AXES

    def init() -> Any:
        return tuple(
            method.for_layer(i, n).init(
                layer_shape(config, i, dtype, axes),
                batch,
                round_up(tokens, CAPACITY_STEP),
                calibration[i],
            )
            for i in range(n)
        )

    shapes = jax.eval_shape(init)
    specs = cache_specs(shapes, lambda axis: gpus > 1 and axis == "context")
    host = allocated_bytes(shapes)["host"]
    return allocated_bytes(device_share(shapes, specs, {"context": gpus})) | {"host": host}


def _within(held: Mapping[str, int], limits: Mapping[str, int]) -> bool:
    return all(held[kind] <= limit for kind, limit in limits.items())


def _search(
    config: ModelConfig,
    method: CacheMethod,
    batch: int,
    dtype: Any,
    limits: Mapping[str, int],
    above: int,
    gpus: int,
) -> int:
    """The most tokens below `above` that fit, where windows make up much of a cache."""
    low, high = 0, above // CAPACITY_STEP
    while low + 1 < high:
        middle = (low + high) // 2
        fits = _within(cache_bytes(config, method, batch, middle * CAPACITY_STEP, dtype, gpus), limits)
        low, high = (middle, high) if fits else (low, middle)
    return low * CAPACITY_STEP


def device_memory() -> int | None:
    """Bytes that the default device lets a process have; None where it does not say (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
