"""Partial attention results merge to the whole, however the tokens were divided."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import split_k

TOKENS, DIM = 24, 6


def attention(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    if scores.size == 0:
        return np.zeros(DIM), split_k.EMPTY
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), scores.max() + np.log(weights.sum())


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, TOKENS), max_size=6),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    seed=st.integers(0, 2**16),
)
def test_any_partition_merges_to_the_whole(cuts, spread, seed):
    """Bound: 2e-6 of the values' size on the output, 2e-6 of the largest score on the log-sum-exp."""
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=TOKENS) * spread, rng.normal(size=(TOKENS, DIM))
    edges = [0, *sorted(cuts), TOKENS]
    parts = [attention(scores[a:b], values[a:b]) for a, b in itertools.pairwise(edges)]
    outputs, lses = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*parts, strict=True))
    output, lse = split_k.merge(outputs, lses)
    expected, expected_lse = attention(scores, values)
    np.testing.assert_allclose(output, expected, atol=2e-6 * abs(values).max() * (1 + spread))
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6 * (1 + abs(scores).max()))


def test_empty_parts_contribute_nothing_whatever_they_hold():
    outputs = jnp.array([[jnp.nan, jnp.inf], [1.0, 2.0]])
    output, lse = split_k.merge(outputs, jnp.array([split_k.EMPTY, 3.0]))
    assert output.tolist() == [1.0, 2.0] and lse == 3.0


def test_nothing_merges_to_nothing():
    for parts in (0, 1, 3):
        output, lse = split_k.merge(jnp.full((2, parts, 4), jnp.nan), jnp.full((2, parts), split_k.EMPTY))
        assert output.shape == (2, 4) and not output.any() and (lse == jnp.float32(split_k.EMPTY)).all()


def test_merging_in_two_steps_equals_merging_at_once():
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)
    lses = jnp.asarray(rng.normal(size=(3, 4)) * 5, jnp.float32).at[:, 1].set(split_k.EMPTY)
    pairs = [split_k.merge(outputs[:, i : i + 2], lses[:, i : i + 2]) for i in (0, 2)]
    stepwise = split_k.merge(jnp.stack([p[0] for p in pairs], 1), jnp.stack([p[1] for p in pairs], 1))
    for got, expected in zip(stepwise, split_k.merge(outputs, lses), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_parts_merge_in_float32():
    output, lse = split_k.merge(jnp.ones((2, 4), jnp.bfloat16), jnp.zeros(2, jnp.bfloat16))
    assert output.dtype == lse.dtype == jnp.float32


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises((ValueError, TypeError), match=r"lses|Type-check"):
        split_k.merge(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4)))


def test_rows_are_split_until_the_device_is_full():
    splits = lambda rows, tokens: split_k.num_splits(rows=rows, tokens=tokens, tile=64, programs=2112)  # noqa: E731
    assert splits(128, 32768) == 16
    assert splits(8, 196608) == 256  # capped
    assert splits(8, 1024) == 4  # no split shorter than four tiles
    assert splits(8192, 4096) == splits(8, 64) == splits(0, 0) == 1
