"""Whole decoding steps, timed: how long a token takes with each cache at a batch and a length, on this device.

Caches hold random content and their lengths are set, so that every layer attends to all tokens; no prompt is run. The
time of a step does not depend on what is cached, so weights and codebooks may be random, too.
"""

import dataclasses
import functools
import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vecinfer_jax.caches import allocated_bytes
from vecinfer_jax.caches.base import NO_AXES, CacheMethod, LayerShape
from vecinfer_jax.calibration.codebooks import drawn_codebooks
from vecinfer_jax.calibration.statistics import LayerStatistics
from vecinfer_jax.errors import CalibrationError, CapacityError, InputError
from vecinfer_jax.generation.engine import CAPACITY_STEP, DecodeState, Engine, round_up
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.models.checkpoint_map import flatten, unflatten
from vecinfer_jax.models.decoder import Decoder, Params, layer_shape, param_shapes
from vecinfer_jax.models.weights import ShardingOf
from vecinfer_jax.parallel.mesh import Layout
from vecinfer_jax.parallel.shardings import weight_sharding
from vecinfer_jax.rope import Rope

# Steps of the two runs whose difference is timed.
FEW, MANY = 4, 36
REPEATS = 5
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
    cache_bytes:  allocated, by kind, on all devices together. weights_bytes: of all parameters, each counted once.
    device_bytes: what the fullest device says is in use after the steps, and device_peak_bytes the most it has seen in
                  this process; 0 where it does not say.
    mesh:         devices along each axis; none for one device.
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
    mesh: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Where the time of one step goes on an NVIDIA GPU.

    us_per_step: from the first event's start to the last one's end; idle_us: of that, with nothing running;
        overlapped_us: with something running on two streams or more.
    events:      kernels and copies by name: how often in a step, and microseconds together. Kernels that start while
        the one before still runs count the wait.
    """

    us_per_step: float
    idle_us: float
    overlapped_us: float
    events: dict[str, dict[str, float]]


class StepBench:
    """Times steps of one model; weights are made or given once."""

    def __init__(
        self, config: ModelConfig, params: Params | None = None, dtype: Any = jnp.bfloat16, layout: Layout | None = None
    ) -> None:
        """Without `params`, random ones of the config's shapes; with a layout, over its mesh."""
        self.config, self.dtype, self.layout = config, jnp.dtype(dtype), layout
        sharding = None if layout is None else weight_sharding(layout, config)
        self.params = random_params(config, dtype, sharding) if params is None else params

    def engine(self, method: CacheMethod, batch: int, capacity: int) -> tuple[Engine, list[dict[str, np.ndarray]]]:
        """A method's programs for caches of that size, and a calibration from random keys and values."""
        axes = NO_AXES if self.layout is None else self.layout.axes(batch, capacity)
        calibration = [random_calibration(self.config, method, i, self.dtype) for i in range(self.config.num_layers)]
        return Engine(Decoder(self.config, method, self.dtype, axes), self.layout), calibration

    def prepare(self, method: CacheMethod, batch: int, tokens: int, room: int) -> tuple[Engine, DecodeState]:
        """Filled caches with space for `room` more tokens. Raises `CapacityError` where they do not fit."""
        for name, value in (("batch", batch), ("tokens", tokens)):
            if value < 1:
                raise InputError(f"{name}={value} must be 1 or more")
        capacity = round_up(tokens + room, CAPACITY_STEP)
        engine, calibration = self.engine(method, batch, capacity)
        caches = engine.init_caches(calibration, batch, capacity)
        state = DecodeState(
            caches=filled(caches, tokens),
            token=jnp.zeros((batch,), jnp.int32),
            position=jnp.full((batch,), tokens, jnp.int32),
            step=jnp.int32(1),
            done=jnp.zeros((batch,), bool),
            tokens=jnp.full((batch, MANY), -1, jnp.int32),
            logprobs=jnp.zeros((batch, MANY), jnp.float32),
            keys=jax.random.split(jax.random.key(0), batch),
        )
        return engine, engine.settle(state)

    def step(self, method: CacheMethod, batch: int, tokens: int, *, repeats: int = REPEATS) -> StepTime:
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
        engine, state = self.prepare(method, batch, tokens, room(repeats))
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
        devices = jax.local_devices() if self.layout is None else self.layout.mesh.local_devices
        memory = [device.memory_stats() or {} for device in devices]
        return StepTime(
            method=repr(method),
            batch=batch,
            tokens=tokens,
            layers=self.config.num_layers,
            ms_per_step=round(ms, 4),
            tokens_per_second=round(batch / ms * 1e3, 1),
            cache_bytes=held,
            weights_bytes=sum(x.nbytes for x in jax.tree.leaves(self.params)),
            device_bytes=max(held.get("bytes_in_use", 0) for held in memory),
            device_peak_bytes=max(held.get("peak_bytes_in_use", 0) for held in memory),
            compile_seconds=round(engine.compile_seconds, 1),
            repeats=repeats,
            mesh=None if self.layout is None else dict(self.layout.mesh.shape),
        )

    def profile(self, method: CacheMethod, batch: int, tokens: int, *, steps: int = 8) -> StepProfile:
        """What the device does in one step of the decoding loop, as XLA's profiler saw it; an average over `steps`."""
        if steps < 1:
            raise InputError(f"steps={steps} must be 1 or more")
        space = max(room(REPEATS), FEW + steps)  # as many tokens as where it is timed: the same program
        engine, state = self.prepare(method, batch, tokens, space)
        settings, stops = Sampling().settings(), jnp.zeros((0,), jnp.int32)
        state = jax.block_until_ready(engine.decode(self.params, state, FEW, settings, stops))
        state = dataclasses.replace(state, step=jnp.int32(1))
        run = functools.partial(engine.decode, self.params, state, 1 + steps, settings, stops)
        return step_profile(device_events(run), steps)


