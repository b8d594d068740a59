"""Writes a Hugging Face directory as a GGUF file, the way llama.cpp's converter does.

Independent of what reads it: names come from the gguf package's own table, and the permutation of llama's Q
and K rows is the converter's expression.
"""

import json
import math
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def write_gguf(directory: Path, path: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
    """The model in `directory`, in float32, without a tokenizer; `leave_out` names tensors to forget."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    head_dim = config.get("head_dim")
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config["rope_parameters"], head_dim))
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for name, values in load_file(directory / "model.safetensors").items():
        if kind == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            values = _permute(values, heads)
        if kind == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            values = _permute(values, kv_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name not in leave_out:
            writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permute(weights: np.ndarray, heads: int) -> np.ndarray:
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def _llama3_factors(rope: dict, dim: int) -> np.ndarray:
    factors = []
    context = rope["original_max_position_embeddings"]
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < context / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > context / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)
