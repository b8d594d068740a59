"""The maps leave scores alone, deal variance out evenly, and follow the queries."""

import numpy as np
import pytest

from vecinfer_jax.calibration.metric import metric_map, principal_rotation, serpentine, spread

HEADS, DIM = 2, 16


def samples(seed=0, count=4000):
    """Keys and queries of unequal, correlated directions, skewed."""
    rng = np.random.default_rng(seed)
    mix, other = (rng.normal(size=(HEADS, DIM, DIM)) * np.geomspace(3, 0.05, DIM) for _ in range(2))
    keys = np.einsum("nhi,hij->nhj", rng.gamma(2.0, size=(count, HEADS, DIM)) - 2.0, mix)
    queries = np.einsum("nhi,hij->nhj", rng.normal(size=(count, HEADS, DIM)), other)
    return keys, queries, np.einsum("nhi,nhj->hij", queries, queries) / count


@pytest.mark.parametrize("power, mixed", [(0.0, False), (0.25, False), (0.5, False), (0.25, True)])
def test_scores_stay_what_they_are(power, mixed):
    keys, queries, moment = samples()
    to_key, to_query = metric_map(moment, keys, 4, power, mixed)
    mapped = np.einsum("nhi,hij->nhj", keys, to_key), np.einsum("nhi,hij->nhj", queries, to_query)
    before, after = (np.einsum("nhi,nhi->nh", q, k) for q, k in ((queries, keys), mapped[::-1]))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3 * np.abs(before).std())


@pytest.mark.parametrize("length", [2, 4, 8])
def test_element_r_of_every_sub_vector_has_about_the_same_variance(length):
    keys, _, moment = samples()
    to_key, _ = metric_map(moment, keys, length)
    variance = np.einsum("nhi,hij->nhj", keys, to_key).var(axis=0).reshape(HEADS, -1, length)
    ordered = np.sort(variance.reshape(HEADS, -1), axis=1)[:, ::-1].reshape(HEADS, length, -1)
    for head in range(HEADS):
        for r in range(length):  # element r takes the r-th block of directions, by falling variance
            np.testing.assert_allclose(np.sort(variance[head, :, r])[::-1], ordered[head, r], rtol=1e-5)


@pytest.mark.parametrize("length", [2, 4, 8])
def test_mixed_sub_vectors_all_have_the_same_covariance(length):
    keys, _, moment = samples()
    centred = keys - keys.mean(axis=0)
    mapped = np.einsum("nhi,hij->nhj", centred, metric_map(moment, centred, length, mixed=True)[0])
    parts = mapped.reshape(len(keys), HEADS, -1, length)
    second = np.einsum("nhjr,nhjs->hjrs", parts, parts) / len(keys)
    largest = second[:, :1, :1, :1]
    np.testing.assert_allclose(second / largest, np.broadcast_to(second[:, :1] / largest, second.shape), atol=1e-3)
    straight = np.einsum("nhi,hij->nhj", centred, metric_map(moment, centred, length)[0])
    np.testing.assert_allclose((mapped**2).sum(-1), (straight**2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("dim, length", [(16, 2), (80, 2), (96, 4), (6, 2), (8, 8)])
def test_any_width_can_be_mixed(dim, length):
    """As far as the number of sub-vectors has factors of two; elements of a sub-vector are never mixed."""
    matrix = spread(dim, length)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-12)
    count = dim // length
    parts = matrix.reshape(count, length, count, length).transpose(1, 3, 0, 2)
    size = count & -count
    for r, other in np.ndindex(length, length):
        block = np.abs(parts[r, other])
        assert (np.isclose(block, size**-0.5).sum(axis=0) == (size if r == other else 0)).all()
        np.testing.assert_allclose(block[block > 0], size**-0.5)


def test_mapped_keys_are_uncorrelated_and_skewed_to_one_side():
    keys, _, moment = samples()
    centred = keys - keys.mean(axis=0)
    mapped = np.einsum("nhi,hij->nhj", centred, metric_map(moment, centred, 4)[0])
    for head in range(HEADS):
        correlation = np.corrcoef(mapped[:, head].T)
        assert np.abs(correlation - np.eye(DIM)).max() < 1e-3
    assert (np.mean((mapped - mapped.mean(axis=0)) ** 3, axis=0) > -1e-6).all()


def test_errors_count_more_where_queries_are_large():
    """The map stretches the directions that queries have most of."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(4000, 1, DIM))
    moment = np.diag(np.geomspace(100.0, 0.01, DIM))[None]
    to_key, _ = metric_map(moment, keys, 4)
    stretch = np.linalg.norm(to_key[0], axis=1)
    np.testing.assert_allclose(stretch / stretch[0], np.diag(moment[0]) ** 0.25 / 100.0**0.25, rtol=1e-4)


def test_a_moment_without_full_rank_is_floored():
    keys, _, _ = samples()
    moment = np.zeros((HEADS, DIM, DIM))
    moment[:, 0, 0] = 1.0
    to_key, to_query = metric_map(moment, keys, 4)
    assert np.isfinite(to_key).all() and np.isfinite(to_query).all()
    np.testing.assert_allclose(np.einsum("hji,hki->hjk", to_key, to_query), np.tile(np.eye(DIM), (2, 1, 1)), atol=1e-4)


def test_without_any_query_the_map_is_finite():
    keys, _, moment = samples()
    for arrays in metric_map(0 * moment, keys, 4):
        assert np.isfinite(arrays).all()


def test_a_rotation_is_one():
    keys, _, _ = samples()
    rotation = principal_rotation(keys, 4)
    np.testing.assert_allclose(
        np.einsum("hji,hki->hjk", rotation, rotation), np.tile(np.eye(DIM), (2, 1, 1)), atol=1e-9
    )


def test_the_serpentine_runs_back_and_forth():
    # Three sub-vectors of four: elements 0 take directions 0 1 2, elements 1 take 5 4 3, elements 2 take 6 7 8, ...
    assert serpentine(12, 4).reshape(3, 4).tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
