"""Transforms that take the keys' mean off: nothing that is exact changes, codes are read where they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.caches.harness import LAYER, chunk_at, decode_all, oracle, prefill, random_qkv
from vecinfer_jax import specs
from vecinfer_jax.caches import METHODS, FullPrecision, VecInfer
from vecinfer_jax.calibration.metric import metric_map
from vecinfer_jax.errors import CalibrationError, InputError
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.folding import fold_values

PAPER = {"transform": "smooth-hadamard"}
HEADS, DIM = LAYER.num_kv_heads, LAYER.head_dim


def calibration_for(method, seed=1):
    rng = np.random.default_rng(seed)
    key, value = method.key_format, method.value_format
    arrays = {
        "smooth": rng.uniform(0.5, 2.0, (HEADS, DIM)).astype(np.float32),
        "mean": 2 * rng.normal(size=(HEADS, DIM)).astype(np.float32),
        "key_codebook": rng.normal(size=(HEADS, key.entries, key.length)).astype(np.float32),
        "value_codebook": rng.normal(size=(HEADS, value.entries, value.length)).astype(np.float32),
    }
    if method.maps:
        moment = np.stack([np.cov(rng.normal(size=(DIM, 40))) for _ in range(HEADS)])
        arrays["key_map"], arrays["query_map"] = metric_map(moment, rng.normal(size=(200, HEADS, DIM)), key.length)
        arrays["smooth"] = np.ones((HEADS, DIM), np.float32)
    return arrays


def nearest(vectors, codebook):
    """What codes of [N, D] read back as."""
    parts = vectors.reshape(len(vectors), -1, codebook.shape[1])
    distance = ((parts[:, :, None] - codebook[None, None]) ** 2).sum(-1)
    return codebook[distance.argmin(-1)].reshape(vectors.shape)


@pytest.mark.parametrize(
    ("transform", "residual", "sink"),
    [("metric", 0, 1), ("metric", 5, 2), ("rotation", 0, 0), ("mean-smooth-hadamard", 5, 2)],
)
def test_a_query_reads_what_the_definition_says(transform, residual, sink):
    """Coded keys are (k - mean) mapped, coded, mapped back; the mean, off every key, is the softmax's to ignore."""
    method = VecInfer(bits=4, transform=transform, residual=residual, sink=sink)
    arrays = calibration_for(method)
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    hadamard = np.asarray(hadamard_matrix(DIM))

    def coded(head, keys, values):
        centred = keys - wide["mean"][head]
        if method.maps:
            there, back = wide["key_map"][head], wide["query_map"][head].T
        else:
            there = hadamard / wide["smooth"][head][:, None]
            back = hadamard * wide["smooth"][head]
        keys = nearest(centred @ there, wide["key_codebook"][head]) @ back + wide["mean"][head]
        return keys, nearest(values, wide["value_codebook"][head])

    q, k, v = random_qkv(1, 24)
    out, _ = decode_all(method, method.init(LAYER, 1, 32, arrays), q, k, v, np.zeros(1, int), 24)
    expected = oracle(q[0], k[0], v[0], coded, residual=residual, sink=sink)
    np.testing.assert_allclose(out[0], expected, atol=2e-4)
    scored, _ = prefill(method, q, k, v, chunk_at([0], [24], 24, True, "coded"), method.init(LAYER, 1, 32, arrays))
    np.testing.assert_allclose(scored[0], expected, atol=2e-4)


def hadamard_matrix(dim):
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(dim)


@pytest.mark.parametrize("transform", ["metric", "mean-smooth-hadamard"])
def test_the_mean_is_invisible_where_everything_is_exact(transform):
    coded, full = VecInfer(bits=2, transform=transform, residual=64), FullPrecision()
    q, k, v = random_qkv(2, 24)
    outs = []
    for method in (coded, full):
        cache = method.init(LAYER, 2, 32, calibration_for(coded))
        _, cache = prefill(method, q[:, :8], k[:, :8], v[:, :8], chunk_at([0, 0], [8, 8], 8, True), cache)
        outs.append(decode_all(method, cache, q, k, v, np.array([8, 8]), 16)[0])
    np.testing.assert_allclose(*outs, atol=2e-5)


