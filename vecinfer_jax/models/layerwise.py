"""Running a model layer by layer, for evaluation and calibration.

Generation compiles the whole model as one program. Evaluation tries many methods on few texts, where compiling costs
more than running: here one layer is compiled and serves every layer with equal settings, and a cache that nobody asks
to keep exists for one layer at a time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from vecinfer_jax.caches.base import NO_AXES, CacheMethod, Chunk, LayerCache, ReadMode, settled
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.errors import InputError
from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.models.decoder import Decoder, DecoderLayer, layer_shape
from vecinfer_jax.models.folding import fold_values
from vecinfer_jax.parallel.shardings import place_params
from vecinfer_jax.parallel.share import Share


class Layerwise:
    """A model over one cache method, run layer by layer; over a mesh where the model lies on one (`lm.layout`).

    What of a method depends on the layer goes through `for_layer`, so layers with equal methods share a program.
    """

    def __init__(self, lm: Any, method: CacheMethod | None = None, calibration: Calibration | None = None) -> None:
        """Raises `InputError` where the mesh is of several processes."""
        if lm.layout is not None and lm.layout.mesh.is_multi_process:
            raise InputError("models are calibrated and evaluated in one process: give several the artefact of one")
        self.lm = lm
        self.method = method or FullPrecision()
        if calibration is not None:
            self.method = self.method.resolved(calibration.layers)
        n = lm.config.num_layers
        self._methods = [self.method.for_layer(i, n) for i in range(n)]
        self._calibration = [None] * n if calibration is None else [layer or None for layer in calibration.layers]
        self._params = lm.params if calibration is None else fold_values(lm, self.method, calibration)
        if lm.layout is not None:
            self._params = place_params(self._params, lm.config, lm.layout)

    def init(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty caches of every layer."""
        return [self._init(index, batch, capacity) for index in range(self.lm.config.num_layers)]

    def _init(self, index: int, batch: int, capacity: int) -> LayerCache:
        method, dtype = self._methods[index], jnp.dtype(self.lm.dtype)
        share = self._share(batch)
        return _init(self.lm.config, method, dtype, share, batch, capacity, self._calibration[index])

    def _share(self, batch: int) -> Share | None:
        """How texts are split over the mesh; None on one device."""
        layout = self.lm.layout
        if layout is None:
            return None
        axes = layout.axes_of_texts(batch, all(method.splits_tokens for method in self._methods))
        return Share(self.lm.config, layout, axes)

    def hidden(
        self,
        tokens: Int[Array, "B T"] | np.ndarray,
        lengths: Int[Array, "B"] | np.ndarray | None = None,
        *,
        read: ReadMode = "exact",
    ) -> Float[Array, "B T hidden"]:
        """The last layer's output over whole texts; no cache is kept."""
        return self._run(tokens, lengths, None, None, first=True, read=read, decode=False, keep=False)[0]

    def prefill(
        self,
        caches: Sequence[LayerCache],
        tokens: Int[Array, "B T"] | np.ndarray,
        lengths: Int[Array, "B"] | np.ndarray | None = None,
        *,
        start: Int[Array, "B"] | np.ndarray | None = None,
        read: ReadMode = "exact",
        donate: bool = False,
        inputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "B T hidden"], list[LayerCache]]:
        """A chunk of prompt -> the last layer's output and the caches; `start`: tokens that are cached already.

        Caches that went in stay valid unless `donate`. Every layer's input [B, T, hidden] is appended to `inputs`.
        """
        how: dict[str, Any] = {"first": start is None, "read": read, "decode": False, "keep": True, "donate": donate}
        return self._run(tokens, lengths, caches, start, inputs=inputs, **how)

    def decode(
        self, caches: Sequence[LayerCache], token: Int[Array, "B"], position: Int[Array, "B"]
    ) -> tuple[Float[Array, "B hidden"], list[LayerCache]]:
        """One token a sequence -> the last layer's output and the caches; the ones that went in are used up."""
        hidden, new = self._run(
            token[:, None], None, caches, position, first=False, read="exact", decode=True, keep=True, donate=True
        )
        return hidden[:, 0], new

    def logits(self, hidden: Float[Array, "*rows hidden"]) -> Float32[Array, "*rows V"]:
        """float32 logits from the last layer's output."""
        return unembed(self.lm.config, jnp.dtype(self.lm.dtype), head_of(self.lm.params), hidden)

    def _run(
        self,
        tokens: Any,
        lengths: Any,
        caches: Any,
        start: Any,
        *,
        first: bool,
        read: str,
        decode: bool,
        keep: bool,
        donate: bool = False,
        inputs: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, list[LayerCache]]:
        lm = self.lm
        tokens = jnp.asarray(tokens, jnp.int32)
        batch, width = tokens.shape
        lengths = jnp.full((batch,), width, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
        start = jnp.zeros((batch,), jnp.int32) if start is None else jnp.asarray(start, jnp.int32)
        share = self._share(batch)
        x, positions, cos, sin = _embed(lm.config, share, decode, lm.params["embed"], tokens, start)
        previous, out = None, []
        for index, method in enumerate(self._methods):
            cache = self._init(index, batch, width) if caches is None else caches[index]
            run = _layer_donating if donate else _layer
            static = (lm.config, method, jnp.dtype(lm.dtype), share, first, read, decode, keep)
            if inputs is not None:
                inputs.append(x)
            x, previous, cache = run(
                *static, self._params[f"layers_{index}"], x, previous, cache, positions, lengths, cos, sin
            )
            if keep:
                out.append(cache)
        return x if share is None or decode else _in_order(share, width, x), out


def _run_layer(
    config: ModelConfig,
    method: CacheMethod,
    dtype: Any,
    share: Share | None,
    first: bool,
    read: ReadMode,
    decode: bool,
    keep: bool,
    params: Any,
    x: jax.Array,
    previous: jax.Array | None,
    cache: LayerCache,
    positions: jax.Array,
    lengths: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> tuple[jax.Array, jax.Array, LayerCache | None]:
    axes, here = (NO_AXES, config) if share is None else (share.axes, share.of_device)

    def run(params: Any, cache: Any, x: Any, previous: Any, positions: Any, lengths: Any, cos: Any, sin: Any) -> Any:
        layer = layer_shape(here, 0, dtype, axes)
        chunk = Chunk(positions, lengths, cos, sin, layer=layer, first=first, read=read)
        if decode:
            (cache,) = settled([method], [cache], positions[:, 0], [chunk.layer])
        out: Any = DecoderLayer(here, dtype).apply({"params": params}, x, chunk, cache, method, decode, previous)
        return out[:2], out[2]

    inputs = (x, previous, positions, lengths, cos, sin)
    if share is None:
        (x, normed), cache = run(params, cache, *inputs)
    else:
        tokens = _spec_of(share, decode)
        specs = (tokens, tokens, tokens, share.rows, tokens, tokens)
        (x, normed), cache = share.mapped(run, params, cache, inputs, specs, tokens)
    return x, normed, cache if keep else None


_STATIC = tuple(range(8))
_layer = jax.jit(_run_layer, static_argnums=_STATIC)
_layer_donating = jax.jit(_run_layer, static_argnums=_STATIC, donate_argnums=11)


def _spec_of(share: Share, decode: bool) -> Any:
    """Of tokens [B, T, ...] and what is computed of them."""
    return share.rows if decode else share.prompt


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _init(
    config: ModelConfig,
    method: CacheMethod,
    dtype: Any,
    share: Share | None,
    batch: int,
    capacity: int,
    calibration: Any,
) -> LayerCache:
    axes = NO_AXES if share is None else share.axes
    cache = method.init(layer_shape(config, 0, dtype, axes), batch, capacity, calibration)
    return cache if share is None else share.settled(cache)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(
    config: ModelConfig, share: Share | None, decode: bool, table: jax.Array, tokens: jax.Array, start: jax.Array
) -> tuple[jax.Array, ...]:
    """What a layer reads beside parameters and cache; over a mesh, of tokens in `Share.prompt_order`."""
    width = tokens.shape[1]
    offsets = np.arange(width) if share is None or decode else share.prompt_order(width)
    positions = start[:, None] + jnp.asarray(offsets, jnp.int32)[None]
    cos, sin = config.rope.cos_sin(positions)
    x = table[jnp.pad(tokens, ((0, 0), (0, len(offsets) - width)))[:, offsets]]
    if share is not None:
        x = jax.lax.with_sharding_constraint(x, share.placed(_spec_of(share, decode)))
    return x, positions, cos, sin


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_order(share: Share, width: int, x: Float[Array, "B T hidden"]) -> Float[Array, "B width hidden"]:
    """The tokens of a prompt in their own order."""
    return x if share.axes.context is None else x[:, np.argsort(share.prompt_order(width))[:width]]


def head_of(params: Any) -> Any:
    """The parameters that turn the last layer's output into logits."""
    return {name: params[name] for name in ("embed", "final_norm", "lm_head") if name in params}


@functools.partial(jax.jit, static_argnums=(0, 1))
def unembed(config: ModelConfig, dtype: Any, head: Any, hidden: Float[Array, "*rows hidden"]) -> jax.Array:
    """float32 logits from the last layer's output; `head`: `head_of` the model's parameters."""
    logits: Any = Decoder(config, FullPrecision(), dtype).apply({"params": head}, hidden, method="unembed")
    return logits
