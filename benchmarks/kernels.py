"""Check and time the kernels of `pallas_kernels` on this machine's GPU, beside their peers, into one JSON.

    python benchmarks/kernels.py --output benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json

Every row is measured on random data and random codes after its result was checked against a float32 reference
with HIGHEST-precision products. A time is the median over repeats of a device-side loop whose steps depend on
each other, divided by its steps; peers run in the same process. `bytes` is what the operation must move at
least once, `ratio` the peer's time over ours: above 1 we are faster.
"""

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hadamard, vq_decode_attention, vq_encode

HEADS = 8  # KV heads of the encode rows (Llama-3.1-8B)
DECODE = [
    # batch, tokens, query heads, KV heads, head dimension
    (16, 32768, 32, 8, 128),
    (1, 196608, 32, 8, 128),
    (64, 4096, 32, 8, 128),
    (16, 32768, 9, 3, 64),
]


def microseconds(step: Callable, state, *constants, steps: int = 10, repeats: int = 7) -> float:
    """Time of state = step(state, *constants), the median over `repeats` of a loop of `steps` on the device."""
    loop = jax.jit(lambda state, *rest: lax.fori_loop(0, steps, lambda _, s: step(s, *rest), state))
    jax.block_until_ready(loop(state, *constants))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(loop(state, *constants))
        times.append((time.perf_counter() - start) / steps * 1e6)
    return statistics.median(times)


