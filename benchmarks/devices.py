"""Fits vecinfer_jax/devices.json, from which `vecinfer plan` predicts steps, to what was measured.

    python benchmarks/devices.py

Reads results/<device>/step-<model>.json and, where there is one, parallel.json, and prints how far every measured step
is from its prediction, those of models that are not fitted included.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vecinfer_jax import specs
from vecinfer_jax.bench import SHAPES
from vecinfer_jax.caches import METHODS
from vecinfer_jax.devices import Device, Reading
from vecinfer_jax.models import ModelConfig
from vecinfer_jax.plan import bytes_read, milliseconds, weights_read

ROOT = Path(__file__).resolve().parent / "results"
TARGET = ROOT.parent.parent / "vecinfer_jax" / "devices.json"
# Short name, folder of results, bytes of memory as the driver gives them.
DEVICES = {"h100": ("nvidia-h100-80gb-hbm3", 81559 * 2**20)}
FITTED = ("llama-3.1-8b", "smollm2-135m")
# From fewer to more tokens by this factor tells what a layer takes whatever the length.
SPREAD = 4


def rows_of(folder: str, model: str) -> list[dict[str, Any]]:
    path = ROOT / folder / f"step-{model}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if "ms_per_step" in row]


def method_of(row: dict[str, Any]) -> Any:
    return specs.parse(row["name"], METHODS, "method")


def fit(folder: str, memory: int) -> Device:
    """Least squares of relative errors: first full precision's weights, layers and cache, then every other cache's."""
    name = json.loads((ROOT / folder / f"step-{FITTED[0]}.json").read_text())["environment"]["device"]
    by_cache: dict[str, list[tuple[ModelConfig, Any, dict[str, Any]]]] = {}
    for model in FITTED:
        for row in rows_of(folder, model):
            method = method_of(row)
            by_cache.setdefault(method.reading(), []).append((SHAPES[model], method, row))
    matrix, ones = [], []
    for config, method, row in by_cache.pop("full"):
        read = bytes_read(config, method, row["batch"], row["tokens"])
        terms = np.array([weights_read(config) / 1e6, config.num_layers / 1e3, read / 1e6])
        matrix.append(terms / row["ms_per_step"])
        ones.append(1.0)
    (per_weight, layer_us, per_byte), *_ = np.linalg.lstsq(np.array(matrix), np.array(ones))
    caches = {"full": Reading(round(float(1 / per_byte), 1), 0.0)}
    device = Device(name, memory, round(float(1 / per_weight), 1), round(float(layer_us), 2), caches)
    for key, rows in sorted(by_cache.items(), key=lambda item: -len(item[1])):
        alike = [reading.layer_us for other, reading in caches.items() if other.split()[0] == key.split()[0]]
        held = [row["batch"] * row["tokens"] for _, _, row in rows]
        close = max(held) < SPREAD * min(held)
        if close and not alike:
            continue
        free, matrix, rest = dataclasses.replace(device, caches={key: Reading(np.inf, 0.0)}), [], []
        for config, method, row in rows:
            batch, tokens, ms = row["batch"], row["tokens"], row["ms_per_step"]
            read = bytes_read(config, method, batch, tokens)
            matrix.append(np.array([config.num_layers / 1e3, read / 1e6]) / ms)
            rest.append(1.0 - (milliseconds(config, method, batch, tokens, free) or 0.0) / ms)
        if close:  # a layer takes as long with the same method in another width
            layer_us = alike[0]
            slope, left = np.array([m[1] for m in matrix]), np.array(rest) - layer_us * np.array([m[0] for m in matrix])
            per_byte = slope @ left / (slope @ slope)
        else:
            (layer_us, per_byte), *_ = np.linalg.lstsq(np.array(matrix), np.array(rest))
        caches[key] = Reading(round(float(1 / per_byte), 1), round(float(layer_us), 2))
    return device


def merge_us(folder: str) -> dict[int, float]:
    """What the merge adds to a layer, by devices: the median over lengths, from `benchmarks/parallel.py attention`."""
    path = ROOT / folder / "parallel.json"
    rows = json.loads(path.read_text()).get("attention", []) if path.exists() else []
    us = {(row["devices"], row["tokens"], row["merge"]): row["us"] for row in rows}
    added: dict[int, list[float]] = {}
    for (devices, tokens, merge), time in us.items():
        if merge == "gather" and (devices, tokens, "alone") in us:
            added.setdefault(devices, []).append(time - us[devices, tokens, "alone"])
    return {devices: round(float(np.median(times)), 2) for devices, times in added.items()}


def main() -> None:
    found = {}
    for short, (folder, memory) in DEVICES.items():
        device = found[short] = dataclasses.replace(fit(folder, memory), merge_us=merge_us(folder))
        for path in sorted((ROOT / folder).glob("step-*.json")):
            model = path.stem.removeprefix("step-")
            for row in rows_of(folder, model):
                method = method_of(row)
                if method.reading() in device.caches:
                    ms = milliseconds(SHAPES[model], method, row["batch"], row["tokens"], device)
                    off = 100 * (ms / row["ms_per_step"] - 1)
                    shape = f"B{row['batch']} x {row['tokens']:>9,}"
                    print(f"{model:14} {row['name']:24} {shape} {row['ms_per_step']:8.3f} ms, {off:+5.1f}%")
    content = {short: dataclasses.asdict(device) for short, device in found.items()}
    TARGET.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
