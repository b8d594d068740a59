"""Attention over integers in groups equals the float64 softmax over what they stand for.

Bounds: 3e-3 of the largest value on the output for 16-bit queries, 2e-5 for float32; on the log-sum-exp, whose scores
reach S, 3e-3 S and 2e-5 S.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ExactTokens, group_int, group_int_decode_attention, split_k
from pallas_kernels.group_int import Layout
from pallas_kernels.group_int_decode_attention import mosaic_gpu, reference
from pallas_kernels.mosaic_gpu.decode_attention import Config
from tests.kernels import cases, lane_simulator, oracle

# What the ordinary run has of the others: cases that the Mosaic GPU kernel does not serve, and one of Triton's.
XLA, TRITON = cases.EVERYWHERE
slow = [pytest.param(how, marks=pytest.mark.slow) for how in (XLA, TRITON)]
every = pytest.mark.parametrize("how", [*slow, cases.MOSAIC_GPU], ids=[*cases.NAMES, "mosaic-gpu"])
xla_and_mosaic = pytest.mark.parametrize("how", [slow[0], cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])
names = ("q", "key_codes", "key_scale_zero", "value_codes", "value_scale_zero", "lengths")


@pytest.fixture(autouse=True)
def simulated(request, monkeypatch):
    """Mosaic GPU kernels run in a simulator where there is no GPU."""
    if "gpu" not in request.keywords:
        lane_simulator.install(monkeypatch)


def finest(how) -> str:
    """The dtype in which an implementation is most exact."""
    return "bfloat16" if how == cases.MOSAIC_GPU else "float32"


@functools.partial(jax.jit, static_argnums=0)
def encode(layout, keys, values):
    return *layout.encode_keys(keys), *layout.encode_values(values)


@functools.partial(jax.jit, static_argnums=0)
def decode(layout, key_codes, key_scale_zero, value_codes, value_scale_zero):
    return layout.decode_keys(key_codes, key_scale_zero), layout.decode_values(value_codes, value_scale_zero)


def expected_of(arrays, options):
    return oracle.group_int_decode_attention(*arrays, options["layout"], options["scale"])


def assert_close(got, expected, lengths, bound):
    (output, lse), (expected, expected_lse) = got, expected
    full = np.asarray(lengths) > 0
    assert abs(oracle.float64(output) - expected).max() <= bound * abs(expected).max()
    error = abs(oracle.float64(lse) - expected_lse)[full]
    assert (error <= bound * (1 + abs(expected_lse[full]))).all()
    assert not output[~full].any() and (lse[~full] == jnp.float32(split_k.EMPTY)).all()


def check(case: cases.GroupInt, **how):
    arrays, options = case.arguments()
    output, lse = group_int_decode_attention(*arrays, **options, **how)
    assert output.dtype == lse.dtype == jnp.float32
    bound = 2e-5 if case.dtype == "float32" else 3e-3
    assert_close((output, lse), expected_of(arrays, options), case.lengths, bound)


def ordinary(case, how) -> bool:
    """Whether a case is of the ordinary run: every one once, by the kernel where that serves it."""
    return how == (cases.MOSAIC_GPU if case.hopper else XLA) or (case, how) == (cases.GROUP_INT[3], TRITON)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(case, how, marks=() if ordinary(case, how) else pytest.mark.slow, id=f"{case}-{name}")
        for case in cases.GROUP_INT
        for how, name in zip((XLA, TRITON, cases.MOSAIC_GPU), (*cases.NAMES, "mosaic-gpu"), strict=True)
    ],
)
def test_the_output_is_the_softmax_over_the_tokens_that_count(case, how):
    if not {"mosaic_gpu": case.hopper, "triton": case.triton}.get(how["implementation"], True):
        with pytest.raises(NotImplementedError, match="kernel serves") as error:
            check(case, **how)
        assert "\n" not in str(error.value)
        return
    check(case, **how)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.GROUP_INT_ON_DEVICE if c.triton]
    + [(c, "mosaic_gpu") for c in cases.GROUP_INT_ON_DEVICE if c.hopper],
    ids=str,
)
def test_the_output_is_the_softmax_over_the_tokens_that_count_on_a_device(case, implementation):
    check(case, implementation=implementation)


def test_shares_of_any_size_and_tiles_of_either_merge_to_the_whole():
    case = cases.GroupInt(dim=64, group=3, lengths=(64, 200), tokens=256)
    arrays, options = case.arguments()
    expected = expected_of(arrays, options)
    for groups, blocks in ((4, 1), (4, 7), (8, 3)):
        config = Config(groups=groups, warpgroups=1, blocks=blocks)
        got = mosaic_gpu.group_int_decode_attention(*arrays, **options, config=config)
        assert_close(got, expected, case.lengths, 3e-3)


def test_a_chunked_reference_equals_an_unchunked_one(monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 3 * 64 * 64 * 2 * 2)  # chunks of 192 of 256 tokens
    check(cases.GroupInt(dim=64, lengths=(1, 250), tokens=256, dtype="float32"), implementation="xla")
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)  # of a group
    check(cases.GroupInt(dim=64, lengths=(65, 0), tokens=192, dtype="float32"), implementation="xla")


@xla_and_mosaic
def test_what_lies_past_the_length_is_never_seen(how):
    case = cases.GroupInt(dim=64, group=2, lengths=(5, 70), tokens=128, dtype=finest(how))
    (q, *coded, lengths), options = case.arguments()
    layout = case.layout
    before = group_int_decode_attention(q, *coded, lengths, **options, **how)
    past = jnp.arange(128)[:, None] >= lengths[:, None, None, None]
    pairs = [(layout.pack_keys, layout.unpack_keys), (layout.pack_values, layout.unpack_values)]
    for i, (pack, unpack) in enumerate(pairs):
        turned = jax.jit(lambda x, pack=pack, unpack=unpack: pack(jnp.where(past, 3 - unpack(x), unpack(x))))
        coded[2 * i] = turned(coded[2 * i])
    after = group_int_decode_attention(q, *coded, lengths, **options, **how)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@xla_and_mosaic
def test_an_output_in_16_bits_is_the_float32_one_rounded(how):
    arrays, options = cases.GroupInt(dim=64, lengths=(0, 40)).arguments()
    wide, _ = group_int_decode_attention(*arrays, **options, **how)
    output, _ = group_int_decode_attention(*arrays, **options, out_dtype=jnp.bfloat16, **how)
    np.testing.assert_array_equal(np.asarray(output), np.asarray(wide.astype(jnp.bfloat16)))


@every
@pytest.mark.parametrize("tokens", [0, 64])
def test_exact_tokens_stand_in_the_same_softmax(how, tokens):
    lengths = (0, min(tokens, 33), tokens)
    case = cases.GroupInt(dim=64, group=3, lengths=lengths, tokens=tokens, dtype=finest(how))
    arrays, options = case.arguments()
    rng = np.random.default_rng(1)
    outputs, lses = ([x] for x in expected_of(arrays, options)) if tokens else ([], [])
    exact = []
    for window in (5, 16):
        keys, values = (jnp.asarray(rng.normal(size=(3, 2, window, 64)), finest(how)) for _ in range(2))
        valid = rng.random((3, window)) < 0.6
        exact.append(ExactTokens(keys, values, jnp.asarray(valid)))
        output, lse = oracle.attention(arrays[0], keys, values, valid, options["scale"])
        outputs.append(output)
        lses.append(lse)
    expected, expected_lse = oracle.merge(outputs, lses)
    output, lse = group_int_decode_attention(*arrays, **options, exact=exact, **how)
    exactness = 3e-5 if finest(how) == "float32" else 3e-3
    np.testing.assert_allclose(output, expected, atol=4 * exactness)
    np.testing.assert_allclose(lse, expected_lse, rtol=exactness, atol=exactness)


@xla_and_mosaic
def test_it_runs_under_vmap_in_a_jit(how):
    case = cases.GroupInt(dim=64, group=3, lengths=(7, 64), tokens=64, dtype=finest(how))
    arrays, options = case.arguments()

    def one(*arrays):
        output, lse = group_int_decode_attention(*(x[None] for x in arrays), **options, **how)
        return output[0], lse[0]

    whole = group_int_decode_attention(*arrays, **options, **how)
    for a, b in zip(jax.jit(jax.vmap(one))(*arrays), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@every
def test_many_tokens_of_small_weight_count(how):
    """A weight of 2^-16 would be a float16 of eight bits, and a tile's scale makes it smaller still."""
    layout, tokens, heads = Layout(64, 1, 64, 64), 128, 1
    keys = np.full((1, heads, tokens, 64), -16 * np.log(2) / 8)
    keys[:, :, 0] = 0.0
    keys, values = jnp.asarray(keys, jnp.float32), jnp.zeros((1, heads, tokens, 64)).at[:, :, 1:].set(1e-3)
    values = values.at[..., 0].add(1e-3)  # a scale of a thousandth, too
    arrays = encode(layout, keys, values)
    q = jnp.ones((1, 1, 64), finest(how))
    output, _ = group_int_decode_attention(
        q, *arrays, jnp.array([tokens], jnp.int32), layout=layout, scale=1 / 8, **how
    )
    few = 127 * 2.0**-16
    np.testing.assert_allclose(output[0, 0, 1:], 1e-3 * few / (1 + few), rtol=2e-2)


