"""The error of codes is that of encoding and decoding."""

import dataclasses

import jax
import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.errors import InputError
from vecinfer_jax.models import random_model

LENGTH = 60  # no multiple of KIVI's group


def windows() -> np.ndarray:
    return np.asarray(small.prompts([LENGTH, LENGTH], seed=3), np.int32)


@pytest.mark.parametrize(
    "method",
    [
        vj.VecInfer(bits=2, transform="smooth-hadamard"),
        vj.KIVI(bits=2, group=16),
        vj.HadamardInt(bits=4),
        vj.PlainVQ(bits=2),
    ],
    ids=repr,
)
def test_errors_are_those_of_a_coder_of_that_width(method):
    result = vj.evaluate.code_error(small.model(), method, small.calibration_of(method), windows(), progress=False)
    assert len(result.key_error_by_layer) == small.CONFIG.num_layers
    low, high = {2: (0.03, 0.8), 4: (0.02, 0.2)}[int(method.bits)]
    assert low < result.key_error < high and low < result.value_error < high
    assert result.tokens == 2 * (48 if isinstance(method, vj.KIVI) else LENGTH)


@pytest.mark.slow
def test_keys_with_a_mean_are_coded_without_it_where_the_method_takes_it_off():
    plain = small.model()
    config = dataclasses.replace(plain.config, model_type="qwen2", qkv_bias=True)
    lm = dataclasses.replace(random_model(config, 0, "float32"), tokenizer=plain.tokenizer)
    for index in range(config.num_layers):
        projection = lm.params[f"layers_{index}"]["attention"]["k_proj"]
        projection["bias"] = 6 * jax.random.normal(jax.random.key(index), projection["bias"].shape)
    errors = {}
    for method in (
        vj.VecInfer(bits=2, transform="smooth-hadamard"),
        vj.VecInfer(bits=2, transform="mean-smooth-hadamard", sink=1),
    ):
        made = vj.calibrate(lm, method, small.texts(), passages=6, passage_length=64, batch=2, progress=False)
        result = vj.evaluate.code_error(lm, method, made, windows(), progress=False)
        errors[method.transform] = result.key_error
    assert errors["mean-smooth-hadamard"] < 0.95 * errors["smooth-hadamard"]


def test_a_window_without_a_whole_group_is_one_line():
    with pytest.raises(InputError, match="no whole group of 64"):
        vj.evaluate.code_error(small.model(), vj.KIVI(group=64), None, windows(), progress=False)


@pytest.mark.slow
def test_more_bits_make_smaller_errors():
    errors = []
    for bits in (1, 2, 4):
        method = vj.VecInfer(bits=bits, transform="smooth-hadamard")
        calibration = small.calibration_of(method)
        errors.append(vj.evaluate.code_error(small.model(), method, calibration, windows(), progress=False).key_error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.5 * errors[2]


def test_layers_without_codes_have_no_error():
    method = vj.PerLayer(vj.FullPrecision(), ((1, vj.HadamardInt(bits=2)),))
    result = vj.evaluate.code_error(small.model(), method, None, windows(), progress=False)
    assert result.key_error_by_layer[0] == result.key_error_by_layer[2] == 0
    assert result.key_error_by_layer[1] > 0.1
