"""What each device of a mesh has of a model and its caches, and programs that run on every device's share of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from vecinfer_jax.caches.base import MeshAxes
from vecinfer_jax.models.checkpoint_map import flatten, unflatten
from vecinfer_jax.models.config import ModelConfig
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


@dataclasses.dataclass(frozen=True)
class Share:
    """A model split over the devices of a mesh.

    config: of the whole model; axes: what is split of caches and rows, and over which axes of `layout`'s mesh.
    """

    config: ModelConfig
    layout: Layout
    axes: MeshAxes

    def __post_init__(self) -> None:
        """Raises `InputError` where the model cannot be split so."""
        self.layout.check(self.config)

    @property
    def whole_vocabulary(self) -> bool:
        """Whether every device has all of embedding and head."""
        return not splits_vocabulary(self.config, self.layout.size("model"))

    @functools.cached_property
    def of_device(self) -> ModelConfig:
        """One device's heads, feed-forward channels and entries of the vocabulary."""
        devices = self.layout.size("model")
        return dataclasses.replace(
            self.config,
            num_query_heads=self.config.num_query_heads // devices,
            num_kv_heads=self.config.num_kv_heads // devices,
            intermediate_size=self.config.intermediate_size // devices,
            vocab_size=self.config.vocab_size // (1 if self.whole_vocabulary else devices),
        )

    def cache_specs(self, shapes: Any) -> Any:
        """Specs of caches of these shapes."""
        return cache_specs(shapes, lambda axis: getattr(self.axes, axis) is not None)

    def cache_shardings(self, shapes: Any) -> Any:
        """Where caches of these shapes go."""
        return cache_shardings(shapes, self.cache_specs(shapes), self.layout.mesh)

    def settled(self, caches: Any) -> Any:
        """Caches where they go; called under `jit`."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), caches)
        return jax.tree.map(jax.device_put, caches, self.cache_shardings(shapes))

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays [B, ...]."""
        return PartitionSpec(self.axes.data)

    @property
    def prompt(self) -> PartitionSpec:
        """Of arrays [B, T, ...] of prompts whose tokens are in `prompt_order`."""
        return PartitionSpec(self.axes.data, self.axes.context)

    def placed(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.layout.mesh, spec)

    def prompt_order(self, width: int) -> Int[np.ndarray, "T"]:
        """Which token of a prompt stands at each place of the devices' shares side by side (`stripes.prompt_share`);
        `width` is rounded up to what can be split."""
        if self.axes.context is None:
            return np.arange(width)
        count = self.axes.shards
        pieces = np.arange(-(-width // (2 * count)) * 2 * count).reshape(2 * count, -1)
        return pieces[[piece for i in range(count) for piece in (i, 2 * count - 1 - i)]].reshape(-1)

    def mapped(
        self,
        run: Callable[..., tuple[Any, Any]],
        params: Any,
        caches: Any,
        inputs: Sequence[Any],
        specs: Sequence[Any],
        out: Any,
    ) -> tuple[Any, Any]:
        """run(params, caches, *inputs) -> (outputs, caches) on every device's share; `specs` of the inputs, `out` of
        the outputs."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), caches)
        of_caches = self.cache_specs(shapes)
        everywhere, here = NonEmpty(shapes), NonEmpty(device_share(shapes, of_caches, self.layout.mesh.shape))
        of_held = everywhere.held(of_caches)

        def share(params: Any, held: list[jax.Array], *inputs: Any) -> Any:
            outputs, caches = run(self.biases_once(params), here.whole(held), *inputs)
            return outputs, here.held(caches)

        outputs, held = jax.shard_map(
            share,
            mesh=self.layout.mesh,
            in_specs=(weight_specs(params, self.config, self.layout), of_held, *specs),
            out_specs=(out, of_held),
            check_vma=False,
        )(params, everywhere.held(caches), *inputs)
        return outputs, everywhere.whole(held)

    def biases_once(self, params: Any) -> Any:
        """Biases that are added to a sum over the model axis, on its first device only."""
        axis = self.axes.model
        if axis is None:
            return params
        first = jax.lax.axis_index(axis) == 0
        flat = flatten(params)
        return unflatten(
            {p: jnp.where(first, x, 0).astype(x.dtype) if p.endswith(ADDED_ONCE) else x for p, x in flat.items()}
        )
