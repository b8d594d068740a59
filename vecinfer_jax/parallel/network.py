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
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.network import Network
from vecinfer_jax.parallel.mesh import Layout
from vecinfer_jax.parallel.share import Share


class SplitNetwork(Network):
    """`Network` over a mesh; `decoder` is that of the whole model, its axes those of `layout.axes`."""

    def __init__(self, decoder: Decoder, layout: Layout) -> None:
        """Raises `InputError` where the model cannot be split so."""
        super().__init__(decoder)
        self.layout, self.share = layout, Share(decoder.config, layout, decoder.axes)
        self.of_device: Decoder = decoder.clone(
            config=self.share.of_device, whole_vocabulary=self.share.whole_vocabulary
        )

    def init_caches(self, calibration: Any, batch: int, capacity: int) -> tuple[Callable[..., Any], Any]:
        init = functools.partial(super().init, batch, capacity)
        return init, self.share.cache_shardings(jax.eval_shape(init, calibration))

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

        def run(params: Any, caches: Any, tokens: jax.Array, start: jax.Array, lengths: jax.Array) -> Any:
            offsets = prompt_share(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], axes)[0]
            own = prompt_share(tokens, axes)
            positions = jnp.broadcast_to(start + offsets, own.shape)
            hidden, caches = self.of_device.apply(
                {"params": params}, own, positions, caches, lengths=lengths, first=first, read=read, logits="hidden"
            )
            last = of_prompt(hidden, offsets, lengths - 1, axes)
            return self.of_device.apply({"params": params}, last, method="unembed"), caches

        return self._mapped(run, params, caches, tokens, start, lengths)

    def step(
        self, params: Any, token: Int[Array, "B"], position: Int[Array, "B"], caches: Any
    ) -> tuple[Float32[Array, "B V"], Any]:
        def run(params: Any, caches: Any, token: jax.Array, position: jax.Array) -> Any:
            logits, caches = self.of_device.apply(
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

    def _mapped(self, run: Callable[..., Any], params: Any, caches: Any, *inputs: Any) -> tuple[jax.Array, Any]:
        """run(params, caches, *inputs) on every device's share; inputs are rows or scalars, outputs rows."""
        rows = self.share.rows
        specs = [rows if jnp.ndim(x) else PartitionSpec() for x in inputs]
        return self.share.mapped(run, params, caches, inputs, specs, rows)
