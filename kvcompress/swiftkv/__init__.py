"""Models whose later layers take keys and values from one hidden state; caches, distillation (arXiv:2410.03960)."""
