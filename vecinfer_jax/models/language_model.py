"""A model ready to run, and where it can be loaded from."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vecinfer_jax import assets
from vecinfer_jax.errors import InputError, WeightsError
from vecinfer_jax.models import orbax
from vecinfer_jax.models.config import ModelConfig, config_from_gguf, config_from_hf
from vecinfer_jax.models.decoder import init_params
from vecinfer_jax.models.gguf import GgufWeights
from vecinfer_jax.models.gguf_file import GgufFile
from vecinfer_jax.models.hf import HfWeights, read_config
from vecinfer_jax.models.tokenizer import Tokenizer, tokenizer_from_directory
from vecinfer_jax.models.tokenizer_gguf import tokenizer_from_gguf
from vecinfer_jax.models.weights import Params, ShardingOf, digest_of, load_params

DTYPES = ("float32", "bfloat16", "float16")

_Placed = Callable[[ModelConfig], ShardingOf | None]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_NOT_HUB_FILES = ["*/*", "consolidated*"]  # the same weights in other forms


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Everything that `generate`, `calibrate` and `evaluate` need of a model.

    config:      its architecture.
    params:      its weights, the tree that `decoder.param_shapes` describes.
    tokenizer:   None where the model's files have none (random weights).
    dtype:       of weights and activations.
    name:        for people.
    fingerprint: identifies the weights as published, whatever type they are loaded in; calibrations carry it.
    layout:      of the mesh that the weights lie on, over which all of that then runs (`vecinfer_jax.parallel.Layout`);
                 None: one device.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    dtype: Any
    name: str
    fingerprint: str
    layout: Any = None

    def save(self, directory: str | Path) -> Path:
        """Writes an Orbax directory that `load` reads back. Raises `InputError` where it exists already."""
        return orbax.save_orbax(
            self.params,
            self.config,
            directory,
            tokenizer=self.tokenizer,
            name=self.name,
            fingerprint=self.fingerprint,
        )


def load(
    name_or_path: str | Path,
    dtype: Any = None,
    *,
    progress: bool = True,
    sharding: ShardingOf | None = None,
    mesh: Any = None,
) -> LanguageModel:
    """Loads a model by the name of an asset, from a directory (Hugging Face or Orbax) or from a .gguf file.

    With huggingface_hub installed, also by its repository name on a hub ("org/model"). `dtype` is a type or
    its name; by default bfloat16 on GPUs and TPUs, float32 on CPUs. `sharding` says, by the path of a weight
    ("layers_0/attention/q_proj/kernel"), where it goes; `mesh`, a mesh or a `vecinfer_jax.parallel.Layout`, puts each
    where it belongs on that mesh, one tensor at a time, and all that is done with the model then runs there. Raises a
    `VecInferError`, in one line, for whatever is wrong with the name, the files or the architecture.
    """
    dtype = resolve_dtype(dtype)
    name = str(name_or_path)
    if name in _model_assets():
        path = assets.fetch(name, progress=progress)
    else:
        path = Path(name).expanduser()
        name = path.absolute().name.removesuffix(".gguf")
    if sharding is not None and mesh is not None:
        raise InputError("give sharding or mesh, not both")
    if mesh is not None:
        from vecinfer_jax.parallel import layout_of, weight_sharding

        layout = layout_of(mesh)
        lm = _load_path(path, name, str(name_or_path), dtype, progress, lambda config: weight_sharding(layout, config))
        return dataclasses.replace(lm, layout=layout)
    return _load_path(path, name, str(name_or_path), dtype, progress, lambda config: sharding)


def _load_path(path: Path, name: str, given: str, dtype: Any, progress: bool, placed: _Placed) -> LanguageModel:
    if path.is_dir():
        return _load_directory(path, name, dtype, progress, placed)
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path, name, dtype, progress, placed)
    if not path.exists() and _HUB_NAME.fullmatch(given):
        return _load_directory(_from_hub(given), given, dtype, progress, placed)
    raise InputError(
        f"there is no model {given!r}; name a directory with config.json and weights, a .gguf file, "
        f"a repository on a hub (org/model), or one of {', '.join(_model_assets())}"
    )


def random_model(config: ModelConfig, seed: int = 0, dtype: Any = None) -> LanguageModel:
    """A model of random weights, without a tokenizer: for shapes whose weights are not at hand."""
    dtype = resolve_dtype(dtype)
    digest = hashlib.sha256(f"random {seed} {dtype}".encode()).hexdigest()
    return LanguageModel(
        config=config,
        params=init_params(config, jax.random.key(seed), dtype),
        tokenizer=None,
        dtype=dtype,
        name=f"random-{config.model_type}-{seed}",
        fingerprint=_fingerprint(config, digest),
    )


def resolve_dtype(dtype: Any = None) -> Any:
    """The type that `dtype` names; None is bfloat16 on a GPU or TPU and float32 on a CPU."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return resolved


