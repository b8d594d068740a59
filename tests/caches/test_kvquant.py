"""KVQuant: what codes and outliers read back as, the same bytes however they come, and what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from pallas_kernels import nuq
from tests import small
from tests.caches.harness import LAYER, chunk_at, decode_all, oracle, prefill, prefill_in_chunks, random_qkv, rotated
from tests.kernels import oracle as kernels
from vecinfer_jax.caches import KVQuant, allocated_bytes
from vecinfer_jax.caches.kvquant import outlier_reach, put_outliers, token_ranges
from vecinfer_jax.errors import InputError
from vecinfer_jax.evaluation.code_error import code_error

HEADS, DIM = LAYER.num_kv_heads, LAYER.head_dim
METHODS = [
    KVQuant(),
    KVQuant(bits=2, outliers=0.005, residual=5, sink=3),
    KVQuant(bits=4, outliers=0, sink=0),
    KVQuant(bits=3, capped=False, qnorm=True),
    KVQuant(bits=4, keys="per-token", rope="post", codebook="int"),
]
# All of them, the less usual ones only in the long run of the tests.
all_methods = pytest.mark.parametrize(
    "method",
    [METHODS[1], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS if method is not METHODS[1])],
    ids=lambda m: f"{m.bits}-{m.outliers}-{m.keys}-{m.capped}",
)


@functools.cache
def calibration_for(method, width=2.0, heads=HEADS, dim=DIM):
    """Ranges of `width` deviations of what `random_qkv` gives: the narrower, the more outliers."""
    rng = np.random.default_rng(1)
    arrays = {
        "key_scale": rng.uniform(0.9, 1.1, (heads, dim)).astype(np.float32) * np.float32(width),
        "key_zero": 0.1 * rng.normal(size=(heads, dim)).astype(np.float32),
        "reach": np.array([0.1, 0.1], np.float32),
    }
    for which in ("key", "value"):
        book = np.sort(rng.uniform(-1, 1, 2**method.bits)).astype(np.float32)
        arrays |= {f"{which}_codebook": book, f"{which}_entries": (1.1 * book + 0.01).astype(np.float32)}
    return arrays


def read_back(method, k, v):
    """What all keys and values [T, Hkv, D] of a sequence read back as, keys after RoPE, in float64, token by token."""
    calibration = calibration_for(method)
    wide = {name: np.asarray(array, np.float64) for name, array in calibration.items()}
    most = math.ceil(method.outliers / 2 * HEADS * DIM - 1e-9)
    slots = method.slots(DIM)

    def coded(which, x, scale, zero, outside, used):
        """One token [Hkv, D]; `used`: filled slots of each head's tile."""
        relative = (x - zero) / scale
        code = np.abs(relative[..., None] - wide[f"{which}_codebook"]).argmin(-1)
        out = wide[f"{which}_entries" if method.normed else f"{which}_codebook"][code] * scale + zero
        for head, channel in np.argwhere(np.abs(relative) > 1 if outside is None else outside):
            if not method.outliers or (method.capped and used[head] >= slots):
                continue
            used[head] += 1
            out[head, channel] += np.float16(x[head, channel] - out[head, channel])
        return out

    def token(which, x, reach, used):
        ordered = np.sort(x, axis=None)
        low, high = ordered[most], ordered[-1 - most]
        beyond = reach * (high - low)
        outside = (x > high + beyond) | (x < low - beyond) if most else np.zeros(x.shape, bool)
        top, bottom = x[~outside].max(), x[~outside].min()
        scale, zero = np.float16((top - bottom) / 2), np.float16((top + bottom) / 2)
        return coded(which, x, np.float64(scale), np.float64(zero), outside, used)

    keys, values = (np.asarray(x, np.float64) for x in (k, v))
    keys = rotated(keys) if method.rope == "post" else keys
    read_keys, read_values = keys.copy(), values.copy()
    for t in range(method.sink, len(keys)):
        if (t - method.sink) % 64 == 0:
            used = np.zeros((2, HEADS), int)
        if method.keys == "per-token":
            read_keys[t] = token("key", keys[t], wide["reach"][0], used[0])
        else:
            read_keys[t] = coded("key", keys[t], wide["key_scale"], wide["key_zero"], None, used[0])
        read_values[t] = token("value", values[t], wide["reach"][1], used[1])
    return (read_keys if method.rope == "post" else rotated(read_keys)), read_values


