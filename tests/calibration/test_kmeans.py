"""k-means finds clusters, is deterministic, and honours weights."""

import numpy as np

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
