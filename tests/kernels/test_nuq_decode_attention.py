"""Attention over non-uniformly quantised keys and values equals the float64 softmax over what they stand for.

Bounds: 3e-3 of the largest value on the output for 16-bit queries, 2e-5 for float32; on the log-sum-exp, whose scores
reach S, 3e-3 S and 2e-5 S. The oracle's angles are float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ExactTokens, nuq, nuq_decode_attention, split_k
from pallas_kernels.mosaic_gpu.decode_attention import Config
from pallas_kernels.nuq_decode_attention import mosaic_gpu, reference, triton
from tests.kernels import cases, lane_simulator, oracle

every = pytest.mark.parametrize("how", [*cases.EVERYWHERE, cases.MOSAIC_GPU], ids=[*cases.NAMES, "mosaic-gpu"])
# The Triton kernel's interpret mode is slow, and what these ask of it others do, too.
xla_and_mosaic = pytest.mark.parametrize("how", [cases.EVERYWHERE[0], cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])


@pytest.fixture(autouse=True)
def simulated(request, monkeypatch):
    """Mosaic GPU kernels run in a simulator where there is no GPU."""
    if "gpu" not in request.keywords:
        lane_simulator.install(monkeypatch)


def finest(how) -> str:
    """The dtype in which an implementation is most exact."""
    return "bfloat16" if how == cases.MOSAIC_GPU else "float32"


def expected_of(arrays, options):
    named = (options["scale"], options["inverse_frequencies"], options["first_position"])
    return oracle.nuq_decode_attention(*arrays, *named)


def check(case: cases.Nuq, **how):
    arrays, options = case.arguments()
    output, lse = nuq_decode_attention(*arrays, **options, **how)
    assert output.dtype == lse.dtype == jnp.float32
    expected, expected_lse = expected_of(arrays, options)
    bound = 2e-5 if case.dtype == "float32" else 3e-3
    full = np.asarray(case.lengths) > 0
    assert abs(oracle.float64(output) - expected).max() <= bound * abs(expected).max()
    error = abs(oracle.float64(lse) - expected_lse)[full]
    assert (error <= bound * (1 + abs(expected_lse[full]))).all()
    assert not output[~full].any() and (lse[~full] == jnp.float32(split_k.EMPTY)).all()


@every
@pytest.mark.parametrize("case", cases.NUQ, ids=str)
def test_the_output_is_the_softmax_over_the_tokens_that_count(case, how):
    served = {"mosaic_gpu": case.hopper, "triton": case.triton}.get(how["implementation"], True)
    if not served:
        with pytest.raises(NotImplementedError, match="kernel serves"):
            check(case, **how)
        return
    check(case, **how)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.NUQ_ON_DEVICE if c.triton]
    + [(c, "mosaic_gpu") for c in cases.NUQ_ON_DEVICE if c.hopper],
    ids=str,
)
def test_the_output_is_the_softmax_over_the_tokens_that_count_on_a_device(case, implementation):
    check(case, implementation=implementation)


@pytest.mark.slow
def test_however_a_launch_is_shaped_the_triton_kernel_is_right(monkeypatch):
    chosen, changes = triton.choose_config, {"splits": 3, "tokens": 16, "slots": 16, "key_codes": 4, "value_codes": 1}
    monkeypatch.setattr(triton, "choose_config", lambda *shape: dataclasses.replace(chosen(*shape), **changes))
    case = cases.Nuq(group=2, outliers=70, lengths=(0, 64, 101), tokens=128, kv_heads=1, dtype="bfloat16")
    check(case, implementation="triton", interpret=True)


@pytest.mark.slow
def test_the_triton_kernel_sees_nothing_past_the_length():
    case = cases.Nuq(lengths=(3, 65), tokens=128, kv_heads=1)
    (q, *codes_before, scale, zero, key_book, value_book, of_token, keys, values, lengths), options = case.arguments()
    how = {"implementation": "triton", "interpret": True}
    attend = jax.jit(
        lambda codes, pools: nuq_decode_attention(
            q, *codes, scale, zero, key_book, value_book, of_token, *pools, lengths, **options, **how
        )
    )
    past = jnp.arange(128)[:, None] >= lengths[:, None, None, None]
    codes_after = [jnp.where(past, jnp.uint8(0xA5), x) for x in codes_before]
    before, after = (
        attend(codes, [jnp.where(_past(pool, lengths, case.dim), hidden, pool) for pool in (keys, values)])
        for codes, hidden in (
            (codes_before, jnp.uint32(0)),
            (codes_after, jnp.uint32(0x7FFF_0FFF)),  # NaN, at a tile's last element
        )
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def _past(words, lengths, dim: int):
    """Slots of tokens past their row's length."""
    token = jnp.arange(words.shape[2])[:, None] * nuq.TILE + (words & 0xFFFF) // dim
    return token >= lengths[:, None, None, None]


