"""Weights from a GGUF file."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vecinfer_jax.models.checkpoint_map import Weight
from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.models.gguf_file import GgufFile

# Rotary tables: `config_from_gguf` reads the first, the second can be computed.
_HARMLESS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


class GgufWeights:
    """A `WeightSource` over a GGUF file, dequantised to float32."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self.path: Path = file.path
        self._file, self._config = file, config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._file.shapes

    def name_of(self, weight: Weight) -> str:
        return weight.gguf

    def is_harmless(self, name: str) -> bool:
        return _HARMLESS.fullmatch(name) is not None

    def read(self, weight: Weight) -> Float[np.ndarray, "*stored"]:
        stored = self._file.read(weight.gguf)
        # llama.cpp rotates neighbouring channels for "llama" and half-split ones for the Qwens.
        if weight.row.heads and self._config.model_type == "llama":
            return deinterleave(stored, self._config.head_dim)
        return stored


def deinterleave(rows: Float[np.ndarray, "rows *rest"], head_dim: int) -> Float[np.ndarray, "rows *rest"]:
    """Rows of heads of `head_dim` channels, rotary pairs at (2j, 2j + 1) -> pairs at (j, j + D/2)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
