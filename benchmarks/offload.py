"""Decoding steps of Llama-3.1-8B's shapes with caches in the host's memory, beside one on the device.

    python benchmarks/offload.py [--output FILE] [--rows 0 1 ...] [--tokens 131072] [--profile | --prompt] [--memory 24]

Random weights in bfloat16, one sequence. Peers in the same run: full precision on the device, and plain offload, which
copies every layer's keys and values to the device in every step. Beside each time stand the bytes that a step fetches
over the bus and how long they take at the speed of a copy, measured in the same run. `--prompt` reads a prompt of so
many tokens and decodes from it, in place of filling caches with random content; `--memory` lets the allocator have so
many GiB of the device, as a smaller card would.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import struct
from jaxtyping import Array, Float

import vecinfer_jax as vj
from vecinfer_jax.bench import SHAPES, StepBench
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.full_precision import FullPrecision, FullPrecisionCache
from vecinfer_jax.caches.host_tier import SparseLayer, on_device, on_host, write_slots
from vecinfer_jax.generation.engine import CAPACITY_STEP, round_up
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.rope import apply_rope

SHAPE = "llama-3.1-8b"
COPIED = 2**30
# Tokens of a prompt that are read at a time, and tokens decoded after it.
CHUNK, DECODED = 8192, 64


@struct.dataclass
class OffloadedCache(FullPrecisionCache):
    """A layer's keys and values on the host."""

    keys: Float[Array, "B S Hkv D"] = array_field("host")
    values: Float[Array, "B S Hkv D"] = array_field("host")

    def copied(self) -> FullPrecisionCache:
        """The same on the device."""
        return FullPrecisionCache(on_device(self.keys), on_device(self.values), self.lengths)


@dataclasses.dataclass(frozen=True)
class Offload(FullPrecision):
    """Whole-layer offload: a step copies all of a layer to the device, attends, and writes its token to the host."""

    name: ClassVar[str] = "offload"

    def init(
        self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None
    ) -> OffloadedCache:
        cache = super().init(layer, batch, capacity, calibration)
        return OffloadedCache(on_host(cache.keys), on_host(cache.values), cache.lengths)

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: OffloadedCache,
    ) -> tuple[Float[Array, "B T Hq D"], OffloadedCache]:
        out, held = super().prefill(q, k, v, chunk, cache.copied())
        return out, OffloadedCache(on_host(held.keys), on_host(held.values), held.lengths)

    def decode(
        self,
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        chunk: Chunk,
        cache: OffloadedCache,
    ) -> tuple[Float[Array, "B Hq D"], OffloadedCache]:
        out, _ = super().decode(q, k, v, chunk, cache.copied())
        k = apply_rope(k, chunk.cos[:, 0], chunk.sin[:, 0])
        at, one = chunk.positions[:, 0], jnp.ones((q.shape[0],), jnp.int32)
        keys, values = (
            write_slots(host, x[:, None], at, one, axis=1) for host, x in ((cache.keys, k), (cache.values, v))
        )
        return out, OffloadedCache(keys, values, at + 1)


def methods() -> dict[str, CacheMethod]:
    roles = ("quantised", "sparse*31")
    return {
        "full": vj.FullPrecision(),
        "offload": Offload(),
        "tailorkv:bits=1": vj.TailorKV(bits=1, roles=roles),
        "tailorkv:bits=2": vj.TailorKV(bits=2, roles=roles),
        "tailorkv:bits=1,long": vj.TailorKV.long_context(bits=1, roles=roles),
        "tailorkv:vecinfer": vj.TailorKV(quantised=vj.VecInfer(bits=2), roles=roles),
        "tailorkv:bits=1,basis=principal": vj.TailorKV(bits=1, basis="principal", roles=roles),
        "tailorkv:bits=1,basis=principal,heads=each": vj.TailorKV(bits=1, basis="principal", heads="each", roles=roles),
        "tailorkv:bits=1,host=vecinfer-4": vj.TailorKV(bits=1, host="vecinfer-4", roles=roles),
        "tailorkv:bits=1,host=vecinfer-4,basis=principal,heads=each": vj.TailorKV(
            bits=1, host="vecinfer-4", basis="principal", heads="each", roles=roles
        ),
    }


def copy_speed() -> float:
    """Bytes a second from pinned host memory to the device, by one large copy."""
    held = jax.jit(lambda: on_host(jnp.zeros(COPIED, jnp.uint8)))()
    copy = jax.jit(on_device)
    jax.block_until_ready(copy(held))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(copy(held))
        times.append(time.perf_counter() - begin)
    return COPIED / sorted(times)[2]


