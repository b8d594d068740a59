"""Where results go, and what every result file says about how it was made."""

import datetime
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent / "results"


def device_name() -> str:
    """The folder of this machine's device, "cpu" or "nvidia-h100-80gb-hbm3"."""
    return folder_of(jax.devices()[0].device_kind)


def folder_of(device_kind: str) -> str:
    """A folder name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    return {
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def write(name: str, content: dict[str, Any], output: Path | None = None) -> Path:
    """Writes results/<device>/<name>.json (or `output`)."""
    path = output or ROOT / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path
