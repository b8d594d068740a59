"""Gold likelihoods are the model's, greedy answers are `generate`'s, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from tests.evaluation.stand_in import StandIn
from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.models.decoder import Decoder

METHODS = [
    vj.FullPrecision(),
    vj.VecInfer(bits=2, residual=4, sink=1, transform="smooth-hadamard"),
    vj.VecInfer(bits=1, residual=0, transform="smooth-hadamard"),
]


def run(method, **options):
    settings = {"prefill": "coded", "batch": 2, "progress": False} | options
    calibration = None if method is None else small.calibration_of(method)
    return vj.evaluate.answer(small.model(), StandIn(), method, calibration, **settings)


@pytest.mark.slow
def test_the_golds_likelihood_is_the_models():
    lm, task = small.model(), StandIn()
    decoder = Decoder(lm.config, vj.FullPrecision(), lm.dtype)
    expected = []
    for case in task.cases(lm):
        ids = jnp.asarray(case.prompt + case.gold)[None]
        n = ids.shape[1]
        caches = tuple(vj.FullPrecision().init(decoder.layer_shape(i), 1, n) for i in range(lm.config.num_layers))
        logits, _ = decoder.apply({"params": lm.params}, ids, jnp.arange(n)[None], caches)
        p = np.asarray(jax.nn.log_softmax(logits[0]))
        expected.append(-sum(p[t - 1, ids[0, t]] for t in range(len(case.prompt), n)))
    result = run(None)
    np.testing.assert_allclose([a.gold_nll for a in result.answers], expected, rtol=1e-5)
    assert result.gold_nll == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.gold_nll_per_token == pytest.approx(sum(expected) / (4 + 5 + 6 + 7 + 8), rel=1e-5)


@pytest.mark.parametrize("prefill", ["coded", "exact"])
@pytest.mark.parametrize("method", [*METHODS[:-1], pytest.param(METHODS[-1], marks=pytest.mark.slow)], ids=repr)
def test_greedy_answers_are_those_of_generate(method, prefill):
    result = run(method, prefill=prefill)
    cases = StandIn().cases(small.model())[:3]
    out = vj.generate(
        small.model(),
        [list(case.prompt) for case in cases],
        method=method,
        calibration=small.calibration_of(method),
        max_new_tokens=8,
        prefill=prefill,
    )
    assert [a.text for a in result.answers] == [*out.texts, None, None]
    assert result.answered == 3
    assert result.score == pytest.approx(sum(StandIn().judge(cases[0], text) for text in out.texts))


@pytest.mark.slow
def test_the_batch_makes_no_difference():
    method = METHODS[1]
    one, many = run(method, batch=1), run(method, batch=8)
    np.testing.assert_allclose(
        [a.gold_nll for a in one.answers], [a.gold_nll for a in many.answers], rtol=1e-4, atol=1e-4
    )
    assert [a.text for a in one.answers] == [a.text for a in many.answers]


@pytest.mark.slow
def test_a_coded_prompt_costs_and_a_window_over_everything_does_not():
    exact = run(None).gold_nll
    wide = vj.VecInfer(bits=1, residual=128, transform="smooth-hadamard")
    assert run(wide).gold_nll == pytest.approx(exact, rel=1e-5)
    assert abs(run(METHODS[2]).gold_nll - exact) > 1e-3
    coded, read = run(METHODS[2]), run(METHODS[2], prefill="exact")
    assert coded.gold_nll != pytest.approx(read.gold_nll, rel=1e-6)


def test_answers_keep_the_order_and_labels_of_the_cases():
    result = run(None)
    assert [a.labels["length"] for a in result.answers] == list(StandIn().lengths)
    assert [a.gold_tokens for a in result.answers] == [4, 5, 6, 7, 8]


def test_what_cannot_be_run_is_one_line():
    with pytest.raises(InputError, match="coded or exact"):
        run(None, prefill="magic")
    with pytest.raises(CapacityError, match="context of 1024"):
        vj.evaluate.answer(small.model(), StandIn(lengths=(1020,)), progress=False)


def test_generate_refuses_an_unknown_reading():
    with pytest.raises(InputError, match="exact or coded"):
        vj.generate(small.model(), [[1, 2]], prefill="magic")
