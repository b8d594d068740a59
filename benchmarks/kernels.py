"""Check and time the kernels of `pallas_kernels` on this machine's GPU, beside their peers, into one JSON.

    python benchmarks/kernels.py --output benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json

Every row runs on random data and random codes, and first checks (part of) its result against an exact one: the
definition, written here, in float32 with HIGHEST-precision products. A time is the median over repeats of a
device-side loop whose steps depend on each other, divided by its steps; peers run in the same process. `bytes`
is what the operation must move at least once; `ratio` is the peer's time over ours, above 1 where we are faster.

Decode attention, ours and cuDNN's, is timed on the device (CUPTI): the sum of the kernels that one call starts, the
merge of its splits included, median of several; `loop_us` is the same call in a loop as above, where it stands beside,
and `map_us` the call that also multiplies the queries by a matrix a head. tokamax is timed where it is installed.
`percent_of_bandwidth` is bytes / us against what a sum over a large array reads in the same run.
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
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import (
    attend_rows,
    channel_lse,
    decode_attention,
    fetch_channels,
    group_int_decode_attention,
    hadamard,
    nuq,
    nuq_decode_attention,
    packing,
    select_tokens,
    vq_decode_attention,
    vq_encode,
)
from pallas_kernels.group_int import Layout
from pallas_kernels.host_tier import reference as host_tier
from vecinfer_jax.caches.kvquant import outlier_slots

HEADS, DIM = 8, 128  # KV heads and head dimension of the encode rows (Llama-3.1-8B)
QUERY_HEADS, FEED_FORWARD = 32, 14336
ENCODE = ("d4b8", "d2b8", "d8b8", "d4b10", "d4b12", "d8b12")
PROMPT = 32768
EIGHT_B = (32, 8, 128)  # query heads, KV heads, head dimension
EVERY = [(f, f) for f in ("d4b8", "d2b8", "d8b8", "d4b10", "d4b12", "d8b12")] + [("d4b10", "d8b12")]
PAPER = [(f, f) for f in ("d4b8", "d2b8", "d8b8", "d4b12", "d8b12")]
SAME = [("d4b8", "d4b8")]
# The same with tables of the values in fp8.
FP8 = [(f, f"{f}-fp8") for f in ("d4b8", "d8b8", "d4b10", "d4b12", "d8b12")]
# batch, tokens, (query heads, KV heads, head dimension), formats of keys and values
DECODE = [
    (16, 32768, EIGHT_B, [*EVERY, *FP8]),
    (1, 196608, EIGHT_B, [("d4b8", "d4b8"), ("d2b8", "d2b8"), ("d8b8", "d8b8")]),
    (64, 4096, EIGHT_B, SAME),
    *((1, tokens, EIGHT_B, SAME) for tokens in (4096, 16384, 65536)),
    *((16, tokens, EIGHT_B, SAME) for tokens in (1024, 4096)),
    (64, 1024, EIGHT_B, SAME),
    (16, 16384, EIGHT_B, PAPER),
    (16, 16384, (32, 8, 64), EVERY),
    *((16, 16384, (8 * group, 8, 128), PAPER) for group in (1, 3, 6, 7, 8)),
    (16, 16384, (128, 8, 128), SAME),
    (16, 16384, (9, 3, 64), SAME),
    (16, 16384, (14, 2, 64), SAME),
]
# The Triton kernel and the loop stand beside these.
BESIDE = DECODE[:1]
# Other kernels for bfloat16 beside cuDNN's are timed with these.
PEERS = DECODE[:3]
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
        ("bfloat16", 128, 2**22),
        ("float32", 128, 2**21),
        ("bfloat16", 64, 2**23),
        ("float32", 64, 2**22),
        ("bfloat16", 1024, 2**19),
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
    """`vq_encode` by its definition, for few tokens: the indices [B, H, S, M]."""
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


def excess_over_nearest(vectors: jax.Array, codebook: jax.Array, codes: jax.Array) -> float:
    """The largest relative excess of a chosen squared distance over the least one, in float64: [n, d], [K, d], [n]."""
    with jax.enable_x64(True):
        wide, table = jnp.float64(vectors), jnp.float64(codebook)

        def one(pair):
            distance = jnp.sum((pair[0][:, None] - table) ** 2, axis=-1)
            least = distance.min(-1)
            chosen = jnp.take_along_axis(distance, pair[1][:, None], axis=1)[:, 0]
            return jnp.max((chosen - least) / jnp.maximum(least, 1e-30))

        parts = wide.reshape(-1, 2048, wide.shape[-1]), jnp.int32(codes).reshape(-1, 2048)
        return float(jnp.max(jax.jit(lambda *pair: lax.map(one, pair))(*parts)))


def time_encode() -> Iterator[dict]:
    for tokens in (8192, PROMPT):
        k = jax.random.split(jax.random.key(0), 6)
        x = jax.random.normal(k[0], (1, tokens, HEADS, DIM), jnp.bfloat16)
        angle = jax.random.uniform(k[1], (1, tokens, DIM // 2), maxval=2 * math.pi)
        rope = jnp.cos(angle), jnp.sin(angle)
        smooth = jax.random.uniform(k[2], (HEADS, DIM), minval=0.5, maxval=2.0)
        dense = jax.random.normal(k[4], (HEADS, DIM, DIM)) / DIM**0.5
        values: dict = {}
        rotated = {"rope": rope, "scale": smooth, "hadamard": True}
        mapped = {"rope": rope, "mean": smooth, "matrix": dense}
        yield from (
            encode_one_by_one(x, k[5], values, rotated, mapped)
            if tokens == 8192
            else encode_prompt(x, k[5], values, rotated, mapped)
        )


def encode_step(codebook, x, kinds, settings, which="triton"):
    """The codebook, moved by nothing to speak of, after each kind of row was encoded with it."""
    for options, flag in zip(kinds, settings, strict=True):
        # Depends on the step before, so that no part of the work is the same in every step and done once.
        moved = {name: options[name] + 1e-6 * codebook[0, 0, 0] for name in ("mean", "scale") if name in options}
        options = options | moved
        codes = vq_encode(x, codebook, **options, hadamard=flag, implementation=which)
        codebook = codebook + 1e-6 * codes[0, 0, 0, 0]
    return codebook


def time_encode_step(codebook, x, *kinds: dict, which="triton", **repeats) -> float:
    settings = tuple(kind.get("hadamard", False) for kind in kinds)
    arrays = tuple({name: array for name, array in kind.items() if name != "hadamard"} for kind in kinds)
    step = functools.partial(encode_step, settings=settings, which=which)
    return microseconds(step, codebook, x, arrays, **repeats)


def encode_one_by_one(x, key, values: dict, rotated: dict, mapped: dict) -> Iterator[dict]:
    kinds = {
        "values": values,
        "keys with rope, smooth, Hadamard": rotated,
        "keys with rope, mean, dense map": mapped,
    }
    tokens = x.shape[1]
    for form in ENCODE:
        codebook = random_codebook(key, HEADS, form, jnp.float32)
        length, bits = format_of(form)
        vectors = jax.random.normal(jax.random.key(1), (1, 2**20 * length // 1024, HEADS, DIM))
        codes = packing.unpack(vq_encode(vectors, codebook, implementation="triton"), bits, DIM // length)
        name = f"vq_encode {form} exactness: {2**20} random float32 vectors"
        per_head = (
            excess_over_nearest(vectors[0, :, h].reshape(-1, length), codebook[h], codes[0, h].reshape(-1))
            for h in range(HEADS)
        )
        yield {"name": name, "largest_excess": check(name, max(per_head), 1e-5)}
        for kind, options in kinds.items():
            if kind.endswith("dense map") and form != "d4b8":
                continue
            name = f"vq_encode {form} {kind}: {tokens} tokens x {HEADS} x {DIM} bfloat16"
            got = vq_encode(x, codebook, **options, implementation="triton")
            few = {key: tuple(a[:, :16] for a in v) if key == "rope" else v for key, v in options.items()}
            expected = exact_codes(x[:, :16], codebook, **few)
            # Codes are discrete: a rounding difference may flip a few.
            error = check(name, jnp.mean(packing.unpack(got[:, :, :16], bits, DIM // length) != expected), 2e-3)
            ours = time_encode_step(codebook, x, options)
            more: dict = {"us_per_token": round(ours / tokens, 5), "codes_that_differ": error}
            if form == "d4b8" and kind == "values":
                more["peer"] = "xla"
                more["peer_us"] = time_encode_step(codebook, x, options, which="xla", steps=2, repeats=3)
            yield row(name, ours, x.nbytes + got.nbytes, **more)
    codebook = random_codebook(key, HEADS, "d4b8", jnp.float32)
    for batch in (1, 16):  # an append: one token a row
        few = x[:, :batch].reshape(batch, 1, HEADS, DIM)
        options = rotated | {"rope": tuple(a[:, :batch].reshape(batch, 1, -1) for a in rotated["rope"])}
        ours, xla = (time_encode_step(codebook, few, options, which=i, steps=100) for i in ("triton", "xla"))
        name = f"vq_encode d4b8 keys with rope, smooth, Hadamard: one token x {batch} rows"
        yield row(name, ours, few.nbytes, peer="xla", peer_us=xla)


def time_layer(tokens: int) -> float:
    """QKV and MLP of a Llama-3.1-8B layer in bfloat16; the residual keeps its input from fading to zeros."""
    model = QUERY_HEADS * DIM
    projected = (QUERY_HEADS + 2 * HEADS) * DIM
    k = jax.random.split(jax.random.key(2), 5)

    def weight(key, rows, columns, size=1.0):
        return (jax.random.normal(key, (rows, columns)) * size / rows**0.5).astype(jnp.bfloat16)

    weights = (
        weight(k[0], model, projected),
        weight(k[1], model, FEED_FORWARD),
        weight(k[2], model, FEED_FORWARD),
        weight(k[3], FEED_FORWARD, model, 0.01),
    )

    def step(state, qkv, gate, up, down):
        x, _ = state
        return x + (jax.nn.silu(x @ gate) * (x @ up)) @ down, x @ qkv

    x = jax.random.normal(k[4], (tokens, model), jnp.bfloat16)
    return microseconds(step, (x, jnp.zeros((tokens, projected), jnp.bfloat16)), *weights, steps=5, repeats=5)


def encode_prompt(x, key, values: dict, rotated: dict, mapped: dict) -> Iterator[dict]:
    tokens = x.shape[1]
    layer = time_layer(tokens)
    kinds = [(form, "rope, smooth, Hadamard", rotated) for form in ENCODE]
    for form, kind, options in [*kinds, ("d4b8", "rope, mean, dense map", mapped)]:
        codebook = random_codebook(key, HEADS, form, jnp.float32)
        ours = time_encode_step(codebook, x, options, values, steps=5, repeats=5)
        name = f"vq_encode {form} K ({kind}) + V: {tokens} tokens x {HEADS} x {DIM} bfloat16"
        peer = {"peer": "QKV + MLP of a Llama-3.1-8B layer, bfloat16", "peer_us": layer}
        yield row(name, ours, 2 * x.nbytes, **peer, percent=round(100 * ours / layer, 2))


def exact_attention(q, codes, codebooks, scale: float) -> tuple[jax.Array, jax.Array]:
    """Attention of some query heads [G, D] over one head's codes [S, bytes]: output and log-sum-exp."""

    def decode(codes, codebook):
        entries, length = codebook.shape
        index = packing.unpack(codes, entries.bit_length() - 1, q.shape[-1] // length)
        return codebook.astype(jnp.float32)[index].reshape(codes.shape[0], q.shape[-1])

    keys, values = (decode(*pair) for pair in zip(codes, codebooks, strict=True))
    scores = scale * exact("gd,sd->gs", q.astype(jnp.float32), keys)
    return exact("gs,sd->gd", jax.nn.softmax(scores), values), jax.nn.logsumexp(scores, axis=-1)


def device_microseconds(call: Callable, *arrays, repeats: int = 9) -> float:
    """What a call's kernels take on the device together, median over `repeats`."""
    call = jax.jit(call)
    jax.block_until_ready(call(*arrays))
    timed = profiler.measure(call, aggregate=False)
    return statistics.median(1e3 * sum(ms for _, ms in timed(*arrays)[1]) for _ in range(repeats))


def read_bandwidth() -> float:
    """GB/s of a sum over a large array."""
    x = jnp.ones((2**30,), jnp.float32)
    return x.nbytes / device_microseconds(jnp.sum, x) / 1e3


def cudnn(q, keys, values):
    out = jax.nn.dot_product_attention(q[:, None], keys, values, scale=q.shape[-1] ** -0.5, implementation="cudnn")
    return out[:, 0]


def same_skeleton(q, keys, values, lengths):
    """Our kernel's schedule, softmax and merge over keys and values [B, H, S, D] as they are."""
    return decode_attention(q, keys, values, lengths, scale=q.shape[-1] ** -0.5, implementation="mosaic_gpu")[0]


def time_peers(shape: str, q, keys, values, cudnn_us: float) -> Iterator[dict]:
    """Kernels for bfloat16 keys and values [B, S, H, D], each against cuDNN."""
    moved = keys.nbytes + values.nbytes
    want = cudnn(q, keys, values).astype(jnp.float32)
    swapped = [jnp.swapaxes(x, 1, 2).copy() for x in (keys, values)]
    arrays = (q, *swapped, jnp.full(q.shape[:1], keys.shape[1], jnp.int32))
    name = f"decode_attention bfloat16: {shape}"
    error = check(name, jnp.max(jnp.abs(same_skeleton(*arrays) - want)), 2e-3)
    us = device_microseconds(same_skeleton, *arrays)
    yield row(name, us, moved, peer="cuDNN bfloat16", peer_us=cudnn_us, max_error=error)
    del swapped, arrays
    try:
        import tokamax
    except ImportError:
        return
    for which in ("mosaic", "triton"):

        def call(q, keys, values, which=which):
            return tokamax.dot_product_attention(q[:, None], keys, values, implementation=which)[:, 0]

        name = f"tokamax {which} bfloat16: {shape}"
        try:
            error = check(name, jnp.max(jnp.abs(call(q, keys, values).astype(jnp.float32) - want)), 2e-2)
            us = device_microseconds(call, q, keys, values)
        except Exception as problem:  # whatever it does not serve
            yield {"name": name, "does_not_serve": str(problem).splitlines()[0][:200]}
            continue
        yield row(name, us, moved, peer="cuDNN bfloat16", peer_us=cudnn_us, max_error=error)


# batch, tokens, (query heads, KV heads, head dimension), [(bits, share of outliers)]
SPARSE = [(4, 0.01), (3, 0.01), (2, 0.01), (4, 0.0), (3, 0.0), (2, 0.0)]
NUQ = [
    (16, 32768, EIGHT_B, SPARSE),
    (1, 196608, EIGHT_B, SPARSE),
    (4, 32768, (32, 32, 128), [(4, 0.01), (3, 0.01), (2, 0.0)]),
    (16, 16384, (9, 3, 64), [(4, 0.01), (2, 0.0)]),
]


def frequencies(dim: int) -> tuple[float, ...]:
    """RoPE's inverse ones."""
    return tuple(500000.0 ** -(i / dim) for i in range(0, dim, 2))


def random_pool(key, shape: tuple[int, ...], dim: int, outliers: float) -> jax.Array | None:
    """Pools [B, H, tiles, slots] as full as a share of outliers fills them on average, in token order."""
    if not outliers:
        return None
    held, slots = round(outliers * nuq.TILE * dim), outlier_slots(outliers, dim)
    # As many places, one a stretch of the tile, so that none stands twice.
    stretch = nuq.TILE * dim // held
    place = jnp.arange(held) * stretch + jax.random.randint(key, (*shape, held), 0, stretch)
    words = nuq.outlier_words(place, jax.random.normal(key, place.shape))
    return jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, slots - held)))


