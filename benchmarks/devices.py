"""Fits vecinfer_jax/devices.json, from which `vecinfer plan` predicts steps, to what was measured.

    python benchmarks/devices.py

Reads results/<device>/step-llama-8b.json and the read bandwidth in kernels.json beside it, and prints how far every
measured step is from its prediction, those of other models (step-<model>.json), which are not fitted, included.
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
from vecinfer_jax.plan import bytes_read, milliseconds

ROOT = Path(__file__).resolve().parent / "results"
TARGET = ROOT.parent.parent / "vecinfer_jax" / "devices.json"
# Short name, folder of results, bytes of memory as the driver gives them.
DEVICES = {"h100": ("nvidia-h100-80gb-hbm3", 81559 * 2**20)}
FITTED = "llama-3.1-8b"


def rows_of(folder: str, model: str) -> list[dict[str, Any]]:
    path = ROOT / folder / f"step-{model}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if "ms_per_step" in row]


def method_of(row: dict[str, Any]) -> Any:
    return specs.parse(row["name"], METHODS, "method")


def fit(folder: str, memory: int) -> Device:
    config, rows = SHAPES[FITTED], rows_of(folder, FITTED)
    kernels = json.loads((ROOT / folder / "kernels.json").read_text())["rows"]
    bandwidth = next(row["gb_per_s"] for row in kernels if row["name"].startswith("read bandwidth"))
    name = json.loads((ROOT / folder / f"step-{FITTED}.json").read_text())["environment"]["device"]
    device = Device(name, memory, bandwidth, 0.0, {})
    layers = config.num_layers
    by_cache: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_cache.setdefault(method_of(row).reading(), []).append(row)
    for key in sorted(by_cache, key=lambda key: key != "full"):  # a layer's own time is full precision's
        of_cache, free = by_cache[key], dataclasses.replace(device, caches={key: Reading(np.inf, 0.0)})
        if len(of_cache) < 2:
            continue
        rest, matrix = [], []
        for row in of_cache:
            method, ms = method_of(row), row["ms_per_step"]
            known = milliseconds(config, method, row["batch"], row["tokens"], free)
            read = bytes_read(config, method, row["batch"], row["tokens"])
            rest.append((ms - known) / ms)
            matrix.append([layers / 1e3 / ms, read / 1e6 / ms])
        (layer_us, per_gb), *_ = np.linalg.lstsq(np.array(matrix), np.array(rest))
        if key == "full":
            device, layer_us = dataclasses.replace(device, layer_us=round(float(layer_us), 2)), 0.0
        device.caches[key] = Reading(round(float(1 / per_gb), 1), round(float(layer_us), 2))
    return device


def main() -> None:
    found = {}
    for short, (folder, memory) in DEVICES.items():
        device = found[short] = fit(folder, memory)
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
