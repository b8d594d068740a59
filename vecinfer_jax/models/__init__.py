"""Models of the Llama family: configuration, decoder, weights and tokenizer."""

from vecinfer_jax.models.config import ModelConfig, config_from_gguf, config_from_hf
from vecinfer_jax.models.decoder import Decoder, init_params, layer_shape, param_shapes
from vecinfer_jax.models.language_model import LanguageModel, load, random_model, resolve_dtype
from vecinfer_jax.models.orbax import save_orbax
from vecinfer_jax.models.tokenizer import IncrementalDecoder, Tokenizer

__all__ = [
    "Decoder",
    "IncrementalDecoder",
    "LanguageModel",
    "ModelConfig",
    "Tokenizer",
    "config_from_gguf",
    "config_from_hf",
    "init_params",
    "layer_shape",
    "load",
    "param_shapes",
    "random_model",
    "resolve_dtype",
    "save_orbax",
]