def fetched_bytes(method: CacheMethod, tokens: int) -> int:
    """What one step must fetch from the host."""
    config = SHAPES[SHAPE]
    token = 2 * config.num_kv_heads * config.head_dim * 2
    if isinstance(method, Offload):
        return config.num_layers * tokens * token
    if not isinstance(method, vj.TailorKV):
        return 0
    layers = [method.for_layer(i, config.num_layers) for i in range(config.num_layers)]
    sparse = [layer for layer in layers if isinstance(layer, SparseLayer)]
    share = 4 if method.host == "vecinfer-4" else 1  # a byte for two elements, and two channels at a time
    return sum(
        config.num_kv_heads * layer.channels * tokens * 2 * min(share, 2) // share
        + min(layer.tokens, tokens) * token // share
        for layer in sparse
    )


def read_prompt(bench: StepBench, method: CacheMethod, tokens: int) -> dict[str, Any]:
    """Seconds of a prompt read in chunks and of the tokens after it, compilation apart, and the device's peak."""
    capacity = round_up(tokens + DECODED, CAPACITY_STEP)
    engine, calibration = bench.engine(method, 1, capacity)
    prompt = np.random.default_rng(0).integers(0, bench.config.vocab_size, (1, tokens)).astype(np.int32)
    lengths, settings, stops = np.asarray([tokens], np.int32), Sampling().settings(), np.zeros(0, np.int32)
    seconds: list[tuple[float, float]] = []
    for _ in range(2):  # the first compiles
        caches = jax.block_until_ready(engine.init_caches(calibration, 1, capacity))
        begin = time.perf_counter()
        logits, caches = jax.block_until_ready(engine.prefill(bench.params, caches, prompt, lengths, CHUNK))
        read = time.perf_counter()
        keys = engine.keys(0, np.zeros(1, np.uint32))
        state = engine.start(logits, caches, lengths, keys, np.ones(1, bool), DECODED, settings, stops)
        state = jax.block_until_ready(engine.decode(bench.params, state, DECODED, settings, stops))
        seconds.append((read - begin, time.perf_counter() - read))
        chosen, logprobs = np.asarray(state.tokens), np.asarray(state.logprobs)
        assert (chosen >= 0).all() and np.isfinite(logprobs).all() and (logprobs < 0).all()
        del caches, state
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "prompt_seconds": round(seconds[-1][0], 3),
        "decoded_tokens": DECODED,
        "decoded_seconds": round(seconds[-1][1], 3),
        "device_peak_bytes": memory.get("peak_bytes_in_use", 0),
    }


def limit_memory(gib: float) -> None:
    """Leaves the allocator so much of the device; before JAX first uses it."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    total = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) / 1024
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{gib / total:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: results/<device>/offload-llama-3.1-8b.json")
    parser.add_argument("--rows", type=int, nargs="*", help="which methods, by number")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="what the device does in a step, instead of its time")
    parser.add_argument("--prompt", action="store_true", help="read a prompt and decode from it, instead")
    parser.add_argument("--memory", type=float, help="GiB of the device to use")
    args = parser.parse_args()
    if args.memory is not None:
        limit_memory(args.memory)
    bench, speed = StepBench(SHAPES[SHAPE]), copy_speed()
    path = args.output or results.ROOT / results.device_name() / f"offload-{SHAPE}.json"
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    chosen = list(methods().items())
    for index in args.rows if args.rows is not None else range(len(chosen)):
        name, method = chosen[index]
        fetched = fetched_bytes(method, args.tokens)
        row: dict[str, Any] = {"name": name, "batch": 1, "tokens": args.tokens}
        if args.memory is not None:
            row |= {"memory_gib": args.memory, "bytes_limit": (jax.devices()[0].memory_stats() or {})["bytes_limit"]}
        if args.prompt:
            row |= read_prompt(bench, method, args.tokens)
        elif args.profile:
            row |= {"profile": dataclasses.asdict(bench.profile(method, 1, args.tokens))}
        else:
            row |= dataclasses.asdict(bench.step(method, 1, args.tokens, repeats=args.repeats))
        row |= {"copy_gb_per_s": round(speed / 1e9, 2), "fetched_bytes": fetched}
        row |= {"link_floor_ms": round(fetched / speed * 1e3, 3)}
        print(json.dumps(row), flush=True)
        held = [old for old in held if identity(old) != identity(row)] + [row]
        results.write(f"offload-{SHAPE}", {"rows": held}, path)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is a measurement of."""
    kind = "profile" in row, "prompt_seconds" in row
    return row["name"], row["batch"], row["tokens"], row.get("memory_gib"), *kind


if __name__ == "__main__":
    main()
