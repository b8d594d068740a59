"""Fixtures that every test may use. Markers: `gpu` needs an NVIDIA GPU, `slow` takes more than twenty
seconds."""

import os
from pathlib import Path

# Before JAX is imported. A GPU is used where there is one and JAX can use it; a CPU machine must not look for
# it.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401

# Shapes and types of annotated signatures are checked while tests run: everywhere but in the modules that define
# pytrees of arrays, whose fields hold whatever JAX's transformations put there.
CHECKED = [
    "pallas_kernels",
    "vecinfer_jax.caches.attention",
    "vecinfer_jax.caches.rows",
    "vecinfer_jax.calibration.codebooks",
    "vecinfer_jax.calibration.kmeans",
    "vecinfer_jax.evaluation",
    "vecinfer_jax.models.decoder",
    "vecinfer_jax.rope",
]
install_import_hook(CHECKED, "tests.typecheck.check")

from vecinfer_jax.errors import AssetError  # noqa: E402
from vecinfer_jax.models import LanguageModel, load  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"


def has_nvidia_gpu() -> bool:
    """Whether JAX runs on an NVIDIA GPU here."""
    return jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind.upper()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_nvidia_gpu():
        return
    skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()} here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2 135M in float32, real weights; fetched on first use."""
    return load_or_skip("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def qwen() -> LanguageModel:
    """Qwen2.5 Coder 0.5B in float32, real weights (500 MB); fetched on first use."""
    return load_or_skip("qwen2.5-coder-0.5b-instruct")


def load_or_skip(name: str) -> LanguageModel:
    """An asset in float32; where it cannot be fetched, the tests that want it are skipped and say why."""
    try:
        return load(name, "float32", progress=False)
    except AssetError as error:
        pytest.skip(f"REAL MODEL NOT TESTED: {error}")
