"""A decoder over the devices of a mesh, as one program each runs on its share (`shard_map`).

What they exchange is written out where it happens and nowhere else: sums of products with row-split weights and of the
embedding, and logits, over `model` (`models.decoder`); the parts of attention and a prompt's keys and values over
`context` (`caches.stripes`); a method's own, such as the range of a token's values (`caches.kvquant`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float32, Int

from vecinfer_jax.caches.base import ReadMode
from vecinfer_jax.caches.stripes import of_prompt, prompt_pieces, prompt_share
from vecinfer_jax.models.checkpoint_map import flatten, unflatten
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.network import Network
from vecinfer_jax.parallel.mesh import Layout
from vecinfer_jax.parallel.shardings import (
    ADDED_ONCE,
    NonEmpty,
    cache_shardings,
    cache_specs,
    device_share,
    splits_vocabulary,
    weight_specs,
)


class SplitNetwork(Network):
    """`Network` over a mesh; `decoder` is that of the whole model, its axes those of `layout.axes`."""

    def __init__(self, decoder: Decoder, layout: Layout) -> None:
        """Raises `InputError` where the model cannot be split so."""
        layout.check(decoder.config)
        super().__init__(decoder)
        self.layout = layout
        devices = layout.size("model")
        config, split = decoder.config, splits_vocabulary(decoder.config, devices)
        share = dataclasses.replace(
            config,
            num_query_heads=config.num_query_heads // devices,
            num_kv_heads=config.num_kv_heads // devices,
            intermediate_size=config.intermediate_size // devices,
            vocab_size=config.vocab_size // devices if split else config.vocab_size,
        )
        self.share: Decoder = decoder.clone(config=share, whole_vocabulary=not split)

    def init_caches(self, calibration: Any, batch: int, capacity: int) -> tuple[Callable[..., Any], Any]:
        init = functools.partial(super().init, batch, capacity)
        shapes = jax.eval_shape(init, calibration)
        return init, cache_shardings(shapes, self.cache_specs(shapes), self.layout.mesh)

    def cache_specs(self, shapes: Any) -> Any:
        """Specs of caches of these shapes."""
        axes = self.decoder.axes
        return cache_specs(shapes, lambda axis: getattr(axes, axis) is not None)

    def prefill(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        start: Int[Array, ""],
        caches: Any,
        lengths: Int[Array, "B"],
        first: bool,
        read: ReadMode,
    ) -> tuple[Float32[Array, "B V"], Any]:
        axes = self.decoder.axes
        pieces = prompt_pieces(axes)
        tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % pieces)))

        def run(params: Any, tokens: jax.Array, start: jax.Array, caches: Any, lengths: jax.Array) -> Any:
            offsets = prompt_share(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], axes)[0]
            own = prompt_share(tokens, axes)
            positions = jnp.broadcast_to(start + offsets, own.shape)
            hidden, caches = self.share.apply(
                {"params": params}, own, positions, caches, lengths=lengths, first=first, read=read, logits="hidden"
            )
            last = of_prompt(hidden, offsets, lengths - 1, axes)
            return self.share.apply({"params": params}, last, method="unembed"), caches

        return self._mapped(run, params, caches, tokens, start, lengths=lengths)

    def step(
        self, params: Any, token: Int[Array, "B"], position: Int[Array, "B"], caches: Any
    ) -> tuple[Float32[Array, "B V"], Any]:
        def run(params: Any, token: jax.Array, position: jax.Array, caches: Any) -> Any:
            logits, caches = self.share.apply(
                {"params": params}, token[:, None], position[:, None], caches, decode=True
            )
            return logits[:, 0], caches

        return self._mapped(run, params, caches, token, position)

    def settled(self, state: Any) -> Any:
        """Rows over `data`, the caches as they are."""
        data = self.decoder.axes.data

        def settle(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self.layout.sharding(*[data] if data and x.ndim else []))

        rest = jax.tree.map(settle, dataclasses.replace(state, caches=None))
        return dataclasses.replace(rest, caches=state.caches)

    def whole(self, arrays: Any) -> Any:
        return jax.tree.map(lambda _: self.layout.sharding(), arrays)

    def _mapped(
        self, run: Callable[..., Any], params: Any, caches: Any, first: Any, second: Any, **rest: Any
    ) -> tuple[jax.Array, Any]:
        """run(params, first, second, caches, *rest) on every device's share."""
        rows = PartitionSpec(self.decoder.axes.data)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), caches)
        of_caches = self.cache_specs(shapes)
        everywhere, here = NonEmpty(shapes), NonEmpty(device_share(shapes, of_caches, self.layout.mesh.shape))
        of_held = everywhere.held(of_caches)

        def share(params: Any, first: Any, second: Any, held: list[jax.Array], *rest: Any) -> Any:
            out, caches = run(self._biases_once(params), first, second, here.whole(held), *rest)
            return out, here.held(caches)

        def spec(x: Any) -> PartitionSpec:
            return rows if jnp.ndim(x) else PartitionSpec()

        of_params = weight_specs(params, self.decoder.config, self.layout)
        out, held = jax.shard_map(
            share,
            mesh=self.layout.mesh,
            in_specs=(of_params, spec(first), spec(second), of_held, *map(spec, rest.values())),
            out_specs=(rows, of_held),
            check_vma=False,
        )(params, first, second, everywhere.held(caches), *rest.values())
        return out, everywhere.whole(held)

    def _biases_once(self, params: Any) -> Any:
        """Biases that are added to a sum over the model axis, on its first device only."""
        axis = self.decoder.axes.model
        if axis is None:
            return params
        first = jax.lax.axis_index(axis) == 0
        flat = flatten(params)
        return unflatten(
            {p: jnp.where(first, x, 0).astype(x.dtype) if p.endswith(ADDED_ONCE) else x for p, x in flat.items()}
        )
