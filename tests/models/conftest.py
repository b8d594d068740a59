"""Helpers of the model tests."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.models import Decoder, LanguageModel


@pytest.fixture(scope="session")
def score() -> Callable[[LanguageModel, Any], np.ndarray]:
    """score(lm, ids[B, T]) -> float32[B, T, V]: logits of every position, prompt read at once."""

    def run(lm: LanguageModel, ids: Any) -> np.ndarray:
        ids = jnp.atleast_2d(jnp.asarray(ids, jnp.int32))
        return np.asarray(_score(lm.config, lm.dtype, lm.params, ids))

    return run


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(config: Any, dtype: Any, params: Any, ids: jax.Array) -> jax.Array:
    method = FullPrecision()
    decoder = Decoder(config, method, dtype)
    batch, length = ids.shape
    caches = tuple(method.init(decoder.layer_shape(i), batch, length) for i in range(config.num_layers))
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    return decoder.apply({"params": params}, ids, positions, caches)[0]
