"""vecinfer_jax: JAX inference for Llama-family models with a compressed KV cache.

import vecinfer_jax as vj
lm = vj.load("smollm2-135m-instruct")
out = vj.generate(lm, ["Once upon a time"], method=vj.VecInfer(bits=2), max_new_tokens=64)
"""

from vecinfer_jax import caches, parallel
from vecinfer_jax import evaluation as evaluate
from vecinfer_jax.caches import *  # noqa: F403
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.collect import calibrate
from vecinfer_jax.calibration.store import load_calibration, resolve_calibration
from vecinfer_jax.errors import VecInferError
from vecinfer_jax.generation import Generation, Sampling, generate, stream
from vecinfer_jax.models import LanguageModel, load

__version__ = "0.1.0"

__all__ = [
    *caches.__all__,
    "Calibration",
    "Generation",
    "LanguageModel",
    "Sampling",
    "VecInferError",
    "calibrate",
    "evaluate",
    "generate",
    "load",
    "load_calibration",
    "parallel",
    "resolve_calibration",
    "stream",
]
