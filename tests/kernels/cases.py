"""The cases that every implementation runs, and how their data is made."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.group_int import Layout
from tests.kernels import oracle

# What runs on this machine: plain JAX, and the Triton kernels in interpret mode.
EVERYWHERE = [
    {"implementation": "xla"},
    {"implementation": "triton", "interpret": True},
]
NAMES = ["xla", "triton-interpret"]
# Of operations with one: a Mosaic GPU kernel, on a CPU in tests/kernels/lane_simulator.py.
MOSAIC_GPU = {"implementation": "mosaic_gpu"}


@dataclasses.dataclass(frozen=True)
class Decode:
    """A decoding step. `tile` tokens is what the Triton kernel reads at once for these shapes."""

    dim: int = 64
    group: int = 4
    key: tuple[int, int] = (4, 8)  # sub-vector length, bits
    value: tuple[int, int] = (4, 8)
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = (0, 1, 100, 131)
    tokens: int = 131
    kv_heads: int = 2
    shared: bool = False  # one codebook for all heads
    num_splits: int | None = None

    def __str__(self) -> str:
        key, value = ("d{}b{}".format(*pair) for pair in (self.key, self.value))
        formats = key if key == value else f"{key}-{value}"
        ends = ".".join(map(str, self.lengths))
        return f"D{self.dim}-G{self.group}-{formats}-{self.dtype}-{ends}of{self.tokens}"

    @property
    def hopper(self) -> bool:
        """Whether the Mosaic GPU kernel serves it."""
        whole = all(self.dim // length * bits % 32 == 0 for length, bits in (self.key, self.value))
        return whole and self.dtype != "float32" and {self.key[1], self.value[1]} <= {8, 10, 12}

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        rng = np.random.default_rng(seed)
        batch = len(self.lengths)
        q = rng.normal(size=(batch, self.kv_heads * self.group, self.dim))
        codes, books = [], []
        for length, bits in (self.key, self.value):
            shape = (batch, self.kv_heads, self.tokens, self.dim // length)
            codes.append(jnp.asarray(oracle.pack(rng.integers(0, 2**bits, shape), bits)))
            book = rng.normal(size=(1 if self.shared else self.kv_heads, 2**bits, length))
            books.append(jnp.asarray(book, jnp.float32))
        arrays = (jnp.asarray(q, self.dtype), *codes, *books, jnp.array(self.lengths, jnp.int32))
        return arrays, {"scale": self.dim**-0.5, "num_splits": self.num_splits}


# Tiles of the Triton kernel: 8192 / D tokens for 16-bit inputs, 2048 / D for float32.
DECODE = [
    Decode(dim=128, group=4, lengths=(0, 63, 64, 65), tokens=100),
    Decode(dim=64, group=3, lengths=(127, 128, 129, 1), tokens=129, num_splits=2),
    Decode(dim=64, group=1, lengths=(1, 40, 77), tokens=77, shared=True),
    Decode(dim=64, group=5, dtype="float32", lengths=(0, 31, 32, 33), tokens=40),
    Decode(dim=128, group=8, dtype="float32", lengths=(15, 16, 17), tokens=50, num_splits=3),
    Decode(dim=64, group=16, key=(2, 8), value=(8, 8), lengths=(0, 200), tokens=200, num_splits=4),
    Decode(dim=128, group=7, key=(8, 8), value=(2, 8), lengths=(3, 70), tokens=90),
    Decode(dim=64, group=4, key=(4, 10), value=(8, 12), lengths=(0, 9, 130), tokens=130),
    Decode(dim=64, group=4, key=(8, 12), value=(4, 10), dtype="float32", lengths=(33, 50), tokens=50, shared=True),
    Decode(dim=64, group=2, key=(2, 4), value=(8, 9), dtype="float32", lengths=(20,), tokens=20),
    Decode(dim=64, group=2, dtype="float16", lengths=(0, 20), tokens=20, shared=True),
    Decode(dim=128, group=12, key=(4, 12), value=(4, 10), lengths=(3, 40), tokens=40),
    Decode(dim=64, group=2, key=(8, 10), value=(4, 8), lengths=(3, 40), tokens=40),
    Decode(dim=64, group=3, key=(2, 10), value=(2, 8), lengths=(3, 40), tokens=40),
]

# On a device: the tiles' edges again, compiled, and long rows.
DECODE_ON_DEVICE = [
    *DECODE,
    *(
        Decode(dim=dim, group=group, key=key, value=value, dtype=dtype, lengths=(0, 1, 1000, 2048), tokens=2048)
        for dim in (64, 128)
        for group, dtype in ((1, "bfloat16"), (4, "bfloat16"), (16, "bfloat16"), (5, "float32"))
        for key, value in (
            ((2, 8), (2, 8)),
            ((4, 8), (8, 8)),
            ((4, 10), (8, 12)),
            ((8, 12), (4, 12)),
            ((2, 10), (2, 10)),
        )
    ),
    Decode(dim=128, lengths=(131072, 100001), tokens=131072, kv_heads=1),
    Decode(dim=64, group=3, lengths=(131071, 5), tokens=131072, kv_heads=1),
    Decode(dim=128, lengths=(31, 32, 33, 4095, 4096, 4097), tokens=5000),
    Decode(dim=128, group=2, lengths=tuple(range(80)), tokens=80),
]


@dataclasses.dataclass(frozen=True)
class Encode:
    """Keys or values to encode; `transform` is "", "affine", "hadamard", "matrix"; affine comes with the
    maps."""

    dim: int = 64
    format: tuple[int, int] = (4, 8)
    dtype: str = "bfloat16"
    rope: bool = False
    transform: str = ""
    batch: int = 2
    tokens: int = 9
    heads: int = 2
    shared: bool = False

    def __str__(self) -> str:
        steps = "-".join(step for step in ("rope" if self.rope else "", self.transform) if step) or "plain"
        return f"D{self.dim}-d{self.format[0]}b{self.format[1]}-{self.dtype}-{steps}"

    @property
    def few(self) -> bool:
        """Whether the Mosaic GPU kernel for few tokens serves it."""
        return not self.rope and self.format[1] > 7 and self.batch * self.tokens <= 512

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        rng = np.random.default_rng(seed)
        length, bits = self.format
        heads, dim = self.heads, self.dim
        x = jnp.asarray(rng.normal(size=(self.batch, self.tokens, heads, dim)) + 1.0, self.dtype)
        codebook = rng.normal(size=(1 if self.shared else heads, 2**bits, length))
        options: dict = {}
        if self.rope:
            angle = rng.normal(size=(self.batch, self.tokens, dim // 2)) * 10
            options["rope"] = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
        if self.transform:
            options["mean"] = jnp.asarray(rng.normal(size=(heads, dim)), jnp.float32)
            options["scale"] = jnp.asarray(rng.uniform(0.3, 2.0, size=(heads, dim)), jnp.float32)
        if self.transform == "matrix":
            options["matrix"] = jnp.asarray(rng.normal(size=(heads, dim, dim)) / dim**0.5, jnp.float32)
        if self.transform == "hadamard":
            options["hadamard"] = True
        return (x, jnp.asarray(codebook, jnp.float32)), options


ENCODE = [
    Encode(dim=64, format=(2, 8)),
    Encode(dim=128, format=(4, 8), dtype="float32"),
    Encode(dim=64, format=(8, 8), shared=True),
    Encode(dim=64, format=(4, 8), transform="affine", dtype="float32"),
    Encode(dim=128, format=(4, 8), rope=True),
    Encode(dim=64, format=(4, 8), rope=True, transform="affine"),
    Encode(dim=64, format=(2, 8), transform="hadamard"),
    Encode(dim=128, format=(4, 8), rope=True, transform="hadamard"),
    Encode(dim=64, format=(8, 8), rope=True, transform="hadamard", dtype="float32", shared=True),
    Encode(dim=64, format=(4, 8), transform="matrix", dtype="float32"),
    Encode(dim=128, format=(8, 8), rope=True, transform="matrix"),
    Encode(dim=64, format=(4, 10), rope=True, transform="matrix", tokens=5),
    Encode(dim=64, format=(8, 12), batch=1, tokens=5),
    Encode(dim=64, format=(2, 4), dtype="float16", tokens=1),
    Encode(dim=256, format=(8, 8), transform="hadamard", tokens=1, batch=1),
    Encode(dim=128, format=(4, 12), transform="hadamard", tokens=1, shared=True),
    Encode(dim=128, format=(2, 8), transform="hadamard", tokens=1, batch=1),
]

ENCODE_ON_DEVICE = [
    *ENCODE,
    *(
        Encode(dim=dim, format=form, dtype=dtype, rope=rope, transform=transform, batch=1, tokens=tokens)
        for dim, form, dtype, tokens in (
            (128, (4, 8), "bfloat16", 300),
            (64, (4, 8), "float32", 129),
            (128, (2, 8), "bfloat16", 65),
            (64, (8, 8), "bfloat16", 1),
        )
        for rope in (False, True)
        for transform in ("", "affine", "hadamard", "matrix")
    ),
]


@dataclasses.dataclass(frozen=True)
class Nuq:
    """A decoding step over non-uniformly quantised keys and values; `outliers` slots a pool, 0: none."""

    dim: int = 64
    group: int = 3
    bits: int = 3
    value_bits: int | None = None
    outliers: int = 24
    dtype: str = "float32"
    lengths: tuple[int, ...] = (0, 1, 63, 64, 65, 200)
    tokens: int = 256
    kv_heads: int = 2
    rope: bool = True
    first_position: int = 1
    theta: float = 1e4

    @property
    def triton(self) -> bool:
        """Whether the Triton kernel serves it."""
        return self.dim in (32, 64, 128, 256)

    def __str__(self) -> str:
        kind = "pre" if self.rope else "post"
        ends = ".".join(map(str, self.lengths))
        return f"D{self.dim}-G{self.group}-nuq{self.bits}-o{self.outliers}-{kind}-{self.dtype}-{ends}of{self.tokens}"

    @property
    def hopper(self) -> bool:
        """Whether the Mosaic GPU kernel serves it."""
        widths = {self.bits, self.value_bits or self.bits}
        return self.dim in (64, 128) and self.dtype != "float32" and self.group <= 8 and widths <= {2, 3, 4}

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        rng = np.random.default_rng(seed)
        batch, heads, dim = len(self.lengths), self.kv_heads, self.dim
        q = jnp.asarray(rng.normal(size=(batch, heads * self.group, dim)), self.dtype)
        codes, books = [], []
        for bits in (self.bits, self.value_bits or self.bits):
            drawn = rng.integers(0, 2**bits, (batch, heads, self.tokens, dim))
            codes.append(jnp.asarray(oracle.pack(drawn, bits)))
            books.append(jnp.asarray(np.sort(rng.uniform(-1, 1, 2**bits)), jnp.float32))
        scale = jnp.asarray(rng.uniform(0.3, 2.0, (heads, dim)), jnp.float32)
        zero = jnp.asarray(rng.normal(size=(heads, dim)), jnp.float32)
        scale_zero = np.stack([rng.uniform(0.3, 2.0, (batch, self.tokens)), rng.normal(size=(batch, self.tokens))], -1)
        pools = [self._pool(rng) if self.outliers else None for _ in range(2)]
        arrays = (q, *codes, scale, zero, *books, jnp.asarray(scale_zero, jnp.float16), *pools)
        inverse = tuple(self.theta ** -(np.arange(dim // 2) / (dim // 2))) if self.rope else None
        options = {"scale": dim**-0.5, "inverse_frequencies": inverse, "first_position": self.first_position}
        return (*arrays, jnp.array(self.lengths, jnp.int32)), options

    def _pool(self, rng):
        """Some slots of each pool filled, from the first on, at places that are all different."""
        shape = (len(self.lengths), self.kv_heads, self.tokens // 64)
        place = rng.permuted(np.broadcast_to(np.arange(64 * self.dim), (*shape, 64 * self.dim)), axis=-1)
        difference = (3 * rng.normal(size=(*shape, self.outliers))).astype(np.float16).view(np.uint16)
        words = place[..., : self.outliers].astype(np.uint32) | (difference.astype(np.uint32) << 16)
        filled = rng.integers(0, self.outliers + 1, (*shape, 1))
        return jnp.asarray(np.where(np.arange(self.outliers) < filled, words, 0), jnp.uint32)


NUQ = [
    Nuq(),
    Nuq(bits=4, dim=128, group=4, dtype="bfloat16"),
    Nuq(bits=2, dim=64, group=1, outliers=0, lengths=(63, 200)),
    Nuq(bits=2, value_bits=4, dim=128, group=8, lengths=(65, 0), tokens=128, dtype="float16"),
    Nuq(bits=3, dim=80, group=2, rope=False, lengths=(5, 64), tokens=64),
    Nuq(bits=3, dim=128, group=4, dtype="bfloat16", first_position=0, theta=5e5),
    Nuq(bits=4, dim=16, group=5, outliers=4, lengths=(1, 130), tokens=192, first_position=4),
    Nuq(bits=3, dim=64, group=5, dtype="float16", lengths=(0, 128), tokens=128),
    Nuq(bits=3, value_bits=1, dim=32, group=9, outliers=40, lengths=(5, 70), tokens=128),
]

# On a device, compiled: all formats and long rows.
NUQ_ON_DEVICE = [
    *NUQ,
    *(
        Nuq(bits=bits, dim=dim, group=group, outliers=outliers, dtype=dtype, lengths=(0, 1, 500, 512), tokens=512)
        for bits in (2, 3, 4)
        for dim, group, dtype in ((64, 4, "float32"), (128, 4, "bfloat16"))
        for outliers in (0, 82)
    ),
    Nuq(bits=1, value_bits=3, dim=256, group=16, outliers=200, lengths=(70,), tokens=128, kv_heads=1, dtype="bfloat16"),
    Nuq(dim=256, bits=3, group=8, dtype="float16", rope=False, lengths=(100,), tokens=128),
    Nuq(dim=128, bits=4, outliers=20, dtype="bfloat16", lengths=(32768,), tokens=32768, kv_heads=1, theta=5e5),
    Nuq(bits=2, dim=128, group=4, dtype="bfloat16", outliers=112, lengths=(0, 1, 4095, 131072), tokens=131072),
    Nuq(bits=3, dim=64, group=3, dtype="bfloat16", outliers=64, lengths=(5000, 4096), tokens=5056, kv_heads=3),
]

# Of these, what is lowered for CUDA without one: every format once.
NUQ_LOWERED = [
    Nuq(bits=bits, dim=dim, group=group, outliers=outliers, dtype=dtype, lengths=(5,), tokens=64)
    for bits, dim, group, outliers, dtype in (
        (2, 128, 4, 82, "bfloat16"),
        (3, 64, 3, 40, "float16"),
        (4, 128, 8, 0, "bfloat16"),
        (3, 64, 1, 20, "float32"),
    )
]


@dataclasses.dataclass(frozen=True)
class GroupInt:
    """A decoding step over integers in groups; `channel_group` None: that of the tokens, or the whole head."""

    dim: int = 128
    group: int = 4
    bits: int = 2
    token_group: int = 64
    channel_group: int | None = None
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = (0, 1, 31, 65)
    tokens: int = 128
    kv_heads: int = 2

    def __str__(self) -> str:
        ends = ".".join(map(str, self.lengths))
        groups = f"g{self.token_group}c{self.layout.channel_group}"
        return f"D{self.dim}-G{self.group}-int{self.bits}-{groups}-{self.dtype}-{ends}of{self.tokens}"

    @property
    def layout(self) -> Layout:
        return Layout(self.dim, self.bits, self.token_group, min(self.channel_group or self.token_group, self.dim))

    @property
    def triton(self) -> bool:
        """Whether the Triton kernel serves it."""
        whole = self.token_group % 32 == 0 and self.layout.channel_group % 32 == 0
        return whole and self.dim in (64, 128) and self.bits != 3 and self.group <= 16

    @property
    def hopper(self) -> bool:
        """Whether the Mosaic GPU kernel serves it."""
        return self.triton and self.dtype != "float32"

    def arguments(self, seed: int = 0) -> tuple[tuple, dict]:
        rng = np.random.default_rng(seed)
        layout, rows = self.layout, (len(self.lengths), self.kv_heads)
        q = jnp.asarray(rng.normal(size=(rows[0], self.kv_heads * self.group, self.dim)), self.dtype)
        coded = []
        for codes, scales in (layout.key_shapes(self.tokens), layout.value_shapes(self.tokens)):
            coded.append(jnp.asarray(rng.integers(0, 256, (*rows, *codes)), jnp.uint8))
            scale, zero = rng.uniform(0.1, 1.0, (*rows, *scales)), rng.normal(size=(*rows, *scales))
            keys = len(coded) == 1
            of_scale = np.arange(scales[1]) < self.dim if keys else np.arange(scales[1]) % 2 == 0
            coded.append(jnp.asarray(np.where(of_scale, scale, zero), jnp.float16))
        arrays = (q, *coded, jnp.array(self.lengths, jnp.int32))
        return arrays, {"layout": layout, "scale": self.dim**-0.5}


GROUP_INT = [
    GroupInt(lengths=(0, 1, 63, 65, 128)),
    GroupInt(dim=64, group=3, bits=1, dtype="float16", lengths=(33, 64)),
    GroupInt(dim=128, group=5, bits=4, token_group=32, lengths=(0, 31, 96), tokens=96),
    GroupInt(dim=64, group=9, bits=2, token_group=96, channel_group=32, lengths=(95,), tokens=192),
    GroupInt(dim=128, group=16, bits=1, token_group=128, lengths=(127, 5)),
    GroupInt(dim=64, group=1, bits=4, token_group=128, dtype="float16", lengths=(200,), tokens=256),
    GroupInt(dim=128, group=2, bits=2, token_group=64, channel_group=96, lengths=(128, 3)),
    GroupInt(dim=64, group=3, bits=2, dtype="float32", lengths=(0, 70)),
    # What only the reference serves.
    GroupInt(dim=80, group=2, bits=2, token_group=32, dtype="float32", lengths=(0, 33), tokens=64),
    GroupInt(dim=64, group=2, bits=3, token_group=64, dtype="float32", lengths=(65,)),
    GroupInt(dim=16, group=3, bits=2, token_group=6, dtype="float32", lengths=(1, 12), tokens=12),
    GroupInt(dim=128, group=20, bits=2, lengths=(66,)),
]

# On a device, compiled: all formats, the edges of a tile, and long rows.
GROUP_INT_ON_DEVICE = [
    *GROUP_INT,
    *(
        GroupInt(dim=dim, group=group, bits=bits, token_group=tokens, lengths=(0, 1, 31, 32, 33, 384), tokens=384)
        for bits in (1, 2, 4)
        for tokens in (32, 64, 128)
        for dim, group in ((64, 3), (128, 4), (128, 12))
    ),
    GroupInt(lengths=(0, 1, 31, 32, 33, 4095, 4096, 131072), tokens=131072),
    GroupInt(dim=64, group=3, bits=1, lengths=(131071, 5), tokens=131072, kv_heads=3),
    GroupInt(dim=64, group=7, bits=2, token_group=32, lengths=(4097, 4095), tokens=4160),
    GroupInt(dim=128, group=4, bits=4, token_group=128, dtype="float16", lengths=(32768, 1), tokens=32768),
    GroupInt(group=2, token_group=32, lengths=tuple(range(80)), tokens=96),
]

# Of these, what is lowered for CUDA without one: every family once.
GROUP_INT_LOWERED = [
    GroupInt(dim=dim, group=group, bits=bits, token_group=tokens, channel_group=channels, dtype=dtype, lengths=(5,))
    for dim, group, bits, tokens, channels, dtype in (
        (128, 4, 2, 64, None, "bfloat16"),
        (64, 3, 1, 32, None, "float16"),
        (128, 16, 4, 128, None, "bfloat16"),
        (64, 5, 4, 64, 32, "bfloat16"),
        (128, 1, 1, 64, 32, "float16"),
        (64, 7, 2, 128, None, "float32"),
    )
]
