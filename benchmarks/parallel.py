"""Attention and whole steps over several devices, beside one: random weights, batch 1, in 16 bits on a GPU.

    python benchmarks/parallel.py attention [--devices 2 4] [--tokens 196608 1048576 4194304] [--merges gather ...]
    python benchmarks/parallel.py step      [--devices 2] [--tokens ...] [--methods vecinfer:bits=2 full]
    python benchmarks/parallel.py prefill   [--devices 2] [--tokens 32768] [--methods vecinfer:bits=2 full]
    python benchmarks/parallel.py largest   [--devices 2] [--tokens 10000000] [--model llama-2-7b]

`attention` times a layer's append, attention and merge in a loop on the device, each layer's queries being the output
of the one before, for every collective that can merge, and for none ("alone": what the merge costs is the difference).
`step` times the whole decoding loop (vecinfer_jax/bench.py). `prefill` times a prompt read at once into an empty cache,
each device its share of it over everyone's keys and values, and what of that is the gathering of those. `largest` steps
a cache of so many tokens in all layers and puts what a device holds beside what `vecinfer plan --gpus` says. Rows that
the JSON file holds already and that are not run now stay in it.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from jax.sharding import PartitionSpec

from vecinfer_jax import specs
from vecinfer_jax.bench import SHAPES, StepBench, device_events, filled, random_calibration
from vecinfer_jax.caches import METHODS
from vecinfer_jax.caches.base import Chunk
from vecinfer_jax.caches.stripes import MERGES
from vecinfer_jax.errors import VecInferError
from vecinfer_jax.generation.engine import CAPACITY_STEP
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.models.decoder import layer_shape
from vecinfer_jax.models.language_model import resolve_dtype
from vecinfer_jax.parallel import Layout, Share, make_mesh
from vecinfer_jax.parallel.shardings import NonEmpty, device_share
from vecinfer_jax.plan import plan

LAYERS = 4  # of the attention part: more than a device's cache memory holds of the shortest cache
FEW, MANY = 4, 36
ALONE = "alone"


def attention_us(config: ModelConfig, method: Any, tokens: int, layout: Layout, repeats: int) -> float:
    """Microseconds of a layer, median of differences between a long loop and a short one."""
    dtype = resolve_dtype()
    layer = dataclasses.replace(layer_shape(config, 0, dtype), axes=layout.axes(1, tokens))
    calibration = random_calibration(config, method, 0, dtype) or None

    def init() -> Any:
        return tuple(method.init(layer, 1, tokens + 128, calibration) for _ in range(LAYERS))

    shapes = jax.eval_shape(init)
    share = Share(config, layout, layer.axes)
    of_caches = share.cache_specs(shapes)
    everywhere, here = NonEmpty(shapes), NonEmpty(device_share(shapes, of_caches, layout.mesh.shape))
    held = everywhere.held(filled(jax.jit(init, out_shardings=share.cache_shardings(shapes))(), tokens))

    def loop(steps: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, held: Any) -> Any:
        at = jnp.full((1, 1), tokens, jnp.int32)
        cos, sin = layer.rope.cos_sin(at % layer.rope.max_position)
        chunk = Chunk(at, jnp.ones((1,), jnp.int32), cos, sin, layer=layer, first=False)

        def step(_: jax.Array, carry: Any) -> Any:
            q, caches = carry
            new = []
            for cache in caches:
                q, cache = method.decode(q, k, v, chunk, cache)
                new.append(cache)
            return q, tuple(new)

        q, caches = jax.lax.fori_loop(0, steps, step, (q, here.whole(held)))
        return q, here.held(caches)

    whole, of_held = PartitionSpec(), everywhere.held(of_caches)
    mapped = jax.shard_map(
        loop,
        mesh=layout.mesh,
        in_specs=(whole, whole, whole, whole, of_held),
        out_specs=(whole, of_held),
        check_vma=False,
    )
    keys = jax.random.split(jax.random.key(1), 3)
    heads = (config.num_query_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = [
        jax.device_put(jax.random.normal(key, (1, n, config.head_dim), dtype), layout.sharding())
        for key, n in zip(keys, heads, strict=True)
    ]
    program = jax.jit(mapped, donate_argnums=4)

    def run(steps: int, held: Any) -> tuple[Any, float]:
        begin = time.perf_counter()
        _, held = jax.block_until_ready(program(jnp.int32(steps), *qkv, held))
        return held, time.perf_counter() - begin

    held, _ = run(FEW, held)
    times = []
    for _ in range(repeats):
        held, few = run(FEW, held)
        held, many = run(MANY, held)
        times.append((many - few) / (MANY - FEW) / LAYERS * 1e6)
    return round(statistics.median(times), 2)


def attention(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    method = specs.parse(
        args.methods[0] if args.methods else "vecinfer:bits=2,transform=smooth-hadamard", METHODS, "method"
    )
    MERGES[ALONE] = lambda output, lse, axis, shards: output
    for tokens in args.tokens or (196608, 1048576, 4194304):
        for devices, merge in [(1, None), *itertools.product(args.devices, args.merges or MERGES)]:
            layout = Layout(make_mesh(context=devices), merge=merge or "gather", split_from=0)
            us = attention_us(SHAPES[args.model], method, tokens, layout, args.repeats)
            where = {"model": args.model, "tokens": tokens, "devices": devices, "merge": merge}
            yield {"method": repr(method), **where, "us": us}


def step(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in ({"context": 1}, *({axis: devices} for devices in args.devices for axis in ("context", "model"))):
        layout = Layout(make_mesh(**shape), merge=(args.merges or ["gather"])[0], split_from=0)
        bench = StepBench(SHAPES[args.model], dtype=resolve_dtype(), layout=layout)
        for name in args.methods or ("vecinfer:bits=2,transform=smooth-hadamard", "full"):
            for tokens in args.tokens or (196608, 1048576):
                yield _step(bench, name, tokens, args.repeats) | {"model": args.model}
        del bench


def prefill(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for devices in (1, *args.devices):
        layout = Layout(make_mesh(context=devices), split_from=0)
        bench = StepBench(SHAPES[args.model], dtype=resolve_dtype(), layout=layout)
        for name, tokens in itertools.product(
            args.methods or ("vecinfer:bits=2,transform=smooth-hadamard", "full"), args.tokens or (32768,)
        ):
            row = {"name": name, "tokens": tokens, "mesh": dict(layout.mesh.shape), "model": args.model}
            yield row | _prefill(bench, specs.parse(name, METHODS, "method"), tokens, args.repeats)
        del bench


def _prefill(bench: StepBench, method: Any, tokens: int, repeats: int) -> dict[str, Any]:
    engine, calibration = bench.engine(method, 1, tokens + CAPACITY_STEP)
    prompt = np.random.default_rng(0).integers(0, bench.config.vocab_size, (1, tokens)).astype(np.int32)

    def read(caches: Any) -> Any:
        return jax.block_until_ready(engine.prefill(bench.params, caches, prompt, np.asarray([tokens], np.int32)))

    times = []
    for _ in range(repeats + 1):  # the first compiles
        caches = jax.block_until_ready(engine.init_caches(calibration, 1, tokens + CAPACITY_STEP))
        begin = time.perf_counter()
        logits, caches = read(caches)
        times.append((time.perf_counter() - begin) * 1e3)
        assert np.isfinite(engine.fetch(logits)).all()
        del caches
    row: dict[str, Any] = {"ms": round(statistics.median(times[1:]), 2)}
    if jax.default_backend() == "gpu":
        caches = jax.block_until_ready(engine.init_caches(calibration, 1, tokens + CAPACITY_STEP))
        events = device_events(lambda: read(caches))
        row["gather_ms"] = round(sum(ns for name, _, ns, _ in events if "AllGather" in name) / 1e6, 2)
    return row


def largest(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for devices in args.devices:
        layout = Layout(make_mesh(context=devices))
        bench = StepBench(SHAPES[args.model], dtype=resolve_dtype(), layout=layout)
        for name in args.methods or ("vecinfer:bits=2,transform=smooth-hadamard",):
            for tokens in args.tokens or (10_000_000,):
                memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**36)
                method = specs.parse(name, METHODS, "method")
                said = plan(SHAPES[args.model], method, batch=1, tokens=tokens, memory=memory, gpus=devices)
                yield _step(bench, name, tokens, 1) | {"model": args.model, "plan": dataclasses.asdict(said)}
        del bench


def _step(bench: StepBench, name: str, tokens: int, repeats: int) -> dict[str, Any]:
    row = {"name": name, "tokens": tokens, "mesh": dict(bench.layout.mesh.shape) if bench.layout else None}
    try:
        return row | dataclasses.asdict(bench.step(specs.parse(name, METHODS, "method"), 1, tokens, repeats=repeats))
    except VecInferError as error:
        return row | {"error": str(error)}


PARTS = {"attention": attention, "step": step, "prefill": prefill, "largest": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--devices", type=int, nargs="+", default=[2])
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--merges", nargs="*", choices=[*MERGES, ALONE])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: results/<device>/parallel.json")
    args = parser.parse_args()
    path = args.output or results.ROOT / results.device_name() / "parallel.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: rows for name, rows in content.items() if name in PARTS}
    for row in PARTS[args.part](args):
        print(json.dumps(row), flush=True)
        old = [other for other in kept.get(args.part, []) if identity(other) != identity(row)]
        kept[args.part] = [*old, row]
        results.write("parallel", kept, path)  # nothing is lost if it is stopped here


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is a measurement of."""
    return tuple(str(row.get(key)) for key in ("model", "name", "method", "tokens", "mesh", "devices", "merge"))


if __name__ == "__main__":
    main()