@every
def test_the_largest_keys_and_values_stay_finite(how):
    layout = Layout(64, 2, 64, 64)
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.choice([-6e4, 0.0, 6e4], (1, 1, 64, 64)), jnp.float32) for _ in range(2))
    arrays = encode(layout, keys, values)
    q = jnp.asarray(rng.normal(size=(1, 2, 64)), finest(how))
    lengths = jnp.array([64], jnp.int32)
    got = group_int_decode_attention(q, *arrays, lengths, layout=layout, scale=1e-6, **how)
    expected = oracle.group_int_decode_attention(q, *arrays, lengths, layout, 1e-6)
    assert_close(got, expected, (64,), 3e-3)


# -- the stored form

LAYOUTS = [
    Layout(128, 2, 64, 64),
    Layout(64, 1, 32, 32),
    Layout(128, 4, 64, 96),
    Layout(64, 2, 128, 64),
    Layout(128, 1, 32, 128),
    Layout(80, 2, 32, 32),
    Layout(64, 3, 64, 64),
    Layout(16, 3, 6, 6),
    Layout(64, 2, 32, 24),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_scales_and_zeros_lie_where_the_definition_says(layout):
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(1, 2, 2 * layout.token_group, layout.dim)).astype(np.float32) for _ in range(2))
    coded = encode(layout, jnp.asarray(keys), jnp.asarray(values))
    tokens = keys.shape[2]
    shapes = *layout.key_shapes(tokens), *layout.value_shapes(tokens)
    assert [x.shape[2:] for x in coded] == list(shapes)
    read = decode(layout, *coded)
    g, c, bits = layout.token_group, layout.channel_group, layout.bits
    for head in range(2):
        dense = oracle.group_int_dense(*(np.asarray(x)[0, head] for x in coded), layout)
        for got, want in zip(read, dense, strict=True):
            np.testing.assert_allclose(got[0, head], want, atol=1e-6)
        # Half a step from what was coded, and what 16 bits round off.
        of_groups = keys[0, head].reshape(-1, g, layout.dim)
        step = np.ptp(of_groups, axis=1, keepdims=True) / (2**bits - 1)
        assert (abs(dense[0].reshape(of_groups.shape) - of_groups) <= step / 2 + 4e-3).all()
        for i in range(0, layout.dim, c):
            part = values[0, head, :, i : i + c]
            step = np.ptp(part, axis=1, keepdims=True) / (2**bits - 1)
            assert (abs(dense[1][:, i : i + c] - part) <= step / 2 + 4e-3).all()


