"""The window with keys grouped along tokens, and prompts that read a long cache a block at a time."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tests.caches.harness import LAYER, chunk_at, decode_all, oracle, prefill, prefill_in_chunks, random_qkv
from vecinfer_jax.caches import FullPrecision, VecInfer, attention
from vecinfer_jax.caches.base import array_field
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.windowed import WindowedMethod

# residual, sink, group
WINDOWS = [(0, 0, 4), (0, 2, 3), (5, 3, 4), (64, 0, 4), (3, 8, 5), (0, 0, 32)]


@struct.dataclass
class MeanStore:
    keys: jax.Array = array_field("codes")
    values: jax.Array = array_field("codes")


@dataclasses.dataclass(frozen=True)
class GroupMeans(WindowedMethod):
    """Keys read back as their group's mean, values as half of themselves: nothing hides behind rounding."""

    group: int = 4
    name: ClassVar[str] = "group-means"

    @property
    def token_group(self):
        return self.group

    def init_store(self, layer, batch, slots, calibration):
        means = (batch, layer.num_kv_heads, slots // self.group, layer.head_dim)
        return MeanStore(jnp.zeros(means), jnp.zeros((batch, layer.num_kv_heads, slots, layer.head_dim)))

    def append(self, store, k, v, slots, layer):
        b, t, heads, dim = k.shape
        assert t % self.group == 0
        means = k.reshape(b, t // self.group, self.group, heads, dim).mean(2)
        at = slots.reshape(b, -1, self.group)[:, :, 0]
        return MeanStore(
            write_chunk(store.keys, means, jnp.where(at < 0, -1, at // self.group)),
            write_chunk(store.values, v / 2, slots),
        )

    def read(self, store, start, size, layer):
        assert size % self.group == 0
        keys = read_slots(store.keys, start // self.group, size // self.group)
        return jnp.repeat(keys, self.group, axis=2), read_slots(store.values, start, size)

    def bits_per_element(self, layer):
        return 16.0


def read_back(group):
    def coded(head, keys, values):
        means = keys.reshape(-1, group, keys.shape[-1]).mean(1)
        return np.repeat(means, group, axis=0), values / 2

    return coded


def oracles(method, q, k, v):
    settings = {"residual": method.residual, "sink": method.sink, "group": method.group}
    return np.stack(
        [oracle(*(np.asarray(x)[row] for x in (q, k, v)), read_back(method.group), **settings) for row in range(len(q))]
    )


@pytest.mark.parametrize(("residual", "sink", "group"), WINDOWS)
def test_scoring_decoding_and_ragged_chunks_read_what_the_definition_says(residual, sink, group):
    method = GroupMeans(residual=residual, sink=sink, group=group)
    q, k, v = random_qkv(2, 28)
    want = oracles(method, q, k, v)
    empty = method.init(LAYER, 2, 30)
    scored, _ = prefill(method, q, k, v, chunk_at([0, 0], [28, 28], 28, True, "coded"), empty)
    np.testing.assert_allclose(scored, want, atol=2e-5)
    decoded, _ = decode_all(method, empty, q, k, v, np.zeros(2, int), 28)
    np.testing.assert_allclose(decoded, want, atol=2e-5)

    lengths = np.array([20, 13])  # chunks of 7 cut groups and windows anywhere; row 1 ends before the last chunk
    chunked, cache = prefill_in_chunks(method, empty, q[:, :21], k[:, :21], v[:, :21], lengths, 7, "coded")
    rest, _ = decode_all(method, cache, q, k, v, lengths, 8)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(chunked[row, :n], want[row, :n], atol=2e-5)
        np.testing.assert_allclose(rest[row], want[row, n : n + 8], atol=2e-5)


def test_a_prompt_in_chunks_of_one_token_reads_the_same():
    method = GroupMeans(residual=2, sink=1, group=4)
    q, k, v = random_qkv(1, 20)
    got, _ = prefill_in_chunks(method, method.init(LAYER, 1, 20), q, k, v, [20], 1, "coded")
    np.testing.assert_allclose(got, oracles(method, q, k, v), atol=2e-5)


@pytest.mark.parametrize(("residual", "sink", "group"), WINDOWS)
def test_a_later_chunk_reads_what_was_coded_before_it_and_all_else_exactly(residual, sink, group):
    method = GroupMeans(residual=residual, sink=sink, group=group)
    q, k, v = random_qkv(1, 27)
    got, _ = prefill_in_chunks(method, method.init(LAYER, 1, 28), q, k, v, [27], 9, "exact")
    # At a chunk that starts at s, the window may be thought to begin where it did when s tokens had been seen.
    for start in (0, 9, 18):
        coded = max(start - residual - sink, 0) // group * group
        for t in range(start, start + 9):
            long = t + 1 - sink - coded  # a window this long, in groups that divide what was coded
            want = oracle(
                *(np.asarray(x)[0, : t + 1] for x in (q, k, v)),
                read_back(group),
                residual=max(long, 0),
                sink=sink,
                group=group,
            )
            np.testing.assert_allclose(got[0, t], want[t], atol=2e-5)


@pytest.mark.parametrize("method", [GroupMeans(residual=5, sink=3, group=4), FullPrecision()], ids=lambda m: m.name)
def test_blocks_of_slots_merge_to_the_whole(method, monkeypatch):
    q, k, v = random_qkv(2, 60)
    lengths = np.array([60, 33])

    def outputs():
        run = jax.jit(lambda *args: method.prefill(*args))  # compiled anew: block sizes are constants of a program
        cache = method.init(LAYER, 2, 70)
        outs = []
        for start in (0, 30):
            here = np.clip(lengths - start, 0, 30)
            piece = slice(start, start + 30)
            chunk = chunk_at([start, start], here, 30, start == 0, "coded")
            out, cache = run(q[:, piece], k[:, piece], v[:, piece], chunk, cache)
            outs.append(out)
        return np.concatenate(outs, 1)

    whole = outputs()
    monkeypatch.setattr(attention, "KEY_BLOCK", 12)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    blocks = outputs()
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(blocks[row, :n], whole[row, :n], atol=2e-6)


def test_decoding_in_blocks_of_slots_merges_to_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, 6, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(3, 2, 1000, 16)), jnp.float32) for _ in range(2))
    count = jnp.array([0, 129, 1000])

    def read(start, size):
        return read_slots(k, start, size), read_slots(v, start, size)

    whole = attention.coded_attention(q, read, 1000, count, 2, 0.25, 8)
    monkeypatch.setattr(attention, "DECODE_ELEMENTS", 1)
    blocks = attention.coded_attention(q, read, 1000, count, 2, 0.25, 8)
    for a, b in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [GroupMeans(residual=16), FullPrecision(), VecInfer(bits=4, transform="smooth-hadamard")],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("read", ["exact", "coded"])
def test_the_memory_of_a_chunk_does_not_grow_with_the_cache(method, read):
    calibration = {
        "smooth": jnp.ones((2, 16)), "key_codebook": jnp.zeros((2, 256, 2)), "value_codebook": jnp.zeros((2, 256, 2))
    }  # fmt: skip

    def temporary(capacity):
        def run(q, k, v, chunk, cache):
            return method.prefill(q, k, v, chunk, cache)

        cache = jax.eval_shape(lambda: method.init(LAYER, 1, capacity, calibration))
        chunk = chunk_at([0], [128], 128, False, read)
        compiled = jax.jit(run, donate_argnums=4).lower(*random_qkv(1, 128), chunk, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2**14), temporary(2**17)
    assert long < 1.1 * short
