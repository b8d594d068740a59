"""Whole decoding steps at Llama-3.1-8B's shapes, random weights in bfloat16: milliseconds a token with each cache.

    python benchmarks/step.py [--output FILE] [--layers 32]

Caches hold valid random codes (or random keys and values) and their lengths are set, so that every layer attends to
all tokens. A time is the difference of two runs of the compiled decode loop, divided by the difference of their steps,
median of several. `cache_bytes` is what the caches allocate; `device_bytes` is what the device says is in use.
"""

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results

from vecinfer_jax import specs
from vecinfer_jax.caches import METHODS, allocated_bytes
from vecinfer_jax.generation.engine import DecodeState, Engine
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.models.decoder import Decoder, layer_shape, param_shapes
from vecinfer_jax.rope import Rope

# batch, tokens held, method
ROWS = [
    (1, 196608, "full"),
    (1, 196608, "vecinfer:bits=2"),
    (12, 32768, "full"),
    (12, 32768, "vecinfer:bits=2"),
    (1, 1024, "full"),
    (1, 1024, "vecinfer:bits=2"),
]
FEW, MANY = 4, 36


def llama_8b(layers: int) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=layers,
        num_query_heads=32, num_kv_heads=8, head_dim=128, rope=Rope(500000.0, 128), rms_norm_eps=1e-5,
        max_position=2**23, tie_embeddings=False,
    )  # fmt: skip


def random_params(config: ModelConfig) -> Any:
    """Leaf by leaf: initialising the model in one program would take as long to compile as the step."""
    shapes = param_shapes(config, jnp.bfloat16)
    make = jax.jit(lambda key, like: 0.02 * jax.random.normal(key, like, jnp.bfloat16), static_argnums=1)
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten(make(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves))


def random_calibration(config: ModelConfig, method: Any) -> dict[str, np.ndarray]:
    if not method.needs_calibration:
        return {}
    shape, rng = layer_shape(config, 0, jnp.bfloat16), np.random.default_rng(0)
    key, value = method.key_format, method.value_format
    return {
        "smooth": np.ones((shape.num_kv_heads, shape.head_dim), np.float32),
        "key_codebook": rng.normal(size=(shape.num_kv_heads, key.entries, key.length)).astype(np.float32),
        "value_codebook": rng.normal(size=(shape.num_kv_heads, value.entries, value.length)).astype(np.float32),
    }


def filled(caches: Any, tokens: int) -> Any:
    """The same caches, with random content of `tokens` tokens a row."""

    def fill(x: jax.Array) -> jax.Array:
        key = jax.random.key(x.size % 7)
        if x.dtype == jnp.uint8:
            return jax.random.bits(key, x.shape, jnp.uint8)
        if x.dtype == jnp.int32:
            return jnp.full_like(x, tokens)
        return x if x.ndim < 4 else jax.random.normal(key, x.shape, x.dtype)

    fill = jax.jit(fill, donate_argnums=0)
    return jax.tree.map(fill, caches)


def measure(
    config: ModelConfig, params: Any, batch: int, tokens: int, name: str, repeats: int, profiled: bool
) -> dict[str, Any]:
    method = specs.parse(name, METHODS, "method")
    decoder = Decoder(config, method, jnp.bfloat16)
    engine = Engine(decoder)
    calibration = [random_calibration(config, method)] * config.num_layers
    capacity = -(-(tokens + (MANY + 1) * (repeats + 1) * 2) // 128) * 128
    caches = filled(engine.init_caches(calibration, batch, capacity), tokens)
    held = allocated_bytes(caches)
    settings, stops = Sampling(temperature=0.0).settings(), jnp.zeros((0,), jnp.int32)
    state = DecodeState(
        caches=caches,
        token=jnp.zeros((batch,), jnp.int32),
        position=jnp.full((batch,), tokens, jnp.int32),
        step=jnp.int32(1),
        done=jnp.zeros((batch,), bool),
        tokens=jnp.full((batch, MANY), -1, jnp.int32),
        logprobs=jnp.zeros((batch, MANY), jnp.float32),
        keys=jax.random.split(jax.random.key(0), batch),
    )

    def run(state: DecodeState, until: int) -> tuple[DecodeState, float]:
        state = state.replace(step=jnp.int32(1))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = jax.block_until_ready(engine.decode(params, state, until, settings, stops))
        return state, time.perf_counter() - begin

    state, _ = run(state, FEW)
    times = []
    for _ in range(repeats):
        state, few = run(state, FEW)
        state, many = run(state, MANY)
        times.append((many - few) / (MANY - FEW) * 1e3)
    print(f"{name}, {batch} x {tokens}: {statistics.median(times):.3f} ms a step", flush=True)
    kernels = profile(decoder, params, state) if profiled else {}
    return {
        "method": name,
        "batch": batch,
        "tokens": tokens,
        "layers": config.num_layers,
        "ms_per_step": round(statistics.median(times), 4),
        "tokens_per_second": round(batch / statistics.median(times) * 1e3, 1),
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "cache_bytes": held,
        "device_bytes": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0),
        "compile_seconds": round(engine.compile_seconds, 1),
        "kernels": kernels,
    }


def profile(decoder: Decoder, params: Any, state: DecodeState) -> dict[str, Any]:
    """What one step starts on the device: by kernel, how often and for how many microseconds together.

    The step's caches are not donated here, so the device holds them twice; the copies are no kernels.
    """
    from jax.experimental.mosaic.gpu import profiler

    def step(params: Any, caches: Any, token: Any, position: Any) -> Any:
        return decoder.apply({"params": params}, token[:, None], position[:, None], caches, decode=True)

    timed = profiler.measure(jax.jit(step), aggregate=False)
    found: dict[str, list[float]] = {}
    for kernel, ms in timed(params, state.caches, state.token, state.position)[1]:
        found.setdefault(re.sub(r"[_.]?\d+$", "", kernel)[:60], []).append(1e3 * ms)
    by_time = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {kernel: {"count": len(us), "us": round(sum(us), 1)} for kernel, us in by_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, by number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step of the quantised caches")
    args = parser.parse_args()
    config = llama_8b(args.layers)
    params = random_params(config)
    rows = []
    for index in args.rows or range(len(ROWS)):
        profiled = args.profile and ROWS[index][2] != "full"
        rows.append(measure(config, params, *ROWS[index], args.repeats, profiled))
        print(rows[-1], flush=True)
        results.write("step-llama-8b", {"rows": rows}, args.output)


if __name__ == "__main__":
    main()
