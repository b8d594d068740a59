"""What is fetched from the host, chosen and attended to equals float64 arithmetic over the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import ExactTokens, attend_rows, channel_lse, dispatch, fetch_channels, select_tokens, split_k
from pallas_kernels.host_tier import triton
from tests.kernels import oracle

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
ON_HOST = pytest.mark.parametrize("place", [jax.memory.Space.Host, jax.memory.Space.Device], ids=["host", "device"])
# head dimension, query heads a KV head, dtype, tokens that count in each row, tokens held, tokens chosen, exact tokens
CASES = [
    (16, 3, "float32", (0, 1, 40), 40, 7, (3, 2)),
    (64, 1, "float32", (5, 64), 64, 64, ()),
    (32, 4, "bfloat16", (33, 90), 90, 16, (4,)),
]
ON_DEVICE = [
    *CASES,
    (128, 4, "bfloat16", (0, 1, 127, 4096), 4096, 128, (8, 120)),
    (128, 4, "bfloat16", (131072,), 131072, 896, (64, 128)),
]


def arrays(case, seed=0):
    """Everything that a step has: q, keys, values, count, exact tokens."""
    dim, group, dtype, counts, size, _, windows = case
    rng = np.random.default_rng(seed)

    def make(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    batch = len(counts)
    exact = [
        ExactTokens(make(batch, 2, w, dim), make(batch, 2, w, dim), jnp.asarray(rng.random((batch, w)) < 0.7))
        for w in windows
    ]
    keys, values = make(batch, 2, size, dim), make(batch, 2, size, dim)
    return make(batch, 2 * group, dim), keys, values, jnp.asarray(counts, jnp.int32), exact


def placed(x, place):
    return jax.jit(lambda x: jax.device_put(x, place))(x)


def distinct(rng, batch, high, count):
    return jnp.asarray(np.stack([[rng.permutation(high)[:count] for _ in range(2)] for _ in range(batch)]), jnp.int32)


def check_fetch(case, place, **how):
    _, keys, _, _, _ = arrays(case)
    by_channel = np.swapaxes(np.asarray(keys), 2, 3)
    channels = distinct(np.random.default_rng(1), len(keys), by_channel.shape[2], 5)
    fetched = jax.jit(lambda x, c: fetch_channels(x, c, **how))(placed(by_channel, place), channels)
    assert fetched.sharding.memory_kind == "device"
    np.testing.assert_array_equal(fetched, np.take_along_axis(by_channel, np.asarray(channels)[..., None], 2))


def check_selection(case, by_each=False, **how):
    dim, group, _, counts, size, tokens, _ = case
    q, keys, _, count, _ = arrays(case)
    channels = distinct(np.random.default_rng(1), len(counts), keys.shape[-1], 5)
    fetched = np.take_along_axis(np.swapaxes(np.asarray(keys), 2, 3), np.asarray(channels)[..., None], 2)
    asked, weighed = (q, jnp.asarray(fetched), channels, count), {}
    if by_each:
        weighed = {"scale": dim**-0.5, "lse": channel_lse(*asked, scale=dim**-0.5, **how)}
    rows = np.asarray(select_tokens(*asked, tokens=tokens, **weighed, **how))
    assert rows.shape == (len(counts), 2, min(tokens, size))
    for b, n in enumerate(counts):
        for h in range(2):
            heads = slice(h * group, (h + 1) * group)
            of_heads = oracle.float64(q[b, heads])[:, np.asarray(channels[b, h])] @ oracle.float64(fetched[b, h])[:, :n]
            scores = of_heads.mean(0)
            if by_each:
                of_heads = of_heads * dim**-0.5
                lse = np.log(np.exp(of_heads).sum(1)) if n else np.full(group, np.float32(split_k.EMPTY))
                np.testing.assert_allclose(weighed["lse"][b, heads], lse, rtol=2e-6, atol=2e-6)
                scores = np.log(np.exp(of_heads - lse[:, None]).sum(0))
            chosen = rows[b, h][rows[b, h] >= 0]
            assert len(chosen) == len(set(chosen.tolist())) == min(tokens, n)
            assert (chosen < n).all() and (rows[b, h] >= -1).all()
            left = np.setdiff1d(np.arange(n), chosen)
            if len(left) and len(chosen):  # rounding may swap near ties
                assert scores[chosen].min() >= scores[left].max() - 1e-5 * abs(scores).max()


def check_attention(case, place, **how):
    dim, group, dtype, counts, size, tokens, _ = case
    q, keys, values, count, exact = arrays(case)
    rng = np.random.default_rng(2)
    rows = distinct(rng, len(counts), size, min(tokens, size))
    # Somewhere between the others, nothing is to be read.
    rows = jnp.where((jnp.arange(rows.shape[-1]) % 5 == 3) | (rows >= count[:, None, None]), -1, rows)
    run = jax.jit(lambda q, k, v, rows, exact: attend_rows(q, k, v, rows, exact, scale=dim**-0.5, **how))
    output, lse = run(q, placed(keys, place), placed(values, place), rows, exact)
    assert output.dtype == lse.dtype == jnp.float32
    bound = 1e-5 if dtype == "float32" else 2.0**-7
    for b in range(len(counts)):
        for h in range(2 * group):
            kv = h // group
            read = np.asarray(rows[b, kv])
            read = read[read >= 0]
            parts = [(keys[b, kv][read], values[b, kv][read])]
            parts += [(e.keys[b, kv][e.valid[b]], e.values[b, kv][e.valid[b]]) for e in exact]
            k, v = (np.concatenate([oracle.float64(part[i]) for part in parts]) for i in range(2))
            if not len(k):
                assert not output[b, h].any() and lse[b, h] == jnp.float32(split_k.EMPTY)
                continue
            scores = k @ oracle.float64(q[b, h]) * dim**-0.5
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(output[b, h], weights @ v / weights.sum(), atol=bound * abs(v).max())
            np.testing.assert_allclose(lse[b, h], scores.max() + np.log(weights.sum()), rtol=2e-5, atol=2e-5)


@ON_HOST
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_named_channels_come_to_the_device_as_they_are(case, place):
    check_fetch(case, place)


@pytest.mark.parametrize("by_each", [False, True], ids=["by-the-mean", "by-each-head"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_best_tokens_of_each_head_are_chosen(case, by_each):
    check_selection(case, by_each)


@ON_HOST
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_output_is_the_softmax_over_the_chosen_and_the_exact_tokens(case, place):
    check_attention(case, place)


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str)
def test_the_kernels_do_the_same_in_interpret_mode(case):
    check_fetch(case, jax.memory.Space.Device, interpret=True)
    check_selection(case, interpret=True)
    check_selection(case, by_each=True, interpret=True)
    check_attention(case, jax.memory.Space.Device, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_DEVICE, ids=str)
@pytest.mark.parametrize("name", sorted({*dispatch.TABLE["attend_rows"], *dispatch.TABLE["select_tokens"]}))
def test_all_three_do_the_same_on_a_device(case, name):
    for operation, check in (("fetch_channels", check_fetch), ("attend_rows", check_attention)):
        if name in dispatch.TABLE[operation]:
            check(case, jax.memory.Space.Host, implementation=name)
    if name in dispatch.TABLE["select_tokens"]:
        check_selection(case, implementation=name)
        check_selection(case, by_each=True, implementation=name)


def test_tiles_of_tokens_that_do_not_count_change_nothing():
    case = (16, 3, "float32", (0, 1100, 2100), 2100, 9, ())  # a program takes 1,024
    check_selection(case, by_each=True, interpret=True)


def test_no_token_counts_without_a_score():
    q, channels, count = jnp.ones((1, 2, 8)), jnp.array([[[0, 5]]], jnp.int32), jnp.array([12], jnp.int32)
    keys = jnp.ones((1, 1, 2, 12)).at[0, 0, 1, 3:10].set(jnp.nan)
    for fetched, want in ((keys, 2 + np.log(5)), (jnp.full_like(keys, jnp.nan), split_k.EMPTY)):
        for how in ({"implementation": "xla"}, {"implementation": "triton", "interpret": True}):
            np.testing.assert_allclose(channel_lse(q, fetched, channels, count, scale=1.0, **how), want, rtol=1e-6)


def test_bytes_are_fetched_as_numbers_are():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 2, 8, 30)), jnp.uint8)
    channels = jnp.asarray([[[7, 0], [3, 3]]], jnp.int32)
    fetched = jax.jit(fetch_channels)(placed(codes, jax.memory.Space.Host), channels)
    np.testing.assert_array_equal(fetched[0], [codes[0, 0, (7, 0), :], codes[0, 1, (3, 3), :]])


def test_tokens_without_a_score_are_not_chosen():
    keys = jnp.ones((1, 1, 2, 12)).at[0, 0, 1, 3:10].set(jnp.nan)
    rows = select_tokens(
        jnp.ones((1, 2, 8)), keys, jnp.array([[[0, 5]]], jnp.int32), jnp.array([12], jnp.int32), tokens=7,
        implementation="triton", interpret=True,
    )  # fmt: skip
    assert sorted(rows[0, 0].tolist()) == [-1, -1, 0, 1, 2, 10, 11]


def test_equal_scores_leave_every_place_filled():
    rows = select_tokens(
        jnp.ones((1, 2, 8)), jnp.ones((1, 1, 2, 9)), jnp.array([[[0, 5]]], jnp.int32), jnp.array([9], jnp.int32),
        tokens=4,
    )  # fmt: skip
    assert len(set(rows[0, 0].tolist())) == 4 and rows.min() >= 0


def test_arguments_that_do_not_belong_together_are_refused():
    q, keys = jnp.zeros((1, 4, 8)), jnp.zeros((1, 2, 30, 8))
    rows, count = jnp.zeros((1, 2, 3), jnp.int32), jnp.zeros(1, jnp.int32)
    fetched = jnp.zeros((1, 2, 3, 30))
    window = [ExactTokens(keys, keys, jnp.ones((1, 2), bool))]
    refused = [
        ("channels must be int32", lambda: fetch_channels(fetched, rows[:, :1])),
        ("channels must be int32", lambda: fetch_channels(fetched, rows.astype(jnp.int8))),
        ("q must be", lambda: select_tokens(q[:, :3], fetched, rows, count, tokens=1)),
        ("channels must be", lambda: select_tokens(q, fetched, rows[..., :2], count, tokens=1)),
        ("count must be", lambda: select_tokens(q, fetched, rows, jnp.zeros(2, jnp.int32), tokens=1)),
        ("lse must be", lambda: select_tokens(q, fetched, rows, count, tokens=1, scale=1, lse=jnp.zeros((1, 2)))),
        ("scale and lse together", lambda: select_tokens(q, fetched, rows, count, tokens=1, lse=jnp.zeros((1, 4)))),
        ("channel_lse: q must be", lambda: channel_lse(q[:, :3], fetched, rows, count, scale=1)),
        ("tokens=0", lambda: select_tokens(q, fetched, rows, count, tokens=0)),
        ("q .* and keys", lambda: attend_rows(q[:, :3], keys, keys, rows, scale=1)),
        ("values must be", lambda: attend_rows(q, keys, keys[:, :, :4], rows, scale=1)),
        ("rows must be", lambda: attend_rows(q, keys, keys, rows[:, :1], scale=1)),
        ("exact keys", lambda: attend_rows(q, keys, keys, rows, window, scale=1)),
        ("no implementation 'magic'", lambda: fetch_channels(fetched, rows, implementation="magic")),
    ]
    for message, call in refused:
        with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check") as error:
            call()
        assert not isinstance(error.value, ValueError) or "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", [1, 128, 896, 5000])
def test_programs_that_choose_have_as_many_warps_as_triton_takes(tokens):
    run, runs = triton._runs(131072, tokens)
    for considered in (runs, min(tokens, runs) * run):
        assert triton._warps(considered) in (4, 8, 16)


@pytest.mark.parametrize("by_each", [False, True], ids=["by-the-mean", "by-each-head"])
@pytest.mark.parametrize("name", dispatch.TABLE["attend_rows"])
def test_a_step_lowers_for_cuda_without_a_copy_of_the_tier(name, by_each):
    """The tier stays annotated as the host's, and nothing of its size is made on the device."""
    case = (128, 4, "bfloat16", (4096,), 4096, 128, (8,))
    q, keys, values, count, exact = arrays(case)

    def step(q, keys, values, count):
        keys, values, by_channel = (
            jax.device_put(x, jax.memory.Space.Host) for x in (keys, values, keys.swapaxes(2, 3))
        )
        channels = jax.lax.top_k(jnp.abs(q.reshape(1, 2, 4, 128).mean(2)), 8)[1].astype(jnp.int32)
        fetched = fetch_channels(by_channel, channels, implementation=name)
        asked, weighed = (q, fetched, channels, count), {}
        if by_each:
            weighed = {"scale": 0.1, "lse": channel_lse(*asked, scale=0.1, implementation=name)}
        rows = select_tokens(*asked, tokens=128, **weighed, implementation=name)
        return attend_rows(q, keys, values, rows, exact, scale=1.0, implementation=name)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = jax.jit(step).trace(q, keys, values, count).lower(lowering_platforms=("cuda",)).as_text()
    to_device = [line for line in text.splitlines() if 'placement = "device"' in line]
    assert text.count('placement = "pinned_host"') >= 3
    assert bool(to_device) == (name == "xla") and text.count("__gpu$xla.gpu.triton") == (
        0 if name == "xla" else 5 + by_each
    )
    assert not any("4096x128" in line or "128x4096" in line for line in to_device)
