"""Which implementation of an operation runs.

The table below is the only place that knows the implementations. Their modules are imported when first
called, so that a machine without a GPU never imports the Triton lowering of Pallas (deprecated in JAX 0.11).
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax

# operation -> implementation -> the module that holds a function named as the operation.
TABLE = {
    "hadamard": {
        "triton": "pallas_kernels.hadamard.triton",
        "xla": "pallas_kernels.hadamard.reference",
    },
    "vq_encode": {
        "triton": "pallas_kernels.vq_encode.triton",
        "xla": "pallas_kernels.vq_encode.reference",
    },
    "vq_decode_attention": {
        "triton": "pallas_kernels.vq_decode_attention.triton",
        "xla": "pallas_kernels.vq_decode_attention.reference",
    },
}

# Fastest first; an implementation that raises NotImplementedError lets the next one try.
PREFERENCE = {"gpu": ("mosaic_gpu", "triton", "xla")}
KERNELS_IN_INTERPRET_MODE = ("triton", "xla")


def candidates(operation: str, implementation: str | None, interpret: bool) -> tuple[str, ...]:
    """The names to try, in order. Raises ValueError for a name the operation does not have."""
    known = TABLE[operation]
    if implementation is not None:
        if implementation not in known:
            raise ValueError(f"{operation}: no implementation {implementation!r}; choose from {sorted(known)} or None")
        return (implementation,)
    order = KERNELS_IN_INTERPRET_MODE if interpret else PREFERENCE.get(jax.default_backend(), ("xla",))
    return tuple(name for name in order if name in known)


def call(operation: str, implementation: str | None, interpret: bool, *args: Any, **kwargs: Any) -> Any:
    """Run `operation` with the first candidate that supports the arguments.

    Raises NotImplementedError, in one line, if a named implementation does not support them.
    """
    names = candidates(operation, implementation, interpret)
    for name in names[:-1]:
        try:
            return _load(operation, name)(*args, interpret=interpret, **kwargs)
        except NotImplementedError:
            continue
    return _load(operation, names[-1])(*args, interpret=interpret, **kwargs)


def _load(operation: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(TABLE[operation][name]), operation)
