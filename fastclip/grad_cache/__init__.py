"""Gradient caching (Gao et al. 2021, arXiv 2101.06983): the gradient of a whole batch, encoded in small pieces."""

from fastclip.grad_cache.cache import GradCache

__all__ = ["GradCache"]
