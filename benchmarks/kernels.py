"""Check and time the kernels of `pallas_kernels` on this machine's GPU, beside their peers, into one JSON.

    python benchmarks/kernels.py --output benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json

Every row runs on random data and random codes, and first checks (part of) its result against an exact one: the
definition, written here, in float32 with HIGHEST-precision products. A time is the median over repeats of a
device-side loop whose steps depend on each other, divided by its steps; peers run in the same process. `bytes`
is what the operation must move at least once; `ratio` is the peer's time over ours, above 1 where we are faster.
"""

import argparse
import datetime
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hadamard, packing, vq_decode_attention, vq_encode

HEADS, DIM = 8, 128  # KV heads and head dimension of the encode rows (Llama-3.1-8B)
# batch, tokens, query heads, KV heads, head dimension, formats of keys and values
DECODE = [
    (16, 32768, 32, 8, 128, [("d4b8", "d4b8"), ("d2b8", "d2b8"), ("d8b8", "d8b8"), ("d4b10", "d8b12")]),
    (1, 196608, 32, 8, 128, [("d4b8", "d4b8")]),
    (64, 4096, 32, 8, 128, [("d4b8", "d4b8")]),
    (16, 32768, 9, 3, 64, [("d4b8", "d4b8")]),
]
exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


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


