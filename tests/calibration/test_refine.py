"""What calibration does beyond k-means: attention's weights, restarts, gradient descent. Each against brute force."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.caches import PerLayer, VecInfer
from vecinfer_jax.calibration import distil, refine
from vecinfer_jax.calibration.codebooks import codebook_of, subvectors
from vecinfer_jax.calibration.collect import collect, fit
from vecinfer_jax.calibration.distil import refine_model
from vecinfer_jax.calibration.refine import coded_attention, output_error, read_back
from vecinfer_jax.calibration.statistics import attention_received
from vecinfer_jax.errors import InputError
from vecinfer_jax.models.layerwise import Layerwise

METRIC = VecInfer(key="d4b4", value="d4b4", transform="metric", sink=1, residual=0)
ALL = frozenset({"weights", "windows"})


@functools.cache
def activations(wanted=ALL):
    return collect(small.model(), small.texts(), passages=6, passage_length=64, batch=2, wanted=wanted, progress=False)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(refine, "STEPS", 48)
    monkeypatch.setattr(refine, "RATES", dict.fromkeys(refine.RATES, 2e-2))


def random_attention(tokens=20, heads=2, group=3, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (heads * group, heads, heads)
    return [jnp.asarray(rng.normal(size=(2, tokens, n, dim)), jnp.float32) for n in shapes]


def test_weights_are_those_of_the_definition():
    q, k, v = random_attention()
    lengths = np.array([20, 13])
    keys, values = attention_received(q, k, v, jnp.asarray(lengths), 8**-0.5)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, length in enumerate(lengths):
        expected = np.zeros((2, 20, 2))
        for head in range(6):
            for i in range(length):
                s = k[b, : i + 1, head // 3] @ q[b, i, head] / np.sqrt(8)
                p = np.exp(s - s.max())
                p /= p.sum()
                out = p @ v[b, : i + 1, head // 3]
                apart = ((v[b, : i + 1, head // 3] - out) ** 2).sum(-1)
                expected[0, : i + 1, head // 3] += p**2 * apart * (q[b, i, head] ** 2).sum()
                expected[1, : i + 1, head // 3] += p**2
        np.testing.assert_allclose(keys[b], expected[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(values[b], expected[1], rtol=1e-4, atol=1e-5)


def test_weights_belong_to_the_sampled_tokens_and_windows_are_whole_passages():
    a = activations()
    plain = activations(frozenset())
    assert plain.statistics[0].windows is None and plain.statistics[0].key_weights is None
    for ours, theirs in zip(a.statistics, plain.statistics, strict=True):
        for field in dataclasses.fields(theirs):  # what is collected beside changes nothing
            if getattr(theirs, field.name) is not None:
                np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
        assert ours.key_weights.shape == ours.value_weights.shape == ours.keys.shape[:2]
        windows = ours.windows
        assert len(windows.keys) == len(a.passages)
        np.testing.assert_allclose(windows.keys.sum((0, 1)), ours.key_sum, rtol=1e-3, atol=1e-2)
        assert (windows.at >= 0).all()
        for w, row in enumerate(a.passages):
            assert (windows.at[w] < len(row)).all() and not windows.keys[w, len(row) :].any()


def test_weighted_codebooks_err_less_where_weights_are():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 2, 8)).astype(np.float32)
    vectors[:60] += 4
    weights = np.ones((600, 2), np.float32)
    weights[:60] = 100

    def error(weights):
        book = codebook_of(vectors, weights, length=4, entries=16, per_head=True, seed=0)
        parts = subvectors(vectors[:60], 4)
        return ((parts[:, :, None] - book[:, None]) ** 2).sum(-1).min(-1).mean()

    assert error(weights) < 0.7 * error(None)
    np.testing.assert_array_equal(
        codebook_of(vectors, None, length=4, entries=16, per_head=True, seed=0),
        codebook_of(vectors, length=4, entries=16, per_head=True, seed=0, restarts=1),
    )


def test_restarts_keep_the_best_start_of_each_head():
    vectors = np.random.default_rng(1).normal(size=(500, 2, 8)).astype(np.float32)

    def errors(restarts):
        book = codebook_of(vectors, length=4, entries=32, per_head=True, seed=3, restarts=restarts)
        return ((subvectors(vectors, 4)[:, :, None] - book[:, None]) ** 2).sum(-1).min(-1).mean(-1)

    one, four = errors(1), errors(4)
    assert (four <= one + 1e-6).all() and four.sum() < one.sum()


def test_what_is_read_back_is_the_nearest_centroid_and_its_gradient_that_of_its_readers():
    rng = np.random.default_rng(0)
    x, book = rng.normal(size=(1, 5, 2, 8)), rng.normal(size=(2, 16, 4))
    read = read_back(jnp.asarray(x, jnp.float32), jnp.asarray(book, jnp.float32))
    counts = np.zeros((2, 16))
    for t, head, part in np.ndindex(5, 2, 2):
        piece = x[0, t, head, 4 * part : 4 * part + 4]
        best = ((piece - book[head]) ** 2).sum(-1).argmin()
        counts[head, best] += 1
        np.testing.assert_allclose(read[0, t, head, 4 * part : 4 * part + 4], book[head, best], rtol=1e-6)
    of_book, of_x = jax.grad(lambda b, x: read_back(x, b, through=True).sum(), argnums=(0, 1))(
        jnp.asarray(book, jnp.float32), jnp.asarray(x, jnp.float32)
    )
    np.testing.assert_allclose(of_book, np.repeat(counts[:, :, None], 4, 2))
    np.testing.assert_allclose(of_x, np.ones_like(x))


@pytest.mark.slow
def test_it_descends_on_what_the_cache_gives():
    """`coded_attention` is what the method's own prompt attention reads; refinement lessens its error."""
    lm = small.model()
    a = activations()
    plain, refined = (dataclasses.replace(METRIC, refine=r) for r in ("none", "attention"))
    before, after = fit(lm, plain, a, progress=False), fit(lm, refined, a, progress=False)
    error = jax.jit(jax.vmap(lambda arrays, window: output_error(arrays, window, 1), in_axes=(None, 0)))
    for layer in range(lm.config.num_layers):
        windows = jax.tree.map(jnp.asarray, a.statistics[layer].windows)
        errors = [error(jax.tree.map(jnp.asarray, c.layers[layer]), windows).mean() for c in (before, after)]
        assert errors[1] < 0.95 * errors[0]
        for name in ("mean", "key_map", "smooth"):
            np.testing.assert_array_equal(after.layers[layer][name], before.layers[layer][name])
    assert after.method_key["refine"] == "attention" and "refine" not in before.method_key


