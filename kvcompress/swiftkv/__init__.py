"""Models whose later layers compute keys and values from one hidden state; caches, distillation (arXiv:2410.03960)."""
