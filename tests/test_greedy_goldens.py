"""Greedy generation with the full-precision cache gives transformers' tokens, one prompt at a time and in a
batch."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import GOLDENS
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.models import Decoder

CASES = json.loads((GOLDENS / "smollm2-135m-instruct" / "greedy.json").read_text(encoding="utf-8"))
NEW_TOKENS = 32
BUCKET = 128


def test_prompts_are_tokenised_alike(smollm2):
    for case in CASES:
        assert smollm2.tokenizer.encode(case["prompt"]) == case["ids"]
        assert smollm2.tokenizer.decode(case["continuation"]) == case["text"]


@pytest.mark.parametrize("cases", [CASES[::5], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_one_prompt_at_a_time(smollm2, cases):
    for case in cases:
        assert greedy(smollm2, [case["ids"]])[0] == case["continuation"], case["prompt"]


def test_a_padded_batch(smollm2):
    continuations = greedy(smollm2, [case["ids"] for case in CASES])
    assert continuations == [case["continuation"] for case in CASES]


def greedy(lm, prompts):
    """32 tokens after each prompt; prompts are padded on the right to one length."""
    lengths = jnp.asarray([len(ids) for ids in prompts])
    assert int(lengths.max()) <= BUCKET
    tokens = np.zeros((len(prompts), BUCKET), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return np.asarray(_generate(lm.config, lm.params, jnp.asarray(tokens), lengths)).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _generate(config, params, tokens, lengths):
    method = FullPrecision()
    decoder = Decoder(config, method, jnp.float32)
    batch = tokens.shape[0]
    caches = tuple(method.init(decoder.layer_shape(i), batch, BUCKET + NEW_TOKENS) for i in range(config.num_layers))
    positions = jnp.broadcast_to(jnp.arange(BUCKET), tokens.shape)
    variables = {"params": params}
    logits, caches = decoder.apply(variables, tokens, positions, caches, lengths=lengths, logits="last")

    def step(state, _):
        token, position, caches = state
        logits, caches = decoder.apply(variables, token[:, None], position[:, None], caches, decode=True)
        return (jnp.argmax(logits[:, 0], axis=-1), position + 1, caches), token

    first = (jnp.argmax(logits, axis=-1), lengths, caches)
    _, out = jax.lax.scan(step, first, length=NEW_TOKENS)
    return out.T
