"""The dense preference of a layer is what the paper's formula gives, whatever the batch and its lengths."""

import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.caches.harness import LAYER, random_qkv
from vecinfer_jax.calibration.collect import collect_statistics, text_of
from vecinfer_jax.calibration.roles import LAST_QUERIES, attention_shares, dense_preference


def preferences(q, k, top):
    """1 - the sum of the largest attention weights, of each of the last queries and each head, one prompt [T, H, D]."""
    found = []
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    for t in range(max(len(q) - LAST_QUERIES, 0), len(q)):
        for head in range(q.shape[1]):
            scores = k[: t + 1, head // (q.shape[1] // k.shape[1])] @ q[t, head] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            most = max(round(top * 100) * (t + 1) // 100, 1)
            found.append(1 - np.sort(weights / weights.sum())[-most:].sum())
    return found


@pytest.mark.parametrize("top", [0.05, 0.5, 0.01])
def test_the_dense_preference_is_that_of_the_definition(top):
    q, k, _ = random_qkv(2, 90)
    lengths = [90, 20]  # fewer than the queries that are looked at
    shares, queries = attention_shares(q, k, jnp.asarray(lengths), LAYER.scale)
    want = [p for b, n in enumerate(lengths) for p in preferences(q[b, :n], k[b, :n], top)]
    assert int(queries) == len(want)
    np.testing.assert_allclose(dense_preference(np.asarray(shares), queries, top), np.mean(want), rtol=1e-5)


def test_attention_to_one_token_has_none_and_equal_attention_all_but_the_share():
    one = jnp.zeros((1, 100, 1, 16)).at[0, 0, 0, 0].set(1000.0)
    q = jnp.ones((1, 100, 2, 16))
    shares, queries = attention_shares(q, one, jnp.array([100]), 1.0)
    assert dense_preference(np.asarray(shares), queries, 0.05) < 1e-6
    shares, queries = attention_shares(q, 0 * one, jnp.array([100]), 1.0)
    np.testing.assert_allclose(dense_preference(np.asarray(shares), queries, 0.05), 0.95, atol=0.01)
    assert dense_preference(np.asarray(shares), queries, 1.0) < 1e-6


@pytest.mark.slow
def test_statistics_add_up_over_batches_and_leave_padding_out():
    lm, rows = small.model(), [[1, 2, 3, 4, 5, 6, 7] * 6, [9, 8, 7] * 5, [5, 4] * 9]

    def found(batch):
        done, layers = collect_statistics(
            lm, iter(rows), passages=9, samples=8, batch=batch, seed=0, progress=False, shares=True
        )
        assert done == 3
        return [(layer.attention_shares, int(layer.share_queries)) for layer in layers]

    for (alone, n), (together, m) in zip(found(1), found(2), strict=True):
        assert n == m == (32 + 15 + 18) * lm.config.num_query_heads
        np.testing.assert_allclose(alone, together, rtol=1e-4)


def test_roles_ask_for_long_passages_and_codebooks_for_the_usual_ones():
    from vecinfer_jax.caches import TailorKV, VecInfer

    assert text_of(small.model(), VecInfer(transform="smooth-hadamard")) == (64, 512)
    assert text_of(small.model(), TailorKV()) == (8, small.CONFIG.max_position)
    assert text_of(small.model(), TailorKV(roles=("sparse*3",))) == (64, 512)


def test_the_text_serves_the_roles_and_the_codebooks_of_what_layers_may_come_to_have():
    codes = vj.VecInfer(bits=2)
    assert vj.TailorKV().calibration_text == (8, 4096)
    assert vj.TailorKV(quantised=codes).calibration_text == (16, 4096)  # 64 passages of 1,024 tokens, in longer ones
    assert vj.TailorKV(quantised=codes, roles=("quantised", "sparse")).calibration_text == codes.calibration_text
    assert vj.TailorKV(roles=("quantised", "sparse")).calibration_text is None
