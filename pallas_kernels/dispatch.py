"""Which implementation of an operation runs.

The table below is the only place that knows the implementations. Their modules are imported when first
called, so that a machine without a GPU never imports the Triton lowering of Pallas (deprecated in JAX 0.11).
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

# operation -> implementation -> the module that holds a function named as the operation.
TABLE = {
    "attend_rows": {
        "triton": "pallas_kernels.host_tier.triton",
        "xla": "pallas_kernels.host_tier.reference",
    },
    "channel_lse": {
        "triton": "pallas_kernels.host_tier.triton",
        "xla": "pallas_kernels.host_tier.reference",
    },
    "decode_attention": {
        "mosaic_gpu": "pallas_kernels.decode_attention.mosaic_gpu",
        "xla": "pallas_kernels.decode_attention.reference",
    },
    "fetch_channels": {
        "triton": "pallas_kernels.host_tier.triton",
        "xla": "pallas_kernels.host_tier.reference",
    },
    "group_int_append": {
        "mosaic_gpu": "pallas_kernels.group_int_append.mosaic_gpu",
        "xla": "pallas_kernels.group_int_append.reference",
    },
    "group_int_decode_attention": {
        "mosaic_gpu": "pallas_kernels.group_int_decode_attention.mosaic_gpu",
        "triton": "pallas_kernels.group_int_decode_attention.triton",
        "xla": "pallas_kernels.group_int_decode_attention.reference",
    },
    "hadamard": {
        "triton": "pallas_kernels.hadamard.triton",
        "xla": "pallas_kernels.hadamard.reference",
    },
    "nuq_decode_attention": {
        "mosaic_gpu": "pallas_kernels.nuq_decode_attention.mosaic_gpu",
        "triton": "pallas_kernels.nuq_decode_attention.triton",
        "xla": "pallas_kernels.nuq_decode_attention.reference",
    },
    "rms_norm": {
        "mosaic_gpu": "pallas_kernels.rms_norm.mosaic_gpu",
        "xla": "pallas_kernels.rms_norm.reference",
    },
    "select_tokens": {
        "triton": "pallas_kernels.host_tier.triton",
        "xla": "pallas_kernels.host_tier.reference",
    },
    "vq_encode": {
        "mosaic_gpu": "pallas_kernels.vq_encode.mosaic_gpu",
        "triton": "pallas_kernels.vq_encode.triton",
        "xla": "pallas_kernels.vq_encode.reference",
    },
    "vq_append": {
        "mosaic_gpu": "pallas_kernels.vq_append.mosaic_gpu",
        "xla": "pallas_kernels.vq_append.reference",
    },
    "vq_decode_attention": {
        "mosaic_gpu": "pallas_kernels.vq_decode_attention.mosaic_gpu",
        "triton": "pallas_kernels.vq_decode_attention.triton",
        "xla": "pallas_kernels.vq_decode_attention.reference",
    },
}

# Fastest first; an implementation that raises NotImplementedError lets the next one try.
PREFERENCE = {"gpu": ("mosaic_gpu", "triton", "xla")}
KERNELS_IN_INTERPRET_MODE = ("triton", "xla")
# Major compute capabilities of devices that Mosaic GPU and the kernels' shared memory are for: Hopper, data centre
# Blackwell.
_MOSAIC_GPU = ("9", "10")
# Of an H100, where the device does not say.
_MULTIPROCESSORS = 132


def candidates(operation: str, implementation: str | None, interpret: bool) -> tuple[str, ...]:
    """The names to try, in order. Raises ValueError for a name the operation does not have."""
    known = TABLE[operation]
    if implementation is not None:
        if implementation not in known:
            raise ValueError(f"{operation}: no implementation {implementation!r}; choose from {sorted(known)} or None")
        return (implementation,)
    order = KERNELS_IN_INTERPRET_MODE if interpret else PREFERENCE.get(jax.default_backend(), ("xla",))
    return tuple(name for name in order if name in known and (name != "mosaic_gpu" or _has_mosaic_gpu()))


def named(operation: str, implementation: str | None) -> str | None:
    """For callers that name one implementation for several operations: what to ask this one for.

    "mosaic_gpu" names decoding's kernels; what else there is to do (a prompt's encoding) is done by the best there is.
    Where an operation has no Triton kernel, plain JAX.
    """
    if implementation == "mosaic_gpu" and operation == "vq_encode":  # which serves few tokens only
        return None
    if implementation is None or implementation in TABLE[operation]:
        return implementation
    return None if implementation == "mosaic_gpu" else "xla"


@functools.cache
def multiprocessors() -> int:
    """Of the default device, for choosing how many programs to start."""
    return getattr(jax.devices()[0], "core_count", None) or _MULTIPROCESSORS


@functools.cache
def _has_mosaic_gpu() -> bool:
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return str(capability).split(".")[0] in _MOSAIC_GPU  # "9.0"; AMD's are names


def call(
    operation: str,
    implementation: str | None,
    interpret: bool,
    *args: Any,
    without: tuple[str, ...] = (),
    **kwargs: Any,
) -> Any:
    """Run `operation` with the first candidate, of those not in `without`, that supports the arguments.

    Raises NotImplementedError, in one line, if a named implementation does not support them.
    """
    names = tuple(name for name in candidates(operation, implementation, interpret) if name not in without)
    for name in names[:-1]:
        try:
            return _load(operation, name)(*args, interpret=interpret, **kwargs)
        except NotImplementedError:
            continue
    return _load(operation, names[-1])(*args, interpret=interpret, **kwargs)


def _load(operation: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(TABLE[operation][name]), operation)