def test_one_layer_reads_what_the_cache_reads():
    from tests.caches.harness import LAYER, chunk_at, prefill, random_qkv
    from vecinfer_jax.rope import apply_rope

    arrays = jax.tree.map(jnp.asarray, small.calibration_of(METRIC).layers[0])
    q, k, v = random_qkv(1, 24)
    chunk = chunk_at([0], [24], 24, True, "coded")
    expected, _ = prefill(METRIC, q, k, v, chunk, METRIC.init(LAYER, 1, 32, arrays))
    turned = [apply_rope(x, chunk.cos, chunk.sin) for x in (q, k)]
    out = coded_attention(turned[0], chunk.positions, turned[1], v, arrays, 1)
    np.testing.assert_allclose(out, expected, atol=2e-4)


def test_the_whole_model_comes_nearer_to_full_precision():
    lm, text = small.model(), small.texts()[0]
    calibration = small.calibration_of(METRIC)
    passages = activations(frozenset()).passages
    layers = refine_model(lm, lm.params, calibration.layers, [1] * 3, passages, seed=0, steps=24)
    moved = dataclasses.replace(calibration, layers=tuple(layers))
    before, after = (
        vj.evaluate.perplexity(lm, METRIC, c, text, length=64, windows=1, progress=False).kl
        for c in (calibration, moved)
    )
    assert after < before
    tokens = np.asarray(passages[0])[None]
    hidden = [np.asarray(Layerwise(lm, METRIC, c).hidden(tokens, read="coded")) for c in (calibration, moved)]
    exact = np.asarray(Layerwise(lm).hidden(tokens))
    assert np.square(hidden[1] - exact).mean() < np.square(hidden[0] - exact).mean()


