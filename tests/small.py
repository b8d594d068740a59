"""A small random model and its calibration, shared by tests."""

import functools

import numpy as np

from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.collect import calibrate
from vecinfer_jax.models import LanguageModel, ModelConfig, random_model
from vecinfer_jax.rope import Rope

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=128,
    hidden_size=48,
    intermediate_size=96,
    num_layers=3,
    num_query_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope=Rope(10000.0, 16),
    rms_norm_eps=1e-5,
    max_position=1024,
    tie_embeddings=True,
    eos_token_ids=(),
)


class LetterTokenizer:
    """One token a character (codes below 128): enough to test what needs text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % 128 for c in text]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids)


@functools.cache
def model() -> LanguageModel:
    """Random weights; float32."""
    import dataclasses

    return dataclasses.replace(random_model(CONFIG, 0, "float32"), tokenizer=LetterTokenizer())


@functools.cache
def calibration_of(method) -> Calibration:
    """Of the small model, from random text."""
    return calibrate(model(), method, texts(), passages=6, passage_length=64, batch=2, progress=False)


def texts() -> list[str]:
    rng = np.random.default_rng(7)
    return ["".join(chr(c) for c in rng.integers(32, 127, 90)) for _ in range(6)]


def prompts(lengths, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
