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

from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCache, ReadMode, settled
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.models.decoder import Decoder, DecoderLayer, layer_shape
from vecinfer_jax.models.folding import fold_values


class Layerwise:
    """A model over one cache method, run layer by layer.

    What of a method depends on the layer goes through `for_layer`, so layers with equal methods share a program.
    """

    def __init__(self, lm: Any, method: CacheMethod | None = None, calibration: Calibration | None = None) -> None:
        self.lm = lm
        self.method = method or FullPrecision()
        if calibration is not None:
            self.method = self.method.resolved(calibration.layers)
        n = lm.config.num_layers
        self._methods = [self.method.for_layer(i, n) for i in range(n)]
        self._calibration = [None] * n if calibration is None else [layer or None for layer in calibration.layers]
        self._params = lm.params if calibration is None else fold_values(lm, self.method, calibration)

    def init(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty caches of every layer."""
        return [self._init(index, batch, capacity) for index in range(self.lm.config.num_layers)]

    def _init(self, index: int, batch: int, capacity: int) -> LayerCache:
        method, dtype = self._methods[index], jnp.dtype(self.lm.dtype)
        return _init(self.lm.config, method, dtype, batch, capacity, self._calibration[index])

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
        x, positions, cos, sin = _embed(lm.config, lm.params["embed"], tokens, start)
        previous, out = None, []
        for index, method in enumerate(self._methods):
            cache = self._init(index, batch, width) if caches is None else caches[index]
            run = _layer_donating if donate else _layer
            static = (lm.config, method, jnp.dtype(lm.dtype), first, read, decode, keep)
            if inputs is not None:
                inputs.append(x)
            x, previous, cache = run(
                *static, self._params[f"layers_{index}"], x, previous, cache, positions, lengths, cos, sin
            )
            if keep:
                out.append(cache)
        return x, out


def _run_layer(
    config: ModelConfig,
    method: CacheMethod,
    dtype: Any,
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
    chunk = Chunk(positions, lengths, cos, sin, layer=layer_shape(config, 0, dtype), first=first, read=read)
    if decode:
        (cache,) = settled([method], [cache], positions[:, 0], [chunk.layer])
    out: Any = DecoderLayer(config, dtype).apply({"params": params}, x, chunk, cache, method, decode, previous)
    x, normed, cache = out
    return x, normed, cache if keep else None


_STATIC = tuple(range(7))
_layer = jax.jit(_run_layer, static_argnums=_STATIC)
_layer_donating = jax.jit(_run_layer, static_argnums=_STATIC, donate_argnums=10)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _init(
    config: ModelConfig, method: CacheMethod, dtype: Any, batch: int, capacity: int, calibration: Any
) -> LayerCache:
    return method.init(layer_shape(config, 0, dtype), batch, capacity, calibration)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: ModelConfig, table: jax.Array, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cos, sin = config.rope.cos_sin(positions)
    return table[tokens], positions, cos, sin


def head_of(params: Any) -> Any:
    """The parameters that turn the last layer's output into logits."""
    return {name: params[name] for name in ("embed", "final_norm", "lm_head") if name in params}


@functools.partial(jax.jit, static_argnums=(0, 1))
def unembed(config: ModelConfig, dtype: Any, head: Any, hidden: Float[Array, "*rows hidden"]) -> jax.Array:
    """float32 logits from the last layer's output; `head`: `head_of` the model's parameters."""
    logits: Any = Decoder(config, FullPrecision(), dtype).apply({"params": head}, hidden, method="unembed")
    return logits