@all_methods
def test_scoring_decoding_and_ragged_chunks_read_what_the_definition_says(method):
    tokens = 80
    q, k, v = random_qkv(2, tokens)
    want = []
    for row in range(2):
        one = [np.asarray(x)[row] for x in (q, k, v)]
        keys, values = read_back(method, *one[1:])

        def coded(head, given, _, keys=keys, values=values):
            return keys[method.sink :, head], values[method.sink :, head]

        want.append(oracle(*one, coded, residual=method.residual, sink=method.sink))
    want = np.stack(want)
    empty = method.init(LAYER, 2, tokens, calibration_for(method))
    scored, _ = prefill(method, q, k, v, chunk_at([0, 0], [tokens] * 2, tokens, True, "coded"), empty)
    np.testing.assert_allclose(scored, want, atol=5e-5)
    decoded, _ = decode_all(method, empty, q, k, v, np.zeros(2, int), tokens)
    np.testing.assert_allclose(decoded, want, atol=5e-5)
    lengths = np.array([70, 13])
    chunked, cache = prefill_in_chunks(method, empty, q[:, :75], k[:, :75], v[:, :75], lengths, 25, "coded")
    rest, _ = decode_all(method, cache, q, k, v, lengths, 8)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(chunked[row, :n], want[row, :n], atol=5e-5)
        np.testing.assert_allclose(rest[row], want[row, n : n + 8], atol=5e-5)


@pytest.mark.parametrize(
    ("method", "width"),
    [(METHODS[0], 0.8), (METHODS[1], 2.0), pytest.param(METHODS[3], 2.0, marks=pytest.mark.slow)],
    ids=["lost", "window", "uncapped"],
)
def test_the_same_keys_and_values_give_the_same_bytes_in_bulk_in_chunks_and_one_by_one(method, width):
    tokens = 140
    _, k, v = random_qkv(2, tokens)
    empty = method.init(LAYER, 2, tokens, calibration_for(method, width))
    append = jax.jit(method._append_chunk)
    bulk = append(k, v, chunk_at([0, 0], [tokens] * 2, tokens, True), empty)
    chunked = empty
    for start in range(0, tokens, 35):
        piece = slice(start, start + 35)
        chunked = append(k[:, piece], v[:, piece], chunk_at([start] * 2, [35] * 2, 35, start == 0), chunked)
    step = jax.jit(lambda k, v, at, cache: method._append_token(k, v, at, LAYER, cache))
    stepped = empty
    for i in range(tokens):
        stepped = step(k[:, i], v[:, i], jnp.array([i, i]), stepped)
    assert (int(bulk.store.key_overflow.sum()) > 0) is method.capped
    jax.tree.map(np.testing.assert_array_equal, bulk, stepped)
    jax.tree.map(np.testing.assert_array_equal, bulk, chunked)


def test_rows_of_different_lengths_are_filled_each_by_itself():
    method, calibration, lengths = KVQuant(), calibration_for(KVQuant()), [100, 70]
    _, k, v = random_qkv(2, 100)
    append = jax.jit(method._append_chunk)
    both = append(k, v, chunk_at([0, 0], lengths, 100, True), method.init(LAYER, 2, 100, calibration)).store
    for row, n in enumerate(lengths):
        own = slice(row, row + 1)
        one = method.init(LAYER, 1, 100, calibration)
        alone = append(k[own, :n], v[own, :n], chunk_at([0], [n], n, True), one).store
        for name in ("key_codes", "value_codes"):
            np.testing.assert_array_equal(getattr(both, name)[row, :, : n - 1], getattr(alone, name)[0, :, : n - 1])
        np.testing.assert_array_equal(both.value_scale_zero[row, : n - 1], alone.value_scale_zero[0, : n - 1])
        for name in ("key_outliers", "value_outliers", "key_overflow", "value_overflow"):
            np.testing.assert_array_equal(getattr(both, name)[row], getattr(alone, name)[0])


