"""Filters keep exactly the tokens they say, with the right probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vecinfer_jax.errors import InputError
from vecinfer_jax.generation.sampling import Sampling, sample

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.13, 0.1])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))


def frequencies(sampling, n=4000):
    keys = jax.random.split(jax.random.key(0), n)
    tokens, _ = sample(jnp.broadcast_to(LOGITS, (n, 6)), keys, sampling.settings())
    return np.bincount(np.asarray(tokens), minlength=6) / n


def expected(keep, temperature=1.0):
    p = np.where(np.isin(np.arange(6), keep), PROBABILITIES ** (1 / temperature), 0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("sampling", "keep"),
    [
        (Sampling(temperature=1.0), range(6)),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.6), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.71), [1, 3, 4]),
        (Sampling(temperature=1.0, min_p=0.3), [1, 3, 4]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.9, min_p=0.3), [1, 3, 4]),
        (Sampling(temperature=2.0, top_k=3), [1, 3, 4]),
        (Sampling(temperature=1.0, top_p=1e-6), [1]),
        (Sampling(temperature=1.0, min_p=1.0), [1]),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling, keep):
    np.testing.assert_allclose(frequencies(sampling), expected(list(keep), sampling.temperature), atol=0.03)


def test_greedy_takes_the_likeliest_and_reports_its_logprob():
    token, logprob = sample(LOGITS[None], jax.random.split(jax.random.key(0), 1), Sampling().settings())
    assert int(token[0]) == 1
    np.testing.assert_allclose(float(logprob[0]), np.log(0.4), rtol=1e-5)


def test_logprobs_ignore_temperature_and_filters():
    settings = Sampling(temperature=3.0, top_k=1).settings()
    _, logprob = sample(LOGITS[None], jax.random.split(jax.random.key(0), 1), settings)
    np.testing.assert_allclose(float(logprob[0]), np.log(0.4), rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)
