"""Plain product quantisation, as in MILLION (arXiv 2504.03661): a codebook for every sub-vector position.

Keys after RoPE and values as they are; nothing is transformed. Every position of every head has its own codebook, so
position j's centroids fit what channels j * d to (j + 1) * d - 1 hold.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import packing, vq_encode
from vecinfer_jax.caches.base import LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.formats import CodeFormat
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.vector_quantised import VectorQuantisedMethod
from vecinfer_jax.calibration.codebooks import codebook_by_position


@struct.dataclass
class PlainVQStore:
    """Codes, uint8[B, Hkv, S, bytes], and codebooks, [Hkv * D / d, 2^b, d], position fastest, in the model's dtype."""

    key_codes: UInt8[Array, "B Hkv S kbytes"] = array_field("codes")
    value_codes: UInt8[Array, "B Hkv S vbytes"] = array_field("codes")
    key_codebook: Float[Array, "Mk K d"] = array_field("codebooks")
    value_codebook: Float[Array, "Mv K d"] = array_field("codebooks")


@dataclasses.dataclass(frozen=True)
class PlainVQ(VectorQuantisedMethod):
    """Product-quantised cache.

    bits:       4, 3, 2, 1.5, 1.25 or 1, with the code formats that VecInfer has for that average.
    key, value: formats such as "d4b10" in their place.
    residual:   exact recent tokens; sink: exact first tokens.
    """

    name: ClassVar[str] = "plain-vq"
    needs_calibration: ClassVar[bool] = True

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> PlainVQStore:
        return PlainVQStore(**self.empty_store(layer, batch, slots, calibration))

    def append(
        self,
        store: PlainVQStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> PlainVQStore:
        key_codes = encode(k, store.key_codebook, self.key_format)
        value_codes = encode(v, store.value_codebook, self.value_format)
        return dataclasses.replace(
            store,
            key_codes=write_chunk(store.key_codes, key_codes, slots),
            value_codes=write_chunk(store.value_codes, value_codes, slots),
        )

    def read(
        self, store: PlainVQStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        return (
            decode(read_slots(store.key_codes, start, size), store.key_codebook, self.key_format),
            decode(read_slots(store.value_codes, start, size), store.value_codebook, self.value_format),
        )

    def calibrate_layer(
        self, layer: LayerShape, statistics: Any, seed: int, shared: Any = None
    ) -> dict[str, np.ndarray]:
        def codebook(vectors: Any, form: CodeFormat, seed: int) -> np.ndarray:
            sample = np.asarray(vectors, np.float32)
            return codebook_by_position(sample, length=form.length, entries=form.entries, seed=seed)

        return {
            "key_codebook": codebook(statistics.keys, self.key_format, seed),
            "value_codebook": codebook(statistics.values, self.value_format, seed + 1),
        }


def encode(
    x: Float[Array, "B T Hkv D"], codebook: Float[Array, "M K d"], form: CodeFormat
) -> UInt8[Array, "B T Hkv bytes"]:
    """The index of the nearest centroid of every position's codebook, a token's packed together."""
    b, t, heads, dim = x.shape
    # A position is a head of d elements to the encoder, which packs each head's one code into bytes of its own.
    codes = vq_encode(x.reshape(b, t, -1, form.length), codebook, implementation="xla")
    codes = packing.unpack(codes, form.code_bits, 1)[..., 0]
    return packing.pack(codes.swapaxes(1, 2).reshape(b, t, heads, dim // form.length), form.code_bits)


def decode(
    codes: UInt8[Array, "B Hkv S bytes"], codebook: Float[Array, "M K d"], form: CodeFormat
) -> Float[Array, "B Hkv S D"]:
    """The centroids that codes stand for."""
    b, heads, slots, _ = codes.shape
    positions = codebook.shape[0] // heads
    index = packing.unpack(codes, form.code_bits, positions)
    index = index + form.entries * jnp.arange(heads * positions).reshape(heads, 1, positions)
    return codebook.reshape(-1, form.length).at[index].get(mode="promise_in_bounds").reshape(b, heads, slots, -1)
