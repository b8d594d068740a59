"""Attention over coded keys and values equals the float64 softmax over the decoded vectors.

Bounds, with V the largest element of the value codebook: 2^-8 V on the output for 16-bit queries (each weight
is rounded once), 2e-5 V for float32; 2e-5 (1 + |lse|) on the log-sum-exp. Codebooks count as rounded to q's
dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import ExactTokens, split_k, vq_decode_attention
from pallas_kernels.mosaic_gpu.decode_attention import Config
from pallas_kernels.vq_decode_attention import mosaic_gpu
from tests.kernels import cases, lane_simulator, oracle

every = pytest.mark.parametrize("how", [*cases.EVERYWHERE, cases.MOSAIC_GPU], ids=[*cases.NAMES, "mosaic-gpu"])
# Of what the Triton kernel leaves to plain JAX.
xla_and_mosaic = pytest.mark.parametrize("how", [cases.EVERYWHERE[0], cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])


@pytest.fixture(autouse=True)
def simulated(request, monkeypatch):
    """Mosaic GPU kernels run in a simulator where there is no GPU."""
    if "gpu" not in request.keywords:
        lane_simulator.install(monkeypatch)


def finest(how) -> tuple[str, float]:
    """The dtype in which an implementation is most exact, and the difference that two ways to sum may make."""
    return ("bfloat16", 2e-2) if how == cases.MOSAIC_GPU else ("float32", 1e-5)


def check(case: cases.Decode, **how):
    arrays, options = case.arguments()
    output, lse = vq_decode_attention(*arrays, **options, **how)
    assert output.dtype == lse.dtype == jnp.float32
    expected, expected_lse = oracle.decode_attention(*arrays, options["scale"])
    largest = abs(oracle.float64(arrays[4])).max()
    bound = 2e-5 if case.dtype == "float32" else 2.0**-8
    assert abs(oracle.float64(output) - expected).max() <= bound * largest
    full = np.asarray(case.lengths) > 0
    error = abs(oracle.float64(lse) - expected_lse)[full]
    assert (error <= 2e-5 * (1 + abs(expected_lse[full]))).all()
    assert not output[~full].any() and (lse[~full] == jnp.float32(split_k.EMPTY)).all()


@every
@pytest.mark.parametrize("case", cases.DECODE, ids=str)
def test_the_output_is_the_softmax_over_the_tokens_that_count(case, how):
    if how == cases.MOSAIC_GPU and not case.hopper:
        with pytest.raises(NotImplementedError, match="mosaic_gpu kernel serves"):
            check(case, **how)
        return
    check(case, **how)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.DECODE_ON_DEVICE] + [(c, "mosaic_gpu") for c in cases.DECODE_ON_DEVICE if c.hopper],
    ids=str,
)
def test_the_output_is_the_softmax_over_the_tokens_that_count_on_a_device(case, implementation):
    check(case, implementation=implementation)


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_output_in_16_bits_is_the_float32_one_rounded(how, dtype):
    arrays, options = cases.Decode(lengths=(0, 5, 30), tokens=30, group=3).arguments()
    wide, lse = vq_decode_attention(*arrays, **options, **how)
    output, same_lse = vq_decode_attention(*arrays, **options, out_dtype=dtype, **how)
    assert output.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(output), np.asarray(wide.astype(dtype)))
    np.testing.assert_array_equal(np.asarray(lse), np.asarray(same_lse))


@every
def test_what_lies_past_the_length_is_never_seen(how):
    case = cases.Decode(lengths=(5, 30), tokens=30)
    (q, keys, values, *rest), options = case.arguments()
    past = jnp.arange(30)[None, None, :, None] >= jnp.array(case.lengths)[:, None, None, None]
    noise = jax.random.bits(jax.random.key(1), keys.shape, jnp.uint8)
    before = vq_decode_attention(q, keys, values, *rest, **options, **how)
    after = vq_decode_attention(
        q, jnp.where(past, noise, keys), jnp.where(past, noise, values), *rest, **options, **how
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@every
def test_lengths_beyond_the_cache_count_as_its_size(how):
    (*arrays, _), options = cases.Decode(lengths=(30, 30), tokens=30).arguments()
    beyond = vq_decode_attention(*arrays, jnp.array([31, 2**30], jnp.int32), **options, **how)
    exact = vq_decode_attention(*arrays, jnp.array([30, 30], jnp.int32), **options, **how)
    for a, b in zip(beyond, exact, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 40])
def test_the_number_of_splits_changes_nothing_but_rounding(num_splits):
    case = cases.Decode(dim=64, dtype="float32", lengths=(0, 1, 33, 150), tokens=150, num_splits=num_splits)
    check(case, implementation="triton", interpret=True)


@every
def test_an_empty_cache_gives_nothing(how):
    arrays, options = cases.Decode(tokens=0, lengths=(0, 0)).arguments()
    output, lse = vq_decode_attention(*arrays, **options, **how)
    assert not output.any() and (lse == jnp.float32(split_k.EMPTY)).all()


@every
def test_scores_of_any_size_stay_finite(how):
    (q, *rest), options = cases.Decode(lengths=(0, 20), tokens=20).arguments()
    for factor in (0.0, 1e4):
        output, lse = vq_decode_attention(q * factor, *rest, **options, **how)
        assert jnp.isfinite(output).all() and jnp.isfinite(lse).all()


@every
def test_a_coded_part_and_an_exact_window_merge_to_the_whole(how):
    dtype, tolerance = finest(how)
    case = cases.Decode(dtype=dtype, lengths=(40, 40), tokens=40)
    (q, keys, values, *books, _), options = case.arguments()
    parts = [
        vq_decode_attention(
            q, keys[:, :, part], values[:, :, part], *books, jnp.full(2, size, jnp.int32), **options, **how
        )
        for part, size in ((slice(0, 29), 29), (slice(29, 40), 11))
    ]
    outputs, lses = zip(*parts, strict=True)
    output, lse = split_k.merge(jnp.stack(outputs, -2), jnp.stack(lses, -1))
    whole = vq_decode_attention(q, keys, values, *books, jnp.full(2, 40, jnp.int32), **options, **how)
    np.testing.assert_allclose(output, whole[0], atol=tolerance)
    np.testing.assert_allclose(lse, whole[1], atol=1e-5)


def check_eight_bits(case, hows, key="bfloat16"):
    """With the values' codebook in fp8, and the keys' in `key`."""
    (q, keys, values, key_book, value_book, lengths), options = case.arguments()
    books = key_book.astype(key), value_book.astype("float8_e4m3fn")
    arrays = q, keys, values, *books, lengths
    expected, expected_lse = oracle.decode_attention(*arrays, options["scale"])
    for how in hows:
        output, lse = vq_decode_attention(*arrays, **options, **how)
        np.testing.assert_allclose(output, expected, atol=2.0**-8 * abs(oracle.float64(books[1])).max())
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("key", ["float8_e4m3fn", "bfloat16"])
def test_codebooks_may_be_held_in_eight_bits(key):
    case = cases.Decode(dim=128, lengths=(0, 1, 40), tokens=40, dtype="bfloat16" if key == "bfloat16" else "float16")
    check_eight_bits(case, (*cases.EVERYWHERE, cases.MOSAIC_GPU), key)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [(4, 8), (8, 8), (4, 12), (8, 12)], ids="d{0[0]}b{0[1]}".format)
@pytest.mark.parametrize("dim", [64, 128])
def test_codebooks_of_values_may_be_held_in_eight_bits_on_a_device(form, dim):
    case = cases.Decode(dim=dim, key=form, value=form, lengths=(0, 1, 1000, 2048), tokens=2048)
    check_eight_bits(case, ({"implementation": "triton"}, {"implementation": "mosaic_gpu"}))


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_a_scale_of_either_sign_is_meant(scale):
    (q, *rest), _ = cases.Decode(lengths=(5, 40), tokens=40).arguments()
    expected, expected_lse = oracle.decode_attention(q, *rest, scale)
    output, lse = vq_decode_attention(q, *rest, scale=scale, **cases.MOSAIC_GPU)
    np.testing.assert_allclose(output, expected, atol=2.0**-8 * abs(oracle.float64(rest[3])).max())
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-5)


@pytest.mark.parametrize(("blocks", "warpgroups"), [(1, 4), (7, 1), (64, 1)])
def test_any_number_of_blocks_shares_ragged_rows(blocks, warpgroups):
    (q, *rest), options = cases.Decode(lengths=(0, 300, 17, 0, 64, 1), tokens=300, group=2).arguments()
    config = Config(groups=2, warpgroups=warpgroups, blocks=blocks)
    expected, expected_lse = oracle.decode_attention(q, *rest, options["scale"])
    output, lse = mosaic_gpu.vq_decode_attention(q, *rest, scale=options["scale"], config=config)
    np.testing.assert_allclose(output, expected, atol=2.0**-8 * abs(oracle.float64(rest[3])).max())
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-5)


@xla_and_mosaic
@pytest.mark.parametrize(("dim", "group", "windows"), [(128, 4, (40,)), (64, 3, (5, 16)), (64, 9, (1, 0))])
def test_exact_tokens_stand_in_the_same_softmax(dim, group, windows, how):
    case = cases.Decode(dim=dim, group=group, lengths=(0, 33, 70, 0), tokens=70)
    arrays, options = case.arguments()
    q, rng = arrays[0], np.random.default_rng(1)
    exact_q = jnp.asarray(rng.normal(size=q.shape), q.dtype)
    outputs, lses = ([x] for x in oracle.decode_attention(*arrays, options["scale"]))
    exact = []
    for window in windows:
        keys, values = (jnp.asarray(rng.normal(size=(4, case.kv_heads, window, dim)), q.dtype) for _ in range(2))
        valid = rng.random((4, window)) < 0.6
        valid[3] = False  # a row with nothing at all
        exact.append(ExactTokens(keys, values, jnp.asarray(valid)))
        if window:
            output, lse = oracle.attention(exact_q, keys, values, valid, options["scale"])
            outputs.append(output)
            lses.append(lse)
    expected, expected_lse = oracle.merge(outputs, lses)
    output, lse = vq_decode_attention(*arrays, **options, exact=exact, exact_q=exact_q, **how)
    np.testing.assert_allclose(output, expected, atol=2.0**-8 * abs(oracle.float64(arrays[4])).max())
    np.testing.assert_allclose(lse, expected_lse, rtol=3e-5, atol=3e-5)
    assert not output[3].any() and (lse[3] == jnp.float32(split_k.EMPTY)).all()


@xla_and_mosaic
@pytest.mark.parametrize(
    ("dim", "group", "dtype", "steps"),
    [
        (128, 4, "bfloat16", "both"),
        (64, 3, "float16", "hadamard"),
        (128, 10, "bfloat16", "scale"),
        (128, 4, "bfloat16", "map"),
        (64, 9, "float16", "map"),
    ],
)
def test_queries_are_brought_into_the_keys_basis(dim, group, dtype, steps, how):
    case = cases.Decode(dim=dim, group=group, dtype=dtype, lengths=(0, 33), tokens=40)
    (q, *rest), options = case.arguments()
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.3, 2.0, (case.kv_heads, dim)), jnp.float32)
    wide = oracle.float64(q)
    given = {}
    if steps == "map":
        given["query_map"] = jnp.asarray(np.random.default_rng(2).normal(size=(case.kv_heads, dim, dim)) / dim**0.5)
        maps = np.repeat(oracle.float64(given["query_map"]), group, 0)
        wide = np.einsum("bhi,hij->bhj", wide, maps)
    if steps in ("scale", "both"):
        wide, given["query_scale"] = wide * np.repeat(oracle.float64(scale), group, 0), scale
    if steps in ("hadamard", "both"):
        wide, given["query_hadamard"] = wide @ oracle.hadamard_matrix(dim), True
    expected, expected_lse = oracle.decode_attention(jnp.asarray(wide, dtype), *rest, options["scale"])
    output, lse = vq_decode_attention(q, *rest, **options, **given, **how)
    # A query that rounds to its other neighbour moves a score by half a per cent of an element.
    np.testing.assert_allclose(output, expected, atol=2.0**-7 * abs(oracle.float64(rest[3])).max())
    np.testing.assert_allclose(lse, expected_lse, atol=5e-3)


def test_exact_tokens_of_two_types_are_left_to_another_implementation():
    arrays, options = cases.Decode(lengths=(5,), tokens=40).arguments()
    keys = jax.random.normal(jax.random.key(0), (1, 2, 8, 64), jnp.bfloat16)
    for values in (keys.astype("float16"), keys.astype("float32")):
        exact = [ExactTokens(keys, values, jnp.ones((1, 8), bool))]
        with pytest.raises(NotImplementedError, match="of one 16-bit type"):
            vq_decode_attention(*arrays, **options, exact=exact, exact_q=arrays[0], **cases.MOSAIC_GPU)
        vq_decode_attention(*arrays, **options, exact=exact, exact_q=arrays[0])


def test_exact_tokens_that_do_not_belong_are_refused():
    arrays, options = cases.Decode(lengths=(5,), tokens=8).arguments()
    window = ExactTokens(jnp.zeros((1, 2, 3, 64)), jnp.zeros((1, 2, 3, 64)), jnp.ones((1, 3), bool))
    for exact, exact_q in ((window, None), (window._replace(valid=jnp.ones((1, 4), bool)), arrays[0])):
        with pytest.raises(ValueError, match="exact"):
            vq_decode_attention(*arrays, **options, exact=[exact], exact_q=exact_q)


def test_a_chunked_reference_equals_an_unchunked_one(monkeypatch):
    from pallas_kernels.vq_decode_attention import reference

    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)  # chunks of 128
    check(cases.Decode(lengths=(0, 127, 128, 129, 300), tokens=300), implementation="xla")


@every
def test_a_batch_may_be_mapped_over(how):
    dtype, tolerance = finest(how)
    case = cases.Decode(dtype=dtype, lengths=(7, 40), tokens=40)
    (q, keys, values, key_book, value_book, lengths), options = case.arguments()

    def one(q, keys, values, length):
        arrays = q[None], keys[None], values[None], key_book, value_book, length[None]
        output, lse = vq_decode_attention(*arrays, **options, **how)
        return output[0], lse[0]

    mapped = jax.jit(jax.vmap(one))(q, keys, values, lengths)
    whole = vq_decode_attention(q, keys, values, key_book, value_book, lengths, **options)
    for a, b in zip(mapped, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@every
def test_it_runs_under_shard_map(how):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    dtype, tolerance = finest(how)
    arrays, options = cases.Decode(dtype=dtype, lengths=(7, 40), tokens=40).arguments()
    specs = (P("data"), P("data"), P("data"), P(), P(), P("data"))
    step = jax.shard_map(
        lambda *a: vq_decode_attention(*a, **options, **how),
        mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data")), check_vma=False,
    )  # fmt: skip
    for a, b in zip(jax.jit(step)(*arrays), vq_decode_attention(*arrays, **options), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_arguments_that_do_not_belong_together_are_refused():
    (q, keys, values, key_book, value_book, lengths), _ = cases.Decode(tokens=8, lengths=(1, 2)).arguments()
    refused = [
        ("q must be", (q[0], keys, values, key_book, value_book, lengths), {}),
        ("Hkv dividing 8", (q, keys[:, [0, 1, 0]], values, key_book, value_book, lengths), {}),
        ("agree in", (q, keys, values[:, :, :5], key_book, value_book, lengths), {}),
        ("packed in uint8", (q, keys.astype(jnp.int32), values, key_book, value_book, lengths), {}),
        ("codebook must be", (q, keys, values, key_book[:, :, :, None], value_book, lengths), {}),
        ("take 16 bytes", (q, keys[..., :15], values, key_book, value_book, lengths), {}),
        ("lengths must be", (q, keys, values, key_book, value_book, lengths[:1]), {}),
        ("num_splits", (q, keys, values, key_book, value_book, lengths), {"num_splits": 0}),
        ("query_map", (q, keys, values, key_book, value_book, lengths), {"query_map": jnp.zeros((2, 64, 63))}),
    ]
    for message, arrays, options in refused:
        with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check") as error:
            vq_decode_attention(*arrays, scale=1.0, **options)
        if isinstance(error.value, ValueError):
            assert "\n" not in str(error.value)
