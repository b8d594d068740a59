"""The decoder of the Llama family as a functional Flax module: caches go in and come out, nothing is mutated.

    decoder = Decoder(config, method, dtype)
    logits, caches = decoder.apply({"params": params}, tokens, positions, caches, lengths=lengths)

One file reads top to bottom: norm, attention, feed-forward, layer, model. What a layer keeps of its keys and
values, and how it attends over them, is the cache method's business (`vecinfer_jax.caches`).
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import rms_norm
from vecinfer_jax.caches.base import NO_AXES, CacheMethod, Chunk, LayerCache, LayerShape, MeshAxes, ReadMode, settled
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.models.config import ModelConfig

Params = Any


def _precision(dtype: Any) -> jax.lax.Precision | None:
    """float32 means float32, also on devices whose default would be tf32 or bfloat16 passes."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _reduced(partial: jax.Array, axes: MeshAxes) -> jax.Array:
    """The product with a matrix of which every device of the model axis has some rows."""
    return partial if axes.model is None else jax.lax.psum(partial, axes.model)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in float32.

    `fused`: by a kernel where there is one, as decoding steps do it.
    """

    epsilon: float
    dtype: Any

    def __call__(self, x: Float[Array, "*shape width"], fused: bool = False) -> Float[Array, "*shape width"]:
        return self.add(x, None, fused)[1]

    @nn.compact
    def add(
        self, x: Float[Array, "*shape width"], delta: Float[Array, "*shape width"] | None, fused: bool
    ) -> tuple[Float[Array, "*shape width"], Float[Array, "*shape width"]]:
        """-> (x + delta, its norm)."""
        weight = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        implementation = None if fused else "xla"
        return rms_norm(x, weight, epsilon=self.epsilon, delta=delta, implementation=implementation)


class Attention(nn.Module):
    """Projections around the cache method's attention; q and k are handed over before RoPE."""

    config: ModelConfig
    dtype: Any

    def setup(self) -> None:
        c = self.config

        def dense(features: Any, axis: Any, bias: bool) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=bias,
                dtype=self.dtype,
                param_dtype=self.dtype,
                precision=_precision(self.dtype),
            )

        self.q_proj = dense((c.num_query_heads, c.head_dim), -1, c.qkv_bias)
        self.k_proj = dense((c.num_kv_heads, c.head_dim), -1, c.qkv_bias)
        self.v_proj = dense((c.num_kv_heads, c.head_dim), -1, c.qkv_bias)
        self.o_proj = dense(c.hidden_size, (-2, -1), c.output_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.rms_norm_eps, self.dtype)
            self.k_norm = RMSNorm(c.rms_norm_eps, self.dtype)

    def project_query(self, hidden: Float[Array, "B T hidden"]) -> Float[Array, "B T Hq D"]:
        """Queries before RoPE."""
        q = self.q_proj(hidden)
        return self.q_norm(q) if self.config.qk_norm else q

    def __call__(
        self,
        hidden: Float[Array, "B T hidden"],
        chunk: Chunk,
        cache: LayerCache,
        method: CacheMethod,
        decode: bool,
    ) -> tuple[Float[Array, "B T hidden"], LayerCache]:
        q, k, v = self.project_query(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.config.qk_norm:
            k = self.k_norm(k)
        if decode:
            out, cache = method.decode(q[:, 0], k[:, 0], v[:, 0], chunk, cache)
            out = out[:, None]
        else:
            out, cache = method.prefill(q, k, v, chunk, cache)
        return _reduced(self.o_proj(out), chunk.layer.axes), cache


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T hidden"]) -> Float[Array, "B T hidden"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=self.config.mlp_bias,
                dtype=self.dtype,
                param_dtype=self.dtype,
                precision=_precision(self.dtype),
                name=name,
            )

        gate = dense(self.config.intermediate_size, "gate_proj")(x)
        up = dense(self.config.intermediate_size, "up_proj")(x)
        return dense(self.config.hidden_size, "down_proj")(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual."""

    config: ModelConfig
    dtype: Any

    def setup(self) -> None:
        self.attention = Attention(self.config, self.dtype)
        self.feed_forward = FeedForward(self.config, self.dtype)
        self.input_norm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        self.post_attention_norm = RMSNorm(self.config.rms_norm_eps, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        chunk: Chunk,
        cache: LayerCache,
        method: CacheMethod,
        decode: bool,
        previous: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """-> (output, normed input of the attention, cache); `previous` is the layer before's normed input."""
        if previous is not None:
            # Apart from this module, so that a method may call it in a transformation of its own.
            attention = self.attention.clone(parent=None)
            project_query: Any = functools.partial(attention.apply, self.attention.variables, method="project_query")
            cache = method.prefetch(previous, project_query, chunk, cache)
        normed = self.input_norm(x, decode)
        attended, cache = self.attention(normed, chunk, cache, method, decode)
        x, between = self.post_attention_norm.add(x, attended, decode)
        x = x + _reduced(self.feed_forward(between), chunk.layer.axes)
        return x, normed, cache


class Decoder(nn.Module):
    """A Llama-family language model over a cache method.

    Attributes: `config`, the architecture; `method`, how keys and values are kept; `dtype`, of parameters and
    activations (logits are float32); `axes`, the mesh axes that are reduced over. With a model axis, this is one
    device's share of a model (inside `shard_map`): `config` counts the heads, feed-forward channels and entries of the
    vocabulary it has; where these are all there are, `whole_vocabulary`.
    """

    config: ModelConfig
    method: CacheMethod
    dtype: Any = jnp.float32
    axes: MeshAxes = NO_AXES
    whole_vocabulary: bool = True

    def setup(self) -> None:
        c = self.config
        self.embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.dtype)
        self.layers = [DecoderLayer(c, self.dtype) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size), self.dtype
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        caches: tuple[LayerCache, ...],
        *,
        lengths: Int[Array, "B"] | None = None,
        decode: bool = False,
        first: bool = True,
        read: ReadMode = "exact",
        logits: Literal["all", "last", "none", "hidden"] = "all",
    ) -> tuple[Float[Array, "..."] | None, tuple[LayerCache, ...]]:
        """Runs a chunk of prompt, or (decode=True, T = 1) one step.

        `lengths` counts the tokens of each row that are not padding (default: all). `logits` chooses float32
        logits of every token [B, T, V], of each row's last counted token [B, V], none, or in their place the last
        layer's output [B, T, hidden] for `unembed`.
        """
        c = self.config
        if lengths is None:
            lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        cos, sin = c.rope.cos_sin(positions)
        x = self.embed_tokens(tokens)
        if decode:
            methods = [self.method.for_layer(i, c.num_layers) for i in range(c.num_layers)]
            layers = [self.layer_shape(i) for i in range(c.num_layers)]
            caches = settled(methods, caches, positions[:, 0], layers)
        previous = None
        new_caches = []
        for index, layer in enumerate(self.layers):
            chunk = Chunk(positions, lengths, cos, sin, layer=self.layer_shape(index), first=first, read=read)
            method = self.method.for_layer(index, c.num_layers)
            x, previous, cache = layer(x, chunk, caches[index], method, decode, previous)
            if not decode:
                x, cache = _written_first(x, cache)
            new_caches.append(cache)
        if logits == "none":
            return None, tuple(new_caches)
        if logits == "hidden":
            return x, tuple(new_caches)
        if logits == "last":
            x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.unembed(x), tuple(new_caches)

    def embed_tokens(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows hidden"]:
        """The first layer's input."""
        if self.whole_vocabulary:
            return self.embed[tokens]
        index = tokens - jax.lax.axis_index(self.axes.model) * self.config.vocab_size
        here = (index >= 0) & (index < self.config.vocab_size)
        return _reduced(jnp.where(here[..., None], self.embed[jnp.where(here, index, 0)], 0), self.axes)

    def unembed(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows V"]:
        """float32 logits from the last layer's output."""
        head = self.embed.T if self.config.tie_embeddings else self.lm_head
        logits = jnp.matmul(
            self.final_norm(x), head, precision=_precision(self.dtype), preferred_element_type=jnp.float32
        )
        if self.whole_vocabulary:
            return logits
        return jax.lax.all_gather(logits, self.axes.model, axis=logits.ndim - 1, tiled=True)

    def layer_shape(self, index: int) -> LayerShape:
        """Static geometry of layer `index`."""
        return layer_shape(self.config, index, self.dtype, self.axes)


def _written_first(x: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
    """The same, but what reads x waits until the cache is written.

    A compiler may leave the writing of all layers to the program's end, and their keys and values then wait for it on
    the device all at once.
    """
    leaves, tree = jax.tree.flatten(cache)
    here = [i for i, leaf in enumerate(leaves) if jax.typeof(leaf).memory_space != jax.memory.Space.Host]
    x, *written = jax.lax.optimization_barrier((x, *(leaves[i] for i in here)))
    for i, leaf in zip(here, written, strict=True):
        leaves[i] = leaf
    return x, jax.tree.unflatten(tree, leaves)


def layer_shape(config: ModelConfig, index: int, dtype: Any, axes: MeshAxes = NO_AXES) -> LayerShape:
    """Static geometry of one layer of a model."""
    return LayerShape(
        num_query_heads=config.num_query_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(dtype),
        rope=config.rope,
        index=index,
        num_layers=config.num_layers,
        axes=axes,
    )


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the right names and shapes."""
    method = FullPrecision()
    decoder = Decoder(config, method, dtype)

    def init(key: jax.Array) -> Params:
        caches = tuple(method.init(decoder.layer_shape(i), 1, 1) for i in range(config.num_layers))
        one = jnp.zeros((1, 1), jnp.int32)
        return decoder.init(key, one, one, caches)["params"]

    return jax.jit(init)(key)


def param_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The tree of `jax.ShapeDtypeStruct`s that `init_params` would return."""
    return jax.eval_shape(lambda key: init_params(config, key, dtype), jax.random.key(0))
