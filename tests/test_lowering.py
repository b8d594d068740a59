"""Whole programs lower for accelerators that are not there: the XLA step for TPU, the kernels' step for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import vq_encode
from tests import small
from vecinfer_jax.caches import KIVI, FullPrecision, TailorKV, VecInfer
from vecinfer_jax.calibration import kmeans, refine
from vecinfer_jax.models.decoder import Decoder, param_shapes
from vecinfer_jax.rope import Rope

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def shapes(method, head_dim, heads, dtype, batch=2, capacity=640, tokens=1):
    """A decoder and the shapes of params, caches, tokens and positions of a call of `tokens` tokens."""
    config = dataclasses.replace(
        small.CONFIG,
        head_dim=head_dim,
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        rope=Rope(1e4, head_dim),
        num_layers=2,
    )
    decoder = Decoder(config, method, dtype)
    calibration = None
    if isinstance(method, VecInfer):
        key, value = method.key_format, method.value_format
        calibration = {
            "smooth": jnp.ones((heads[1], head_dim)),
            "key_codebook": jnp.zeros((heads[1], key.entries, key.length)),
            "value_codebook": jnp.zeros((heads[1], value.entries, value.length)),
            "mean": jnp.zeros((heads[1], head_dim)),
            "key_map": jnp.zeros((heads[1], head_dim, head_dim)),
            "query_map": jnp.zeros((heads[1], head_dim, head_dim)),
            "value_scale": jnp.ones(heads[1]),
        }

    def init():
        return tuple(method.init(decoder.layer_shape(i), batch, capacity, calibration) for i in range(2))

    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return decoder, (param_shapes(config, dtype), ids, ids, jax.eval_shape(init))


def step(decoder, decode=True):
    def run(params, tokens, positions, caches):
        return decoder.apply({"params": params}, tokens, positions, caches, decode=decode)

    return jax.jit(run, donate_argnums=3)


@pytest.mark.parametrize(
    "method",
    [
        FullPrecision(),
        VecInfer(bits=2, transform="smooth-hadamard"),
        VecInfer(bits=1.5, sink=4, transform="smooth-hadamard"),
        VecInfer(transform="metric", sink=1),
    ],
    ids=repr,
)
def test_the_xla_step_and_prefill_lower_for_tpu(method):
    for tokens, decode in ((1, True), (256, False)):
        decoder, args = shapes(method, 128, (8, 2), jnp.bfloat16, tokens=tokens)
        lowered = step(decoder, decode).trace(*args).lower(lowering_platforms=("tpu",))
        assert "custom_call" not in lowered.as_text() or "triton" not in lowered.as_text()


@pytest.mark.parametrize(("head_dim", "heads"), [(64, (9, 3)), (128, (32, 8)), (128, (14, 2))])
@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [(jnp.bfloat16, "mosaic_gpu"), (jnp.bfloat16, "triton"), (jnp.float32, "triton")],
    ids=["bfloat16-mosaic_gpu", "bfloat16-triton", "float32-triton"],
)
def test_the_kernels_step_and_prefill_lower_for_cuda(head_dim, heads, dtype, implementation):
    method = VecInfer(bits=2, sink=1, implementation=implementation, transform="smooth-hadamard")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        for tokens, decode in ((1, True), (256, False)):
            decoder, args = shapes(method, head_dim, heads, dtype, tokens=tokens)
            text = step(decoder, decode).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
            assert ("mosaic_gpu" in text) == (implementation == "mosaic_gpu" and decode)
            assert ("triton" in text) == (implementation == "triton")


@pytest.mark.parametrize(("head_dim", "heads"), [(64, (9, 3)), (128, (32, 8))])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_a_step_over_integers_in_groups_lowers_for_cuda(head_dim, heads, implementation):
    method = KIVI(bits=2, group=64, sink=1, implementation=implementation)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        decoder, args = shapes(method, head_dim, heads, jnp.bfloat16)
        text = step(decoder).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "group_int_decode_attention" in text
    assert ("group_int_append" in text, "triton" in text) == (
        implementation == "mosaic_gpu",
        implementation == "triton",
    )


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 3, "fp8_values": True}], ids=str)
def test_a_step_with_a_dense_map_of_the_keys_lowers_for_cuda(settings):
    method = VecInfer(sink=1, transform="metric", implementation="mosaic_gpu", **settings)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        decoder, args = shapes(method, 128, (32, 8), jnp.bfloat16)
        text = step(decoder).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "vq_append" in text and "vq_decode_attention" in text and "triton" not in text


def test_a_step_with_layers_in_the_hosts_memory_lowers_for_cuda():
    """Caches made within the program, so that their place is known without a device that has it."""
    method = TailorKV(roles=("quantised", "sparse"), residual=64, recent=32, block=32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        decoder, (params, ids, positions, _) = shapes(method, 128, (32, 8), jnp.bfloat16)

        def run(params, ids, positions):
            caches = tuple(method.for_layer(i, 2).init(decoder.layer_shape(i), 2, 640) for i in range(2))
            return decoder.apply({"params": params}, ids, positions, caches, decode=True)

        lowered = jax.jit(run).trace(params, ids, positions).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count('memory_kind = "pinned_host"') == 3


def test_a_step_of_refinement_lowers_for_cuda(monkeypatch):
    """Codes are chosen by the encoder's kernel in the middle of what is differentiated."""
    monkeypatch.setattr(kmeans, "vq_encode", functools.partial(vq_encode, implementation="triton"))
    monkeypatch.setattr(refine, "nearest", kmeans.nearest_by_encoding)

    def gradient(x, codebook):
        return jax.grad(lambda x, book: jnp.sum(refine.read_back(x, book, through=True) ** 2), argnums=(0, 1))(
            x, codebook
        )

    args = jax.ShapeDtypeStruct((1, 77, 2, 64), jnp.float32), jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = jax.jit(gradient).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


@pytest.mark.parametrize("form", [(2, 8), (4, 8), (8, 8), (2, 4), (4, 10), (4, 12), (8, 12)], ids=str)
@pytest.mark.parametrize("dim", [32, 128, 256])
def test_encoding_lowers_for_cuda_in_every_format(form, dim):
    length, bits = form
    heads, tokens = 3, 77  # odd and ragged

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    angles = shape(2, tokens, dim // 2)
    kinds = [
        {},
        {"rope": (angles, angles)},
        {"rope": (angles, angles), "scale": shape(heads, dim), "hadamard": True},
        {"rope": (angles, angles), "mean": shape(heads, dim), "matrix": shape(heads, dim, dim)},
    ]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        for options in kinds:
            hadamard = options.pop("hadamard", False)

            def encode(x, codebook, options, hadamard=hadamard):
                return vq_encode(x, codebook, **options, hadamard=hadamard, implementation="triton")

            x = shape(2, tokens, heads, dim, dtype=jnp.bfloat16)
            args = (x, shape(heads, 2**bits, length), options)
            text = jax.jit(encode).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("__gpu$xla.gpu.triton") == (2 if options else 1)
