"""Whole decoding steps, timed: how long a token takes with each cache at a batch and a length, on this device.

Caches hold random content and their lengths are set, so that every layer attends to all tokens; no prompt is run. The
time of a step does not depend on what is cached, so weights and codebooks may be random, too.
"""

import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vecinfer_jax.caches import allocated_bytes
from vecinfer_jax.caches.base import CacheMethod, LayerShape
from vecinfer_jax.calibration.statistics import LayerStatistics
from vecinfer_jax.errors import CalibrationError, CapacityError, InputError
from vecinfer_jax.generation.engine import CAPACITY_STEP, DecodeState, Engine, round_up
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.models.decoder import Decoder, Params, layer_shape, param_shapes
from vecinfer_jax.rope import Rope

# Steps of the two runs whose difference is timed.
FEW, MANY = 4, 36
# What random words of outliers keep: places below 4,096, which every tile of heads of 64 elements or more has, and
# differences of either sign below 1.
OUTLIER_BITS = 0xBBFF0FFF


def _shapes(
    kv_heads: int, hidden: int, feed_forward: int, layers: int, vocabulary: int, theta: float, family: str = "llama"
) -> ModelConfig:
    return ModelConfig(
        model_type=family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_query_heads=hidden // 128,
        num_kv_heads=kv_heads,
        head_dim=128,
        rope=Rope(theta, 128),
        rms_norm_eps=1e-5,
        max_position=2**24,
        tie_embeddings=False,
        qkv_bias=family == "qwen2",
    )