def test_shares_of_any_size_merge_to_the_whole():
    case = cases.Nuq(dtype="bfloat16", lengths=(64, 200), tokens=256)
    arrays, options = case.arguments()
    expected, _ = expected_of(arrays, options)
    for blocks in (1, 3, 7):
        config = Config(groups=8, warpgroups=1, blocks=blocks)
        output, _ = mosaic_gpu.nuq_decode_attention(*arrays, **options, config=config)
        assert abs(oracle.float64(output) - expected).max() <= 3e-3 * abs(expected).max()


@every
def test_far_positions_are_as_exact_as_near_ones(how):
    check(cases.Nuq(lengths=(64, 10), tokens=64, first_position=1_000_000, dtype=finest(how)), **how)


def test_a_chunked_reference_equals_an_unchunked_one(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 3 * 64 * 64 * 6 * 2)  # chunks of 192 of 256 tokens
    check(cases.Nuq(), implementation="xla")
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)  # of 64
    check(cases.Nuq(lengths=(64, 129)), implementation="xla")


@xla_and_mosaic
def test_what_lies_past_the_length_is_never_seen(how):
    case = cases.Nuq(lengths=(5, 70), tokens=128, outliers=0, dtype=finest(how))
    (q, keys, values, *rest), options = case.arguments()
    past = jnp.arange(128)[None, None, :, None] >= jnp.array(case.lengths)[:, None, None, None]
    noise = jax.random.bits(jax.random.key(1), keys.shape, jnp.uint8)
    before = nuq_decode_attention(q, keys, values, *rest, **options, **how)
    hidden = (jnp.where(past, noise, x) for x in (keys, values))
    after = nuq_decode_attention(q, *hidden, *rest, **options, **how)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@xla_and_mosaic
def test_an_output_in_16_bits_is_the_float32_one_rounded(how):
    arrays, options = cases.Nuq(dtype="bfloat16").arguments()
    wide, _ = nuq_decode_attention(*arrays, **options, **how)
    output, _ = nuq_decode_attention(*arrays, **options, out_dtype=jnp.bfloat16, **how)
    np.testing.assert_array_equal(np.asarray(output), np.asarray(wide.astype(jnp.bfloat16)))


@every
def test_exact_tokens_stand_in_the_same_softmax(how):
    case = cases.Nuq(lengths=(0, 33, 70), tokens=128, dtype=finest(how))
    arrays, options = case.arguments()
    rng = np.random.default_rng(1)
    outputs, lses = ([x] for x in expected_of(arrays, options))
    exact = []
    for window in (5, 16):
        keys, values = (jnp.asarray(rng.normal(size=(3, 2, window, 64)), finest(how)) for _ in range(2))
        valid = rng.random((3, window)) < 0.6
        exact.append(ExactTokens(keys, values, jnp.asarray(valid)))
        output, lse = oracle.attention(arrays[0], keys, values, valid, options["scale"])
        outputs.append(output)
        lses.append(lse)
    expected, expected_lse = oracle.merge(outputs, lses)
    output, lse = nuq_decode_attention(*arrays, **options, exact=exact, **how)
    exactness = 3e-5 if finest(how) == "float32" else 3e-3
    np.testing.assert_allclose(output, expected, atol=4 * exactness)
    np.testing.assert_allclose(lse, expected_lse, rtol=exactness, atol=exactness)


