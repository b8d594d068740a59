"""Which mesh axis splits which axis of weights and caches."""

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vecinfer_jax.models.checkpoint_map import flatten, unflatten
from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.parallel.mesh import Layout, layout_of

# The end of a weight's path -> the axis that the model axis splits: columns of what enters a head or a channel, rows of
# what leaves one (Megatron-LM, arXiv 1909.08053), entries of the vocabulary.
SPLIT = {
    "embed": 0,
    "lm_head": 1,
    "q_proj/kernel": 1,
    "k_proj/kernel": 1,
    "v_proj/kernel": 1,
    "q_proj/bias": 0,
    "k_proj/bias": 0,
    "v_proj/bias": 0,
    "o_proj/kernel": 0,
    "gate_proj/kernel": 1,
    "up_proj/kernel": 1,
    "gate_proj/bias": 0,
    "up_proj/bias": 0,
    "down_proj/kernel": 0,
}
# Added once, to the sum over all devices.
ADDED_ONCE = ("o_proj/bias", "down_proj/bias")

# A cache's arrays say in their annotations, such as Float[Array, "B Hkv S D"], what their axes are.
CACHE_AXES = {
    "B": "data",
    **dict.fromkeys(("Hq", "Hkv", "Hk", "Hv", "Mk", "Mv"), "model"),
    **dict.fromkeys(("S", "tiles", "groups", "shards"), "context"),
}


def splits_vocabulary(config: ModelConfig, devices: int) -> bool:
    """Whether embedding and head are split over a model axis; where it does not divide them, all devices hold them."""
    return devices > 1 and config.vocab_size % devices == 0


def weight_spec(path: str, config: ModelConfig, layout: Layout) -> PartitionSpec:
    """Of one weight by its path, "layers_0/attention/q_proj/kernel"."""
    end = path if "/" not in path else "/".join(path.split("/")[-2:])
    devices = layout.size("model")
    whole = end in ("embed", "lm_head") and not splits_vocabulary(config, devices)
    if end not in SPLIT or devices == 1 or whole:
        return PartitionSpec()
    return PartitionSpec(*[None] * SPLIT[end], "model")


def weight_specs(params: Any, config: ModelConfig, layout: Layout) -> Any:
    """A tree of the parameters' specs."""
    return unflatten({path: weight_spec(path, config, layout) for path in flatten(params)})


def weight_sharding(mesh: Mesh | Layout, config: ModelConfig) -> Callable[[str], NamedSharding]:
    """What `load(sharding=)` takes: where each weight goes. Raises `InputError` where the model cannot be split so."""
    layout = layout_of(mesh)
    layout.check(config)
    return lambda path: NamedSharding(layout.mesh, weight_spec(path, config, layout))


def place_params(params: Any, config: ModelConfig, mesh: Mesh | Layout) -> Any:
    """The parameters where they belong; those that are there already are not copied."""
    sharding = weight_sharding(mesh, config)
    return unflatten({path: jax.device_put(x, sharding(path)) for path, x in flatten(params).items()})


def place_model(lm: Any, mesh: Mesh | Layout) -> Any:
    """The model on a mesh, as `load(mesh=)` gives it. Raises `InputError` where it cannot be split so."""
    return dataclasses.replace(lm, params=place_params(lm.params, lm.config, mesh), layout=layout_of(mesh))


def cache_specs(shapes: Any, splits: Callable[[str], bool]) -> Any:
    """Specs of caches, from their shapes as a whole; `splits` says whether a mesh axis splits anything."""

    def spec(array: jax.ShapeDtypeStruct, field: dataclasses.Field[Any]) -> PartitionSpec:
        names = _axis_names(field.type)
        if len(names) != array.ndim:
            raise TypeError(f"a cache's array of shape {array.shape} is annotated {field.type}")
        axes = (CACHE_AXES.get(name) for name in names)
        # An axis of 1 is one codebook for all heads.
        return PartitionSpec(
            *(
                axis if axis and splits(axis) and size > 1 else None
                for axis, size in zip(axes, array.shape, strict=True)
            )
        )

    return _by_field(spec, shapes)


def cache_shardings(shapes: Any, specs: Any, mesh: Mesh) -> Any:
    """Where caches of these shapes and specs go: each array of the host tier into the memory of its devices' hosts."""

    def kind(array: jax.ShapeDtypeStruct, field: dataclasses.Field[Any]) -> str:
        return "pinned_host" if field.metadata.get("bytes") == "host" else "device"

    def placed(spec: PartitionSpec, kind: str) -> NamedSharding:
        return NamedSharding(mesh, spec, memory_kind=kind)

    return jax.tree.map(placed, specs, _by_field(kind, shapes))


def _by_field(function: Callable[[jax.ShapeDtypeStruct, Any], Any], shapes: Any) -> Any:
    """A tree of what the function makes of each array of caches and the field that holds it."""

    def visit(node: Any, field: Any) -> Any:
        if isinstance(node, jax.ShapeDtypeStruct):
            return function(node, field)
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            fields = {f.name: f for f in dataclasses.fields(node) if f.metadata.get("pytree_node", True)}
            return dataclasses.replace(node, **{name: visit(getattr(node, name), f) for name, f in fields.items()})
        if isinstance(node, list | tuple):
            return type(node)(visit(child, field) for child in node)
        return node

    return visit(shapes, None)


def device_share(shapes: Any, specs: Any, sizes: Mapping[str, int]) -> Any:
    """Shapes of what one device holds of arrays of these shapes and specs, on mesh axes of these sizes."""

    def share(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        parts = (sizes.get(axis, 1) for axis in spec)
        split = [n // part for n, part in zip(array.shape, parts, strict=True)]
        return jax.ShapeDtypeStruct(split, array.dtype)

    return jax.tree.map(share, shapes, specs)


class NonEmpty:
    """The arrays of a tree that have elements. XLA (of JAX 0.11) crashes where others, such as a window of no tokens,
    enter or leave a mapped function with a loop in or around it."""

    def __init__(self, shapes: Any) -> None:
        self._shapes = jax.tree.leaves(shapes)
        self._structure: Any = jax.tree.structure(shapes)

    def held(self, tree: Any) -> list[Any]:
        """Those of a tree like the shapes."""
        leaves = self._structure.flatten_up_to(tree)
        return [x for x, shape in zip(leaves, self._shapes, strict=True) if shape.size]

    def whole(self, held: list[jax.Array]) -> Any:
        """The tree again."""
        parts = iter(held)
        leaves = [next(parts) if shape.size else jnp.zeros(shape.shape, shape.dtype) for shape in self._shapes]
        return jax.tree.unflatten(self._structure, leaves)


def _axis_names(annotation: Any) -> list[str]:
    for kind in _alternatives(annotation):
        if hasattr(kind, "dim_str"):
            return kind.dim_str.split()
    return []


def _alternatives(annotation: Any) -> Iterator[Any]:
    yield from annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
