"""The last refinement of a calibration: gradient descent on the predictions of the whole model.

The loss is the divergence of the model's predictions with coded keys and values from its own with exact ones, so no
labels are needed. Codes are straight-through (`vecinfer_jax.calibration.refine`), also for what lies before them: keys
and values are moved as if they were read as they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from vecinfer_jax.caches.base import NO_AXES, CacheMethod, Chunk, LayerShape, total
from vecinfer_jax.calibration.fisher import gradient_by_rows
from vecinfer_jax.calibration.refine import (
    Arrays,
    coded_attention,
    optimiser_of,
    passes,
    rates_for,
    sizes_of,
    unscaled,
)
from vecinfer_jax.models.decoder import DecoderLayer, layer_shape
from vecinfer_jax.models.layerwise import head_of, unembed
from vecinfer_jax.parallel.share import Share
from vecinfer_jax.rope import apply_rope

# Adam's rates, as shares of an array's root mean square, which fall to 0 as a cosine (less for finer codes,
# `rates_for`); steps at least, and as many passes over the passages.
RATES = {"key_codebook": 5e-3, "value_codebook": 5e-3, "query_map": 2.5e-3}
STEPS, PASSES = 256, 2


class Differentiable(CacheMethod):
    """Attention over a layer's keys and values as `coded_attention` reads them; its cache are the layer's arrays."""

    name: ClassVar[str] = "differentiable"

    def __init__(self, sink: int) -> None:
        self.sink = sink

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: Any = None) -> Any:
        return calibration

    def prefill(self, q: Array, k: Array, v: Array, chunk: Chunk, cache: Any) -> tuple[Array, Any]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
        out = coded_attention(wide_q, chunk.positions, wide_k, wide_v, cache, self.sink, through=True)
        return out.astype(q.dtype), cache

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        raise NotImplementedError("codebooks are refined on passages, not while decoding")

    def bits_per_element(self, layer: LayerShape) -> float:
        return 0.0


def refine_model(
    lm: Any,
    params: Any,
    layers: Sequence[Mapping[str, np.ndarray]],
    sinks: Sequence[int],
    passages: Sequence[Sequence[int]],
    *,
    seed: int,
    steps: int | None = None,
    progress: bool = False,
) -> list[dict[str, np.ndarray]]:
    """The layers' arrays moved so that the model predicts what it does with full precision's cache.

    The loss is KL(full || coded) in the mean over a passage's predictions, one passage a step; layers are run one at a
    time, forward and then backward, so that one compiled layer serves all and one layer's attention is in memory.
    params: the model's, with the values' transform folded in; sinks: of each layer's method; steps: by default the
    larger of 256 and twice the number of passages.
    """
    longest = max(map(len, passages))
    whole = [row for row in passages if len(row) == longest]  # a shorter one would be compiled anew
    steps = max(STEPS, PASSES * len(whole)) if steps is None else steps
    config, dtype = lm.config, jnp.dtype(lm.dtype)
    # One passage is run at a time: what splits it is the model axis.
    share = None if lm.layout is None else Share(config, lm.layout, lm.layout.axes_of_texts(1, context=False))
    names = [f"layers_{index}" for index in range(config.num_layers)]
    head = head_of(params)
    held = [{name: jnp.asarray(array, jnp.float32) for name, array in layer.items()} for layer in layers]
    sizes = [sizes_of({name: layer[name] for name in RATES}) for layer in held]
    scaled = [{name: layer[name] / size[name] for name in RATES} for layer, size in zip(held, sizes, strict=True)]
    rates = [tuple(rates_for(RATES, layer).items()) for layer in held]
    states = [optimiser_of(dict(of_layer), steps).init(one) for of_layer, one in zip(rates, scaled, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def update(rates: Any, scaled: Arrays, state: Any, gradient: Arrays, size: Arrays) -> tuple[Any, Any]:
        updates, state = optimiser_of(dict(rates), steps).update(
            {name: gradient[name] * size[name] for name in size}, state, scaled
        )
        return optax.apply_updates(scaled, updates), state

    order = passes(len(whole), steps, seed)
    exact: dict[int, np.ndarray] = {}  # the last layer's output, on the host, of passages that come again
    for index in tqdm(order, "predictions", disable=not progress, unit="step"):
        tokens = jnp.asarray(whole[index], jnp.int32)
        positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
        cos, sin = config.rope.cos_sin(positions)
        x = embedded = params["embed"][tokens][None]
        inputs = []
        arrays = [{**layer, **unscaled(s, size)} for layer, s, size in zip(held, scaled, sizes, strict=True)]
        for name, layer, sink in zip(names, arrays, sinks, strict=True):
            inputs.append(x)
            x = _forward(config, dtype, share, sink, params[name], x, layer, positions, cos, sin)
        if index in exact:
            full = jnp.asarray(exact[index])[None]
        else:
            full = embedded
            for name, sink in zip(names, sinks, strict=True):
                full = _forward(config, dtype, share, sink, params[name], full, {}, positions, cos, sin)
            if len(whole) < steps:
                exact[index] = np.asarray(full[0])
        gradient = _divergence_gradient(config, dtype, head, x[0], full[0])[None]
        for at in reversed(range(len(names))):
            of_layer = params[names[at]], inputs[at], arrays[at]
            gradient, of_arrays = _backward(config, dtype, share, sinks[at], *of_layer, positions, cos, sin, gradient)
            scaled[at], states[at] = update(rates[at], scaled[at], states[at], of_arrays, sizes[at])
    return [
        {**layer, **{name: np.asarray(array) for name, array in unscaled(s, size).items()}}
        for layer, s, size in zip(layers, scaled, sizes, strict=True)
    ]


def _layer_output(
    config: Any,
    dtype: Any,
    share: Share | None,
    sink: int,
    params: Any,
    x: Float[Array, "1 T hidden"],
    arrays: Arrays,
    positions: Int[Array, "1 T"],
    cos: Array,
    sin: Array,
) -> Float[Array, "1 T hidden"]:
    """On one device, or of a device's share."""
    axes = NO_AXES if share is None else share.axes
    if share is not None:
        config = share.of_device
    lengths = jnp.full((x.shape[0],), x.shape[1], jnp.int32)
    chunk = Chunk(positions, lengths, cos, sin, layer=layer_shape(config, 0, dtype, axes))
    out: Any = DecoderLayer(config, dtype).apply({"params": params}, x, chunk, arrays, Differentiable(sink), False)
    return out[0]  # type: ignore[no-any-return]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forward(
    config: Any, dtype: Any, share: Share | None, sink: int, params: Any, x: Array, arrays: Arrays, *places: Array
) -> Float[Array, "1 T hidden"]:
    """A layer's output; `places`: positions, cos and sin."""

    def run(params: Any, x: Array, arrays: Arrays, *places: Array) -> Array:
        return _layer_output(config, dtype, share, sink, params, x, arrays, *places)

    if share is not None:
        return _mapped(run, share, PartitionSpec(), params, x, arrays, *places)
    return run(params, x, arrays, *places)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(
    config: Any,
    dtype: Any,
    share: Share | None,
    sink: int,
    params: Any,
    x: Float[Array, "1 T hidden"],
    arrays: Arrays,
    positions: Int[Array, "1 T"],
    cos: Array,
    sin: Array,
    gradient: Float[Array, "1 T hidden"],
) -> tuple[Float[Array, "1 T hidden"], Arrays]:
    """Gradients with respect to a layer's input and its arrays, from that with respect to its output.

    Over a mesh, inside the mapped function: XLA (of JAX 0.11) crashes where some of what a gradient keeps leaves it.
    """
    split = {} if share is None else _by_head(share, arrays)

    def run(params: Any, x: Array, arrays: Arrays, *places: Array) -> tuple[Array, Arrays]:
        def output(x: Array, arrays: Arrays) -> Array:
            return _layer_output(config, dtype, share, sink, params, x, arrays, *places[:3])

        _, back = jax.vjp(output, x, arrays)
        if share is None:
            return back(places[3])
        # Every device has the output, and an input of its own: what it changes there is its part of the gradient.
        of_input, of_arrays = back(places[3] / share.layout.size("model"))
        axis = share.axes.model
        return total(of_input, axis), {
            name: array if split[name] != PartitionSpec() else total(array, axis) for name, array in of_arrays.items()
        }

    if share is not None:
        out = PartitionSpec(), split
        return _mapped(run, share, out, params, x, arrays, positions, cos, sin, gradient)
    return run(params, x, arrays, positions, cos, sin, gradient)


