"""Shares of attention that chosen tokens receive, against the definition."""

import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.caches.harness import rotated
from vecinfer_jax.errors import InputError
from vecinfer_jax.evaluation import selection_recall

METHOD = vj.TailorKV(roles=("sparse", "quantised", "sparse"), tokens=4, channels=16, sink=1, recent=3, block=4)


@pytest.mark.slow
def test_shares_of_the_first_layer_are_those_of_its_softmax():
    """With all channels, and no layer before to predict by, the chosen tokens are those of the largest mean score."""
    lm, tokens = small.model(), np.asarray(small.prompts([30]), np.int32)
    result = selection_recall(lm, METHOD, None, tokens, progress=False)
    weights = {name: np.asarray(x["kernel"], np.float64) for name, x in lm.params["layers_0"]["attention"].items()}
    x = np.asarray(lm.params["embed"], np.float64)[tokens[0]]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + lm.config.rms_norm_eps)
    x = x * np.asarray(lm.params["layers_0"]["input_norm"]["scale"])
    q, k = (rotated(np.einsum("tx,xhd->thd", x, weights[name])) for name in ("q_proj", "k_proj"))
    near, chosen, best = [], [], []
    for t in range(30):
        held = max(t + 1 - 3 - 1, 0) // 4 * 4
        if held <= 4:
            continue
        host, others = np.arange(1, 1 + held), np.r_[0, 1 + held : t + 1]
        for h in range(2):
            scores = q[t, 3 * h : 3 * h + 3] @ k[: t + 1, h].T
            p = np.exp(scores / 4 - (scores / 4).max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            near.append(p[:, others].sum(-1).mean())
            chosen.append(p[:, host[np.argsort(-scores.mean(0)[host])[:4]]].sum(-1).mean())
            best.append(np.sort(p.mean(0)[host])[-4:].sum())
    near, chosen, best = np.mean(near), np.mean(chosen), np.mean(best)
    assert result.queries == sum(max(t - 3, 0) // 4 * 4 > 4 for t in range(30))
    np.testing.assert_allclose(result.kept_by_layer[0], near + chosen, rtol=1e-4)
    np.testing.assert_allclose(result.best_by_layer[0], near + best, rtol=1e-4)
    np.testing.assert_allclose(result.recall_by_layer[0], chosen / best, rtol=1e-4)
    assert result.recall_by_layer[1] is None
    np.testing.assert_allclose(result.recall, (result.recall_by_layer[0] + result.recall_by_layer[2]) / 2)
    assert result.recall_by_layer[2] < result.recall_by_layer[0] <= 1


@pytest.mark.slow
def test_nothing_to_measure_is_refused():
    tokens = np.asarray(small.prompts([30]), np.int32)
    with pytest.raises(InputError, match="keeps no layer"):
        selection_recall(small.model(), vj.FullPrecision(), None, tokens, progress=False)
    with pytest.raises(InputError, match="are read whole"):
        selection_recall(small.model(), METHOD, None, tokens[:, :9], progress=False)
