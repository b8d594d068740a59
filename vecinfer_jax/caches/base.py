"""The protocol between the model and a cache method.

A *method* (`VecInfer`, `FullPrecision`, ...) is a frozen, hashable dataclass of settings: a static argument of
`jit`. A *layer cache* is what it makes: a `flax.struct.dataclass` pytree of arrays, which goes into every call and
comes out of it changed, never mutated. The model hands q, k and v to the method **before RoPE**; the method
rotates them, answers the attention and keeps what it wants to keep.

What a query at position t reads: the keys and values of the first `sink` positions and of the last `residual`
positions (t - residual + 1 ... t) in full precision, every other position from its codes.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from vecinfer_jax.rope import Rope

LayerCache = Any
LayerCalibration = Mapping[str, Any] | None
ReadMode = Literal["exact", "coded"]


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Names of the mesh axes that a method must reduce over; None where that axis is not split.

    `data` splits the batch, `context` the cached tokens, `model` the KV heads. `shards`: devices along `context`;
    `merge`: how their parts of an attention become one (`vecinfer_jax.caches.stripes.MERGES`).
    """

    data: str | None = None
    context: str | None = None
    model: str | None = None
    shards: int = 1
    merge: str = "gather"


NO_AXES = MeshAxes()


def every_row(x: Shaped[Array, "b ..."], axes: MeshAxes) -> Shaped[Array, "B ..."]:
    """Of an array whose rows the data axis splits, those of all devices."""
    return x if axes.data is None else jax.lax.all_gather(x, axes.data, tiled=True)


