"""Long context over several devices: a mesh of batch, cached tokens, and heads and weights."""

from vecinfer_jax.parallel import processes
from vecinfer_jax.parallel.mesh import AXES, Layout, layout_of, make_mesh, parse_mesh
from vecinfer_jax.parallel.network import SplitNetwork
from vecinfer_jax.parallel.shardings import place_model, place_params, weight_sharding
from vecinfer_jax.parallel.share import Share

__all__ = [
    "AXES",
    "Layout",
    "Share",
    "SplitNetwork",
    "layout_of",
    "make_mesh",
    "parse_mesh",
    "place_model",
    "place_params",
    "processes",
    "weight_sharding",
]
