"""Cache methods: one file a method; `base.py` is the protocol. A method is added to this
file and no other: `METHODS` names it on the command line, `__all__` makes it `vj.Name`."""

from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerShape, MeshAxes, allocated_bytes
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.caches.hadamard_int import HadamardInt
from vecinfer_jax.caches.kivi import KIVI
from vecinfer_jax.caches.kvquant import KVQuant
from vecinfer_jax.caches.per_layer import PerLayer
from vecinfer_jax.caches.plain_vq import PlainVQ
from vecinfer_jax.caches.tailorkv import TailorKV
from vecinfer_jax.caches.vecinfer import VecInfer

# Names on the command line.
METHODS: dict[str, type[CacheMethod]] = {
    method.name: method for method in (FullPrecision, VecInfer, KVQuant, TailorKV, KIVI, PlainVQ, HadamardInt)
}

__all__ = [
    "KIVI",
    "METHODS",
    "CacheMethod",
    "Chunk",
    "FullPrecision",
    "HadamardInt",
    "KVQuant",
    "LayerShape",
    "MeshAxes",
    "PerLayer",
    "PlainVQ",
    "TailorKV",
    "VecInfer",
    "allocated_bytes",
]
