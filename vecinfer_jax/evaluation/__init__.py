"""What a compressed cache costs in quality."""

from vecinfer_jax.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
