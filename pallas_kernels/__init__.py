"""Kernels for a compressed KV cache: array in, array out.

Every operation has a reference in plain `jax.numpy` (implementation "xla"), which says what it means and runs
anywhere, and Pallas kernels for NVIDIA GPUs. `implementation=None` picks the best one for the default device.
"""

from pallas_kernels import group_int, nuq, packing, split_k
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.group_int_append import group_int_append
from pallas_kernels.group_int_decode_attention import group_int_decode_attention
from pallas_kernels.hadamard import hadamard
from pallas_kernels.host_tier import attend_rows, channel_lse, fetch_channels, select_tokens
from pallas_kernels.nuq_decode_attention import nuq_decode_attention
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.vq_append import vq_append
from pallas_kernels.vq_decode_attention import ExactTokens, vq_decode_attention
from pallas_kernels.vq_encode import vq_encode

__all__ = [
    "ExactTokens",
    "attend_rows",
    "channel_lse",
    "decode_attention",
    "fetch_channels",
    "group_int",
    "group_int_append",
    "group_int_decode_attention",
    "hadamard",
    "nuq",
    "nuq_decode_attention",
    "packing",
    "rms_norm",
    "select_tokens",
    "split_k",
    "vq_append",
    "vq_decode_attention",
    "vq_encode",
]
