"""A calibration: arrays per layer and how they were made. Data only, saved with Orbax, never pickled.

A directory holds `metadata.json` (what it is for, versions, a SHA-256 of every array) and `arrays/` (Orbax). It is
written beside its destination and renamed, so nothing half-written stays behind.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vecinfer_jax.errors import CalibrationError, InputError

COMMITTED = "commit_success.txt"  # Orbax's mark of a whole checkpoint
FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """layers: one dict of arrays a layer; metadata: model fingerprint, method key, text, versions."""

    layers: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, Any]

    @property
    def method_key(self) -> Mapping[str, Any]:
        """`CacheMethod.calibration_key()` of the methods this serves."""
        return self.metadata["method"]

    @property
    def digest(self) -> str:
        """A short hash of every array: equal calibrations have equal digests."""
        return hashlib.sha256(json.dumps(_digests(self._arrays()), sort_keys=True).encode()).hexdigest()[:16]

    def _arrays(self) -> dict[str, dict[str, np.ndarray]]:
        # A layer whose method needs nothing has no arrays.
        return {_layer_name(i): {k: np.asarray(v) for k, v in a.items()} for i, a in enumerate(self.layers) if a}

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes the artefact; an older artefact there is replaced once the new one is whole.

        Raises `InputError` where `directory` is something else than an artefact or an empty directory (unless
        `force`), or cannot be written; what was there then stays.
        """
        destination = Path(directory).absolute()
        if not force:
            check_destination(destination)
        arrays = self._arrays()
        metadata = dict(self.metadata) | {
            "format": FORMAT,
            "num_layers": len(self.layers),
            "arrays": _digests(arrays),
        }
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        except OSError as error:
            raise InputError(f"cannot write {destination}: {error}") from None
        new, old = work / "new", work / "old"
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(new / "arrays", arrays)
            (new / "arrays" / COMMITTED).write_text("Checkpoint commit was successful")  # without its path there
            (new / "metadata.json").write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n")
            try:
                if destination.exists():
                    os.replace(destination, old)
                os.replace(new, destination)
            except BaseException:
                if old.exists() and not destination.exists():
                    os.replace(old, destination)
                raise
        except OSError as error:
            raise InputError(f"cannot write {destination}: {error}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return destination

    def check(self, fingerprint: str, method_key: Mapping[str, Any]) -> None:
        """Raises `CalibrationError` unless this was made from that model for that method."""
        if self.metadata["model"]["fingerprint"] != fingerprint:
            raise CalibrationError(
                f"this calibration is of model {self.metadata['model']['name']!r} "
                f"({self.metadata['model']['fingerprint']}), not of the loaded one ({fingerprint}): calibrate again"
            )
        if dict(self.method_key) != dict(method_key):
            raise CalibrationError(
                f"this calibration is for {_short(self.method_key)}, not for {_short(method_key)}: calibrate again"
            )


def check_destination(directory: str | os.PathLike[str]) -> None:
    """Raises `InputError` unless an artefact may be saved there: nothing, an empty directory or an artefact."""
    path = Path(directory).absolute()
    try:
        if path.is_dir():
            free = not any(path.iterdir()) or ((path / "metadata.json").is_file() and (path / "arrays").exists())
        else:
            free = not path.exists()
        # Trying is the only sure way to find out whether a place can be written.
        with tempfile.TemporaryDirectory(dir=next((p for p in path.parents if p.exists()), path)):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    if not free:
        raise InputError(f"{path} exists and is no calibration: choose another directory")


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an artefact, without its arrays. Raises `CalibrationError`."""
    path = Path(directory) / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
        if metadata["format"] != FORMAT:
            raise CalibrationError(f"{directory}: calibration format {metadata['format']} is not {FORMAT}")
        _ = metadata["model"]["fingerprint"], metadata["method"], metadata["arrays"], metadata["num_layers"]
    except OSError as error:
        raise CalibrationError(f"{directory} holds no calibration: {path.name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path} is damaged ({error!r}): calibrate again") from None
    return metadata


def read_calibration(directory: str | os.PathLike[str]) -> Calibration:
    """Reads an artefact; truncated, altered or NaN-carrying ones are refused by name with `CalibrationError`."""
    metadata = read_metadata(directory)
    digests = metadata["arrays"]
    arrays_path = Path(directory).absolute() / "arrays"
    if digests and not arrays_path.is_dir():
        raise CalibrationError(f"{arrays_path} cannot be read (there is none): calibrate again")
    try:
        template: dict[str, dict[str, np.ndarray]] = {}
        for name, entry in digests.items():
            layer, _, field = name.partition("/")
            template.setdefault(layer, {})[field] = np.zeros(entry["shape"], entry["dtype"])
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(arrays_path, template)
        arrays = jax.tree.map(np.asarray, arrays)
        found = _digests(arrays)
        expected = {name: entry["sha256"] for name, entry in digests.items()}
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CalibrationError(f"{arrays_path} cannot be read ({reason[0][:120]}): calibrate again") from None
    for name, digest in expected.items():
        if found[name]["sha256"] != digest:
            raise CalibrationError(f"{directory}: array {name} is not what was saved: calibrate again")
    layers = tuple(arrays.get(_layer_name(i), {}) for i in range(metadata["num_layers"]))
    for index, layer_arrays in enumerate(layers):
        for field, array in layer_arrays.items():
            if not np.all(np.isfinite(array)):
                raise CalibrationError(f"{directory}: layer {index}'s {field} is not finite: calibrate again")
    return Calibration(layers, metadata)


def versions() -> dict[str, str]:
    """What made an artefact."""
    found = {}
    for package in ("vecinfer-jax", "jax", "flax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def _layer_name(index: int) -> str:
    return f"layer_{index:03d}"


def _digests(arrays: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    digests = {}
    for layer, fields in arrays.items():
        for field, array in fields.items():
            content = np.ascontiguousarray(array)
            digests[f"{layer}/{field}"] = {
                "shape": list(content.shape),
                "dtype": str(content.dtype),
                "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
            }
    return digests


def _short(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(key.items()))
