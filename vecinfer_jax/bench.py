"""Whole decoding steps, timed: how long a token takes with each cache at a batch and a length, on this device.

Caches hold random content and their lengths are set, so that every layer attends to all tokens; no prompt is run. The
time of a step does not depend on what is cached, so weights and codebooks may be random, too.
"""

import dataclasses
import functools
import re
import statistics
import time
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


def _llama(kv_heads: int, hidden: int, feed_forward: int, layers: int, vocabulary: int, theta: float) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
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
    )


# Architectures to be timed with random weights.
SHAPES = {
    "llama-3.1-8b": _llama(8, 4096, 14336, 32, 128256, 5e5),
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32000, 1e4),
}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """One decoding step of `batch` sequences of `tokens` tokens each.

    ms_per_step:  milliseconds, median of `repeats` differences between a long and a short run.
    cache_bytes:  allocated, by kind. weights_bytes: of all parameters.
    device_bytes: what the device says is in use, 0 where it does not say.
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
    compile_seconds: float
    repeats: int


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
        return StepTime(
            method=repr(method),
            batch=batch,
            tokens=tokens,
            layers=self.config.num_layers,
            ms_per_step=round(ms, 4),
            tokens_per_second=round(batch / ms * 1e3, 1),
            cache_bytes=held,
            weights_bytes=sum(x.nbytes for x in jax.tree.leaves(self.params)),
            device_bytes=(jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0),
            compile_seconds=round(engine.compile_seconds, 1),
            repeats=repeats,
        )

    def kernels(self, method: CacheMethod, batch: int, tokens: int) -> dict[str, dict[str, float]]:
        """What one step starts on an NVIDIA GPU: by kernel, how often and for how many microseconds together.

        The caches are not donated here, so the device holds them twice; the copies are no kernels.
        """
        from jax.experimental.mosaic.gpu import profiler

        engine, state = self.prepare(method, batch, tokens, 1)

        def step(params: Any, caches: Any, token: Any, position: Any) -> Any:
            return engine.decoder.apply({"params": params}, token[:, None], position[:, None], caches, decode=True)

        timed = profiler.measure(jax.jit(step), aggregate=False)
        found: dict[str, list[float]] = {}
        for kernel, ms in timed(self.params, state.caches, state.token, state.position)[1] or []:
            found.setdefault(re.sub(r"[_.]?\d+$", "", kernel)[:60], []).append(1e3 * ms)
        by_time = sorted(found.items(), key=lambda item: -sum(item[1]))
        return {kernel: {"count": len(us), "us": round(sum(us), 1)} for kernel, us in by_time}


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
    )


def _filled(caches: Any, tokens: int) -> Any:
    """The same caches with random content, `tokens` tokens a row."""

    def fill(x: jax.Array) -> jax.Array:
        key = jax.random.key(x.size % 7)
        if x.dtype == jnp.uint8:
            return jax.random.bits(key, x.shape, jnp.uint8)
        if x.dtype == jnp.int32:
            return jnp.full_like(x, tokens)
        return x if x.ndim < 4 else jax.random.normal(key, x.shape, x.dtype)

    return jax.tree.map(jax.jit(fill, donate_argnums=0), caches)
