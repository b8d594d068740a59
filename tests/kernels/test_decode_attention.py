"""Attention over 16-bit keys and values equals the float64 softmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, split_k
from tests.kernels import cases, lane_simulator, oracle

every = pytest.mark.parametrize("how", [cases.EVERYWHERE[0], cases.MOSAIC_GPU], ids=["xla", "mosaic-gpu"])
# head dimension, query heads a KV head, dtype, lengths, tokens
CASES = [
    (128, 4, "bfloat16", (0, 7, 8, 70), 70),
    (64, 3, "float16", (1, 17, 90), 90),
    (64, 10, "bfloat16", (5, 2), 5),
]


def check(dim, group, dtype, lengths, tokens, **how):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(len(lengths), 2 * group, dim)), dtype)
    keys, values = (jnp.asarray(rng.normal(size=(len(lengths), 2, tokens, dim)), dtype) for _ in range(2))
    output, lse = decode_attention(q, keys, values, jnp.array(lengths, jnp.int32), scale=dim**-0.5, **how)
    for b, length in enumerate(lengths):
        if length == 0:
            assert not output[b].any() and (lse[b] == jnp.float32(split_k.EMPTY)).all()
            continue
        for h in range(2 * group):
            scores = oracle.float64(keys[b, h // group, :length]) @ oracle.float64(q[b, h]) * dim**-0.5
            weights = np.exp(scores - scores.max())
            expected = weights @ oracle.float64(values[b, h // group, :length]) / weights.sum()
            np.testing.assert_allclose(output[b, h], expected, atol=2.0**-8 * abs(oracle.float64(values)).max())
            np.testing.assert_allclose(lse[b, h], scores.max() + np.log(weights.sum()), rtol=2e-5, atol=2e-5)


@every
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_output_is_the_softmax_over_the_tokens_that_count(case, how, monkeypatch):
    lane_simulator.install(monkeypatch)
    check(*case, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (128, 4, "bfloat16", (0, 1, 4095, 131072), 131072)], ids=str)
def test_the_output_is_the_softmax_over_the_tokens_that_count_on_a_device(case):
    check(*case, implementation="mosaic_gpu")


@every
def test_no_tokens_give_nothing(how, monkeypatch):
    lane_simulator.install(monkeypatch)
    check(64, 2, "bfloat16", (0,), 0, **how)


def test_arguments_that_do_not_belong_together_are_refused():
    q, keys, lengths = jnp.zeros((1, 4, 64)), jnp.zeros((1, 2, 8, 64)), jnp.zeros(1, jnp.int32)
    refused = [
        ("q must be", (q[0], keys, keys, lengths)),
        ("Hkv dividing 4", (q, jnp.zeros((1, 3, 8, 64)), keys, lengths)),
        ("keys must be float32", (q, keys.astype("bfloat16"), keys, lengths)),
        ("as the keys", (q, keys, keys[:, :, 1:], lengths)),
        ("lengths must be", (q, keys, keys, lengths.astype(jnp.int8))),
    ]
    for message, arrays in refused:
        with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check") as error:
            decode_attention(*arrays, scale=1.0)
        assert not isinstance(error.value, ValueError) or "\n" not in str(error.value)
    with pytest.raises(NotImplementedError, match="the mosaic_gpu kernel serves"):
        decode_attention(q, keys, keys, lengths, scale=1.0, implementation="mosaic_gpu")
