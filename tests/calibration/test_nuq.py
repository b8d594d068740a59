"""Codebooks of scalars are optimal, honour weights and keep what Q-Norm says; the Fisher gradients are gradients."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.caches import FullPrecision, KVQuant, PerLayer, VecInfer
from vecinfer_jax.calibration.collect import collect, fit
from vecinfer_jax.calibration.fisher import GradientSampler, _Shifted
from vecinfer_jax.calibration.nuq import q_norm, weighted_codebook
from vecinfer_jax.calibration.statistics import draw
from vecinfer_jax.calibration.store import load_calibration
from vecinfer_jax.errors import CalibrationError
from vecinfer_jax.evaluation import table
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.layerwise import Layerwise

GRADIENTS = frozenset({"gradients"})
OPTIONS = {"passages": 5, "passage_length": 24, "batch": 2, "progress": False}


def error_of(points, weights, codebook):
    return float((weights * ((points[:, None] - codebook[None]) ** 2).min(1)).sum())


def by_brute_force(points, weights, entries):
    """The least error over all ways to cut the sorted points into intervals."""
    order = np.argsort(points)
    x, w = points[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), entries - 1):
        error = 0.0
        for part in np.split(np.arange(len(x)), cuts):
            if w[part].sum() > 0:
                mean = (w[part] * x[part]).sum() / w[part].sum()
                error += (w[part] * (x[part] - mean) ** 2).sum()
        best = min(best, error)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("entries", [2, 4])
def test_a_codebook_is_as_good_as_the_best_of_all(seed, entries):
    rng = np.random.default_rng(seed)
    points, weights = rng.uniform(-1, 1, 14), rng.exponential(size=14) * (rng.random(14) < 0.8)
    codebook = weighted_codebook(points, weights, entries)
    assert codebook.dtype == np.float32 and np.all(np.diff(codebook) >= 0)
    assert error_of(points, weights, codebook) == pytest.approx(by_brute_force(points, weights, entries), abs=1e-6)


def test_many_points_are_as_well_served_as_by_lloyds_iterations():
    rng = np.random.default_rng(0)
    points = np.clip(0.3 * rng.standard_t(4, 50000), -1, 1)
    weights = rng.exponential(size=50000) ** 4
    codebook = weighted_codebook(points, weights, 8).astype(np.float64)
    error = error_of(points, weights, codebook)
    for _ in range(20):
        nearest = np.abs(points[:, None] - codebook).argmin(1)
        codebook = np.bincount(nearest, weights * points) / np.bincount(nearest, weights)
    assert error < 1.001 * error_of(points, weights, codebook)


def test_codebooks_of_odd_points():
    np.testing.assert_array_equal(weighted_codebook(np.array([0.5, 0.5]), np.ones(2), 4), [0.5] * 4)
    np.testing.assert_array_equal(weighted_codebook(np.array([0.5, 0.0]), np.zeros(2), 2), [0.0, 0.5])
    np.testing.assert_array_equal(weighted_codebook(np.zeros(0), np.zeros(0), 4), np.linspace(-1, 1, 4, dtype="f"))


def test_q_norm_keeps_mean_and_deviation():
    points = np.random.default_rng(0).normal(0.1, 0.3, 5000)
    codebook = np.array([-0.5, 0.0, 0.3, 0.7], np.float32)
    entries = q_norm(codebook, points)
    decoded = entries[np.abs(points[:, None] - codebook).argmin(1)]
    assert decoded.mean() == pytest.approx(points.mean(), abs=1e-6)
    assert decoded.std() == pytest.approx(points.std(), rel=1e-6)
    np.testing.assert_array_equal(q_norm(np.zeros(4, np.float32), points), np.zeros(4))


def gradients_of(lm, tokens, lengths, layer):
    """By JAX through the whole model at once: [B, T, Hkv, D] each of keys and of values."""
    method, dtype = _Shifted(), jnp.dtype(lm.dtype)
    decoder = Decoder(lm.config, method, dtype)
    empty = tuple(method.init(decoder.layer_shape(i), *tokens.shape) for i in range(lm.config.num_layers))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(shifts):
        caches = (*empty[:layer], shifts, *empty[layer + 1 :])
        logits, _ = decoder.apply({"params": lm.params}, tokens, positions, caches, lengths=lengths)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=2)[..., 0]
        return -jnp.sum(jnp.where(positions[:, 1:] < lengths[:, None], likelihood, 0.0))

    return jax.jit(loss), empty[layer], jax.jit(jax.grad(loss))(empty[layer])


def test_gradients_taken_layer_by_layer_are_those_of_the_whole_loss():
    lm = small.model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 12)))
    lengths = jnp.array([12, 7])
    inputs: list = []
    model = Layerwise(lm)
    out, _ = model.prefill(model.init(2, 12), tokens, lengths, inputs=inputs)
    sampler = GradientSampler(lm, 64, seed=0)
    sampler.add(np.asarray(tokens), np.asarray(lengths), inputs, out)
    counts = (jnp.arange(12)[None, :] < lengths[:, None]).reshape(-1)
    _, order = draw(0, jnp.int32(0), counts, jnp.full((64,), jnp.inf, jnp.float32))
    order = np.asarray(order)[:19] - 64
    for layer in (0, 2):
        loss, nothing, wanted = gradients_of(lm, tokens, lengths, layer)
        sample = sampler.layers[layer]
        assert np.isfinite(sample.priority).sum() == 19
        for got, want in zip((sample.keys, sample.values), wanted, strict=True):
            want = np.asarray(want).reshape(24, 2, 16)[order]
            np.testing.assert_allclose(np.asarray(got, np.float32)[:19], want, atol=0.005 * abs(want).max())
        # And they are slopes: a difference quotient at one element of a key.
        step = 1e-2
        at = nothing[0].at[0, 3, 1, 5].set(step), nothing[1]
        back = nothing[0].at[0, 3, 1, 5].set(-step), nothing[1]
        slope = (loss(at) - loss(back)) / (2 * step)
        assert float(slope) == pytest.approx(float(wanted[0][0, 3, 1, 5]), abs=2e-3)


@pytest.mark.slow
def test_statistics_are_the_same_with_gradients_and_without():
    lm = small.model()
    plain = collect(lm, small.texts(), samples=80, **OPTIONS)
    more = collect(lm, small.texts(), samples=80, wanted=GRADIENTS, **OPTIONS)
    for a, b in zip(plain.statistics, more.statistics, strict=True):
        assert a.key_gradients is None and b.key_gradients.shape == b.keys.shape == (80, 2, 16)
        for field in dataclasses.fields(a):
            if not field.name.endswith("gradients"):
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    for method in (VecInfer(bits=2, residual=0, transform="smooth-hadamard"), KVQuant(fisher=False)):
        fitted = [fit(lm, method, activations, progress=False).digest for activations in (plain, more)]
        assert fitted[0] == fitted[1]
    with pytest.raises(CalibrationError, match="gradients"):
        fit(lm, KVQuant(), plain, progress=False)


def test_gradients_stand_beside_the_keys_they_are_of():
    """The last token of a passage is read by no prediction that counts: its gradients are 0, and only its."""
    lm = small.model()
    activations = collect(lm, small.texts(), samples=80, wanted=GRADIENTS, **OPTIONS)
    for layer in activations.statistics:
        last = layer.positions == 23
        silent = ~np.any(np.asarray(layer.value_gradients, np.float32), axis=(1, 2))
        np.testing.assert_array_equal(silent, last)


@pytest.mark.slow
def test_a_calibration_has_the_share_of_outliers_and_reads_back(tmp_path):
    lm, method = small.model(), KVQuant(bits=3, outliers=0.04, sink=2)
    assert method.wanted_statistics() == PerLayer(FullPrecision(), ((1, method),)).wanted_statistics() == GRADIENTS
    activations = collect(lm, small.texts(), samples=4000, wanted=GRADIENTS, **OPTIONS)
    made = fit(lm, method, activations, progress=False)
    for layer, statistics in zip(made.layers, activations.statistics, strict=True):
        assert {name: x.shape for name, x in layer.items()} == {
            "key_scale": (2, 16), "key_zero": (2, 16), "key_codebook": (8,), "key_entries": (8,),
            "value_codebook": (8,), "value_entries": (8,), "reach": (2,),
        }  # fmt: skip
        coded = statistics.positions >= 2
        cos, sin = (np.asarray(x)[:, None] for x in lm.config.rope.cos_sin(jnp.asarray(statistics.positions)))
        left, right = np.split(np.asarray(statistics.keys), 2, axis=-1)
        before = np.concatenate([left * cos + right * sin, right * cos - left * sin], axis=-1)[coded]
        beyond = np.abs((before - layer["key_zero"]) / layer["key_scale"]) > 1 + 1e-5
        assert beyond.mean() == pytest.approx(0.04, abs=0.02)
    saved = made.save(tmp_path / "kvquant")
    read = load_calibration(saved, lm, method)
    for a, b in zip(made.layers, read.layers, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(CalibrationError, match="calibrate again"):
        load_calibration(saved, lm, KVQuant(bits=4))
    out = vj.generate(lm, small.prompts([20, 9]), method=method, calibration=read, max_new_tokens=6)
    assert [len(tokens) for tokens in out.tokens] == [6, 6]


def test_passages_of_sinks_only_are_refused():
    activations = collect(small.model(), small.texts(), wanted=GRADIENTS, **OPTIONS)
    with pytest.raises(CalibrationError, match="first 24"):
        fit(small.model(), KVQuant(sink=24), activations, progress=False)


def test_a_table_collects_gradients_once_and_only_where_they_are_wanted(tmp_path, monkeypatch):
    asked = []

    def counted(lm, texts=None, *, wanted=frozenset(), **_):
        asked.append(wanted == GRADIENTS)
        return collect(lm, small.texts(), wanted=wanted, **OPTIONS)

    monkeypatch.setattr(table, "collect", counted)
    made = table.Table(small.model(), tmp_path, progress=False)
    for wanted in (False, False, True, False, True):
        held = made._activations(0, GRADIENTS if wanted else frozenset()).statistics
        assert all(layer.key_gradients is not None for layer in held) or not wanted
    assert asked == [False, True]
    made._activations(1, frozenset())
    assert asked == [False, True, False]
