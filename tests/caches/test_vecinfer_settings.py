"""Settings that make no sense are refused in one line."""

import jax.numpy as jnp
import pytest

from tests import small
from vecinfer_jax.caches import PerLayer, VecInfer
from vecinfer_jax.caches.formats import CodeFormat
from vecinfer_jax.errors import InputError
from vecinfer_jax.models.decoder import layer_shape
from vecinfer_jax.rope import Rope


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 7},
        {"bits": 0},
        {"key": "d3b8"},
        {"value": "4bits"},
        {"key": "d4b17"},
        {"transform": "fourier"},
        {"scope": "galaxy"},
        {"residual": -1},
        {"sink": 1.5},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(InputError) as error:
        VecInfer(**settings)
    assert "\n" not in str(error.value)


def test_a_format_that_does_not_divide_the_head_is_refused():
    layer = layer_shape(small.CONFIG, 0, jnp.float32)
    with pytest.raises(InputError, match="whole bytes"):
        VecInfer(key="d16b12").validate(layer)


def test_hadamard_needs_a_power_of_two():
    import dataclasses

    layer = dataclasses.replace(layer_shape(small.CONFIG, 0, jnp.float32), head_dim=80, rope=Rope(1e4, 80))
    with pytest.raises(InputError, match="power of two"):
        VecInfer(bits=2, transform="smooth-hadamard").validate(layer)
    for transform in ("smooth", "metric"):
        VecInfer(bits=2, transform=transform).validate(layer)


def test_the_first_token_is_exact_where_the_mean_is_taken_off():
    assert (VecInfer().transform, VecInfer().sink) == ("metric", 1)
    assert VecInfer(transform="smooth-hadamard").sink == 0  # the paper
    assert (VecInfer(sink=0).sink, VecInfer(transform="none", sink=3).sink) == (0, 3)


def test_formats_read_back():
    assert str(CodeFormat.parse("d8b12")) == "d8b12"
    assert CodeFormat.parse("d8b12").bits == 1.5
    assert CodeFormat.parse("d4b10").bytes_per_token(64) == 20


def test_an_override_of_a_layer_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="layer 9"):
        PerLayer(VecInfer(), ((9, VecInfer(bits=4)),)).for_layer(0, 3)