def time_nuq() -> Iterator[dict]:
    """KVQuant's codes: keys before RoPE, by channel; values by token; outliers. The peer is cuDNN's, whose keys had
    RoPE when they were written."""
    bandwidth = read_bandwidth()
    for batch, tokens, (query_heads, heads, dim), formats in NUQ:
        k = jax.random.split(jax.random.key(0), 11)
        group, scale = query_heads // heads, dim**-0.5
        lengths = jnp.full((batch,), tokens, jnp.int32)
        q = jax.random.normal(k[0], (batch, query_heads, dim), jnp.bfloat16)
        exact_cache = [jax.random.normal(key, (batch, tokens, heads, dim), jnp.bfloat16) for key in k[1:3]]
        peer = device_microseconds(cudnn, q, *exact_cache)
        del exact_cache
        options = {"scale": scale, "inverse_frequencies": frequencies(dim), "first_position": 1}
        key_scale = jax.random.uniform(k[3], (heads, dim), minval=0.5, maxval=2.0)
        key_zero = jax.random.normal(k[4], (heads, dim))
        factors = jax.random.uniform(k[5], (batch, tokens)), jax.random.normal(k[6], (batch, tokens))
        scale_zero = jnp.stack(factors, axis=-1).astype(jnp.float16)
        for bits, outliers in formats:
            codes = [jax.random.bits(x, (batch, heads, tokens, dim * bits // 8), jnp.uint8) for x in k[7:9]]
            book = jnp.sort(jax.random.uniform(k[9], (2**bits,), minval=-1.0))
            tiles = batch, heads, tokens // nuq.TILE
            pools = [random_pool(x, tiles, dim, outliers) for x in jax.random.split(k[10])]
            arrays = (*codes, key_scale, key_zero, book, book, scale_zero, *pools, lengths)
            name = (
                f"nuq_decode_attention nuq{bits} {100 * outliers:g}% bfloat16: "
                f"B{batch} S{tokens} {query_heads}/{heads} heads D{dim}"
            )

            def call(q, *arrays, which="mosaic_gpu", options=options):
                return nuq_decode_attention(q, *arrays, **options, implementation=which)

            entries = nuq.value_entries(book, q.dtype)
            last = [q[-1:, -group:], *(x[-1:, -1:] for x in codes), key_scale[-1:], key_zero[-1:], book, entries]
            last += [scale_zero[-1:], *(x if x is None else x[-1:, -1:] for x in pools), lengths[-1:]]
            want = call(last[0].astype(jnp.float32), *last[1:], which="xla")
            got = [x[-1:, -group:] for x in jax.jit(call)(q, *arrays)]
            error = float(jnp.linalg.norm(got[0] - want[0]) / jnp.linalg.norm(want[0]))
            check(name, error, 3e-3)
            check(name, jnp.max(jnp.abs(got[1] - want[1])), 2e-3)
            us = device_microseconds(lambda q, *arrays, call=call: call(q, *arrays)[0], q, *arrays)
            moved = sum(x.nbytes for x in (*codes, *pools, scale_zero) if x is not None)
            more = {"relative_error": error, "percent_of_bandwidth": round(100 * moved / us / 1e3 / bandwidth, 1)}
            yield row(name, us, moved, peer="cuDNN bfloat16", peer_us=peer, **more)


# batch, tokens, (query heads, KV heads, head dimension), [(bits, group of tokens and of channels)]
INTEGERS = [(bits, group) for bits in (1, 2, 4) for group in (64, 128)]
GROUP_INT = [
    (16, 32768, EIGHT_B, [*INTEGERS, (2, 32)]),
    (1, 196608, EIGHT_B, [(2, 64), (2, 128)]),
    (64, 4096, EIGHT_B, [(2, 64), (2, 128)]),
    (16, 16384, (9, 3, 64), [(1, 64), (2, 64)]),
    (16, 16384, (14, 2, 64), [(1, 64), (2, 64)]),
    (16, 16384, (128, 8, 128), [(2, 64)]),
]


def time_group_int() -> Iterator[dict]:
    """Integers in groups, keys' along tokens and values' along channels (KIVI, TailorKV's quantised layers)."""
    bandwidth = read_bandwidth()
    for batch, tokens, (query_heads, heads, dim), formats in GROUP_INT:
        k = jax.random.split(jax.random.key(0), 7)
        group, scale = query_heads // heads, dim**-0.5
        lengths = jnp.full((batch,), tokens, jnp.int32)
        q = jax.random.normal(k[0], (batch, query_heads, dim), jnp.bfloat16)
        exact_cache = [jax.random.normal(key, (batch, tokens, heads, dim), jnp.bfloat16) for key in k[1:3]]
        peer = device_microseconds(cudnn, q, *exact_cache)
        del exact_cache
        for bits, of_group in formats:
            layout = Layout(dim, bits, of_group, min(of_group, dim))
            coded = []
            for codes, scales in (layout.key_shapes(tokens), layout.value_shapes(tokens)):
                coded.append(jax.random.bits(k[3 + len(coded)], (batch, heads, *codes), jnp.uint8))
                # No scale is negative; zeros need not be.
                coded.append(jax.random.uniform(k[3 + len(coded)], (batch, heads, *scales), jnp.float16))
            name = (
                f"group_int_decode_attention int{bits} group {of_group} bfloat16: "
                f"B{batch} S{tokens} {query_heads}/{heads} heads D{dim}"
            )

            def call(q, *arrays, which="mosaic_gpu", layout=layout, scale=scale):
                return group_int_decode_attention(q, *arrays, layout=layout, scale=scale, implementation=which)

            last = [q[-1:, -group:].astype(jnp.float32), *(x[-1:, -1:] for x in coded), lengths[-1:]]
            want = call(*last, which="xla")
            got = [x[-1:, -group:] for x in jax.jit(call)(q, *coded, lengths)]
            error = float(jnp.linalg.norm(got[0] - want[0]) / jnp.linalg.norm(want[0]))
            check(name, error, 3e-3)
            check(name, jnp.max(jnp.abs(got[1] - want[1])), 2e-3)
            us = device_microseconds(lambda q, *arrays, call=call: call(q, *arrays)[0], q, *coded, lengths)
            moved = sum(x.nbytes for x in coded)
            more = {"relative_error": error, "percent_of_bandwidth": round(100 * moved / us / 1e3 / bandwidth, 1)}
            yield row(name, us, moved, peer="cuDNN bfloat16", peer_us=peer, **more)


def time_host_tier() -> Iterator[dict]:
    """A cache in pinned host memory: each row beside one copy of as many bytes to the device, or beside `lax.top_k`."""
    (query_heads, heads, dim), size = EIGHT_B, 131072
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, query_heads, dim), jnp.bfloat16)
    on_host = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))
    to_device = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device))
    k, v = (jax.random.normal(key, (1, heads, size, dim), jnp.bfloat16) for key in keys[1:])
    by_channel, k, v = on_host(k.swapaxes(2, 3)), on_host(k), on_host(v)

    def copy(count: int) -> float:
        held = on_host(jnp.zeros((count,), jnp.uint8))
        jax.block_until_ready(to_device(held))
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(to_device(held))
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    for channels, tokens in ((8, 128), (12, 896)):
        where = f"{size} tokens {query_heads}/{heads} heads D{dim} bfloat16"
        some = jnp.stack([jax.random.permutation(jax.random.key(h), dim)[:channels] for h in range(heads)])[None]
        some = some.astype(jnp.int32)
        count = jnp.full((1,), size, jnp.int32)
        fetched = jax.jit(fetch_channels)(by_channel, some)
        want = jnp.take_along_axis(to_device(by_channel), some[..., None], axis=2)
        name = f"fetch_channels {channels} of {where}"
        check(name, jnp.max(jnp.abs(fetched - want)), 0)
        us = device_microseconds(fetch_channels, by_channel, some)
        peer = {"peer": "one copy of the bytes", "peer_us": copy(fetched.nbytes)}
        yield row(name, us, fetched.nbytes, **peer)

        name = f"select_tokens {tokens} by {channels} channels of {where}"
        select = functools.partial(select_tokens, tokens=tokens)
        scores = jax.jit(host_tier.token_scores)(q, fetched, some)
        rows, best = jax.jit(select)(q, fetched, some, count), lax.top_k(scores, tokens)[0]
        got = jnp.sort(jnp.take_along_axis(scores, rows, axis=2), axis=2, descending=True)
        check(name, jnp.max(jnp.abs(got - best)), 1e-4)
        us = device_microseconds(select, q, fetched, some, count)
        peer_us = device_microseconds(lambda x, tokens=tokens: lax.top_k(x, tokens), scores)
        approximate = device_microseconds(lambda x, tokens=tokens: lax.approx_max_k(x, tokens), scores)
        more = {"peer": "lax.top_k of the scores", "peer_us": peer_us, "approx_max_k_us": round(approximate, 2)}
        yield row(name, us, fetched.nbytes, **more)

        def by_each(*asked, tokens=tokens):
            lse = channel_lse(*asked, scale=dim**-0.5)
            return select_tokens(*asked, tokens=tokens, scale=dim**-0.5, lse=lse)

        name = f"select_tokens_by_each {tokens} by {channels} channels of {where}"
        lse = host_tier.channel_lse(q, fetched, some, count, scale=dim**-0.5)
        scores = jax.jit(host_tier.token_scores)(q, fetched, some, dim**-0.5, lse)
        got = jnp.take_along_axis(scores, jax.jit(by_each)(q, fetched, some, count), axis=2)
        got, best = jnp.sort(got, axis=2, descending=True), lax.top_k(scores, tokens)[0]
        check(name, jnp.max(jnp.abs(got - best)), 1e-4)
        yield row(name, device_microseconds(by_each, q, fetched, some, count), 2 * fetched.nbytes, **more)

        name = f"attend_rows {tokens} of {where}"
        attend = functools.partial(attend_rows, scale=dim**-0.5)
        chosen = [jnp.take_along_axis(to_device(x), rows[..., None], axis=2) for x in (k, v)]
        logits = dim**-0.5 * exact(
            "hgd,hsd->hgs", q.reshape(heads, -1, dim).astype(jnp.float32), chosen[0][0].astype(jnp.float32)
        )
        want = exact("hgs,hsd->hgd", jax.nn.softmax(logits), chosen[1][0].astype(jnp.float32)).reshape(
            1, query_heads, dim
        )
        error = jnp.linalg.norm(jax.jit(attend)(q, k, v, rows)[0] - want) / jnp.linalg.norm(want)
        us = device_microseconds(lambda *arrays, attend=attend: attend(*arrays)[0], q, k, v, rows)
        moved = sum(x.nbytes for x in chosen)
        more = {"peer": "one copy of the bytes", "peer_us": copy(moved)}
        yield row(name, us, moved, **more, relative_error=check(name, error, 3e-3))


