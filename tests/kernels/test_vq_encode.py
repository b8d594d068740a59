"""Encoding picks the nearest centroid, as float64 sees it, after any transform.

Bound: the chosen centroid's squared distance exceeds the least one by at most 1e-5 of it, plus what float32
rounding of the transformed sub-vector itself accounts for (2e-6 of the head's largest element). So the code
is the float64 argmin wherever the two best differ by more. With RoPE on a device in 16 bits, a fused
multiply-add may round one element in 10^4 to the other neighbour: there, one code in a thousand may miss that
bound, by at most a tenth.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, packing, vq_encode
from pallas_kernels.vq_encode import reference
from tests.kernels import cases, lane_simulator, oracle

both = pytest.mark.parametrize("how", cases.EVERYWHERE, ids=cases.NAMES)


def codes_of(case: cases.Encode, packed) -> np.ndarray:
    length, bits = case.format
    count = case.dim // length
    assert packed.dtype == jnp.uint8
    assert packed.shape == (case.batch, case.heads, case.tokens, packing.num_bytes(count, bits))
    return oracle.unpack(np.asarray(packed), bits, count)


def excess(codes: np.ndarray, x, codebook, options: dict) -> np.ndarray:
    """How far each chosen squared distance is above its bound, relative to the least; at most 0 if right."""
    options = dict(options)
    y = oracle.transform(oracle.rotate(x, *rope) if (rope := options.pop("rope", None)) else x, **options)
    distance = oracle.distances(y, codebook)
    least = distance.min(-1)
    chosen = np.take_along_axis(distance, codes[..., None], -1)[..., 0]
    rounding = 2e-6 * abs(y).max() * (np.sqrt(least) + np.sqrt(chosen)) if options else 0.0
    return (chosen - least - rounding) / np.maximum(least, 1e-30) - 1e-5


@pytest.mark.parametrize("case", [case for case in cases.ENCODE if case.few], ids=str)
def test_the_kernel_for_few_tokens_chooses_the_nearest_centroid(case, monkeypatch):
    lane_simulator.install(monkeypatch)
    arrays, options = case.arguments()
    few = jnp.asarray(arrays[0])[:, :2], arrays[1]
    codes = vq_encode(*few, **options, **cases.MOSAIC_GPU)
    count = case.dim // case.format[0]
    assert (excess(oracle.unpack(np.asarray(codes), case.format[1], count), *few, options) <= 0).all()


def test_the_kernel_for_few_tokens_gives_ties_to_the_lowest_index(monkeypatch):
    lane_simulator.install(monkeypatch)
    codebook = jnp.tile(jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 4)), jnp.float32), (1, 8, 1))
    x = codebook[:, 200:216].reshape(1, 1, 1, 64)
    codes = vq_encode(x, codebook, **cases.MOSAIC_GPU)
    np.testing.assert_array_equal(np.asarray(codes)[0, 0, 0], np.arange(200, 216) % 32)


@both
@pytest.mark.parametrize("case", cases.ENCODE, ids=str)
def test_the_code_is_the_nearest_centroid(case, how):
    arrays, options = case.arguments()
    codes = codes_of(case, vq_encode(*arrays, **options, **how))
    assert (excess(codes, *arrays, options) <= 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.ENCODE_ON_DEVICE] + [(c, "mosaic_gpu") for c in cases.ENCODE_ON_DEVICE if c.few],
    ids=str,
)
def test_the_code_is_the_nearest_centroid_on_a_device(case, implementation):
    arrays, options = case.arguments()
    codes = codes_of(case, vq_encode(*arrays, **options, implementation=implementation))
    above = excess(codes, *arrays, options)
    if case.rope and case.dtype != "float32":
        assert (above > 0).mean() <= 1e-3 and above.max() < 0.1
    else:
        assert (above <= 0).all()


@pytest.mark.parametrize("case", cases.ENCODE[:6], ids=str)
def test_plain_jax_walks_over_centroids_in_chunks_where_distances_would_not_fit(case, monkeypatch):
    arrays, options = case.arguments()
    at_once = vq_encode(*arrays, **options, implementation="xla")
    monkeypatch.setattr(reference, "_DIRECT_DISTANCES", 0)
    monkeypatch.setattr(reference, "_CHUNK_SUBVECTORS", 100)
    codes = vq_encode(*arrays, **options, implementation="xla")
    assert (excess(codes_of(case, codes), *arrays, options) <= 0).all()
    assert (np.asarray(codes) != np.asarray(at_once)).mean() < 1e-3


def test_a_decoded_token_is_not_encoded_by_the_triton_kernel_unless_it_is_named(monkeypatch):
    asked = []

    def call(operation, implementation, interpret, x, codebook, without, **options):
        asked.append((implementation, without))
        return jnp.zeros((*x.shape[:1], x.shape[2], x.shape[1], 16), jnp.uint8)

    monkeypatch.setattr(dispatch, "call", call)
    codebook = jnp.zeros((2, 256, 4))
    for tokens, implementation in ((1, None), (2, None), (1, "triton")):
        vq_encode(jnp.zeros((1, tokens, 2, 64)), codebook, implementation=implementation)
    assert asked == [(None, ("triton",)), (None, ()), ("triton", ())]


@both
def test_a_mean_far_larger_than_the_spread_does_not_blur_the_choice(how):
    rng = np.random.default_rng(0)
    x = jnp.asarray(30 + 0.05 * rng.normal(size=(1, 20, 2, 64)), jnp.float32)
    codebook = jnp.asarray(30 + 0.05 * rng.normal(size=(2, 256, 4)), jnp.float32)
    codes = np.asarray(vq_encode(x, codebook, **how))
    assert (excess(codes, x, codebook, {}) <= 0).all()


def worst_of_random(form: tuple[int, int], tokens: int, **how) -> float:
    """The largest relative excess among 32 random sub-vectors a token and random centroids, of unequal spread."""
    length, bits = form
    rng = np.random.default_rng(2)
    spread = rng.uniform(0.3, 3.0, size=length)
    vectors = (rng.normal(size=(tokens * 32, length)) * spread).astype(np.float32)
    codebook = jnp.asarray(rng.normal(size=(1, 2**bits, length)) * spread, jnp.float32)
    x = jnp.asarray(vectors.reshape(1, tokens, 1, 32 * length))
    codes = jax.jit(lambda *arrays: vq_encode(*arrays, **how))(x, codebook)
    return oracle.largest_excess(vectors, codebook[0], oracle.unpack(np.asarray(codes), bits, 32).reshape(-1))


def test_a_million_random_vectors_get_their_nearest_centroid():
    assert worst_of_random((4, 8), 2**15, implementation="xla") <= 1e-5


@both
@pytest.mark.parametrize("form", [(2, 8), (4, 8), (8, 8)], ids=str)
def test_random_vectors_get_their_nearest_centroid(form, how):
    assert worst_of_random(form, 64, **how) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("form", [(2, 8), (4, 8), (8, 8), (2, 4), (4, 10), (4, 12), (8, 12)], ids=str)
def test_a_million_random_vectors_get_their_nearest_centroid_on_a_device(form):
    assert worst_of_random(form, 2**15, implementation="triton") <= 1e-5


@pytest.mark.parametrize("layer", [0, 20])
@pytest.mark.slow
def test_real_activations_get_their_nearest_centroid(smollm2, layer):
    """Keys and values of a real model, static means and outliers included, and centroids from among themselves."""
    from vecinfer_jax.calibration.collect import collect

    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = collect(smollm2, [text], passages=1, passage_length=256, batch=1, progress=False).statistics[layer]
    tokens = np.flatnonzero(np.asarray(found.positions) >= 0)
    for activations in (found.keys, found.values):
        x = np.asarray(activations)[tokens][None]
        heads = x.shape[2]
        own = x[0, ::2].reshape(-1, heads, x.shape[3] // 4, 4).swapaxes(0, 1).reshape(heads, -1, 4)
        codebook = jnp.asarray(own[:, np.random.default_rng(0).choice(own.shape[1], 256, replace=False)])
        few = jnp.asarray(x[:, 1:64:2])
        for how in cases.EVERYWHERE:
            for options in ({}, {"hadamard": True}):
                codes = np.asarray(vq_encode(few, codebook, **options, **how))
                assert (excess(codes, few, codebook, options) <= 0).all()


@both
def test_vectors_far_from_every_centroid_get_the_nearest(how):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 8, 2, 64)) * 10.0 ** rng.integers(0, 6, size=(1, 8, 2, 1))
    x = jnp.asarray(x, jnp.float32)
    codebook = jnp.asarray(rng.normal(size=(2, 256, 4)), jnp.float32)
    codes = np.asarray(vq_encode(x, codebook, **how))
    assert (excess(codes, x, codebook, {}) <= 0).all()


@both
def test_a_codebook_of_equal_centroids_gives_the_first(how):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 3, 1, 32)), jnp.float32)
    assert (vq_encode(x, jnp.full((1, 256, 4), 0.5), **how) == 0).all()
    assert (vq_encode(x, jnp.zeros((1, 256, 4)), **how) == 0).all()


@both
def test_exact_ties_go_to_the_lowest_index(how):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 9, 1, 64)), jnp.float32)
    half = rng.normal(size=(1, 128, 4))
    twins = jnp.asarray(np.concatenate([half, half], axis=1), jnp.float32)
    first = vq_encode(x, twins, **how)
    assert first.max() < 128
    np.testing.assert_array_equal(first, vq_encode(x, twins.at[:, 128:].add(100.0), **how))
    interleaved = jnp.repeat(jnp.asarray(half, jnp.float32), 2, axis=1)
    np.testing.assert_array_equal(vq_encode(x, interleaved, **how), 2 * first)
    opposite = jnp.full((1, 256, 4), 9.0).at[0, 77].set(1.0).at[0, 200].set(-1.0)
    assert (vq_encode(jnp.zeros((1, 1, 1, 64)), opposite, **how) == 77).all()


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoding_before_rope_equals_encoding_the_rotated_key(dtype, how):
    case = cases.Encode(dim=64, dtype=dtype, rope=True, transform="hadamard", batch=1)
    (x, codebook), options = case.arguments(seed=3)
    fused = vq_encode(x, codebook, **options, **how)
    rotated = jnp.asarray(oracle.rotate(x, *options.pop("rope")))
    np.testing.assert_array_equal(fused, vq_encode(rotated, codebook, **options, **how))


@both
@pytest.mark.parametrize("transform", ["", "matrix"])
def test_a_token_encodes_alike_alone_and_in_bulk(transform, how):
    case = cases.Encode(dim=64, rope=True, transform=transform, batch=1, tokens=33)
    (x, codebook), options = case.arguments()
    bulk = vq_encode(x, codebook, **options, **how)
    alone = dict(options, rope=tuple(part[:, 20:21] for part in options["rope"]))
    np.testing.assert_array_equal(vq_encode(x[:, 20:21], codebook, **alone, **how), bulk[:, :, 20:21])


@pytest.mark.gpu
@pytest.mark.parametrize("transform", ["", "affine", "hadamard", "matrix"])
def test_a_token_encodes_alike_alone_and_in_bulk_on_a_device(transform):
    case = cases.Encode(dim=128, rope=True, transform=transform, tokens=333, heads=8)
    (x, codebook), options = case.arguments()
    bulk = vq_encode(x, codebook, **options, implementation="triton")
    alone = dict(options, rope=tuple(part[:, 20:21] for part in options["rope"]))
    single = vq_encode(x[:, 20:21], codebook, **alone, implementation="triton")
    np.testing.assert_array_equal(single, bulk[:, :, 20:21])


@both
def test_no_tokens_give_no_codes(how):
    assert vq_encode(jnp.zeros((2, 0, 3, 64)), jnp.zeros((1, 1024, 4)), **how).shape == (2, 3, 0, 20)


def test_every_format_is_served_by_the_reference():
    for dim, length, bits in ((64, 1, 2), (64, 4, 1), (96, 3, 8), (64, 16, 9), (80, 8, 12)):
        case = cases.Encode(dim=dim, format=(length, bits), dtype="float32", tokens=3)
        arrays, options = case.arguments()
        assert (excess(codes_of(case, vq_encode(*arrays)), *arrays, options) <= 0).all()


def test_a_batch_may_be_mapped_over():
    case = cases.Encode(batch=3, transform="hadamard", rope=True)
    (x, codebook), options = case.arguments()
    cos, sin = options.pop("rope")

    def one(x, cos, sin):
        return vq_encode(x[None], codebook, rope=(cos[None], sin[None]), **options)[0]

    whole = jax.jit(lambda x, cos, sin: vq_encode(x, codebook, rope=(cos, sin), **options))
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(x, cos, sin), whole(x, cos, sin))


def test_arguments_that_do_not_belong_together_are_refused():
    x, book = jnp.zeros((2, 5, 3, 64)), jnp.zeros((3, 256, 4))
    refused = [
        ("B, S, H, D", (x[0], book), {}),
        ("codebook must be", (x, book[:2]), {}),
        ("power of two", (x, book[:, :200]), {}),
        ("d=5", (x, jnp.zeros((1, 256, 5))), {}),
        ("exclude each other", (x, book), {"matrix": jnp.zeros((3, 64, 64)), "hadamard": True}),
        ("rope must be", (x, book), {"rope": (jnp.zeros((2, 5, 64)),) * 2}),
        ("mean must have shape", (x, book), {"mean": jnp.zeros((64, 3))}),
    ]
    for message, arrays, options in refused:
        with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check") as error:
            vq_encode(*arrays, **options)
        if isinstance(error.value, ValueError):
            assert "\n" not in str(error.value)
