"""KIVI, plain product quantisation and Hadamard integers: what they read back, their bytes, and that they generate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.caches.harness import LAYER, chunk_at, decode_all, oracle, prefill, prefill_in_chunks, random_qkv
from vecinfer_jax.caches import KIVI, HadamardInt, PlainVQ, allocated_bytes, uniform
from vecinfer_jax.errors import InputError

DIM = LAYER.head_dim
METHODS = [
    KIVI(bits=2, group=4, residual=0),
    KIVI(bits=3, group=6, residual=5, sink=3),
    HadamardInt(bits=4, residual=0),
    HadamardInt(bits=8, residual=5, sink=3),
    PlainVQ(bits=2, residual=0),
    PlainVQ(key="d8b12", value="d2b4", residual=5, sink=3),
]
all_methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.residual}")


def layer_of(head_dim):
    return dataclasses.replace(LAYER, head_dim=head_dim, rope=dataclasses.replace(LAYER.rope, head_dim=head_dim))


@functools.cache
def calibration_for(method, layer=LAYER):
    if not isinstance(method, PlainVQ):
        return None
    rng = np.random.default_rng(1)

    def codebook(form):
        positions = layer.num_kv_heads * layer.head_dim // form.length
        return rng.normal(size=(positions, form.entries, form.length)).astype(np.float32)

    return {"key_codebook": codebook(method.key_format), "value_codebook": codebook(method.value_format)}


def integers(x, axis, bits):
    """Minimum and maximum in float64, scale and zero rounded to 16 bits."""
    zero = x.min(axis, keepdims=True).astype(np.float16).astype(np.float64)
    scale = ((x.max(axis, keepdims=True) - zero) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    return zero + np.clip(np.round((x - zero) / scale), 0, 2**bits - 1) * scale


def read_back(method):
    """What keys and values [N, D] of a head read back as, from the methods' definitions."""
    if isinstance(method, KIVI):

        def coded(head, keys, values):
            g = method.group
            keys = integers(keys.reshape(-1, g, DIM), 1, method.bits).reshape(-1, DIM)
            parts = [integers(values[:, i : i + g], 1, method.bits) for i in range(0, DIM, g)]
            return keys, np.concatenate(parts, axis=1)

    elif isinstance(method, HadamardInt):
        h = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(DIM)] for i in range(DIM)]) / np.sqrt(DIM)

        def coded(head, keys, values):
            return integers(keys @ h, 1, method.bits) @ h, integers(values @ h, 1, method.bits) @ h

    else:
        calibration = calibration_for(method)

        def nearest(x, codebook, head):
            length = codebook.shape[-1]
            books = codebook.reshape(LAYER.num_kv_heads, DIM // length, -1, length)[head].astype(np.float64)
            parts = [x[:, i * length : (i + 1) * length] for i in range(DIM // length)]
            index = [
                ((part[:, None] - book[None]) ** 2).sum(-1).argmin(-1) for part, book in zip(parts, books, strict=True)
            ]
            return np.concatenate([book[i] for book, i in zip(books, index, strict=True)], axis=1)

        def coded(head, keys, values):
            return (
                nearest(keys, calibration["key_codebook"], head),
                nearest(values, calibration["value_codebook"], head),
            )

    return coded


@all_methods
def test_scoring_decoding_and_ragged_chunks_read_what_the_definition_says(method):
    q, k, v = random_qkv(2, 28)
    settings = {"residual": method.residual, "sink": method.sink, "group": method.token_group}
    rows = [[np.asarray(x)[row] for x in (q, k, v)] for row in range(2)]
    want = np.stack([oracle(*row, read_back(method), **settings) for row in rows])
    empty = method.init(LAYER, 2, 30, calibration_for(method))
    scored, _ = prefill(method, q, k, v, chunk_at([0, 0], [28, 28], 28, True, "coded"), empty)
    np.testing.assert_allclose(scored, want, atol=5e-5)
    decoded, _ = decode_all(method, empty, q, k, v, np.zeros(2, int), 28)
    np.testing.assert_allclose(decoded, want, atol=5e-5)
    lengths = np.array([20, 13])
    chunked, cache = prefill_in_chunks(method, empty, q[:, :21], k[:, :21], v[:, :21], lengths, 7, "coded")
    rest, _ = decode_all(method, cache, q, k, v, lengths, 8)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(chunked[row, :n], want[row, :n], atol=5e-5)
        np.testing.assert_allclose(rest[row], want[row, n : n + 8], atol=5e-5)


@all_methods
def test_the_same_keys_and_values_give_the_same_bytes_in_bulk_and_one_by_one(method):
    _, k, v = random_qkv(2, 24)
    empty = method.init(LAYER, 2, 24, calibration_for(method))
    lengths = jnp.array([24, 24])
    chunk = chunk_at([0, 0], lengths, 24, True)
    bulk = jax.jit(method._append_chunk)(k, v, chunk, empty)
    step = jax.jit(lambda k, v, at, cache: method._append_token(k, v, at, LAYER, cache))
    stepped = empty
    for i in range(24):
        stepped = step(k[:, i], v[:, i], jnp.array([i, i]), stepped)
    assert int(method.coded_count(lengths)[0]) > 0
    jax.tree.map(np.testing.assert_array_equal, bulk, stepped)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(
    "method",
    [*(KIVI(bits=b) for b in (1, 2, 3, 4)), KIVI(group=24), *(HadamardInt(bits=b) for b in (2, 3, 4, 8)), PlainVQ()],
    ids=lambda m: f"{m.name}-{m.bits}",
)
def test_true_bits_are_the_bytes_of_the_codes(method, head_dim):
    layer = layer_of(head_dim)
    if isinstance(method, HadamardInt) and head_dim == 80:
        with pytest.raises(InputError, match="power of two"):
            method.validate(layer)
        return
    calibration = {name: jnp.zeros(x.shape) for name, x in (calibration_for(method, layer) or {}).items()}
    capacity = method.residual + 960
    shapes = jax.eval_shape(lambda: method.init(layer, 3, capacity, calibration))
    elements = 3 * 2 * layer.num_kv_heads * head_dim * 960
    assert allocated_bytes(shapes)["codes"] * 8 == pytest.approx(elements * method.bits_per_element(layer))


def test_true_bits_are_those_of_the_reports():
    assert KIVI(bits=2, group=32).bits_per_element(layer_of(64)) == 3.0
    assert KIVI(bits=2, group=128).bits_per_element(layer_of(128)) == 2.25
    assert HadamardInt(bits=2).bits_per_element(layer_of(64)) == 2.5
    assert PlainVQ(bits=1.25).bits_per_element(layer_of(64)) == 1.25


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_codes_read_back_within_half_a_step(bits):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7, 40)), jnp.float32) * 10 + 3
    scaling = uniform.fit(x, -1, bits)
    codes = uniform.encode(x, scaling, bits)
    assert codes.dtype == np.uint8 and codes.shape[-1] == 5 * bits
    step = np.ptp(x, axis=-1, keepdims=True) / (2**bits - 1)
    # Half a step, and what 16 bits round off the zero and the last code's multiple of the scale.
    error = np.abs(np.asarray(uniform.decode(codes, scaling, bits, 40)) - x)
    assert np.all(error <= step / 2 + np.abs(x).max() * 2**-10)


