"""Long context over several devices: a mesh of batch, cached tokens, and heads and weights."""

from vecinfer_jax.parallel.mesh import AXES, Layout, make_mesh, parse_mesh
from vecinfer_jax.parallel.network import SplitNetwork
from vecinfer_jax.parallel.shardings import place_params, weight_sharding

__all__ = ["AXES", "Layout", "SplitNetwork", "make_mesh", "parse_mesh", "place_params", "weight_sharding"]