def test_a_quarter_of_a_coded_key_holds_whole_rotary_pairs():
    for dim in (16, 64, 80, 128):
        order = nuq.pair_order(dim)
        assert order.tolist() == oracle.nuq_pair_order(dim)
        for quarter in order.reshape(4, -1):
            assert {(c + dim // 2) % dim for c in quarter} == set(quarter)


def test_keys_are_packed_in_that_order_and_read_back_in_the_channels():
    index = np.random.default_rng(0).integers(0, 8, (2, 5, 16))
    packed = nuq.pack_keys(jnp.asarray(index, jnp.int32), 3)
    np.testing.assert_array_equal(packed, oracle.pack(index[..., oracle.nuq_pair_order(16)], 3))
    np.testing.assert_array_equal(nuq.unpack_keys(packed, 3, 16), index)


@pytest.mark.parametrize(("start", "size"), [(0, 64), (0, 5), (70, 1), (63, 2), (1, 191), (190, 2), (0, 192)])
def test_outliers_of_any_tokens_are_read_from_their_tiles(start, size):
    words = cases.Nuq(lengths=(1, 1), tokens=192)._pool(np.random.default_rng(0))
    got = nuq.read_outliers(words, jnp.int32(start), size, 64)
    for row in range(2):
        for head in range(2):
            want = oracle.nuq_outliers(words[row, head], 64)[start : start + size]
            np.testing.assert_array_equal(got[row, head], want)


def test_a_code_is_the_nearest_entry_and_the_lower_of_two():
    book = jnp.array([-1.0, -0.25, 0.25, 1.0])
    x = jnp.array([-9.0, -0.6, 0.0, 0.1, 0.625, 0.626, 9.0])
    assert nuq.nearest(x, book).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_arguments_that_do_not_belong_together_are_refused():
    arrays, options = cases.Nuq(lengths=(1, 2), tokens=64).arguments()
    names = ("q", "key_codes", "value_codes", "key_scale", "key_zero", "key_codebook", "value_codebook")
    names += ("value_scale_zero", "key_outliers", "value_outliers", "lengths")
    given = dict(zip(names, arrays, strict=True))
    refused = [
        ("q must be", {"q": given["q"][0]}),
        ("multiple of 8", {"q": given["q"][..., :60]}),
        ("64 dividing", {"key_codes": given["key_codes"][:, :, :63]}),
        ("agree in", {"value_codes": given["value_codes"][:, :1]}),
        ("take 24 bytes", {"key_codes": given["key_codes"][..., :23]}),
        ("2, 4, 8 or 16", {"key_codebook": given["key_codebook"][:7]}),
        ("key_scale must be", {"key_scale": given["key_scale"][:, :5]}),
        ("value_scale_zero must be", {"value_scale_zero": given["value_scale_zero"][:, :5]}),
        ("key_outliers must be", {"key_outliers": given["key_outliers"][:, :, :0]}),
        ("inverse_frequencies", {"inverse_frequencies": (1.0,)}),
        ("lengths must be", {"lengths": given["lengths"][:1]}),
        ("first_position", {"first_position": -1}),
    ]
    for message, changes in refused:
        with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check") as error:
            nuq_decode_attention(**(given | options | changes))
        if isinstance(error.value, ValueError):
            assert "\n" not in str(error.value)


@xla_and_mosaic
def test_shares_of_every_third_tile_merge_to_the_whole(how):
    case = cases.Nuq(group=2, outliers=16, lengths=(0, 65, 500), tokens=576, dtype=finest(how))
    (q, *of_tokens), options = case.arguments()
    keys, values, scale, zero, key_book, value_book, scale_zero, key_pool, value_pool, lengths = of_tokens
    tiles = [jnp.arange(case.tokens // nuq.TILE)[i::3] for i in range(3)]
    firsts = tuple(options["first_position"] + i * nuq.TILE for i in range(3))
    parts = []
    for i, mine in enumerate(tiles):
        slots = (mine[:, None] * nuq.TILE + jnp.arange(nuq.TILE)).reshape(-1)
        held = jnp.sum(slots[None] < lengths[:, None], axis=1, dtype=jnp.int32)
        arrays = (keys[:, :, slots], values[:, :, slots], scale, zero, key_book, value_book, scale_zero[:, slots])
        share = {"first_position": firsts, "tile_stride": 3, "shard": jnp.int32(i)}
        pools = key_pool[:, :, mine], value_pool[:, :, mine]
        parts.append(nuq_decode_attention(q, *arrays, *pools, held, **options | share, **how))
    outputs, lses = zip(*parts, strict=True)
    output, lse = split_k.merge(jnp.stack(outputs, axis=-2), jnp.stack(lses, axis=-1))
    expected, expected_lse = expected_of(*case.arguments())
    bound = 2e-5 if case.dtype == "float32" else 3e-3
    assert abs(oracle.float64(output) - expected).max() <= bound * abs(expected).max()
    assert (abs(oracle.float64(lse) - expected_lse)[1:] <= bound * (1 + abs(expected_lse[1:]))).all()
