"""Weights from a Hugging Face directory."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float

from vecinfer_jax.errors import UnsupportedModelError, WeightsError
from vecinfer_jax.models.checkpoint_map import Weight
from vecinfer_jax.models.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")


def read_json(path: Path) -> Any:
    """Parsed JSON; `WeightsError` naming the file where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, with every end-of-text id that generation_config.json adds."""
    data = read_json(directory / "config.json")
    if not isinstance(data, dict):
        raise UnsupportedModelError(f"{directory / 'config.json'} does not hold a JSON object")
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
        # What generation stops at is the generation config's to say; config.json's may be only one of
        # several.
        ids = [*_as_list(data.get("eos_token_id")), *_as_list(generation.get("eos_token_id"))]
        data["eos_token_id"] = list(dict.fromkeys(ids))
    return data


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


class HfWeights:
    """A `WeightSource` over the safetensors files of a directory, mapped and read one tensor at a time."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.path = Path(directory)
        self._tied = config.tie_embeddings
        self._files = {name: _open(self.path / name) for name in self._file_names()}
        self._where = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            index = read_json(self.path / INDEX)
            names = sorted(set(index.get("weight_map", {}).values()))
            absent = [name for name in names if not (self.path / name).is_file()]
            if absent or not names:
                raise WeightsError(f"{self.path / INDEX} names files that are not there: {', '.join(absent)}")
            return names
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        raise WeightsError(f"{self.path} has neither {SINGLE} nor {INDEX}; convert the weights to safetensors")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {key: tuple(file.get_slice(key).get_shape()) for key, file in self._where.items()}

    def name_of(self, weight: Weight) -> str:
        return weight.hf

    def is_harmless(self, name: str) -> bool:
        # Old checkpoints carry rotary frequencies; a tied head may be written out beside the embedding.
        return name.endswith("rotary_emb.inv_freq") or (self._tied and name == "lm_head.weight")

    def read(self, weight: Weight) -> Float[np.ndarray, "*stored"]:
        file = self._where[weight.hf]
        kind = file.get_slice(weight.hf).get_dtype()
        if kind not in _FLOATS:
            raise WeightsError(f"{self.path}: {weight.hf} is stored as {kind}; only float weights can be read")
        return file.get_tensor(weight.hf)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise WeightsError(f"{path} is truncated or damaged ({reason}); fetch it again") from None
