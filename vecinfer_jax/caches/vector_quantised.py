"""What cache methods that keep the index of the nearest centroid of every sub-vector have in common."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from vecinfer_jax.caches.base import LayerCalibration, LayerShape
from vecinfer_jax.caches.formats import PAPER_FORMATS, CodeFormat, check_bits
from vecinfer_jax.caches.windowed import WindowedMethod
from vecinfer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class VectorQuantisedMethod(WindowedMethod):
    """Base of the methods with code formats.

    bits:       4, 3, 2, 1.5, 1.25 or 1: the formats that VecInfer's paper has for that average.
    key, value: formats such as "d4b10" in their place.
    """

    bits: float = 2
    key: str | None = None
    value: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(type(self).__name__, self.bits)
        _ = self.key_format, self.value_format

    @property
    def key_format(self) -> CodeFormat:
        return CodeFormat.parse(self.key or PAPER_FORMATS[self.bits][0])

    @property
    def value_format(self) -> CodeFormat:
        return CodeFormat.parse(self.value or PAPER_FORMATS[self.bits][1])

    def validate(self, layer: LayerShape) -> None:
        self.key_format.check("key", layer.head_dim)
        self.value_format.check("value", layer.head_dim)

    def bits_per_element(self, layer: LayerShape) -> float:
        return (self.key_format.bits + self.value_format.bits) / 2

    def reading(self) -> str:
        return f"{self.name} {self.key_format}/{self.value_format}"

    def calibration_key(self) -> dict[str, Any]:
        return {"method": self.name, "key": str(self.key_format), "value": str(self.value_format)}

    def empty_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> dict[str, Array]:
        """Codes of no tokens and the calibration's codebooks, in the model's dtype, by their names in a store."""
        if calibration is None:
            name = type(self).__name__
            raise InputError(f"{name} needs a calibration: vj.calibrate(lm, method), or `vecinfer calibrate`")

        def codes(form: CodeFormat) -> UInt8[Array, "B Hkv S bytes"]:
            return jnp.zeros((batch, layer.num_kv_heads, slots, form.bytes_per_token(layer.head_dim)), jnp.uint8)

        return {
            "key_codes": codes(self.key_format),
            "value_codes": codes(self.value_format),
            "key_codebook": jnp.asarray(calibration["key_codebook"]).astype(layer.dtype),
            "value_codebook": jnp.asarray(calibration["value_codebook"]).astype(layer.dtype),
        }