def row(name: str, us: float, moved: int, *, peer: str = "", peer_us: float | None = None, **more) -> dict:
    out = {"name": name, "us": round(us, 2), "bytes": moved, "gb_per_s": round(moved / us / 1e3, 1), **more}
    if peer_us is not None:
        out |= {"peer": peer, "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 3)}
    return out


def check(name: str, error, bound: float) -> float:
    error = float(error)
    if not error <= bound:
        raise SystemExit(f"{name}: error {error:g} exceeds {bound:g}")
    return error


def format_of(name: str) -> tuple[int, int]:
    """d4b8 -> (4, 8): sub-vector length and bits."""
    length, bits = name[1:].split("b")
    return int(length), int(bits)


def random_codebook(key, heads: int, form: str, dtype) -> jax.Array:
    length, bits = format_of(form)
    return jax.random.normal(key, (heads, 2**bits, length), dtype)


def hadamard_matrix(size: int) -> jax.Array:
    matrix = jnp.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def time_hadamard() -> Iterator[dict]:
    for dtype, dim, count in (
        ("bfloat16", 128, 524288),
        ("float32", 128, 262144),
        ("bfloat16", 64, 1048576),
        ("bfloat16", 1024, 65536),
    ):
        x = jax.random.normal(jax.random.key(0), (count, dim), dtype)
        name = f"hadamard {count} x {dim} {dtype}"
        expected = exact("nd,de->ne", x[:4096].astype(jnp.float32), hadamard_matrix(dim))
        got = hadamard(x[:4096], implementation="triton").astype(jnp.float32)
        bound = 1e-5 if dtype == "float32" else 2.0**-6
        error = check(name, jnp.max(jnp.abs(got - expected)), bound)

        # Two applications a step: after an odd number the loop would have to copy its state back.
        def twice(x, which):
            return hadamard(hadamard(x, implementation=which), implementation=which)

        ours = microseconds(lambda x, f=twice: f(x, "triton"), x) / 2
        xla = microseconds(lambda x, f=twice: f(x, "xla"), x) / 2
        copy = microseconds(lambda x: -x, x)
        more = {"max_error": error, "xla_us": round(xla, 2)}
        yield row(name, ours, 2 * x.nbytes, peer="device copy", peer_us=copy, **more)


def exact_codes(x, codebook, rope=None, mean=None, scale=None, matrix=None, hadamard=False) -> jax.Array:
    """`vq_encode` by its definition, for 8-bit codes and few tokens: uint8[B, H, S, M]."""
    y = x.astype(jnp.float32)
    if rope is not None:
        cos, sin = (part[:, :, None] for part in rope)
        low, high = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
        y = y.astype(x.dtype).astype(jnp.float32)
    y = (y - (0.0 if mean is None else mean)) * (1.0 if scale is None else scale)
    if matrix is not None:
        y = exact("bshi,hij->bshj", y, matrix)
    if hadamard:
        y = exact("bshi,ij->bshj", y, hadamard_matrix(y.shape[-1]))
    parts = jnp.swapaxes(y.reshape(*y.shape[:-1], -1, 1, codebook.shape[-1]), 1, 2)
    return jnp.argmin(jnp.sum((parts - codebook[:, None, None]) ** 2, -1), -1)


def time_encode(tokens: int = 8192) -> Iterator[dict]:
    k = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(k[0], (1, tokens, HEADS, DIM), jnp.bfloat16)
    angle = jax.random.uniform(k[1], (1, tokens, DIM // 2), maxval=2 * math.pi)
    rope = jnp.cos(angle), jnp.sin(angle)
    smooth = jax.random.uniform(k[2], (HEADS, DIM), minval=0.5, maxval=2.0)
    dense = jax.random.normal(k[4], (HEADS, DIM, DIM)) / DIM**0.5
    kinds = {
        "values": (False, {}),
        "keys with rope, smooth, Hadamard": (True, {"rope": rope, "scale": smooth}),
        "keys with rope, mean, dense map": (False, {"rope": rope, "mean": smooth, "matrix": dense}),
    }

    def step(codebook, x, options, flag, which):
        codes = vq_encode(x, codebook, **options, hadamard=flag, implementation=which)
        return codebook + 1e-6 * codes[0, 0, 0, 0]

    for form in ("d4b8", "d2b8", "d8b8", "d8b12"):
        codebook = random_codebook(k[5], HEADS, form, jnp.float32)
        length, bits = format_of(form)
        for kind, (flag, options) in kinds.items():
            name = f"vq_encode {form} {kind}: {tokens} tokens x {HEADS} x {DIM} bfloat16"
            got = vq_encode(x, codebook, **options, hadamard=flag, implementation="triton")
            few = {key: tuple(a[:, :16] for a in v) if key == "rope" else v for key, v in options.items()}
            expected = exact_codes(x[:, :16], codebook, **few, hadamard=flag)
            codes = packing.unpack(got[:, :, :16], bits, DIM // length)
            # Codes are discrete: a rounding difference may flip a few.
            error = check(name, jnp.mean(codes != expected), 2e-3)

            arrays = (codebook, x, options)
            ours = microseconds(lambda *a, f=flag: step(*a, f, "triton"), *arrays)
            more: dict = {"us_per_token": round(ours / tokens, 5), "codes_that_differ": error}
            if form == "d4b8":
                xla = microseconds(lambda *a, f=flag: step(*a, f, "xla"), *arrays, steps=2, repeats=3)
                more |= {"peer": "xla", "peer_us": xla}
            yield row(name, ours, x.nbytes + got.nbytes, **more)
    codebook = random_codebook(k[5], HEADS, "d4b8", jnp.float32)
    for batch in (1, 16):  # an append: one token a row
        few = x[:, :batch].reshape(batch, 1, HEADS, DIM)
        options = {"rope": tuple(a[:, :batch].reshape(batch, 1, -1) for a in rope), "scale": smooth}
        ours, xla = (
            microseconds(lambda *a, i=i: step(*a, True, i), codebook, few, options, steps=100)
            for i in ("triton", "xla")
        )
        name = f"vq_encode d4b8 keys with rope, smooth, Hadamard: one token x {batch} rows"
        yield row(name, ours, few.nbytes, peer="xla", peer_us=xla)


def exact_attention(q, codes, codebooks, scale: float) -> tuple[jax.Array, jax.Array]:
    """Attention of some query heads [G, D] over one head's codes [S, bytes]: output and log-sum-exp."""

    def decode(codes, codebook):
        entries, length = codebook.shape
        index = packing.unpack(codes, entries.bit_length() - 1, q.shape[-1] // length)
        return codebook.astype(jnp.float32)[index].reshape(codes.shape[0], q.shape[-1])

    keys, values = (decode(*pair) for pair in zip(codes, codebooks, strict=True))
    scores = scale * exact("gd,sd->gs", q.astype(jnp.float32), keys)
    return exact("gs,sd->gd", jax.nn.softmax(scores), values), jax.nn.logsumexp(scores, axis=-1)


def time_decode() -> Iterator[dict]:
    for batch, tokens, query_heads, heads, dim, formats in DECODE:
        k = jax.random.split(jax.random.key(0), 7)
        scale, group = dim**-0.5, query_heads // heads
        lengths = jnp.full((batch,), tokens, jnp.int32)
        q = jax.random.normal(k[0], (batch, query_heads, dim), jnp.bfloat16)

        def cudnn(q, keys, values, scale=scale):
            out = jax.nn.dot_product_attention(q[:, None], keys, values, scale=scale, implementation="cudnn")
            return (q + 1e-3 * out[:, 0]).astype(q.dtype)

        def step(q, *arrays, which, scale=scale):
            out, _ = vq_decode_attention(q, *arrays, scale=scale, implementation=which)
            return (q + 1e-3 * out).astype(q.dtype)

        shape = (batch, tokens, heads, dim)
        peer = microseconds(cudnn, q, *(jax.random.normal(key, shape, jnp.bfloat16) for key in k[1:3]))
        for forms in formats:
            codes, books = [], []
            for i, form in enumerate(forms):
                length, bits = format_of(form)
                size = packing.num_bytes(dim // length, bits)
                codes.append(jax.random.bits(k[3 + i], (batch, heads, tokens, size), jnp.uint8))
                books.append(random_codebook(k[5 + i], heads, form, jnp.bfloat16))
            name = (
                f"vq_decode_attention K {forms[0]} V {forms[1]} bfloat16: "
                f"B{batch} S{tokens} {query_heads}/{heads} heads D{dim}"
            )
            arrays = (*codes, *books, lengths)
            got = vq_decode_attention(q, *arrays, scale=scale, implementation="triton")
            last = slice(query_heads - group, query_heads)  # the last row's last KV head
            want = exact_attention(q[-1, last], [c[-1, -1] for c in codes], [b[-1] for b in books], scale)
            error = check(name, jnp.max(jnp.abs(got[0][-1, last] - want[0])), 2e-3)
            check(name, jnp.max(jnp.abs(got[1][-1, last] - want[1])), 1e-4)

            ours = microseconds(functools.partial(step, which="triton"), q, *arrays)
            more: dict = {"max_error": error}
            if forms == ("d4b8", "d4b8"):
                xla = microseconds(functools.partial(step, which="xla"), q, *arrays, steps=1, repeats=3)
                more["xla_us"] = round(xla, 2)
            moved = sum(array.nbytes for array in codes)
            yield row(name, ours, moved, peer="cuDNN bfloat16", peer_us=peer, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this benchmark needs a GPU; JAX runs on {jax.default_backend()} here")
    result: dict = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for part in (time_decode, time_encode, time_hadamard):
        for line in part():
            print(json.dumps(line), flush=True)
            result["rows"].append(line)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
