"""What Mosaic GPU kernels written lane by lane share: `lanes`, the only module that names JAX's private ones."""
