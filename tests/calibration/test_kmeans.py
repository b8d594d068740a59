"""k-means finds clusters, is deterministic, and honours weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from vecinfer_jax.calibration import kmeans as module
from vecinfer_jax.calibration.codebooks import codebook_of, drawn_codebooks
from vecinfer_jax.calibration.kmeans import kmeans


def blobs(seed=0, clusters=8, per=200, dim=4):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim)) * 10
    points = centres[:, None] + rng.normal(size=(clusters, per, dim)) * 0.1
    return centres.astype(np.float32), points.reshape(1, -1, dim).astype(np.float32)


def test_separated_clusters_are_found():
    centres, points = blobs()
    found, error = kmeans(points, clusters=8, seed=0)
    nearest = np.sqrt(((np.asarray(found)[0][:, None] - centres[None]) ** 2).sum(-1)).min(0)
    assert nearest.max() < 0.1
    assert float(error[0]) < 4 * 0.1**2 * 1.2


def test_the_same_seed_gives_the_same_centroids():
    _, points = blobs()
    a, _ = kmeans(points, clusters=16, seed=3)
    b, _ = kmeans(points, clusters=16, seed=3)
    c, _ = kmeans(points, clusters=16, seed=4)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_error_is_that_of_an_independent_computation_and_near_a_restarted_optimum():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(2, 3000, 2)).astype(np.float32)
    found, error = kmeans(points, clusters=32, seed=0)
    for group in range(2):
        distance = ((points[group][:, None] - np.asarray(found)[group][None]) ** 2).sum(-1).min(-1).mean()
        np.testing.assert_allclose(float(error[group]), distance, rtol=1e-4)
    restarts = [np.asarray(kmeans(points, clusters=32, seed=s)[1]) for s in range(1, 5)]
    assert np.all(np.asarray(error) < 1.08 * np.min(restarts, axis=0))


def test_points_of_weight_zero_do_not_matter():
    _, points = blobs(clusters=4)
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(1, 500, 4)).astype(np.float32) * 100
    weights = np.concatenate([np.ones((1, points.shape[1])), np.zeros((1, 500))], axis=1)
    _, error = kmeans(np.concatenate([points, noise], axis=1), weights, clusters=4, seed=0)
    assert float(error[0]) < 4 * 0.1**2 * 1.2


def test_fewer_points_than_centroids_is_exact():
    points = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    found, error = kmeans(points, clusters=16, seed=0)
    assert np.all(np.isfinite(found))
    assert float(error[0]) < 1e-6


@pytest.mark.slow
def test_centroids_drawn_in_batches_are_as_good_as_one_by_one(monkeypatch):
    points = jnp.asarray(np.random.default_rng(2).standard_t(4, size=(4000, 3)), jnp.float32)
    weights = jnp.ones(4000)

    def error(seed):
        def fit(x, w):
            start = module._plus_plus(x, w, jax.random.key(seed), 300, 2)
            return module._lloyd(x[None], w[None], start[None], 6)[1][0]

        return float(jax.jit(fit)(points, weights))

    monkeypatch.setattr(module, "ONE_BY_ONE", 512)
    one_by_one = np.mean([error(seed) for seed in range(2)])
    monkeypatch.setattr(module, "ONE_BY_ONE", 64)
    batches = np.mean([error(seed) for seed in range(2)])
    assert batches < 1.02 * one_by_one


@pytest.mark.parametrize(("clusters", "length", "n"), [(1, 4, 50), (3, 4, 129), (300, 8, 500), (16, 3, 77), (20, 2, 9)])
def test_the_encoder_finds_the_nearest_centroids(clusters, length, n):
    rng = np.random.default_rng(6)
    points = jnp.asarray(rng.normal(size=(2, n, length)), jnp.float32)
    centroids = jnp.asarray(rng.normal(size=(2, clusters, length)), jnp.float32)
    nearest = jnp.argmin(((points[:, :, None] - centroids[:, None]) ** 2).sum(-1), axis=-1)
    np.testing.assert_array_equal(module.nearest_by_encoding(points, centroids), nearest)


@pytest.mark.parametrize("clusters", [1, 3, 20, 257, 300])
def test_any_number_of_centroids(clusters):
    points = np.random.default_rng(3).normal(size=(1, 700, 2)).astype(np.float32)
    found, error = kmeans(points, clusters=clusters, seed=0, iterations=2)
    distance = ((points[0][:, None] - np.asarray(found)[0][None]) ** 2).sum(-1).min(-1).mean()
    assert found.shape == (1, clusters, 2) and np.all(np.isfinite(found))
    np.testing.assert_allclose(float(error[0]), distance, rtol=1e-4)


@pytest.mark.slow
def test_an_accelerator_finds_the_same_centroids(monkeypatch):
    """All groups at a time, and points assigned by the encoder, not by walks."""
    points = jnp.asarray(np.random.default_rng(4).normal(size=(3, 900, 4)), jnp.float32)
    here = kmeans(points, clusters=16, seed=0)[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(dispatch.PREFERENCE, "gpu", ("xla",))
    there = kmeans.__wrapped__(points, clusters=16, seed=0)[0]
    np.testing.assert_allclose(here, there, atol=1e-4)


def test_codebooks_are_drawn_where_only_their_shape_matters_and_fitted_elsewhere():
    vectors = blobs(clusters=4)[1].reshape(-1, 2, 4)
    how = {"length": 4, "entries": 4, "per_head": True, "seed": 0}
    with drawn_codebooks():
        drawn = codebook_of(vectors, **how)
    fitted = codebook_of(vectors, **how)
    assert drawn.shape == fitted.shape == (2, 4, 4)
    for head in range(2):
        assert all((vectors[:, head] == entry).all(-1).any() for entry in drawn[head])
        assert not all((vectors[:, head] == entry).all(-1).any() for entry in fitted[head])
