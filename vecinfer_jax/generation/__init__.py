"""Prefill, the decode loop, sampling, streaming, batch jobs."""

from vecinfer_jax.generation.generate import Generation, GenerationStats, generate, stream
from vecinfer_jax.generation.sampling import Sampling

__all__ = ["Generation", "GenerationStats", "Sampling", "generate", "stream"]
