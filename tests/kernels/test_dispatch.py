"""Dispatch picks an implementation, and every kernel lowers for the devices that it is dispatched to."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import (
    dispatch,
    group_int_decode_attention,
    hadamard,
    nuq_decode_attention,
    vq_decode_attention,
    vq_encode,
)
from tests.kernels import cases

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lower_for_cuda(function, *arguments):
    """Lower as on a GPU machine; interpret mode accepts what this refuses."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text or "mosaic_gpu" in text
    return text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 16), (64, 64), (1000, 128), (70, 256), (9, 512), (100, 1024)])
def test_hadamard_lowers_for_cuda(shape, dtype):
    lower_for_cuda(lambda x: hadamard(x, implementation="triton"), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.ENCODE_ON_DEVICE] + [(c, "mosaic_gpu") for c in cases.ENCODE_ON_DEVICE if c.few],
    ids=str,
)
def test_vq_encode_lowers_for_cuda(case, implementation):
    arrays, options = case.arguments()
    dense = options.pop("hadamard", False)
    encode = lambda arrays, options: vq_encode(*arrays, **options, hadamard=dense, implementation=implementation)  # noqa: E731
    lower_for_cuda(encode, arrays, options)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.DECODE_ON_DEVICE] + [(c, "mosaic_gpu") for c in cases.DECODE_ON_DEVICE if c.hopper],
    ids=str,
)
def test_vq_decode_attention_lowers_for_cuda(case, implementation):
    arrays, options = case.arguments()
    lower_for_cuda(lambda *a: vq_decode_attention(*a, **options, implementation=implementation), *arrays)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.NUQ_LOWERED if c.triton] + [(c, "mosaic_gpu") for c in cases.NUQ_LOWERED if c.hopper],
    ids=str,
)
def test_nuq_decode_attention_lowers_for_cuda(case, implementation):
    arrays, options = case.arguments()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    lower_for_cuda(lambda *a: nuq_decode_attention(*a, **options, implementation=implementation), *shapes)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(c, "triton") for c in cases.GROUP_INT_LOWERED] + [(c, "mosaic_gpu") for c in cases.GROUP_INT_LOWERED if c.hopper],
    ids=str,
)
def test_group_int_decode_attention_lowers_for_cuda(case, implementation):
    arrays, options = case.arguments()
    text = lower_for_cuda(lambda *a: group_int_decode_attention(*a, **options, implementation=implementation), *arrays)
    if implementation == "mosaic_gpu":  # the cache is read as it is stored
        assert "transpose" not in text and "concatenate" not in text


def test_kernels_lower_for_cuda_under_vmap():
    (q, keys, values, *rest), options = cases.Decode(lengths=(3, 20), tokens=20).arguments()
    for name in ("triton", "mosaic_gpu"):
        step = lambda *a, name=name: vq_decode_attention(*a, *rest, **options, implementation=name)  # noqa: E731
        lower_for_cuda(jax.vmap(step), *(jnp.stack([a, a]) for a in (q, keys, values)))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_references_lower_for_every_platform(platform):
    lower = lambda f, *a: jax.jit(f).trace(*a).lower(lowering_platforms=(platform,))  # noqa: E731
    lower(lambda x: hadamard(x, implementation="xla"), jnp.zeros((3, 512)))
    for case in cases.ENCODE:
        arrays, options = case.arguments()
        lower(lambda x, b, o=options: vq_encode(x, b, **o, implementation="xla"), *arrays)
    for case in cases.DECODE:
        arrays, options = case.arguments()
        lower(lambda *a, o=options: vq_decode_attention(*a, **o, implementation="xla"), *arrays)


def test_unknown_implementations_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'cuda'.*triton"):
        hadamard(jnp.zeros((2, 64)), implementation="cuda")


def test_a_named_implementation_says_what_it_does_not_support():
    x = jnp.zeros((1, 4, 2, 96))
    with pytest.raises(NotImplementedError, match="D=96") as error:
        vq_encode(x, jnp.zeros((1, 256, 4)), implementation="triton", interpret=True)
    assert "\n" not in str(error.value)
    case = cases.Decode(group=17, lengths=(3,), tokens=4)
    arrays, options = case.arguments()
    with pytest.raises(NotImplementedError, match="17 heads"):
        vq_decode_attention(*arrays, **options, implementation="triton", interpret=True)


def test_none_falls_back_where_a_kernel_does_not_serve_the_format():
    arrays, options = cases.Decode(group=17, lengths=(3,), tokens=4).arguments()
    output, _ = vq_decode_attention(*arrays, **options, interpret=True)
    assert (output == vq_decode_attention(*arrays, **options, implementation="xla")[0]).all()


def test_gpus_try_the_kernels_first_and_other_devices_only_the_reference(monkeypatch):
    for backend, expected in (("gpu", ("triton", "xla")), ("cpu", ("xla",)), ("tpu", ("xla",))):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert dispatch.candidates("hadamard", None, interpret=False) == expected


def test_mosaic_gpu_is_for_hopper_and_data_centre_blackwell(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    capabilities = {"8.9": False, "9.0": True, "10.0": True, "12.0": False, "gfx942": False, None: False}
    for capability, has in capabilities.items():
        dispatch._has_mosaic_gpu.cache_clear()
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        names = dispatch.candidates("vq_decode_attention", None, interpret=False)
        assert names == (("mosaic_gpu",) if has else ()) + ("triton", "xla")
    dispatch._has_mosaic_gpu.cache_clear()
    assert dispatch.named("hadamard", "mosaic_gpu") is dispatch.named("hadamard", None) is None
    assert dispatch.named("vq_append", "triton") == "xla"
    assert dispatch.named("vq_decode_attention", "mosaic_gpu") == "mosaic_gpu"


def test_a_machine_without_a_gpu_never_imports_the_triton_lowering():
    program = (
        "import sys, jax.numpy as jnp, pallas_kernels as pk;"
        "pk.hadamard(jnp.ones((2, 64)), implementation='xla');"
        "sys.exit('jax.experimental.pallas.triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", program]).returncode == 0
