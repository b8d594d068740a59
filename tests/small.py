"""A small random model and its calibration, shared by tests."""

import dataclasses
import functools

import numpy as np
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers

from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.collect import calibrate
from vecinfer_jax.models import LanguageModel, ModelConfig, random_model
from vecinfer_jax.models.tokenizer import Tokenizer
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


def letter_tokenizer() -> Tokenizer:
    """One token a character (codes below 128): enough to test what needs text."""
    vocabulary = {chr(i): i for i in range(CONFIG.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="\x00"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


@functools.cache
def model() -> LanguageModel:
    """Random weights; float32."""
    return dataclasses.replace(random_model(CONFIG, 0, "float32"), tokenizer=letter_tokenizer())


@functools.cache
def calibration_of(method) -> Calibration:
    """Of the small model, from random text; said to reach as far as the model, which is not what its users test."""
    made = calibrate(model(), method, texts(), passages=6, passage_length=64, batch=2, progress=False)
    return Calibration(made.layers, {**made.metadata, "longest_passage": CONFIG.max_position})


def texts() -> list[str]:
    rng = np.random.default_rng(7)
    return ["".join(chr(c) for c in rng.integers(32, 127, 90)) for _ in range(6)]


def prompts(lengths, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