# Architectures to be timed with random weights.
SHAPES = {
    "smollm2-135m": ModelConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_query_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope=Rope(1e5, 64),
        rms_norm_eps=1e-5,
        max_position=2**24,
        tie_embeddings=True,
    ),
    "llama-3.1-8b": _shapes(8, 4096, 14336, 32, 128256, 5e5),
    "llama-2-7b": _shapes(32, 4096, 11008, 32, 32000, 1e4),
    "mistral-7b": _shapes(8, 4096, 14336, 32, 32768, 1e6, "mistral"),
    "qwen2.5-14b": _shapes(8, 5120, 13824, 48, 152064, 1e6, "qwen2"),
}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """One decoding step of `batch` sequences of `tokens` tokens each.

    ms_per_step:  milliseconds, median of `repeats` differences between a long and a short run.
    cache_bytes:  allocated, by kind. weights_bytes: of all parameters.
    device_bytes: what the device says is in use after the steps, and device_peak_bytes the most it has seen in this
                  process; 0 where it does not say.
    """

    method: str
    batch: int
    tokens: int
    layers: int
    ms_per_step: float
    tokens_per_second: float
    cache_bytes: dict[str, int]
    weights_bytes: int
    device_bytes: int
    device_peak_bytes: int
    compile_seconds: float
    repeats: int


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Where the time of one step goes on an NVIDIA GPU.

    us_per_step: from the first event's start to the last one's end; idle_us: of that, with nothing running.
    events:      kernels and copies by name: how often in a step, and microseconds together. Kernels that start while
        the one before still runs count the wait.
    """

    us_per_step: float
    idle_us: float
    events: dict[str, dict[str, float]]


class StepBench:
    """Times steps of one model; weights are made or given once."""

    def __init__(self, config: ModelConfig, params: Params | None = None, dtype: Any = jnp.bfloat16) -> None:
        """Without `params`, random ones of the config's shapes."""
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.params = random_params(config, dtype) if params is None else params

    def prepare(self, method: CacheMethod, batch: int, tokens: int, room: int) -> tuple[Engine, DecodeState]:
        """Filled caches with space for `room` more tokens. Raises `CapacityError` where they do not fit."""
        for name, value in (("batch", batch), ("tokens", tokens)):
            if value < 1:
                raise InputError(f"{name}={value} must be 1 or more")
        decoder = Decoder(self.config, method, self.dtype)
        engine = Engine(decoder)
        calibration = [random_calibration(self.config, method, i, self.dtype) for i in range(self.config.num_layers)]
        caches = engine.init_caches(calibration, batch, round_up(tokens + room, CAPACITY_STEP))
        return engine, DecodeState(
            caches=_filled(caches, tokens),
            token=jnp.zeros((batch,), jnp.int32),
            position=jnp.full((batch,), tokens, jnp.int32),
            step=jnp.int32(1),
            done=jnp.zeros((batch,), bool),
            tokens=jnp.full((batch, MANY), -1, jnp.int32),
            logprobs=jnp.zeros((batch, MANY), jnp.float32),
            keys=jax.random.split(jax.random.key(0), batch),
        )

    def step(self, method: CacheMethod, batch: int, tokens: int, *, repeats: int = 5) -> StepTime:
        """Times a method. Raises `CapacityError` where weights, caches and the step do not fit the device."""
        if repeats < 1:
            raise InputError(f"repeats={repeats} must be 1 or more")
        try:
            return self._step(method, batch, tokens, repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise CapacityError(
                f"{method!r} with {batch} x {tokens} tokens does not fit the device's memory: lower batch or tokens"
            ) from None

    def _step(self, method: CacheMethod, batch: int, tokens: int, repeats: int) -> StepTime:
        engine, state = self.prepare(method, batch, tokens, MANY * (repeats + 1) * 2)
        held = allocated_bytes(state.caches)
        settings, stops = Sampling().settings(), jnp.zeros((0,), jnp.int32)

        def run(state: DecodeState, until: int) -> tuple[DecodeState, float]:
            state = jax.block_until_ready(dataclasses.replace(state, step=jnp.int32(1)))
            begin = time.perf_counter()
            state = jax.block_until_ready(engine.decode(self.params, state, until, settings, stops))
            return state, time.perf_counter() - begin

        state, _ = run(state, FEW)
        times = []
        for _ in range(repeats):
            state, few = run(state, FEW)
            state, many = run(state, MANY)
            times.append((many - few) / (MANY - FEW) * 1e3)
        ms = statistics.median(times)
        memory = jax.devices()[0].memory_stats() or {}
        return StepTime(
            method=repr(method),
            batch=batch,
            tokens=tokens,
            layers=self.config.num_layers,
            ms_per_step=round(ms, 4),
            tokens_per_second=round(batch / ms * 1e3, 1),
            cache_bytes=held,
            weights_bytes=sum(x.nbytes for x in jax.tree.leaves(self.params)),
            device_bytes=memory.get("bytes_in_use", 0),
            device_peak_bytes=memory.get("peak_bytes_in_use", 0),
            compile_seconds=round(engine.compile_seconds, 1),
            repeats=repeats,
        )

    def profile(self, method: CacheMethod, batch: int, tokens: int, *, steps: int = 8) -> StepProfile:
        """What the device does in one step of the decoding loop, as XLA's profiler saw it; an average over `steps`."""
        if steps < 1:
            raise InputError(f"steps={steps} must be 1 or more")
        engine, state = self.prepare(method, batch, tokens, FEW + steps)
        settings, stops = Sampling().settings(), jnp.zeros((0,), jnp.int32)
        state = jax.block_until_ready(engine.decode(self.params, state, FEW, settings, stops))
        state = dataclasses.replace(state, step=jnp.int32(1))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(engine.decode(self.params, state, 1 + steps, settings, stops))
            files = list(Path(folder).rglob("*.xplane.pb"))
            planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
        events = [
            (event.name, event.start_ns, event.duration_ns)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        return step_profile(events, steps)


def step_profile(events: Iterable[tuple[str, float, float]], steps: int) -> StepProfile:
    """Sums up (name, start, duration) of a device's events, in nanoseconds, over a number of steps.

    Raises `InputError` where there are none: the device, or its profiler, gives no timeline.
    """
    by_start = sorted(events, key=lambda event: event[1])
    if not by_start:
        raise InputError("the profiler saw nothing: steps are profiled on NVIDIA GPUs only")
    found: dict[str, list[float]] = {}
    busy, end = 0.0, 0.0
    for name, start, duration in by_start:
        found.setdefault(re.sub(r"[_.]\d+$", "", name)[:80], []).append(duration)
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    span = end - by_start[0][1]
    by_time = sorted(found.items(), key=lambda item: -sum(item[1]))
    return StepProfile(
        us_per_step=round(span / steps / 1e3, 2),
        idle_us=round((span - busy) / steps / 1e3, 2),
        events={
            name: {"count": round(len(ns) / steps, 2), "us": round(sum(ns) / steps / 1e3, 2)} for name, ns in by_time
        },
    )


def random_params(config: ModelConfig, dtype: Any) -> Params:
    """Leaf by leaf: initialising a model in one program takes as long to compile as its step."""
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    leaves, tree = jax.tree.flatten(param_shapes(config, dtype))
    return jax.tree.unflatten(tree, [make(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)])


def random_calibration(config: ModelConfig, method: CacheMethod, index: int, dtype: Any) -> dict[str, np.ndarray]:
    """A layer's calibration from keys and values drawn at random; nothing for methods that need none."""
    method = method.for_layer(index, config.num_layers)
    if not method.needs_calibration:
        return {}
    layer = layer_shape(config, index, dtype)
    return _fitted(method, dataclasses.replace(layer, index=0))


@functools.lru_cache(maxsize=8)
def _fitted(method: CacheMethod, layer: LayerShape) -> dict[str, np.ndarray]:
    count = 512
    while True:
        statistics = _random_statistics(layer, count)
        try:
            return method.calibrate_layer(layer, statistics, 0, method.shared_calibration([layer], [statistics], 0))
        except CalibrationError:  # too few for a codebook this large
            if count > 2**16:
                raise
            count *= 2


def _random_statistics(layer: LayerShape, count: int) -> LayerStatistics:
    heads, dim = layer.num_kv_heads, layer.head_dim
    keys, values = (jax.random.normal(jax.random.key(i), (count, heads, dim)) for i in range(2))
    ones = jnp.ones((heads, dim))
    return LayerStatistics(
        count=jnp.int32(count),
        key_abs_max=ones,
        rotated_key_abs_max=ones,
        key_sum=0 * ones,
        query_moment=jnp.broadcast_to(jnp.eye(dim), (heads, dim, dim)),
        keys=keys,
        values=values,
        positions=jnp.arange(count),
        priority=jnp.zeros((count,)),
        draws=jnp.int32(0),
        key_gradients=keys,
        value_gradients=values,
    )


def _filled(caches: Any, tokens: int) -> Any:
    """The same caches with random content, `tokens` tokens a row; one array at a time is held twice at most.

    What lies in the host's memory stays there.
    """

    def fill(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(x.size % 7), x.shape, jnp.uint8)
        if x.dtype == jnp.uint32:  # pools of outliers: a place in a tile and a small float16 difference
            return jax.random.bits(jax.random.key(x.size % 7), x.shape, jnp.uint32) & jnp.uint32(OUTLIER_BITS)
        return jax.random.normal(jax.random.key(x.size % 7), x.shape, x.dtype)

    leaves, structure = jax.tree.flatten(caches)
    fill = jax.jit(fill, static_argnums=0)
    for i, x in enumerate(leaves):
        if x.dtype == jnp.int32:
            leaves[i] = jnp.full_like(x, tokens)
        elif x.ndim == 4:
            shape, place = jax.ShapeDtypeStruct(x.shape, x.dtype), x.sharding
            x.delete()
            leaves[i] = jax.device_put(fill(shape), place) if place.memory_kind == "pinned_host" else fill(shape)
    return jax.tree.unflatten(structure, leaves)