def _model_assets() -> list[str]:
    return [name for name, asset in assets.ASSETS.items() if asset.kind == "model"]


def _load_gguf(path: Path, name: str, dtype: Any, progress: bool, placed: _Placed) -> LanguageModel:
    file = GgufFile(path)
    config = config_from_gguf(file)
    tokenizer = tokenizer_from_gguf(file)
    source = GgufWeights(file, config)
    params, digest = load_params(source, config, dtype, sharding=placed(config), progress=progress)
    return _assemble(config, params, tokenizer, dtype, name, _fingerprint(config, digest))


def _load_directory(path: Path, name: str, dtype: Any, progress: bool, placed: _Placed) -> LanguageModel:
    if orbax.is_orbax(path):
        config, description = orbax.read_description(path)
        tokenizer = tokenizer_from_directory(path)
        params = orbax.load_orbax(path, config, dtype, sharding=placed(config))
        name, fingerprint = description.get("name") or name, description.get("fingerprint")
        if not fingerprint:
            as_saved = orbax.load_orbax(path, config, None)
            fingerprint = _fingerprint(config, digest_of(as_saved, config, path))
        return _assemble(config, params, tokenizer, dtype, name, fingerprint)
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path} has no config.json; name a Hugging Face or an Orbax directory")
    config = config_from_hf(read_config(path))
    tokenizer = tokenizer_from_directory(path)
    source = HfWeights(path, config)
    params, digest = load_params(source, config, dtype, sharding=placed(config), progress=progress)
    return _assemble(config, params, tokenizer, dtype, name, _fingerprint(config, digest))


def _assemble(
    config: ModelConfig, params: Params, tokenizer: Tokenizer | None, dtype: Any, name: str, fingerprint: str
) -> LanguageModel:
    """Generation stops at what either the model's or the tokenizer's files call an end."""
    if tokenizer is not None:
        ends = tuple(dict.fromkeys((*config.eos_token_ids, *tokenizer.eos_token_ids)))
        config = dataclasses.replace(config, eos_token_ids=ends)
        tokenizer = dataclasses.replace(tokenizer, eos_token_ids=ends)
    return LanguageModel(config, params, tokenizer, dtype, name, fingerprint)


def _fingerprint(config: ModelConfig, digest: str) -> str:
    """16 hexadecimal digits over the weights and everything in the configuration that changes the logits."""
    data = config.to_json()
    for key in ("model_type", "max_position", "bos_token_id", "eos_token_ids"):
        del data[key]
    del data["rope"]["max_position"]
    text = json.dumps(data, sort_keys=True) + digest
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_hub(repository: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"there is no directory {repository!r}; to fetch that repository install vecinfer-jax[hub], "
            "or download it yourself and name its directory"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES)
        )
    except Exception as error:  # many kinds: no network, no such repository, gated, disk full
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{repository} cannot be fetched from the hub ({reason}); download it and name its directory"
        ) from None