def test_outliers_take_the_free_slots_in_order_and_the_rest_is_counted():
    rng = np.random.default_rng(0)
    difference = np.where(rng.random((2, 150, HEADS, DIM)) < 0.02, rng.normal(size=(2, 150, HEADS, DIM)), 0)
    difference[:, 70:75] = 1.0
    difference = jnp.asarray(difference, jnp.float16).at[1, 100:].set(0)
    slots = jnp.where(jnp.arange(150) < jnp.array([[150], [100]]), jnp.arange(150), -1)
    pool, lost = jax.jit(put_outliers)(jnp.zeros((2, HEADS, 3, 20), jnp.uint32), difference, slots)
    for row in range(2):
        missing = 0
        for head in range(HEADS):
            got = kernels.nuq_outliers(pool[row, head], DIM)
            for tile in range(3):
                part = np.asarray(difference)[row, tile * 64 : (tile + 1) * 64, head].astype(np.float64)
                at = np.argwhere(part != 0)
                missing += max(len(at) - 20, 0)
                want = np.zeros((64, DIM))
                for t, c in at[:20]:
                    want[t, c] = part[t, c]
                np.testing.assert_array_equal(got[tile * 64 : (tile + 1) * 64], want)
                words = np.asarray(pool)[row, head, tile]
                assert np.all(np.diff((words != 0).astype(int)) <= 0)  # filled from the first slot on
        assert int(lost[row].sum()) == missing > 0


@pytest.mark.parametrize(("share", "most"), [(0.001, 1), (0.01, 1), (0.04, 2), (0.05, 2)])
def test_a_calibrated_reach_gives_the_share_of_outliers_that_is_asked_for(share, most):
    x = jnp.asarray(np.random.default_rng(0).standard_t(4, (4000, 64)), jnp.float32)
    reach = outlier_reach(x, most, share)
    _, outside = token_ranges(x, most, reach)
    assert float(jnp.mean(outside)) == pytest.approx(min(share, 2 * most / 64), rel=0.03)


