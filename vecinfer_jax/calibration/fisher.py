"""Gradients of the language model's loss with respect to every token's keys and values: the diagonal Fisher
information of KVQuant (arXiv 2401.18079, section 3.3) is their square.

The model is run backwards layer by layer from the inputs that a pass forwards left, so that one layer's intermediate
values exist at a time and one program serves every layer. Of each batch of passages only the gradients of those tokens
stay whose keys and values `Statistics` samples.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int

from vecinfer_jax.caches.attention import causal_attention
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape
from vecinfer_jax.calibration.statistics import draw
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.models.decoder import DecoderLayer, layer_shape
from vecinfer_jax.models.layerwise import head_of, unembed
from vecinfer_jax.rope import apply_rope

# Rows of the [tokens, vocabulary] logits that exist at one time.
LOGIT_ROWS = 256


@struct.dataclass
class GradientSample:
    """Of one layer: gradients bfloat16[n, Hkv, D] of the tokens that `LayerStatistics` holds, in its order.

    priority: as there. Gradients have a float32's range; that they keep 8 bits does not matter in a weight.
    """

    keys: Float[Array, "n Hkv D"]
    values: Float[Array, "n Hkv D"]
    priority: Float32[Array, "n"]


class GradientSampler:
    """Gradients of the tokens that `Statistics(samples, seed)` samples, batch after batch.

    The loss is the negative log-likelihood of a passage's tokens, summed; passages do not see each other, so a batch
    gives each passage's own gradients.
    """

    def __init__(self, lm: LanguageModel, samples: int, seed: int) -> None:
        self.lm, self.seed, self.draws = lm, seed, 0
        c = lm.config

        def empty() -> Float[Array, "n Hkv D"]:
            return jnp.zeros((samples, c.num_kv_heads, c.head_dim), jnp.bfloat16)

        def none() -> Float32[Array, "n"]:
            return jnp.full((samples,), jnp.inf, jnp.float32)

        layers = [GradientSample(empty(), empty(), none()) for _ in range(c.num_layers)]
        self.layers = layers if lm.layout is None else jax.device_put(layers, lm.layout.sharding())

    def add(
        self,
        tokens: Int[np.ndarray, "B T"],
        lengths: Int[np.ndarray, "B"],
        inputs: Sequence[Float[Array, "B T hidden"]],
        out: Float[Array, "B T hidden"],
    ) -> None:
        """A batch of passages: every layer's input and the last one's output, as `Layerwise.prefill` gives them."""
        c, dtype = self.lm.config, jnp.dtype(self.lm.dtype)
        at, draws = jnp.asarray(lengths, jnp.int32), jnp.int32(self.draws)
        gradient = _loss_gradient(c, dtype, head_of(self.lm.params), out, jnp.asarray(tokens), at)
        for index in reversed(range(c.num_layers)):
            params = self.lm.params[f"layers_{index}"]
            gradient, of_keys, of_values = layer_gradients(c, dtype, params, inputs[index], gradient, at)
            self.layers[index] = _sampled(self.seed, self.layers[index], of_keys, of_values, at, draws)
        self.draws += 1


@dataclasses.dataclass(frozen=True)
class _Shifted(CacheMethod):
    """Exact attention with its cache, a pair [B, T, Hkv, D], added to the keys before RoPE and to the values."""

    name: ClassVar[str] = "shifted"

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> Any:
        zeros = jnp.zeros((batch, capacity, layer.num_kv_heads, layer.head_dim), layer.dtype)
        return zeros, zeros

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: Any,
    ) -> tuple[Float[Array, "B T Hq D"], Any]:
        k, v = k + cache[0], v + cache[1]
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        return causal_attention(q, k, v, chunk.lengths, chunk.layer.scale), cache

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        raise NotImplementedError("gradients are taken over passages, not while decoding")

    def bits_per_element(self, layer: LayerShape) -> float:
        return 8.0 * jnp.dtype(layer.dtype).itemsize


@functools.partial(jax.jit, static_argnums=(0, 1))
def layer_gradients(
    config: ModelConfig,
    dtype: Any,
    params: Any,
    x: Float[Array, "B T hidden"],
    gradient: Float[Array, "B T hidden"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T hidden"], Float[Array, "B T Hkv D"], Float[Array, "B T Hkv D"]]:
    """From the gradient at a layer's output to those at its input, at its keys before RoPE and at its values."""
    batch, width = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    cos, sin = config.rope.cos_sin(positions)
    layer, method = layer_shape(config, 0, dtype), _Shifted()
    chunk = Chunk(positions, lengths, cos, sin, layer=layer)

    def run(x: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        done: Any = DecoderLayer(config, dtype).apply({"params": params}, x, chunk, (k, v), method, False, None)
        return done[0]

    _, back = jax.vjp(run, x, *method.init(layer, batch, width))
    return back(gradient)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_gradient(
    config: ModelConfig,
    dtype: Any,
    head: Any,
    hidden: Float[Array, "B T hidden"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B T hidden"]:
    """The gradient of the summed loss at the last layer's output; logits exist a block of rows at a time."""
    batch, width = tokens.shape
    targets = jnp.roll(tokens, -1, axis=1)
    counts = jnp.arange(width)[None, :] < lengths[:, None] - 1

    def loss(logits: Array, target: Array, count: Array) -> Array:
        likelihood = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.where(count, jnp.take_along_axis(likelihood, target[:, None], 1)[:, 0], 0.0))

    rows = (x.reshape(batch * width, *x.shape[2:]) for x in (hidden, targets, counts))
    return gradient_by_rows(lambda x: unembed(config, dtype, head, x), loss, *rows).reshape(hidden.shape)


def gradient_by_rows(
    logits: Callable[[Array], Array], loss: Callable[..., Array], hidden: Float[Array, "N hidden"], *others: Array
) -> Float[Array, "N hidden"]:
    """The gradient at `hidden` of the sum over rows of loss(logits(hidden), *others); logits exist a block of rows at a
    time. Rows of zeros (false) fill the last block."""
    count = hidden.shape[0]

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, -count % LOGIT_ROWS)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, LOGIT_ROWS, *x.shape[1:])

    def block(args: tuple[Array, ...]) -> Array:
        x, *rest = args
        return jax.grad(lambda x: loss(logits(x), *rest))(x)

    out = jax.lax.map(block, tuple(map(blocks, (hidden, *others))))
    return out.reshape(-1, hidden.shape[-1])[:count]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _sampled(
    seed: int,
    sample: GradientSample,
    of_keys: Float[Array, "B T Hkv D"],
    of_values: Float[Array, "B T Hkv D"],
    lengths: Int[Array, "B"],
    draws: Int[Array, ""],
) -> GradientSample:
    """The sample with a batch's tokens among those it is drawn from."""
    counts = (jnp.arange(of_keys.shape[1])[None, :] < lengths[:, None]).reshape(-1)
    priority, keep = draw(seed, draws, counts, sample.priority)

    def kept(old: Array, new: Array) -> Array:
        return jnp.concatenate([old, new.reshape(-1, *new.shape[2:]).astype(old.dtype)])[keep]

    return GradientSample(kept(sample.keys, of_keys), kept(sample.values, of_values), priority[keep])