def test_groups_of_tokens_are_coded_alike_together_and_one_by_one():
    layout = Layout(64, 2, 64, 64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 192, 64)), jnp.bfloat16)
    parts = [encode(layout, *[x[:, :, i : i + 64]] * 2) for i in (0, 64, 128)]
    for whole, of_groups in zip(encode(layout, x, x), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(of_groups, axis=2))


def test_equal_elements_have_a_scale_of_0_and_are_read_back():
    scaling = group_int.fit(jnp.full((3, 4), 2.5), -1, 2)
    assert not scaling.scale.any() and (scaling.zero == 2.5).all()
    codes = group_int.quantise(jnp.full((3, 4), 2.5), scaling, 2)
    np.testing.assert_array_equal(group_int.dequantise(codes, scaling), jnp.full((3, 4), 2.5))


def test_arguments_that_do_not_belong_together_are_refused():
    arrays, options = cases.GroupInt(dim=64, lengths=(1, 2)).arguments()
    given = dict(zip(names, arrays, strict=True))
    refused = [
        ("q must be", {"q": given["q"][0]}),
        ("q must be", {"q": given["q"][..., :60]}),
        ("Hkv dividing 8", {"key_codes": given["key_codes"][:, [0, 1, 0]]}),
        ("no whole groups of 64", {"key_codes": given["key_codes"][:, :, :3]}),
        ("key_codes must be", {"key_codes": given["key_codes"][..., :5]}),
        ("key_scale_zero must be", {"key_scale_zero": given["key_scale_zero"][..., :5]}),
        ("value_codes must be", {"value_codes": given["value_codes"][:, :, :2]}),
        ("value_scale_zero must be", {"value_scale_zero": given["value_scale_zero"].astype(jnp.float32)}),
        ("value_codes must be", {"layout": Layout(64, 4, 64, 64), "key_codes": jnp.tile(given["key_codes"], 2)}),
        ("lengths must be", {"lengths": given["lengths"][:1]}),
        ("num_splits", {"num_splits": 0}),
    ]
    for message, changes in refused:
        with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check") as error:
            group_int_decode_attention(**(given | options | changes))
        if isinstance(error.value, ValueError):
            assert "\n" not in str(error.value)