def test_a_tokens_range_is_that_of_what_is_no_outlier():
    x = jnp.array([[0.0, 1.0, 2.0, 100.0, -1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    scale_zero, outside = token_ranges(x, 1, 1.0)
    np.testing.assert_array_equal(scale_zero, [[1.5, 0.5], [0, 1]])
    assert outside.tolist() == [[False, False, False, True, False, False], [False] * 6]


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("method", [*(KVQuant(bits=b) for b in (2, 3, 4)), KVQuant(outliers=0.001), METHODS[4]])
def test_true_bits_are_the_bytes_of_the_codes(method, head_dim):
    rope = dataclasses.replace(LAYER.rope, head_dim=head_dim)
    layer = dataclasses.replace(LAYER, head_dim=head_dim, rope=rope)
    calibration = {name: jnp.asarray(x) for name, x in calibration_for(method, dim=head_dim).items()}
    shapes = jax.eval_shape(lambda: method.init(layer, 3, method.residual + method.sink + 960, calibration))
    elements = 3 * 2 * layer.num_kv_heads * head_dim * 960
    assert allocated_bytes(shapes)["codes"] * 8 == pytest.approx(elements * method.bits_per_element(layer))


@all_methods
def test_constant_and_huge_keys_and_values_stay_finite(method):
    _, k, v = random_qkv(1, 24)
    empty = method.init_store(LAYER, 1, 24, calibration_for(method))

    @jax.jit
    def coded(k, v):
        store = method.append(empty, k, v, jnp.arange(24)[None], LAYER)
        return method.read(store, jnp.int32(0), 24, LAYER)

    for value in (0.0, -3.5, 7e4, 3e38):
        given = jnp.full_like(v, value).at[:, 3].set(-value)
        keys, values = coded(jnp.full_like(k, value), given)
        assert np.all(np.isfinite(keys)) and np.all(np.isfinite(values))
        if abs(value) < 100:
            np.testing.assert_allclose(values, given.swapaxes(1, 2), atol=0.02)


def test_an_outlier_is_read_back_as_it_was_and_costs_the_others_nothing():
    method = KVQuant(bits=4)
    _, k, v = random_qkv(1, 24)
    empty = method.init_store(LAYER, 1, 24, calibration_for(method, 6.0))

    @jax.jit
    def read(k, v):
        store = method.append(empty, k, v, jnp.arange(24)[None], LAYER)
        return method.read(store, jnp.int32(0), 24, LAYER)

    plain, far = read(k, v), read(k.at[0, 5, 1].mul(50), v.at[0, 7, 0, 3].set(300))
    wanted = k.at[0, 5, 1].mul(50)[0, 5, 1]
    np.testing.assert_allclose(far[0][0, 1, 5], wanted, atol=1.0 + 0.002 * float(jnp.abs(wanted).max()))
    np.testing.assert_allclose(far[1][0, 0, 7, 3], 300, atol=0.2)
    keys, values = (np.asarray(a - b).copy() for a, b in zip(plain, far, strict=True))
    keys[0, 1, 5] = 0
    assert not keys.any()
    values[0, :, 7] = 0
    assert not values.any()


@pytest.mark.slow
def test_rows_of_a_batch_give_the_tokens_that_they_give_alone():
    method = KVQuant(bits=2, residual=8, sink=2, fisher=False)
    lm, prompts = small.model(), small.prompts([90, 11])
    calibration = small.calibration_of(method)
    out = vj.generate(lm, prompts, method=method, calibration=calibration, max_new_tokens=10)
    alone = vj.generate(lm, prompts[1:], method=method, calibration=calibration, max_new_tokens=10)
    assert [len(tokens) for tokens in out.tokens] == [10, 10]
    assert out.tokens[1] == alone.tokens[0]


@pytest.mark.slow
def test_it_is_evaluated():
    method = KVQuant(bits=2, residual=8, sink=2, fisher=False)
    lm, calibration = small.model(), small.calibration_of(method)
    text = "".join(small.texts())
    result = vj.evaluate.perplexity(lm, method, calibration, text, length=60, windows=1, progress=False)
    assert 0 < result.kl < 1 and result.bits_per_element == method.bits_per_element(LAYER)


@pytest.mark.slow
def test_errors_fall_with_bits_and_outliers_and_what_is_lost_is_counted():
    lm = small.model()
    windows = np.asarray(small.prompts([80, 80]))
    found = {}
    for bits, outliers in ((2, 0), (4, 0), (4, 0.05)):
        method = KVQuant(bits=bits, outliers=outliers, fisher=False)
        found[bits, outliers] = code_error(lm, method, small.calibration_of(method), windows, progress=False)
    errors = [(result.key_error, result.value_error) for result in found.values()]
    assert errors[0] > errors[1] > errors[2] and errors[0][1] > errors[1][1] > errors[2][1]
    assert found[4, 0].outliers == found[4, 0].outliers_lost == 0
    kept, lost = found[4, 0.05].outliers, found[4, 0.05].outliers_lost
    assert 0.02 < (kept + lost) / (2 * 3 * 2 * 79 * HEADS * DIM) < 0.1 and lost < kept


def test_settings_that_do_not_change_the_calibration_share_it():
    assert KVQuant(residual=128, qnorm=True, capped=False).calibration_key() == KVQuant().calibration_key()
    assert KVQuant(sink=2).calibration_key() != KVQuant().calibration_key()
    assert KVQuant(codebook="int").needs_gradients is KVQuant(fisher=False).needs_gradients is False


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KVQuant(bits=5), "2, 3, 4"),
        (lambda: KVQuant(outliers=0.2), "outliers=0.2"),
        (lambda: KVQuant(outliers=-0.1), "outliers"),
        (lambda: KVQuant(keys="per-head"), "per-channel, per-token"),
        (lambda: KVQuant(rope="none"), "pre, post"),
        (lambda: KVQuant(codebook="float"), "nuq, int"),
        (lambda: KVQuant(qnorm=2), "qnorm"),
        (lambda: KVQuant(fisher=1), "fisher"),
        (lambda: KVQuant(residual=-1), "residual"),
        (lambda: KVQuant(implementation="cuda"), "implementation"),
        (lambda: KVQuant().validate(dataclasses.replace(LAYER, head_dim=20)), "multiple of 8"),
        (lambda: KVQuant().init(LAYER, 1, 8), "needs a calibration"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(make, said):
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_cache_holds_whole_tiles():
    method = KVQuant(residual=3, sink=1)
    store = method.init(LAYER, 1, 100, calibration_for(method)).store
    assert store.key_codes.shape[2] == store.value_scale_zero.shape[1] == 2 * nuq.TILE
    assert store.key_outliers.shape == (1, HEADS, 2, method.slots(DIM))
