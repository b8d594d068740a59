"""What the layers of a method are calibrated with in common."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.caches import FullPrecision, PerLayer, VecInfer
from vecinfer_jax.calibration.codebooks import codebook_by_position, pooled_codebook
from vecinfer_jax.calibration.store import load_calibration


@pytest.mark.slow
def test_a_global_codebook_is_the_same_in_every_layer(tmp_path):
    method = VecInfer(bits=2, scope="global", residual=4, transform="smooth-hadamard")
    calibration = small.calibration_of(method)
    for layer in calibration.layers:
        assert set(layer) == {"smooth", "key_codebook", "value_codebook"}
        for name in ("key_codebook", "value_codebook"):
            assert layer[name].shape == (1, 256, 4)
            np.testing.assert_array_equal(layer[name], calibration.layers[0][name])
    assert not np.array_equal(calibration.layers[0]["key_codebook"], calibration.layers[0]["value_codebook"])
    read = load_calibration(calibration.save(tmp_path / "global"), small.model(), method)
    np.testing.assert_array_equal(read.layers[2]["key_codebook"], calibration.layers[0]["key_codebook"])
    out = vj.generate(small.model(), small.prompts([20, 9]), method=method, calibration=read, max_new_tokens=6)
    assert [len(tokens) for tokens in out.tokens] == [6, 6]


def test_it_is_fitted_to_the_layers_that_share_it_only():
    method = VecInfer(bits=2, scope="global", residual=4, transform="smooth-hadamard")
    window = VecInfer(
        bits=2, scope="global", residual=8, transform="smooth-hadamard"
    )  # a window is no matter of codebooks
    other = VecInfer(bits=2, scope="global", transform="none")
    mixed = small.calibration_of(PerLayer(method, ((1, window), (2, FullPrecision()))))
    apart = small.calibration_of(PerLayer(method, ((1, other), (2, FullPrecision()))))
    whole = small.calibration_of(method)
    assert mixed.layers[2] == {}
    np.testing.assert_array_equal(mixed.layers[0]["key_codebook"], mixed.layers[1]["key_codebook"])
    assert not np.array_equal(apart.layers[0]["value_codebook"], apart.layers[1]["value_codebook"])
    assert not np.array_equal(mixed.layers[0]["key_codebook"], whole.layers[0]["key_codebook"])


@dataclasses.dataclass(frozen=True)
class Counting(FullPrecision):
    """Says which layers were shown to it together."""

    mark: int = 0
    name: ClassVar[str] = "counting"
    needs_calibration: ClassVar[bool] = True

    def calibration_key(self):
        return {"method": self.name, "mark": self.mark}

    def shared_calibration(self, layers, statistics, seed):
        assert len(layers) == len(statistics)
        CALLS.append((self.mark, [layer.index for layer in layers]))
        return sum(float(s.count) for s in statistics)

    def calibrate_layer(self, layer, statistics, seed, shared=None):
        return {"sum": np.array([shared])}


CALLS: list = []


def test_the_hook_is_called_once_for_every_distinct_method_with_the_layers_it_serves():
    CALLS.clear()
    calibration = small.calibration_of(PerLayer(Counting(), ((1, Counting(mark=1)),)))
    assert CALLS == [(0, [0, 2]), (1, [1])]
    assert [float(layer["sum"][0]) for layer in calibration.layers] == [768.0, 384.0, 768.0]


def test_every_head_of_every_layer_has_an_equal_share_of_a_pooled_codebook():
    """Layers of 1 and 3 heads, each head around its own number: one centroid each."""
    one = np.full((50, 1, 8), 1.0, np.float32)
    three = np.stack([np.full((400, 8), float(x), np.float32) for x in (2, 3, 4)], axis=1)
    book = pooled_codebook([one, three], length=2, entries=4, seed=0)
    assert book.shape == (1, 4, 2)
    np.testing.assert_allclose(np.sort(book[0, :, 0]), [1, 2, 3, 4], atol=1e-5)
    mean = pooled_codebook([one, three], length=2, entries=1, seed=0)
    np.testing.assert_allclose(mean, 2.5, atol=1e-5)


def test_codebooks_by_position_are_of_their_head_and_position():
    channel = np.arange(8, dtype=np.float32) + 10 * np.arange(2, dtype=np.float32)[:, None]
    vectors = np.broadcast_to(channel, (40, 2, 8))
    books = codebook_by_position(vectors, length=2, entries=2, seed=0)
    np.testing.assert_allclose(books[:, 0], channel.reshape(8, 2))


def test_text_too_short_for_a_shared_codebook_is_refused():
    with pytest.raises(vj.VecInferError, match="more text"):
        pooled_codebook([np.zeros((4, 1, 8), np.float32)], length=2, entries=256, seed=0)
