"""The decoder computes what transformers computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import GOLDENS
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.models import Decoder, load

FAMILIES = ("llama", "smollm2", "mistral", "qwen2", "qwen3")
REAL = ("smollm2", pytest.param("qwen", marks=pytest.mark.slow))
ATOL = 1e-3
STRIDE = json.loads((GOLDENS / "inputs.json").read_text(encoding="utf-8"))["row_stride"]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_match(family, score):
    lm = load(GOLDENS / "tiny" / family, "float32", progress=False)
    golden = np.load(GOLDENS / "tiny" / family / "logits.npz")
    logits = score(lm, golden["ids"])[:, golden["positions"]]
    np.testing.assert_allclose(logits, golden["logits"], atol=ATOL, rtol=0)
    assert np.abs(golden["logits"]).max() > 1  # the comparison says something


@pytest.mark.parametrize("model", REAL)
def test_real_models_match(model, score, request):
    lm = request.getfixturevalue(model)
    golden = reference(lm.name)
    rows = np.load(GOLDENS / lm.name / "logits.npz")
    longest = max(len(case["ids"]) for case in golden["scored"])  # compiled once, for all
    for index, case in enumerate(golden["scored"]):
        ids = case["ids"]
        last = score(lm, ids + [0] * (longest - len(ids)))[0, len(ids) - 1]
        np.testing.assert_allclose(last[case["top_ids"]], case["top_logits"], atol=ATOL, rtol=0)
        assert set(np.argsort(-last)[:5]) == set(case["top_ids"][:5])
        if f"last_{index}" in rows:
            np.testing.assert_allclose(last[::STRIDE], rows[f"last_{index}"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_step_by_step_equals_scoring_at_once(family, score):
    lm = load(GOLDENS / "tiny" / family, "float32", progress=False)
    ids = jnp.asarray(np.load(GOLDENS / "tiny" / family / "logits.npz")["ids"][:, :24])
    np.testing.assert_allclose(_step_by_step(lm, ids, prompt=5), score(lm, ids)[:, 4:], atol=1e-4)


def _step_by_step(lm, ids, prompt):
    """Logits float32[B, T - prompt + 1, V]: of the prompt's last token, then of every token after it."""
    method = FullPrecision()
    decoder = Decoder(lm.config, method, lm.dtype)
    batch, length = ids.shape
    caches = tuple(method.init(decoder.layer_shape(i), batch, length) for i in range(lm.config.num_layers))
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    start = positions[:, :prompt]
    logits, caches = decoder.apply({"params": lm.params}, ids[:, :prompt], start, caches, logits="last")
    out = [logits]

    @jax.jit
    def step(token, position, caches):
        logits, caches = decoder.apply({"params": lm.params}, token, position, caches, decode=True)
        return logits[:, 0], caches

    for at in range(prompt, length):
        logits, caches = step(ids[:, at : at + 1], positions[:, at : at + 1], caches)
        out.append(logits)
    return np.stack(out, axis=1)


def reference(name: str) -> dict:
    """What transformers says of a real model."""
    return json.loads((GOLDENS / name / "reference.json").read_text(encoding="utf-8"))