def device_events(run: Callable[[], Any]) -> list[tuple[str, float, float, str]]:
    """(name, start, duration, stream) of what the first GPU does in a call, in nanoseconds, by XLA's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
    return [
        (event.name, event.start_ns, event.duration_ns, line.name)
        for plane in planes
        if plane.name == "/device:GPU:0"
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def room(repeats: int) -> int:
    """Tokens that so many repeats add to a cache, and some."""
    return MANY * (repeats + 1) * 2


def step_profile(events: Iterable[tuple[str, float, float, str]], steps: int) -> StepProfile:
    """Sums up (name, start, duration, stream) of a device's events, in nanoseconds, over a number of steps.

    Raises `InputError` where there are none: the device, or its profiler, gives no timeline.
    """
    by_start = sorted(events, key=lambda event: event[1])
    if not by_start:
        raise InputError("the profiler saw nothing: steps are profiled on NVIDIA GPUs only")
    found: dict[str, list[float]] = {}
    streams: dict[str, list[tuple[float, float]]] = {}
    for name, start, duration, stream in by_start:
        found.setdefault(re.sub(r"[_.]\d+$", "", name)[:80], []).append(duration)
        streams.setdefault(stream, []).append((start, start + duration))
    spans = {stream: merged(periods) for stream, periods in streams.items()}
    together = merged(sorted(itertools.chain(*spans.values())))
    busy = length(together)
    begin, end = together[0][0], together[-1][1]
    by_time = sorted(found.items(), key=lambda item: -sum(item[1]))
    return StepProfile(
        us_per_step=round((end - begin) / steps / 1e3, 2),
        idle_us=round((end - begin - busy) / steps / 1e3, 2),
        overlapped_us=round(overlapped(spans.values()) / steps / 1e3, 2),
        events={
            name: {"count": round(len(ns) / steps, 2), "us": round(sum(ns) / steps / 1e3, 2)} for name, ns in by_time
        },
    )


def merged(periods: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Periods (start, end) in order of their starts, those that touch made one."""
    out: list[tuple[float, float]] = []
    for start, end in periods:
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def length(periods: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in periods)


def overlapped(streams: Iterable[list[tuple[float, float]]]) -> float:
    """How long two or more of them are busy at once; periods of one do not touch."""
    changes = sorted(
        (at, change) for spans in streams for span in spans for at, change in zip(span, (1, -1), strict=True)
    )
    total, running = 0.0, 0
    for (at, change), (later, _) in itertools.pairwise(changes):
        running += change
        total += (later - at) * (running >= 2)
    return total


def random_params(config: ModelConfig, dtype: Any, sharding: ShardingOf | None = None) -> Params:
    """Leaf by leaf: initialising a model in one program takes as long to compile as its step."""

    def make(index: int, path: str, shape: tuple[int, ...]) -> jax.Array:
        place = None if sharding is None else sharding(path)
        return _random(shape, jnp.dtype(dtype), place)(jax.random.key(index))

    shapes = flatten(param_shapes(config, dtype))
    return unflatten({path: make(i, path, leaf.shape) for i, (path, leaf) in enumerate(shapes.items())})


@functools.lru_cache(maxsize=64)
def _random(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype), out_shardings=place)


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
            with drawn_codebooks():
                shared = method.shared_calibration([layer], [statistics], 0)
                return method.calibrate_layer(layer, statistics, 0, shared)
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


def filled(caches: Any, tokens: int) -> Any:
    """The same caches with random content, `tokens` tokens a row; one array at a time is held twice at most.

    What lies in the host's memory stays there.
    """
    leaves, structure = jax.tree.flatten(caches)
    for i, x in enumerate(leaves):
        if x.dtype == jnp.int32 or x.ndim == 4:
            make = _content(x.shape, x.dtype, tokens, x.sharding, jax.typeof(x).memory_space)
            x.delete()
            leaves[i] = make()
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=64)
def _content(shape: tuple[int, ...], dtype: Any, tokens: int, place: Any, space: Any) -> Any:
    def content() -> jax.Array:
        key = jax.random.key(int(np.prod(shape)) % 7)
        if dtype == jnp.int32:
            return jnp.full(shape, tokens, dtype)
        if dtype == jnp.uint8:
            return jax.random.bits(key, shape, jnp.uint8)
        if dtype == jnp.uint32:  # pools of outliers: a place in a tile and a small float16 difference
            return jax.random.bits(key, shape, jnp.uint32) & jnp.uint32(OUTLIER_BITS)
        return jax.random.normal(key, shape, dtype)

    return jax.jit(lambda: jax.device_put(content(), space), out_shardings=place)
