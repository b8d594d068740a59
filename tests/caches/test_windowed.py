"""Who reads what: bulk and token-by-token caches agree, at every window, sink, chunking and raggedness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.vq_decode_attention.reference import dequantise
from tests.caches.harness import LAYER, chunk_at, decode_all, oracle, prefill, random_qkv
from vecinfer_jax.caches import FullPrecision, PerLayer, VecInfer, allocated_bytes
from vecinfer_jax.caches.formats import PAPER_FORMATS

WINDOWS = [(0, 0), (0, 2), (5, 0), (5, 3), (64, 0), (3, 8)]


def random_calibration(method, seed=1):
    rng = np.random.default_rng(seed)
    key, value = method.key_format, method.value_format
    groups = LAYER.num_kv_heads if method.scope == "layer_head" else 1
    return {
        "smooth": rng.uniform(0.5, 2.0, (LAYER.num_kv_heads, LAYER.head_dim)).astype(np.float32),
        "key_codebook": rng.normal(size=(groups, key.entries, key.length)).astype(np.float32),
        "value_codebook": rng.normal(size=(groups, value.entries, value.length)).astype(np.float32),
    }


def assert_same_cache(a, b, method, lengths):
    """Same codes, same window, same sinks, wherever a token is held."""
    count = np.asarray(method.coded_count(jnp.asarray(lengths)))
    for row, n in enumerate(count):
        for field in ("key_codes", "value_codes"):
            np.testing.assert_array_equal(
                np.asarray(getattr(a.store, field))[row, :, :n], np.asarray(getattr(b.store, field))[row, :, :n]
            )
    tokens_a, tokens_b = method._joined_exact_tokens(a), method._joined_exact_tokens(b)
    np.testing.assert_array_equal(tokens_a.positions, tokens_b.positions)
    held = np.asarray(tokens_a.positions >= 0)[:, None, :, None]
    for x, y in ((tokens_a.keys, tokens_b.keys), (tokens_a.values, tokens_b.values)):
        # RoPE may be rounded differently in differently compiled programs.
        np.testing.assert_allclose(np.where(held, x, 0), np.where(held, y, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("residual", "sink"), WINDOWS)
def test_encoding_in_bulk_and_token_by_token_is_the_same(residual, sink):
    method = VecInfer(bits=2, residual=residual, sink=sink, transform="smooth-hadamard")
    q, k, v = random_qkv(3, 20)
    lengths = np.array([20, 7, 1])
    empty = method.init(LAYER, 3, 32, random_calibration(method))
    _, bulk = prefill(method, q, k, v, chunk_at([0, 0, 0], lengths, 20, True), empty)
    _, stepped = decode_all(method, empty, q, k, v, np.zeros(3, int), 20)
    # Rows that are shorter are compared at their own length: step them separately.
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        one = method.init(LAYER, 1, 32, random_calibration(method))
        _, single = decode_all(method, one, q[own], k[own], v[own], np.zeros(1, int), int(length))
        picked = jax.tree.map(lambda x, own=own: x[own] if x.shape[:1] == (3,) else x, bulk)
        assert_same_cache(single, picked, method, lengths[own])
    assert int(stepped.lengths[0]) == 20


@pytest.mark.parametrize(("residual", "sink"), WINDOWS)
def test_decoding_equals_the_strict_evaluation(residual, sink):
    """Every query of a coded prompt reads what decoding at its position reads."""
    method = VecInfer(bits=4, residual=residual, sink=sink, transform="smooth-hadamard")
    q, k, v = random_qkv(2, 24)
    empty = method.init(LAYER, 2, 32, random_calibration(method))
    scored, _ = prefill(method, q, k, v, chunk_at([0, 0], [24, 24], 24, True, "coded"), empty)
    decoded, _ = decode_all(method, empty, q, k, v, np.zeros(2, int), 24)
    np.testing.assert_allclose(decoded, scored, atol=2e-5)


@pytest.mark.parametrize(("residual", "sink"), WINDOWS)
@pytest.mark.parametrize("read", ["exact", "coded"])
def test_a_prompt_in_chunks_leaves_the_cache_of_a_whole_one(residual, sink, read):
    method = VecInfer(bits=2, residual=residual, sink=sink, transform="smooth-hadamard")
    q, k, v = random_qkv(2, 24)
    lengths = np.array([24, 13])
    empty = method.init(LAYER, 2, 32, random_calibration(method))
    whole_out, whole = prefill(method, q, k, v, chunk_at([0, 0], lengths, 24, True, read), empty)
    cache, outs = empty, []
    for start in range(0, 24, 8):
        here = np.clip(lengths - start, 0, 8)
        piece = slice(start, start + 8)
        chunk = chunk_at([start, start], here, 8, start == 0, read)
        out, cache = prefill(method, q[:, piece], k[:, piece], v[:, piece], chunk, cache)
        outs.append(out)
    np.testing.assert_array_equal(cache.lengths, lengths)
    assert_same_cache(cache, whole, method, lengths)
    if read == "coded":  # exact reading depends on the chunking by design; coded reading does not
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(jnp.concatenate(outs, 1)[row, :n], whole_out[row, :n], atol=2e-5)


def test_a_window_over_everything_is_full_precision():
    coded, full = VecInfer(bits=2, residual=64, transform="smooth-hadamard"), FullPrecision()
    q, k, v = random_qkv(2, 24)
    calibration = random_calibration(coded)
    for method in (coded, full):
        cache = method.init(LAYER, 2, 32, calibration)
        _, cache = prefill(method, q[:, :8], k[:, :8], v[:, :8], chunk_at([0, 0], [8, 8], 8, True), cache)
        out, _ = decode_all(method, cache, q, k, v, np.array([8, 8]), 16)
        if method is coded:
            kept = out
    np.testing.assert_allclose(kept, out, atol=1e-5)


def test_full_precision_in_chunks_equals_whole():
    method = FullPrecision()
    q, k, v = random_qkv(2, 24)
    lengths = np.array([24, 13])
    whole, _ = prefill(method, q, k, v, chunk_at([0, 0], lengths, 24, True), method.init(LAYER, 2, 32))
    cache, outs = method.init(LAYER, 2, 32), []
    for start in range(0, 24, 8):
        chunk = chunk_at([start, start], np.clip(lengths - start, 0, 8), 8, start == 0)
        piece = slice(start, start + 8)
        out, cache = prefill(method, q[:, piece], k[:, piece], v[:, piece], chunk, cache)
        outs.append(out)
    joined = jnp.concatenate(outs, axis=1)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(joined[row, :n], whole[row, :n], atol=1e-5)


@pytest.mark.parametrize("transform", ["smooth-hadamard", "hadamard-smooth", "smooth", "hadamard", "none"])
def test_transforms_leave_scores_as_they_are(transform):
    """With a codebook that holds every key exactly, coded attention is exact attention."""
    method = VecInfer(key="d16b8", value="d16b8", transform=transform, residual=0)
    q, k, v = random_qkv(1, 12)
    calibration = random_calibration(method)
    if not method.smooths:
        calibration["smooth"] = np.ones_like(calibration["smooth"])
    chunk = chunk_at([0], [12], 12, True)
    from vecinfer_jax.rope import apply_rope

    rotated = apply_rope(k, chunk.cos, chunk.sin)[0].swapaxes(0, 1)  # [Hkv, T, D]
    store = method.init(LAYER, 1, 32, calibration).store
    hadamard_matrix = np.asarray(method._rotate(jnp.eye(LAYER.head_dim)))
    smooth = calibration["smooth"][:, None]
    if transform == "hadamard-smooth":
        coded = (np.asarray(rotated) @ hadamard_matrix) / smooth
    else:
        coded = np.asarray(rotated) / smooth
        coded = coded @ hadamard_matrix if method.rotates else coded
    calibration["key_codebook"][:, :12] = coded
    calibration["value_codebook"][:, :12] = np.asarray(v)[0].swapaxes(0, 1)
    del store
    cache = method.init(LAYER, 1, 32, calibration)
    out, _ = decode_all(method, cache, q, k, v, np.zeros(1, int), 12)
    exact, _ = prefill(FullPrecision(), q, k, v, chunk, FullPrecision().init(LAYER, 1, 32))
    np.testing.assert_allclose(out, exact, atol=1e-5)


@pytest.mark.parametrize("bits", list(PAPER_FORMATS))
def test_every_width_of_the_paper_has_the_bytes_it_says(bits):
    method = VecInfer(bits=bits, residual=0, transform="smooth-hadamard")
    layer = dataclasses.replace(LAYER, head_dim=64, rope=dataclasses.replace(LAYER.rope, head_dim=64))
    shapes = jax.eval_shape(
        lambda: method.init(
            layer,
            1,
            1000,
            {
                "smooth": jnp.ones((2, 64)),
                "key_codebook": jnp.zeros((2, method.key_format.entries, method.key_format.length)),
                "value_codebook": jnp.zeros((2, method.value_format.entries, method.value_format.length)),
            },
        )
    )
    assert allocated_bytes(shapes)["codes"] == 2 * 2 * 64 * 1000 * bits / 8
    assert method.bits_per_element(layer) == bits


def test_shared_codebooks_serve_every_head():
    method = VecInfer(bits=2, scope="layer", residual=4, transform="smooth-hadamard")
    q, k, v = random_qkv(2, 16)
    empty = method.init(LAYER, 2, 16, random_calibration(method))
    scored, _ = prefill(method, q, k, v, chunk_at([0, 0], [16, 16], 16, True, "coded"), empty)
    decoded, _ = decode_all(method, empty, q, k, v, np.zeros(2, int), 16)
    np.testing.assert_allclose(decoded, scored, atol=2e-5)


def test_dequantised_keys_are_the_nearest_centroids():
    method = VecInfer(bits=2, residual=0, transform="none")
    _, k, v = random_qkv(1, 9)
    calibration = random_calibration(method)
    calibration["smooth"] = np.ones_like(calibration["smooth"])
    chunk = chunk_at([0], [9], 9, True)
    q = jnp.zeros((1, 9, LAYER.num_query_heads, LAYER.head_dim))
    _, cache = prefill(method, q, k, v, chunk, method.init(LAYER, 1, 9, calibration))
    got = np.asarray(dequantise(cache.store.value_codes, cache.store.value_codebook, LAYER.head_dim, jnp.float32))[
        0, :, :9
    ]
    sub = np.asarray(v, np.float64)[0].swapaxes(0, 1).reshape(2, 9, -1, 4)
    distance = ((sub[:, :, :, None] - calibration["value_codebook"][:, None, None].astype(np.float64)) ** 2).sum(-1)
    index = distance.argmin(-1)
    want = np.stack([calibration["value_codebook"][h][index[h]] for h in range(2)]).reshape(2, 9, -1)
    np.testing.assert_array_equal(got, want)


def test_different_layers_may_use_different_methods():
    method = PerLayer(
        VecInfer(bits=2, transform="smooth-hadamard"),
        ((0, FullPrecision()), (2, VecInfer(bits=4, transform="smooth-hadamard"))),
    )
    assert method.for_layer(0, 3) == FullPrecision()
    assert method.for_layer(1, 3) == VecInfer(bits=2, transform="smooth-hadamard")
    assert method.for_layer(2, 3) == VecInfer(bits=4, transform="smooth-hadamard")
    assert hash(method) == hash(
        PerLayer(
            VecInfer(bits=2, transform="smooth-hadamard"),
            ((0, FullPrecision()), (2, VecInfer(bits=4, transform="smooth-hadamard"))),
        )
    )


@pytest.mark.parametrize(("residual", "sink"), WINDOWS)
@pytest.mark.parametrize("transform", ["smooth-hadamard", "none"])
def test_what_a_query_reads_is_what_the_definition_says(residual, sink, transform):
    """Against a float64 loop over queries and tokens, written from the definition alone."""
    method = VecInfer(bits=2, residual=residual, sink=sink, transform=transform)
    tokens = 20
    q, k, v = random_qkv(1, tokens)
    calibration = random_calibration(method)
    if transform == "none":
        calibration["smooth"] = np.ones_like(calibration["smooth"])
    got, _ = prefill(
        method, q, k, v, chunk_at([0], [tokens], tokens, True, "coded"), method.init(LAYER, 1, tokens, calibration)
    )

    dim = LAYER.head_dim

    def nearest(x, codebook):
        parts = x.reshape(-1, 4)
        index = ((parts[:, None] - codebook[None].astype(np.float64)) ** 2).sum(-1).argmin(-1)
        return codebook[index].astype(np.float64).reshape(x.shape)

    h = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]) / np.sqrt(dim)
    if transform == "none":
        h = np.eye(dim)

    def coded(head, keys, values):
        smooth = calibration["smooth"][head].astype(np.float64)
        key_codes = nearest((keys / smooth) @ h, calibration["key_codebook"][head]) @ h * smooth
        return key_codes, nearest(values, calibration["value_codebook"][head])

    want = oracle(*(np.asarray(x)[0] for x in (q, k, v)), coded, residual=residual, sink=sink)
    np.testing.assert_allclose(got[0], want, atol=2e-5)
