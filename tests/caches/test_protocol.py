"""What the protocol carries for methods to come: folded values, the prefetch hook, bytes by kind."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.caches import METHODS, FullPrecision, PerLayer, VecInfer, allocated_bytes
from vecinfer_jax.caches.base import CacheMethod, array_field
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.folding import fold_values


def rotation(heads: int, dim: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(heads)]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RotatedValues(FullPrecision):
    """Keeps values rotated per KV head: W_v gets the rotation, W_o its inverse."""

    name: ClassVar[str] = "rotated-values"

    def fold_values(self, layer, calibration, v_kernel, v_bias, o_kernel):
        turn = jnp.asarray(calibration["rotation"])
        per_query_head = jnp.repeat(turn, layer.group, axis=0)
        return (
            jnp.einsum("xhd,hde->xhe", v_kernel, turn, precision="highest"),
            None if v_bias is None else jnp.einsum("hd,hde->he", v_bias, turn, precision="highest"),
            jnp.einsum("hdx,hde->hex", o_kernel, per_query_head, precision="highest"),
        )


def test_values_transformed_in_copies_of_the_weights_change_nothing_else():
    lm = small.model()
    turn = rotation(lm.config.num_kv_heads, lm.config.head_dim)
    method = RotatedValues()
    calibration = Calibration(tuple({"rotation": turn} for _ in range(3)), {"method": method.calibration_key()})
    folded = fold_values(lm, method, calibration)
    before = np.asarray(lm.params["layers_0"]["attention"]["v_proj"]["kernel"])
    assert not np.allclose(folded["layers_0"]["attention"]["v_proj"]["kernel"], before)
    assert folded["layers_0"]["feed_forward"] is lm.params["layers_0"]["feed_forward"]  # shared, not copied

    tokens = jnp.asarray(small.prompts([20]))
    positions = jnp.arange(20)[None]

    def logits_and_values(method, params):
        decoder = Decoder(lm.config, method, lm.dtype)
        caches = tuple(method.init(decoder.layer_shape(i), 1, 20) for i in range(3))
        logits, caches = decoder.apply({"params": params}, tokens, positions, caches)
        return logits, caches[0].values

    plain, values = logits_and_values(FullPrecision(), lm.params)
    turned, turned_values = logits_and_values(method, folded)
    np.testing.assert_allclose(turned, plain, atol=1e-4)
    np.testing.assert_allclose(turned_values, jnp.einsum("bshd,hde->bshe", values, turn), atol=1e-4)
    np.testing.assert_array_equal(lm.params["layers_0"]["attention"]["v_proj"]["kernel"], before)


@struct.dataclass
class SpyCache:
    """A full-precision cache and what the prefetch hook saw."""

    inner: object
    hidden: jax.Array = array_field("state")
    query: jax.Array = array_field("state")


@dataclasses.dataclass(frozen=True)
class Spy(FullPrecision):
    name: ClassVar[str] = "spy"

    def init(self, layer, batch, capacity, calibration=None):
        inner = super().init(layer, batch, capacity, calibration)
        hidden = jnp.zeros((batch, 20, small.CONFIG.hidden_size))
        return SpyCache(inner, hidden, jnp.zeros((batch, 20, layer.num_query_heads, layer.head_dim)))

    def prefetch(self, hidden, project_query, chunk, cache):
        return dataclasses.replace(cache, hidden=hidden, query=project_query(hidden))

    def prefill(self, q, k, v, chunk, cache):
        out, inner = super().prefill(q, k, v, chunk, cache.inner)
        return out, dataclasses.replace(cache, inner=inner)


def test_the_prefetch_hook_sees_the_previous_layers_normed_input_and_this_layers_query_projection():
    lm = small.model()
    decoder = Decoder(lm.config, Spy(), lm.dtype)
    caches = tuple(Spy().init(decoder.layer_shape(i), 1, 20) for i in range(3))
    tokens = jnp.asarray(small.prompts([20]))
    _, caches = decoder.apply({"params": lm.params}, tokens, jnp.arange(20)[None], caches)
    assert not np.any(caches[0].hidden)  # the first layer has no previous one
    embedded = lm.params["embed"][tokens[0]]
    scale = lm.params["layers_0"]["input_norm"]["scale"]
    mean_square = jnp.mean(embedded**2, -1, keepdims=True)
    normed = embedded / jnp.sqrt(mean_square + lm.config.rms_norm_eps) * scale
    np.testing.assert_allclose(caches[1].hidden[0], normed, atol=1e-5)
    kernel = lm.params["layers_1"]["attention"]["q_proj"]["kernel"]
    query = jnp.einsum("tx,xhd->thd", normed, kernel, precision="highest")
    np.testing.assert_allclose(caches[1].query[0], query, atol=1e-4)


def test_different_layers_generate_with_their_own_method():
    method = PerLayer(
        VecInfer(bits=2, residual=4, transform="smooth-hadamard"),
        ((0, FullPrecision()), (1, VecInfer(bits=4, residual=4, transform="smooth-hadamard"))),
    )
    calibration = small.calibration_of(method)
    assert calibration.layers[0] == {}
    assert calibration.layers[1]["key_codebook"].shape[-1] == 2
    assert calibration.layers[2]["key_codebook"].shape[-1] == 4
    out = vj.generate(small.model(), small.prompts([20]), method=method, calibration=calibration, max_new_tokens=8)
    assert len(out.tokens[0]) == 8
    bits = vj.evaluate.perplexity(
        small.model(), method, calibration, "".join(small.texts()), length=40, windows=1, progress=False
    ).bits_per_element
    assert bits == (32 + 4 + 2) / 3


def test_bytes_are_counted_by_kind_on_shapes_and_arrays_alike():
    method = VecInfer(bits=2, residual=8, sink=2, transform="smooth-hadamard")
    lm = small.model()
    decoder = Decoder(lm.config, method, lm.dtype)
    layers = small.calibration_of(method).layers

    def init():
        return tuple(method.init(decoder.layer_shape(i), 2, 100, layers[i]) for i in range(3))

    assert allocated_bytes(jax.eval_shape(init)) == allocated_bytes(init())
    sizes = allocated_bytes(init())
    assert sizes["total"] == sum(x.nbytes for x in jax.tree.leaves(init()))
    assert all(sizes[kind] > 0 for kind in ("codes", "codebooks", "window", "state"))


def test_every_method_on_the_command_line_is_a_frozen_hashable_setting():
    for name, method in METHODS.items():
        assert issubclass(method, CacheMethod) and method.name == name
        assert hash(method()) == hash(method())
        assert method() == method()


def test_a_per_layer_method_within_another_is_resolved():
    coded = vj.HadamardInt(bits=2)
    nested = vj.PerLayer(vj.PerLayer(vj.FullPrecision(), ((1, coded),)), ((2, coded),))
    assert [nested.for_layer(i, 3) for i in range(3)] == [vj.FullPrecision(), coded, coded]