def ours(q, *arrays, which=None, query_map=None):
    return vq_decode_attention(q, *arrays, scale=q.shape[-1] ** -0.5, implementation=which, query_map=query_map)[0]


def with_map(q, *arrays):
    *rest, query_map = arrays
    return ours(q, *rest, which="mosaic_gpu", query_map=query_map)


def in_loop(call: Callable, q, *arrays, **options) -> float:
    return microseconds(lambda q, *a: (q + 1e-3 * call(q, *a)).astype(q.dtype), q, *arrays, **options)


def time_decode() -> Iterator[dict]:
    bandwidth = read_bandwidth()
    yield {"name": "read bandwidth: sum of 4 GiB", "gb_per_s": round(bandwidth, 1)}
    for shape in DECODE:
        batch, tokens, (query_heads, heads, dim), formats = shape
        k = jax.random.split(jax.random.key(0), 7)
        scale, group = dim**-0.5, query_heads // heads
        lengths = jnp.full((batch,), tokens, jnp.int32)
        q = jax.random.normal(k[0], (batch, query_heads, dim), jnp.bfloat16)
        exact_cache = [jax.random.normal(key, (batch, tokens, heads, dim), jnp.bfloat16) for key in k[1:3]]
        peer = device_microseconds(cudnn, q, *exact_cache)
        peer_loop = in_loop(cudnn, q, *exact_cache) if shape in BESIDE else None
        described = f"B{batch} S{tokens} {query_heads}/{heads} heads D{dim}"
        if shape in PEERS:
            yield from time_peers(described, q, *exact_cache, peer)
        del exact_cache
        for forms in formats:
            codes, books = [], []
            for i, form in enumerate(forms):
                form, *fp8 = form.split("-")
                length, bits = format_of(form)
                size = packing.num_bytes(dim // length, bits)
                codes.append(jax.random.bits(k[3 + i], (batch, heads, tokens, size), jnp.uint8))
                book = random_codebook(k[5 + i], heads, form, jnp.bfloat16)
                books.append(book.astype(jnp.float8_e4m3fn) if fp8 else book)
            name = f"vq_decode_attention K {forms[0]} V {forms[1]} bfloat16: {described}"
            arrays = (*codes, *books, lengths)
            more: dict = {"max_error": 0.0}
            last = slice(query_heads - group, query_heads)  # the last row's last KV head
            want = exact_attention(q[-1, last], [c[-1, -1] for c in codes], [b[-1] for b in books], scale)
            times = {}
            beside = shape in BESIDE and not forms[1].endswith("fp8")
            for which in ("mosaic_gpu", "triton") if beside else ("mosaic_gpu",):
                got = vq_decode_attention(q, *arrays, scale=scale, implementation=which)
                error = check(name, jnp.max(jnp.abs(got[0][-1, last] - want[0])), 2e-3)
                check(name, jnp.max(jnp.abs(got[1][-1, last] - want[1])), 1e-4)
                more["max_error"] = max(more["max_error"], error)
                times[which] = device_microseconds(functools.partial(ours, which=which), q, *arrays)
            if beside:
                call = functools.partial(ours, which="mosaic_gpu")
                more |= {"loop_us": round(in_loop(call, q, *arrays), 2), "peer_loop_us": round(peer_loop, 2)}
                more["triton_us"] = round(times["triton"], 2)
            if shape in PEERS and forms == SAME[0]:
                unit = jnp.broadcast_to(jnp.eye(dim), (heads, dim, dim))
                check(name, jnp.max(jnp.abs(with_map(q, *arrays, unit) - ours(q, *arrays, which="mosaic_gpu"))), 1e-6)
                more["map_us"] = round(device_microseconds(with_map, q, *arrays, unit), 2)
            moved = sum(array.nbytes for array in codes)
            us = times["mosaic_gpu"]
            more["percent_of_bandwidth"] = round(100 * moved / us / 1e3 / bandwidth, 1)
            yield row(name, us, moved, peer="cuDNN bfloat16", peer_us=peer, **more)


PARTS = {
    "hadamard": time_hadamard,
    "decode": time_decode,
    "nuq": time_nuq,
    "group_int": time_group_int,
    "host_tier": time_host_tier,
    "encode": time_encode,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--only", choices=PARTS, help="time one part; the other rows stay as the JSON has them")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this benchmark needs a GPU; JAX runs on {jax.default_backend()} here")
    held = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    parts = [arguments.only] if arguments.only else list(PARTS)
    done: list[dict] = []

    def write(old: list[dict]) -> None:
        result = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "rows": old + done,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    for part in parts:
        for line in PARTS[part]():
            print(json.dumps(line), flush=True)
            done.append(line)
            measured = {row["name"] for row in done}
            write([old for old in held if old["name"] not in measured])  # nothing is lost if it is stopped here
    write([old for old in held if part_of(old) not in parts])


def part_of(line: dict) -> str:
    """Which part a row is of."""
    parts = {"hadamard": "hadamard", "vq_encode": "encode", "nuq_decode_attention": "nuq"}
    parts["group_int_decode_attention"] = "group_int"
    parts |= dict.fromkeys(("fetch_channels", "select_tokens", "select_tokens_by_each", "attend_rows"), "host_tier")
    return parts.get(line["name"].split()[0], "decode")


if __name__ == "__main__":
    main()