@pytest.mark.parametrize(
    "settings", [{"rotate_values": True}, {"fp8_values": True}, {"rotate_values": True, "fp8_values": True}], ids=str
)
def test_folded_values_change_nothing_where_everything_is_exact(settings):
    lm, method = small.model(), VecInfer(bits=2, residual=64, transform="smooth-hadamard", **settings)
    calibration = small.calibration_of(method)
    folded = fold_values(lm, method, calibration)
    kernels = [p["layers_1"]["attention"]["v_proj"]["kernel"] for p in (lm.params, folded)]
    assert not np.allclose(*kernels)
    tokens = jnp.asarray(small.prompts([20]))

    def logits(method, params):
        decoder = Decoder(lm.config, method, lm.dtype)
        caches = tuple(method.init(decoder.layer_shape(i), 1, 32, calibration.layers[i]) for i in range(3))
        return decoder.apply({"params": params}, tokens, jnp.arange(20)[None], caches)[0]

    np.testing.assert_allclose(logits(method, folded), logits(FullPrecision(), lm.params), atol=2e-4)


def test_values_that_are_not_rotated_take_no_copies_of_weights():
    lm, method = small.model(), VecInfer(bits=2, transform="smooth-hadamard")
    folded = fold_values(lm, method, small.calibration_of(method))
    assert all(a is b for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(lm.params), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"transform": "metric", "rotate_values": True},
        pytest.param({"transform": "metric", "fp8_values": True}, marks=pytest.mark.slow),
        pytest.param({"transform": "mean-smooth-hadamard"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_they_calibrate_generate_and_are_evaluated(settings):
    lm, method = small.model(), VecInfer(bits=2, residual=4, sink=1, **settings)
    calibration = small.calibration_of(method)
    out = vj.generate(lm, ["some text here", "more"], method=method, calibration=calibration, max_new_tokens=6)
    assert all(len(tokens) == 6 for tokens in out.tokens)
    result = vj.evaluate.perplexity(lm, method, calibration, small.texts()[0], length=32, windows=2, progress=False)
    assert np.isfinite(result.perplexity) and result.bits_per_element == 2


@pytest.mark.parametrize("settings", [{"transform": "metric"}, {"transform": "mean-smooth-hadamard"}], ids=str)
def test_passages_shorter_than_the_sinks_are_refused(settings):
    method = VecInfer(bits=1, sink=64, **settings)
    with pytest.raises(CalibrationError, match="after its first 64: give longer ones or fewer sinks"):
        small.calibration_of(method)


@pytest.mark.parametrize("name", ["rotate_values", "fp8_values"])
def test_whether_values_are_rotated_or_in_fp8_is_a_truth(name):
    with pytest.raises(InputError, match=f"{name}=2 must be true or false"):
        VecInfer(**{name: 2})


def test_values_in_fp8_are_scaled_to_its_range_and_read_as_they_are_rounded():
    """A head's values may be of any size; what is encoded, evaluated and decoded are the same rounded centroids."""
    plain, fp8 = (VecInfer(bits=2, residual=0, fp8_values=on, transform="smooth-hadamard") for on in (False, True))
    rng = np.random.default_rng(0)
    sizes = np.array([1e-4, 300.0] * HEADS)[:HEADS]
    values = rng.normal(size=(3000, HEADS, DIM)) * sizes[:, None]
    statistics = dataclasses.replace(statistics_of(rng.normal(size=values.shape), rng), values=values)
    errors = {}
    for method in (plain, fp8):
        arrays = method.calibrate_layer(LAYER, statistics, 0)
        store = method.init(LAYER, 1, 8, arrays).store
        scale = arrays.get("value_scale", np.ones(HEADS))
        held = np.asarray(store.value_codebook)
        for head in range(HEADS):
            given = values[:200, head] * scale[head]
            errors[method.fp8_values, head] = np.linalg.norm(nearest(given, held[head]) - given) / np.linalg.norm(given)
        if not method.fp8_values:
            assert store.value_table is None and "value_scale" not in arrays
            continue
        assert store.value_table.dtype == jnp.float8_e4m3fn
        np.testing.assert_array_equal(held, np.asarray(store.value_table, np.float32))
        assert (np.log2(scale) == np.round(np.log2(scale))).all()
        peak = np.abs(values).max(axis=(0, 2)) * scale
        assert (peak > 128).all() and (peak <= 256).all()
        q = jnp.asarray(rng.normal(size=(1, LAYER.num_query_heads, DIM)), jnp.float32)
        codes = rng.integers(0, 256, (2, 1, HEADS, 8, DIM // 4)).astype(np.uint8)
        store = dataclasses.replace(store, key_codes=jnp.asarray(codes[0]), value_codes=jnp.asarray(codes[1]))
        count = jnp.asarray([8], jnp.int32)
        outs = [
            method.attend_codes(q, each, count, (), LAYER, jnp.float32)[0]
            for each in (store, dataclasses.replace(store, value_table=None))
        ]
        np.testing.assert_allclose(*outs, rtol=1e-6)
        empty = dataclasses.replace(store, value_table=jnp.zeros_like(store.value_table))
        assert not method.attend_codes(q, empty, count, (), LAYER, jnp.float32)[0].any()  # decoding reads the table
    for head in range(HEADS):  # of 8% of the squared error at 2 bits, rounding adds a hundredth
        assert errors[False, head] < errors[True, head] * 1.001 and errors[True, head] < 1.02 * errors[False, head]


def test_values_in_fp8_need_sub_vectors_of_four():
    with pytest.raises(InputError, match=r"fp8_values=true needs values of sub-vectors of 4 or more.* not d2b8"):
        VecInfer(fp8_values=True, bits=4)


def test_sub_vectors_of_two_are_mixed():
    """By default where they are turned; others where it is said so."""
    assert VecInfer(bits=4).mixes == "keys" and VecInfer(bits=4, rotate_values=True).mixes == "both"
    assert VecInfer(bits=2, rotate_values=True).mixes == VecInfer(bits=4, **PAPER).mixes == "none"
    assert VecInfer(key="d4b8", value="d2b8", rotate_values=True).mixes == "values"
    assert dataclasses.replace(VecInfer(bits=4), bits=2).mixes == "none"
    assert specs.parse("vecinfer:bits=4,mixed=none", METHODS, "method").mixes == "none"
    assert VecInfer(bits=4, mixed="keys").calibration_key() == VecInfer(bits=4).calibration_key()
    assert VecInfer(bits=2, mixed="none").calibration_key() == VecInfer(bits=2).calibration_key()
    kinds = ["none", "keys", "values", "both"]
    methods = [VecInfer(bits=4, rotate_values=True, mixed=mixed) for mixed in kinds]
    assert len({str(method.calibration_key()) for method in methods}) == 4
    statistics = statistics_of(
        np.random.default_rng(0).normal(size=(800, HEADS, DIM)) * np.geomspace(4, 0.2, DIM), np.random.default_rng(1)
    )
    arrays = [method.calibrate_layer(LAYER, statistics, 0) for method in methods]
    for name, which in (("key_map", "keys"), ("value_map", "values")):
        same = [np.allclose(each[name], arrays[0][name]) for each in arrays]
        assert same == [mixed not in (which, "both") for mixed in kinds]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed": "all"}, "mixed='all' is unknown; choose from none, keys, values, both"),
        ({"mixed": "values"}, "mixed='values' needs rotate_values=true"),
        ({"mixed": "both", "rotate_values": True, **PAPER}, "mixed='both' needs transform=metric or rotation"),
    ],
    ids=str,
)
def test_only_what_is_turned_can_be_mixed(settings, message):
    with pytest.raises(InputError, match=message):
        VecInfer(**settings)


def test_a_calibration_is_for_its_transform_and_sinks():
    keys = [
        VecInfer(bits=2, **settings).calibration_key()
        for settings in (PAPER, {"transform": "metric"}, {"sink": 0}, PAPER | {"rotate_values": True})
    ]
    assert len({str(sorted(key.items())) for key in keys}) == 4
    assert VecInfer(bits=2, sink=1, **PAPER).calibration_key() == keys[0]  # the paper's does not depend on sinks


def test_codes_fit_better_than_the_papers_where_keys_have_a_mean():
    """The error of codes of keys with a large constant part, in the mean over queries."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(4000, HEADS, DIM)) + 8 * rng.normal(size=(HEADS, DIM))
    errors = {}
    for transform in ("smooth-hadamard", "metric"):
        method = VecInfer(bits=2, transform=transform, sink=1, residual=0)
        statistics = statistics_of(keys, rng)
        arrays = method.calibrate_layer(LAYER, statistics, 0)
        store = method.init(LAYER, 1, 65, arrays).store
        some = method.centred(jnp.asarray(keys[None, :64], jnp.float32), store)
        store = method.append(store, some, some, jnp.arange(64)[None], LAYER)
        read = method.read(store, jnp.int32(0), 64, LAYER)[0]
        errors[transform] = float(jnp.mean((read[0] - some[0].swapaxes(0, 1)) ** 2))
    assert errors["metric"] < 0.5 * errors["smooth-hadamard"]


def statistics_of(keys, rng):
    from vecinfer_jax.calibration.statistics import LayerStatistics

    count, heads, dim = keys.shape
    peak = np.abs(keys).max(axis=0).astype(np.float32)
    return LayerStatistics(
        count=np.int32(count),
        key_abs_max=peak,
        rotated_key_abs_max=peak,
        key_sum=keys.sum(axis=0),
        query_moment=np.tile(np.eye(dim), (heads, 1, 1)) * count,
        keys=keys,
        values=rng.normal(size=keys.shape),
        positions=np.arange(count),
        priority=np.zeros(count),
        draws=np.int32(0),
    )
