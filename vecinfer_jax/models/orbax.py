"""Models in Orbax checkpoints: a directory with config.json, the tokenizer's files and the weights in
`params`."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vecinfer_jax.errors import InputError, WeightsError
from vecinfer_jax.models.checkpoint_map import flatten, unflatten
from vecinfer_jax.models.config import ModelConfig, config_from_hf
from vecinfer_jax.models.decoder import param_shapes
from vecinfer_jax.models.hf import read_config
from vecinfer_jax.models.tokenizer import Tokenizer
from vecinfer_jax.models.weights import Params, ShardingOf

PARAMS = "params"
CONFIG = "config.json"
FORMAT = "vecinfer_jax 1"


def is_orbax(directory: Path) -> bool:
    """Whether `save_orbax` wrote this directory."""
    return (directory / PARAMS).is_dir() and (directory / CONFIG).is_file()


def save_orbax(
    params: Params,
    config: ModelConfig,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    name: str = "",
    fingerprint: str = "",
) -> Path:
    """Writes a model that `load` reads back, with the same fingerprint.

    The directory appears whole or not at all: everything is written to a sibling that is then renamed. Raises
    `InputError` where `directory` exists already.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise InputError(f"{directory} exists already; name a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        description = {
            "format": FORMAT,
            "name": name,
            "fingerprint": fingerprint,
            "dtype": str(jax.tree.leaves(params)[0].dtype),
            "model": config.to_json(),
        }
        (scratch / CONFIG).write_text(json.dumps(description, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(scratch)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(scratch / PARAMS, params)
        scratch.chmod(0o755)  # mkdtemp keeps others out
        os.replace(scratch, directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return directory


def read_description(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """-> (configuration, what `save_orbax` wrote beside it: "name" and "fingerprint").

    A Hugging Face config.json serves too; its fingerprint is found out by reading the weights. Raises
    `WeightsError` or `UnsupportedModelError` where config.json is neither.
    """
    data = read_config(directory)
    if "format" not in data:
        return config_from_hf(data), {}
    if data["format"] != FORMAT or "model" not in data:
        raise WeightsError(f"{directory / CONFIG} is not of the format {FORMAT!r}; convert the model again")
    return ModelConfig.from_json(data["model"]), data


def load_orbax(directory: str | Path, config: ModelConfig, dtype: Any, *, sharding: ShardingOf | None = None) -> Params:
    """The parameters in `directory`, cast to `dtype` (None: as saved) and placed where `sharding` says.

    Raises `WeightsError` where a weight is missing, unexpected, misshapen, unreadable or not finite.
    """
    directory = Path(directory).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            held = flatten(checkpointer.metadata(directory / PARAMS).item_metadata.tree)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(directory, error) from None
        wanted = _wanted(config, dtype, held, sharding)
        _check(directory, held, wanted)
        try:
            params = checkpointer.restore(directory / PARAMS, unflatten(wanted))
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise _unreadable(directory, error) from None
    for path, leaf in flatten(params).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise WeightsError(f"{directory}: weight {path} holds values that are not finite")
    return params


def _unreadable(directory: Path, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:300]
    return WeightsError(f"{directory / PARAMS} is incomplete or damaged: {reason}; convert the model again")


def _wanted(
    config: ModelConfig, dtype: Any, held: dict[str, Any], sharding: ShardingOf | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What to restore: every parameter's shape, type and place."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {}
    for path, leaf in flatten(param_shapes(config, jnp.float32)).items():
        saved = held[path].dtype if path in held else jnp.float32
        place = None if sharding is None else sharding(path)
        wanted[path] = jax.ShapeDtypeStruct(leaf.shape, dtype or saved, sharding=place or default)
    return wanted


def _check(directory: Path, held: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    misshapen = [
        f"{path} is {list(held[path].shape)}, not {list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in held and tuple(held[path].shape) != leaf.shape
    ]
    found = (
        ("missing", sorted(wanted.keys() - held.keys())),
        ("unexpected", sorted(held.keys() - wanted.keys())),
        ("misshapen", misshapen),
    )
    problems = [f"{what}: {', '.join(names)}" for what, names in found if names]
    if problems:
        raise WeightsError(
            f"{directory} does not hold the weights that its configuration describes; {'; '.join(problems)}"
        )