@all_methods
@pytest.mark.parametrize("value", [0.0, -3.5, 7e4, 3e38])
def test_constant_and_huge_keys_and_values_stay_finite(method, value):
    _, k, v = random_qkv(1, 24)
    k, v = jnp.full_like(k, value), jnp.full_like(v, value).at[:, 3].set(-value)
    store = method.init_store(LAYER, 1, 24, calibration_for(method))
    store = jax.jit(lambda s: method.append(s, k, v, jnp.arange(24)[None], LAYER))(store)
    keys, values = method.read(store, jnp.int32(0), 24, LAYER)
    assert np.all(np.isfinite(keys)) and np.all(np.isfinite(values))
    if not isinstance(method, PlainVQ) and abs(value) < 100:
        np.testing.assert_allclose(keys, k.swapaxes(1, 2), atol=0.02)
        np.testing.assert_allclose(values, v.swapaxes(1, 2), atol=0.02)


def test_one_huge_channel_costs_its_own_group_only():
    """What keys per channel are for."""
    _, k, _ = random_qkv(1, 24)
    k = k.at[..., 5].mul(1000)
    method = KIVI(bits=4, group=8)
    store = method.append(method.init_store(LAYER, 1, 24, None), k, k, jnp.arange(24)[None], LAYER)
    keys, _ = method.read(store, jnp.int32(0), 24, LAYER)
    error = np.abs(np.asarray(keys - k.swapaxes(1, 2)))
    assert error[..., 5].max() > 10 and np.delete(error, 5, axis=-1).max() < 0.3


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(KIVI(bits=2, group=8, residual=8), marks=pytest.mark.slow),
        HadamardInt(bits=3, residual=8, sink=2),
        pytest.param(PlainVQ(bits=2, residual=8), marks=pytest.mark.slow),
    ],
    ids=lambda m: m.name,
)
def test_they_generate_and_are_evaluated(method):
    lm, prompts = small.model(), small.prompts([30, 11])
    calibration = small.calibration_of(method)
    out = vj.generate(lm, prompts, method=method, calibration=calibration, max_new_tokens=10)
    alone = vj.generate(lm, prompts[1:], method=method, calibration=calibration, max_new_tokens=10)
    assert [len(tokens) for tokens in out.tokens] == [10, 10]
    assert out.tokens[1] == alone.tokens[0]
    text = "".join(small.texts())
    result = vj.evaluate.perplexity(lm, method, calibration, text, length=60, windows=1, progress=False)
    assert 0 < result.kl < 1 and result.bits_per_element == method.bits_per_element(LAYER)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KIVI(bits=5), "1, 2, 3, 4"),
        (lambda: KIVI(group=0), "group=0"),
        (lambda: KIVI(residual=-1), "residual"),
        (lambda: HadamardInt(bits=1), "2, 3, 4, 8"),
        (lambda: PlainVQ(bits=5), "PlainVQ"),
        (lambda: PlainVQ(key="d3b8"), "d3b8"),
        (lambda: PlainVQ(key="d16b12").validate(LAYER), "whole bytes"),
        (lambda: PlainVQ().init(LAYER, 1, 8), "needs a calibration"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(make, said):
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