def _mapped(
    run: Callable[..., Any], share: Share, out: Any, params: Any, x: Array, arrays: Arrays, *others: Array
) -> Any:
    """run(params, x, arrays, *others) on every device's share of weights and of what arrays have a part of a head."""

    def without_caches(params: Any, _: Any, *inputs: Any) -> tuple[Any, Any]:
        return run(params, *inputs), ()

    specs = PartitionSpec(), _by_head(share, arrays), *[PartitionSpec()] * len(others)
    return share.mapped(without_caches, params, (), (x, arrays, *others), specs, out)[0]


def _by_head(share: Share, arrays: Arrays) -> dict[str, PartitionSpec]:
    """Specs of a layer's arrays by their first axes: KV heads, or one for all of them."""
    of_head, heads = PartitionSpec(share.axes.model), share.config.num_kv_heads
    return {name: of_head if len(array) == heads else PartitionSpec() for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divergence_gradient(
    config: Any, dtype: Any, head: Any, hidden: Float[Array, "T hidden"], full: Float[Array, "T hidden"]
) -> Float[Array, "T hidden"]:
    """Gradient of the mean KL(full || coded) of predictions, with respect to the last layer's output."""
    count = hidden.shape[0]

    def logits(x: Array) -> Array:
        return unembed(config, dtype, head, x)

    def loss(ours: Array, exact: Array) -> Array:  # the KL but for its constant part
        return -jnp.sum(jax.nn.softmax(logits(exact)) * jax.nn.log_softmax(ours)) / count

    return gradient_by_rows(logits, loss, hidden, full)
