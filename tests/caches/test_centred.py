"""Transforms that take the keys' mean off: nothing that is exact changes, codes are read where they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.caches.harness import LAYER, chunk_at, decode_all, oracle, prefill, random_qkv
from vecinfer_jax.caches import FullPrecision, VecInfer
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


def test_rotated_values_change_nothing_where_everything_is_exact():
    lm, method = small.model(), VecInfer(bits=2, rotate_values=True, residual=64, transform="smooth-hadamard")
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


def test_whether_values_are_rotated_is_a_truth():
    with pytest.raises(InputError, match="rotate_values=2 must be true or false"):
        VecInfer(rotate_values=2)


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
