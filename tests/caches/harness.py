"""Feeding a cache method by hand, and what a query should read, computed from the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import small
from vecinfer_jax.caches.base import Chunk
from vecinfer_jax.models.decoder import layer_shape

LAYER = layer_shape(small.CONFIG, 0, jnp.float32)


def random_qkv(batch, tokens, seed=0):
    rng = np.random.default_rng(seed)

    def make(heads):
        return jnp.asarray(rng.normal(size=(batch, tokens, heads, LAYER.head_dim)), jnp.float32)

    return make(LAYER.num_query_heads), make(LAYER.num_kv_heads), make(LAYER.num_kv_heads)


def chunk_at(start, lengths, tokens, first, read="exact"):
    positions = jnp.asarray(start)[:, None] + jnp.arange(tokens)[None]
    cos, sin = LAYER.rope.cos_sin(positions)
    return Chunk(positions, jnp.asarray(lengths, jnp.int32), cos, sin, layer=LAYER, first=first, read=read)


@functools.partial(jax.jit, static_argnums=0)
def prefill(method, q, k, v, chunk, cache):
    """Compiled: op by op, these tests would take minutes."""
    return method.prefill(q, k, v, chunk, cache)


@functools.partial(jax.jit, static_argnums=0)
def decode(method, q, k, v, chunk, cache):
    return method.decode(q, k, v, chunk, cache)


def decode_all(method, cache, q, k, v, start, count):
    """Feeds tokens start .. start + count - 1 of every row, one at a time."""
    outs = []
    for i in range(count):
        at = np.asarray(start) + i
        rows = np.arange(q.shape[0])
        chunk = chunk_at(at, np.ones_like(at), 1, False)
        out, cache = decode(method, q[rows, at], k[rows, at], v[rows, at], chunk, cache)
        outs.append(out)
    return jnp.stack(outs, axis=1), cache


def prefill_in_chunks(method, cache, q, k, v, lengths, size, read):
    """A padded prompt in chunks of `size` -> the outputs side by side, and the cache."""
    outs = []
    for start in range(0, q.shape[1], size):
        here = np.clip(np.asarray(lengths) - start, 0, size)
        piece = slice(start, start + size)
        chunk = chunk_at([start] * q.shape[0], here, q[:, piece].shape[1], start == 0, read)
        out, cache = prefill(method, q[:, piece], k[:, piece], v[:, piece], chunk, cache)
        outs.append(out)
    return jnp.concatenate(outs, 1), cache


def rotated(x):
    """RoPE in float64 of one sequence [T, H, D] from position 0."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def oracle(q, k, v, coded, *, residual, sink, group=1):
    """What decoding one sequence [T, H, D] should give: a float64 loop over queries and tokens.

    coded(keys, values): what codes read back as, for rotated keys and values [N, D] of whole groups of one head.
    """
    tokens, query_heads, dim = q.shape
    queries, keys, values = rotated(q), rotated(k), np.asarray(v, np.float64)
    out = np.zeros(q.shape)
    whole = (tokens - sink) // group * group
    for head in range(query_heads):
        kv = head // (query_heads // k.shape[1])
        read_back = coded(kv, keys[sink : sink + whole, kv], values[sink : sink + whole, kv])
        for t in range(tokens):
            in_groups = max(t + 1 - residual - sink, 0) // group * group
            read_keys, read_values = keys[: t + 1, kv].copy(), values[: t + 1, kv].copy()
            read_keys[sink : sink + in_groups] = read_back[0][:in_groups]
            read_values[sink : sink + in_groups] = read_back[1][:in_groups]
            scores = read_keys @ queries[t, head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ read_values / weights.sum()
    return out
