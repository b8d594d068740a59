"""Perplexity is that of an independent computation, and decoding agrees with its own rescoring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.errors import InputError
from vecinfer_jax.evaluation.perplexity import agreement, full_precision_hidden, rescoring_kl, text_windows
from vecinfer_jax.models.decoder import Decoder

TEXT = "".join(small.texts())


def test_full_precision_perplexity_is_the_mean_likelihood():
    lm = small.model()
    result = vj.evaluate.perplexity(lm, text=TEXT, length=50, windows=3, progress=False)
    ids = lm.tokenizer.encode(TEXT)
    method = vj.FullPrecision()
    decoder = Decoder(lm.config, method, lm.dtype)
    nll = []
    for window in range(3):
        tokens = jnp.asarray(ids[50 * window : 50 * window + 50])
        caches = tuple(method.init(decoder.layer_shape(i), 1, 50) for i in range(lm.config.num_layers))
        logits, _ = decoder.apply({"params": lm.params}, tokens[None], jnp.arange(50)[None], caches)
        p = jax.nn.log_softmax(logits[0, :-1])
        nll.append(-np.asarray(p)[np.arange(49), np.asarray(tokens[1:])])
    assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert result.predictions == 3 * 49
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.full_perplexity
    assert 50 < result.perplexity < 500  # a random model over 128 tokens


def test_strict_reading_costs_and_a_window_over_everything_does_not():
    lm = small.model()
    strict, window = (
        vj.VecInfer(bits=1, residual=0, transform="smooth-hadamard"),
        vj.VecInfer(bits=1, residual=64, transform="smooth-hadamard"),
    )
    calibration = small.calibration_of(strict)
    options = {"text": TEXT, "length": 60, "windows": 2, "progress": False}
    coded = vj.evaluate.perplexity(lm, strict, calibration, **options)
    kept = vj.evaluate.perplexity(lm, window, calibration, **options)
    exact = vj.evaluate.perplexity(lm, strict, calibration, prefill="exact", **options)
    assert coded.kl > 1e-4
    assert kept.kl == pytest.approx(0, abs=1e-6)
    assert exact.kl == pytest.approx(0, abs=1e-6)
    assert coded.bits_per_element == 1


def test_windows_may_be_run_together_and_the_reference_computed_once():
    lm, method = small.model(), vj.VecInfer(bits=1, residual=0, transform="smooth-hadamard")
    calibration = small.calibration_of(method)
    options = {"text": TEXT, "length": 60, "windows": 3, "progress": False}
    alone = vj.evaluate.perplexity(lm, method, calibration, **options)
    windows = text_windows(lm, TEXT, 60, 3)
    reference = full_precision_hidden(lm, windows, batch=3, progress=False)
    together = vj.evaluate.perplexity(lm, method, calibration, batch=2, reference=reference, **options)
    assert together.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert together.kl == pytest.approx(alone.kl, rel=1e-4)
    with pytest.raises(InputError, match="other windows"):
        vj.evaluate.perplexity(lm, method, calibration, reference=reference[:2], **options)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(vj.VecInfer(bits=2, residual=0, transform="smooth-hadamard"), marks=pytest.mark.slow),
        vj.VecInfer(bits=2, residual=8, sink=2, transform="smooth-hadamard"),
    ],
)
def test_decoding_step_by_step_agrees_with_scoring_at_once(method):
    tokens = small.prompts([60])[0]
    calibration = small.calibration_of(method)
    against_itself = rescoring_kl(small.model(), method, calibration, tokens, start=1)
    against_full, top1 = agreement(small.model(), method, calibration, tokens, start=1)
    assert against_itself < 1e-5
    assert against_full > 10 * against_itself
    assert 0 < top1 <= 1


@pytest.mark.parametrize(
    "options", [{"length": 5000}, {"length": 1}, {"windows": 99}, {"windows": 0}, {"prefill": "magic"}]
)
def test_what_cannot_be_scored_is_one_line(options):
    with pytest.raises(vj.VecInferError) as error:
        vj.evaluate.perplexity(small.model(), text=TEXT, **({"length": 50} | options), progress=False)
    assert "\n" not in str(error.value)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="fewer than one window"):
        vj.evaluate.perplexity(small.model(), text="short", length=50, progress=False)


def test_results_are_json():
    import dataclasses
    import json

    result = vj.evaluate.perplexity(small.model(), text=TEXT, length=50, windows=1, progress=False)
    assert set(json.loads(json.dumps(dataclasses.asdict(result)))) >= {
        "perplexity",
        "kl",
        "top1_agreement",
        "bits_per_element",
    }
    assert np.isfinite(result.perplexity)