def total(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """The sum over the devices of those axes that split anything."""
    split = tuple(axis for axis in axes if axis is not None)
    return jax.lax.psum(x, split) if split else x


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What is static about one attention layer."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    rope: Rope
    index: int = 0
    num_layers: int = 1
    axes: MeshAxes = NO_AXES

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """Scale of the scores, 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5


@struct.dataclass
class Chunk:
    """The tokens in flight: a chunk of a prompt, or one token a sequence when decoding.

    Where `layer.axes` names a context axis, a prompt's chunk is split over its devices: T counts this device's share
    (`vecinfer_jax.caches.stripes.prompt_share`), as do q, k and v.

    positions: int32[B, T], absolute positions (a token's slot in the cache is its position).
    lengths:   int32[B], tokens of the whole chunk that count; the rest of the row is padding.
    cos, sin:  float32[B, T, D/2], the rotary factors at `positions`.
    layer:     static geometry of the layer being computed.
    first:     static; True when nothing is cached yet (the chunk starts at position 0). A later chunk of a
               long prompt has False, and its offset is positions[:, 0].
    read:      static; whether prompt queries read exact keys and values ("exact", as generation does while
               the prompt fits) or what decoding would read ("coded", the strict evaluation).
    """

    positions: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    layer: LayerShape = struct.field(pytree_node=False)
    first: bool = struct.field(pytree_node=False, default=True)
    read: ReadMode = struct.field(pytree_node=False, default="exact")


def array_field(kind: Literal["codes", "codebooks", "window", "state", "host"], **kwargs: Any) -> Any:
    """A field of a layer cache, labelled with what its bytes are spent on (see `allocated_bytes`)."""
    return struct.field(metadata={"bytes": kind}, **kwargs)


class CacheMethod(abc.ABC):
    """A way to keep keys and values. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    # Whether a prompt's tokens and the cached ones may be split over the devices of a context axis.
    splits_tokens: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> LayerCache:
        """An empty cache of one layer for `capacity` tokens a sequence. Called under `jit`."""

    @abc.abstractmethod
    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T Hq D"], LayerCache]:
        """Attention of a chunk of prompt, and the cache with the chunk's tokens in it."""

    @abc.abstractmethod
    def decode(
        self,
        q: Float[Array, "B Hq D"],
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        chunk: Chunk,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B Hq D"], LayerCache]:
        """Appends one token to every sequence and answers its attention."""

    @abc.abstractmethod
    def bits_per_element(self, layer: LayerShape) -> float:
        """True bits per cached key or value element outside window and sinks: codes, scales, zeros, outliers."""

    # What follows has a default that suits most methods.

    def for_layer(self, index: int, num_layers: int) -> "CacheMethod":
        """The method of one layer; methods that treat layers differently return different ones."""
        del index, num_layers
        return self

    def validate(self, layer: LayerShape) -> None:
        """Raises `InputError` where these settings cannot serve this geometry."""
        del layer

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """What XLA is to be told when it compiles this method's programs for a GPU."""
        return {}

    def overdue(self, cache: LayerCache, at: Int[Array, "B"]) -> Bool[Array, ""] | None:
        """Whether tokens of positions at[b] find anything in the cache that must be moved before; None: never."""
        del cache, at
        return None

    def settle(self, cache: LayerCache, at: Int[Array, "B"], layer: LayerShape) -> LayerCache:
        """Moves it. Whatever runs a decoding step calls `settled` on the caches first."""
        del at, layer
        return cache

    def prefetch(
        self,
        hidden: Float[Array, "B T hidden"],
        project_query: Callable[[jax.Array], jax.Array],
        chunk: Chunk,
        cache: LayerCache,
    ) -> LayerCache:
        """Called before the layer runs with the *previous* layer's normed input and this layer's query projection.

        For methods that predict what the layer will look at and start fetching it (TailorKV, section 3.3). In a
        decoding step, `settled` has been called before.
        """
        del hidden, project_query, chunk
        return cache

    @property
    def folds_values(self) -> bool:
        """Whether `fold_values` changes anything."""
        return type(self).fold_values is not CacheMethod.fold_values

    def fold_values(
        self,
        layer: LayerShape,
        calibration: LayerCalibration,
        v_kernel: Float[Array, "hidden Hkv D"],
        v_bias: Float[Array, "Hkv D"] | None,
        o_kernel: Float[Array, "Hq D hidden"],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Folds an invertible transform of the values into copies of W_v and W_o; the default has none."""
        del layer, calibration
        return v_kernel, v_bias, o_kernel

    def wanted_statistics(self) -> frozenset[str]:
        """What calibration wants beside what is always collected: "weights", "windows", "gradients" and "shares" of
        `LayerStatistics`."""
        return frozenset()

    @property
    def calibration_text(self) -> tuple[int, int] | None:
        """Passages, and tokens of one, that this method is calibrated on unless it is said otherwise."""
        return None

    @property
    def calibration_repeated(self) -> float:
        """Share of these passages that say everything twice, unless it is said otherwise (`calibrate`)."""
        return 0.0

    @property
    def bound_to_positions(self) -> bool:
        """Whether what is calibrated serves the positions of the text's passages and no later ones: rotary embeddings
        turn a key's slow channels with the position, so a mean after RoPE is one of the positions it was taken over."""
        return False

    def survey(self, statistics: Sequence[Any]) -> Sequence[Mapping[str, np.ndarray]]:
        """Arrays of every layer by which `resolved` decides, found before any layer is calibrated."""
        return [{} for _ in statistics]

    def resolved(self, layers: Sequence[Mapping[str, Any]]) -> "CacheMethod":
        """The method with everything fixed that its calibration (the arrays of every layer) decides.

        A method is static under `jit`: what runs a model asks for this before it compiles anything.
        """
        del layers
        return self

    def findings(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """What a calibration found, one entry a layer, for people; kept in the artefact's metadata."""
        del layers
        return {}

    @property
    def refines_model(self) -> bool:
        """Whether calibration ends with gradient descent through the whole model."""
        return False

    def shared_calibration(self, layers: Sequence[LayerShape], statistics: Sequence[Any], seed: int) -> Any:
        """What the layers this method serves are calibrated with in common, from the statistics of all of them.

        Called once for every distinct calibration key among the methods that `for_layer` returns; `calibrate_layer`
        gets the result as `shared`.
        """
        del layers, statistics, seed
        return None

    def calibrate_layer(
        self, layer: LayerShape, statistics: Any, seed: int, shared: Any = None
    ) -> dict[str, np.ndarray]:
        """Arrays that `init` wants for one layer, from the activation statistics of that layer."""
        del layer, statistics, seed, shared
        return {}

    def reading(self) -> str:
        """What the time to read this cache depends on, as a key of a device's measurements (`vecinfer_jax.devices`)."""
        settings = [name for name in ("bits", "group") if hasattr(self, name)]
        return " ".join([self.name, *(f"{name}={getattr(self, name)}" for name in settings)])

    def calibration_key(self) -> dict[str, Any]:
        """The settings that a calibration depends on: an artefact serves every method with an equal key."""
        return {"method": self.name}


def joined_text(texts: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Passages, and tokens of one, that serve several who ask for some: as long as the longest, as much as the most,
    before a model's context shortens them."""
    asked = [text for text in texts if text is not None]
    if not asked:
        return None
    length = max(length for _, length in asked)
    return -(-max(passages * each for passages, each in asked) // length), length


def settled(
    methods: Sequence[CacheMethod], caches: Sequence[LayerCache], at: Int[Array, "B"], layers: Sequence[LayerShape]
) -> tuple[LayerCache, ...]:
    """Caches of several layers with what is overdue in them moved, as a decoding step of positions at[b] begins with.

    It is under one condition for all layers: each stops a device for a moment.
    """
    flags = [method.overdue(cache, at) for method, cache in zip(methods, caches, strict=True)]
    indices = [i for i, flag in enumerate(flags) if flag is not None]
    if not indices:
        return tuple(caches)
    overdue = jnp.any(jnp.stack([flag for flag in flags if flag is not None]))

    def settle(caches: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        return tuple(methods[i].settle(cache, at, layers[i]) for i, cache in zip(indices, caches, strict=True))

    moved = jax.lax.cond(overdue, settle, lambda caches: caches, tuple(caches[i] for i in indices))
    new = dict(zip(indices, moved, strict=True))
    return tuple(new.get(i, cache) for i, cache in enumerate(caches))


def allocated_bytes(cache: Any) -> dict[str, int]:
    """Bytes of a cache (one layer's, or any pytree of layer caches) by what they are spent on.

    Works on arrays and on `jax.ShapeDtypeStruct`s alike. Keys: codes, codebooks, window, state and their total, which
    is what the device holds; host, what lies in pinned memory of the host beside it.
    """
    sizes = {"codes": 0, "codebooks": 0, "window": 0, "state": 0, "host": 0}

    def visit(node: Any) -> None:
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            for field in dataclasses.fields(node):
                kind = field.metadata.get("bytes")
                value = getattr(node, field.name)
                if kind is None:
                    visit(value)
                else:
                    for leaf in jax.tree.leaves(value):
                        sizes[kind] += int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        elif isinstance(node, list | tuple):
            for child in node:
                visit(child)
        elif isinstance(node, Mapping):
            for child in node.values():
                visit(child)

    visit(cache)
    sizes["total"] = sum(size for kind, size in sizes.items() if kind != "host")
    return sizes