def row(name: str, us: float, moved: int, *, peer: str | None = None, peer_us: float | None = None, **more) -> dict:
    out = {"name": name, "us": round(us, 2), "bytes": moved, "gb_per_s": round(moved / us / 1e3, 1), **more}
    if peer is not None and peer_us is not None:
        out |= {"peer": peer, "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 3)}
    print(json.dumps(out), flush=True)
    return out


def check(name: str, error, bound: float) -> float:
    error = float(error)
    if not error <= bound:
        raise SystemExit(f"{name}: error {error:g} exceeds {bound:g}; nothing was written")
    return error


def keys(count: int):
    return jax.random.split(jax.random.key(0), count)


def time_hadamard() -> list[dict]:
    rows = []
    for dtype, dim, count in (
        ("bfloat16", 128, 524288),
        ("float32", 128, 262144),
        ("bfloat16", 64, 1048576),
        ("bfloat16", 1024, 65536),
    ):
        x = jax.random.normal(keys(1)[0], (count, dim), dtype)
        name = f"hadamard {count} x {dim} {dtype}"
        exact = hadamard(x[:4096].astype(jnp.float32), implementation="xla")
        got = hadamard(x[:4096], implementation="triton").astype(jnp.float32)
        error = check(name, jnp.max(jnp.abs(got - exact)), 1e-5 if dtype == "float32" else 2.0**-6)

        # Two applications a step: an odd number would make the loop copy its state back.
        def twice(x, which):
            return hadamard(hadamard(x, implementation=which), implementation=which)

        ours = microseconds(lambda x, f=twice: f(x, "triton"), x) / 2
        xla = microseconds(lambda x, f=twice: f(x, "xla"), x) / 2
        copy = microseconds(lambda x: -x, x)
        more = {"xla_us": round(xla, 2), "max_error": error}
        rows.append(row(name, ours, 2 * x.nbytes, peer="device copy", peer_us=copy, **more))
    return rows


def time_encode(tokens: int = 8192) -> list[dict]:
    k = keys(6)
    x = jax.random.normal(k[0], (1, tokens, HEADS, 128), jnp.bfloat16)
    angle = jax.random.uniform(k[1], (1, tokens, 64), maxval=2 * math.pi)
    rope, smooth = (jnp.cos(angle), jnp.sin(angle)), jax.random.uniform(k[2], (HEADS, 128), minval=0.5, maxval=2.0)
    mean = jax.random.normal(k[3], (HEADS, 128))
    dense = jax.random.normal(k[4], (HEADS, 128, 128)) / 128**0.5
    kinds = {
        "keys: rope, smooth, Hadamard": {"rope": rope, "scale": smooth, "hadamard": True},
        "keys: rope, mean, dense map": {"rope": rope, "mean": mean, "matrix": dense},
        "values": {},
    }
    rows = []
    for length, bits in ((4, 8), (2, 8), (8, 8), (8, 12)):
        codebook = jax.random.normal(k[5], (HEADS, 2**bits, length))
        for kind, options in kinds.items():
            name = f"vq_encode d{length}b{bits} {kind}, {tokens} tokens x {HEADS} heads x 128 bfloat16"
            got, expected = (vq_encode(x, codebook, **options, implementation=which) for which in ("triton", "xla"))
            # Codes are discrete: a rounding difference flips a few.
            error = check(name, jnp.mean(got != expected), 1e-3)

            def step(codebook, x, options, which):
                codes = vq_encode(x, codebook, **options, implementation=which)
                return codebook + 1e-6 * codes[0, 0, 0, 0]

            flags = {key: value for key, value in options.items() if value is True}
            arrays = {key: value for key, value in options.items() if value is not True}
            ours, xla = (
                microseconds(
                    lambda c, x, o, which=which, flags=flags: step(c, x, {**o, **flags}, which),
                    codebook, x, arrays, steps=4,
                )
                for which in ("triton", "xla")
            )  # fmt: skip
            per_token = {"us_per_token": round(ours / tokens, 5), "codes_that_differ": error}
            rows.append(row(name, ours, x.nbytes + got.nbytes, peer="xla", peer_us=xla, **per_token))
    for batch in (1, 16):  # an append: one token a row
        one = jnp.broadcast_to(x[:, :1], (batch, 1, HEADS, 128))
        turn = tuple(jnp.broadcast_to(part[:, :1], (batch, 1, 64)) for part in rope)
        codebook = jax.random.normal(k[5], (HEADS, 256, 4))

        def append(codebook, x, rope):
            codes = vq_encode(x, codebook, rope=rope, scale=smooth, hadamard=True, implementation="triton")
            return codebook + 1e-6 * codes[0, 0, 0, 0]

        ours = microseconds(append, codebook, one, turn, steps=100)
        rows.append(row(f"vq_encode d4b8 keys: rope, smooth, Hadamard, one token of {batch} rows", ours, one.nbytes))
    return rows


def random_codes(key, batch: int, heads: int, tokens: int, dim: int, length: int, bits: int) -> jax.Array:
    return jax.random.bits(key, (batch, heads, tokens, dim // length * bits // 8), jnp.uint8)


def time_decode() -> list[dict]:
    rows = []
    for batch, tokens, query_heads, heads, dim in DECODE:
        k = keys(8)
        scale, lengths = dim**-0.5, jnp.full((batch,), tokens, jnp.int32)
        q = jax.random.normal(k[0], (batch, query_heads, dim), jnp.bfloat16)
        kv = [jax.random.normal(key, (batch, tokens, heads, dim), jnp.bfloat16) for key in k[1:3]]

        def peer(q, k, v, scale=scale):
            out = jax.nn.dot_product_attention(q[:, None], k, v, scale=scale, implementation="cudnn")
            return (q + 1e-3 * out[:, 0]).astype(q.dtype)

        cudnn = microseconds(peer, q, *kv)
        del kv
        formats = [((4, 8), (4, 8))]
        if dim == 128 and batch == 16:
            formats += [((2, 8), (2, 8)), ((8, 8), (8, 8)), ((4, 10), (8, 12)), ((4, 12), (4, 12))]
        for key, value in formats:
            codes = [
                random_codes(which, batch, heads, tokens, dim, *form)
                for which, form in zip(k[3:5], (key, value), strict=True)
            ]
            books = [
                jax.random.normal(which, (heads, 2**bits, length), jnp.bfloat16)
                for which, (length, bits) in zip(k[5:7], (key, value), strict=True)
            ]
            names = ["d{}b{}".format(*form) for form in (key, value)]
            shape = f"B{batch} S{tokens} {query_heads}/{heads} heads D{dim}"
            name = f"vq_decode_attention K {names[0]} V {names[1]} bfloat16, {shape}"

            def attend(q, *arrays, which, scale=scale):
                return vq_decode_attention(q, *arrays, scale=scale, implementation=which)

            arrays = (*codes, *books, lengths)
            got, expected = (attend(q, *arrays, which=which) for which in ("triton", "xla"))
            error = check(name, jnp.max(jnp.abs(got[0] - expected[0])), 2e-3)
            check(name, jnp.max(jnp.abs(got[1] - expected[1])), 1e-3)

            def step(q, *arrays, which):
                return (q + 1e-3 * attend(q, *arrays, which=which)[0]).astype(q.dtype)

            ours = microseconds(lambda *a: step(*a, which="triton"), q, *arrays)
            more = {"max_error": error}
            if key == (4, 8):
                xla = microseconds(lambda *a: step(*a, which="xla"), q, *arrays, steps=2, repeats=3)
                more["xla_us"] = round(xla, 2)
            moved = sum(array.nbytes for array in codes)
            rows.append(row(name, ours, moved, peer="cuDNN bfloat16", peer_us=cudnn, **more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--only", choices=["hadamard", "encode", "decode"], help="one operation (for tuning)")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this benchmark needs a GPU; JAX runs on {jax.default_backend()} here")
    parts = {"hadamard": time_hadamard, "encode": time_encode, "decode": time_decode}
    rows = [line for name, part in parts.items() if arguments.only in (None, name) for line in part()]
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
