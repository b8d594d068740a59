"""A mesh's programs lower for CUDA where there is no GPU, with the kernels of one device inside."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from tests import small
from tests.test_lowering import H100
from vecinfer_jax.bench import random_calibration
from vecinfer_jax.caches import FullPrecision, KVQuant, TailorKV, VecInfer
from vecinfer_jax.caches.host_tier import SparseLayer
from vecinfer_jax.models.decoder import Decoder, param_shapes
from vecinfer_jax.parallel import AXES, Layout, SplitNetwork
from vecinfer_jax.rope import Rope

CONFIG = dataclasses.replace(
    small.CONFIG, num_query_heads=16, num_kv_heads=4, head_dim=64, rope=Rope(1e4, 64), num_layers=1
)


@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        (
            VecInfer(bits=2, sink=1, implementation="mosaic_gpu", transform="smooth-hadamard"),
            ("vq_append", "vq_decode_attention"),
        ),
        pytest.param(FullPrecision(), (), marks=pytest.mark.slow),
        pytest.param(
            VecInfer(bits=2, implementation="triton", transform="smooth-hadamard"), ("triton",), marks=pytest.mark.slow
        ),
        pytest.param(KVQuant(bits=3, implementation="mosaic_gpu"), ("nuq_decode_attention",), marks=pytest.mark.slow),
        pytest.param(KVQuant(bits=2, implementation="triton"), ("triton",), marks=pytest.mark.slow),
        (
            TailorKV(roles=("sparse*2",), implementation="triton"),
            ("fetch_channels", "_xla_stream_annotation", "pinned_host"),
        ),
        pytest.param(
            TailorKV(roles=("quantised", "sparse"), implementation="triton", host="vecinfer-4"),
            ("fetch_channels", "_xla_stream_annotation", "pinned_host"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TailorKV(roles=("sparse*2",), implementation="triton", basis="principal"),
            ("fetch_channels", "_xla_stream_annotation", "pinned_host"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TailorKV(roles=("sparse*2",), implementation="triton", basis="principal", heads="each"),
            ("channel_lse", "fetch_channels", "_xla_stream_annotation", "pinned_host"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TailorKV(roles=("sparse*2",), implementation="triton", host="vecinfer-4", basis="principal"),
            ("fetch_channels", "_xla_stream_annotation", "pinned_host"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "vecinfer-mosaic_gpu",
        "full",
        "vecinfer-triton",
        "kvquant-mosaic_gpu",
        "kvquant-triton",
        "sparse",
        "sparse-codes",
        "sparse-principal",
        "sparse-principal-by-each-head",
        "sparse-codes-principal",
    ],
)
def test_a_step_and_a_prompt_lower_for_cuda(method, kernels, monkeypatch):
    # On a GPU, what is prefetched goes to a stream of its own.
    monkeypatch.setattr(SparseLayer, "_kernels_serve", lambda self, store: True)
    config = dataclasses.replace(CONFIG, num_layers=len(getattr(method, "roles", "1")))
    mesh = AbstractMesh((1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=H100)
    layout = Layout(mesh, split_from=0)
    with jax.sharding.use_abstract_mesh(mesh):
        network = SplitNetwork(Decoder(config, method, jnp.bfloat16, layout.axes(2, 640)), layout)
        calibration = [random_calibration(config, method, i, jnp.bfloat16) for i in range(config.num_layers)]
        caches = jax.eval_shape(lambda: network.init(2, 640, calibration))
        params, ids = param_shapes(config, jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
        step = jax.jit(network.step).trace(params, ids, ids, caches).lower(lowering_platforms=("cuda",)).as_text()
        prompt = jax.ShapeDtypeStruct((2, 250), jnp.int32)
        start = jax.ShapeDtypeStruct((), jnp.int32)
        prefill = jax.jit(network.prefill, static_argnums=(5, 6))
        prefill.trace(params, prompt, start, caches, ids, True, "exact").lower(lowering_platforms=("cuda",))
        prefill.trace(params, prompt, start, caches, ids, False, "exact").lower(lowering_platforms=("cuda",))
    assert all(kernel in step for kernel in kernels)
    assert "all_gather" in step and "all_reduce" in step