def test_finer_codes_take_smaller_steps():
    """Half for every bit above two, and the queries' map with the keys."""
    books = {"d4b8": (2, 256, 4), "d8b8": (2, 256, 8), "d4b12": (2, 4096, 4), "d2b8": (2, 256, 2)}
    rates = {"key_codebook": 8.0, "value_codebook": 4.0, "query_map": 2.0}

    def found(key, value):
        arrays = {"key_codebook": np.zeros(books[key]), "value_codebook": np.zeros(books[value])}
        return list(refine.rates_for(rates, arrays).values())

    assert found("d4b8", "d8b8") == [8.0, 4.0, 2.0]
    assert found("d4b12", "d4b8") == [4.0, 4.0, 1.0]
    assert found("d8b8", "d2b8") == [8.0, 1.0, 2.0]


@pytest.mark.slow
def test_rates_of_nothing_move_nothing(monkeypatch):
    """So both descents go by `rates_for`."""
    for module in (refine, distil):
        monkeypatch.setattr(module, "rates_for", lambda rates, arrays: dict.fromkeys(rates, 0.0))
    lm, a, calibration = small.model(), activations(), small.calibration_of(METRIC)
    moved = [
        refine.refine_layer(calibration.layers[0], a.statistics[0].windows, 2, 0),  # compiled for no other test
        *refine_model(lm, lm.params, calibration.layers, [1] * 3, a.passages, seed=0, steps=2),
    ]
    for ours, theirs in zip(moved, (calibration.layers[0], *calibration.layers), strict=True):
        for name in refine.RATES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


def test_refined_is_everything_that_calibration_can_do():
    assert VecInfer.refined(bits=2) == VecInfer(bits=2, weighted="both", rotate_values=True, refine="kl")
    assert VecInfer.refined(refine="attention").refine == "attention"


@pytest.mark.slow
def test_settings_calibrate_and_are_told_apart():
    a = activations()
    settings = {"weighted": "both", "restarts": 2, "refine": "attention", "rotate_values": True, "fp8_values": True}
    method = dataclasses.replace(METRIC, **settings)
    calibration = fit(small.model(), method, a, progress=False)
    result = vj.evaluate.perplexity(
        small.model(), method, calibration, small.texts()[0], length=32, windows=1, progress=False
    )
    assert np.isfinite(result.perplexity)
    methods = [METRIC, method, *(dataclasses.replace(METRIC, **{name: value}) for name, value in settings.items())]
    assert len({str(m.calibration_key()) for m in methods}) == 7
    assert dataclasses.replace(METRIC, refine="kl").refines_model
    assert PerLayer(METRIC, ((0, dataclasses.replace(METRIC, refine="kl")),)).wanted_statistics() == {"windows"}
    with pytest.raises(InputError, match="give it to every layer's method"):
        fit(small.model(), PerLayer(METRIC, ((0, dataclasses.replace(METRIC, refine="kl")),)), a, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": "more"}, "refine='more' is unknown"),
        ({"weighted": "yes"}, "weighted='yes' is unknown"),
        ({"restarts": 0}, "restarts=0 must be a whole number, 1 or more"),
        (
            {"refine": "attention", "transform": "smooth-hadamard"},
            "needs transform=metric or rotation, not smooth-hadamard",
        ),
        ({"restarts": 2, "scope": "global"}, "choose scope layer_head or layer"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        VecInfer(**settings)
