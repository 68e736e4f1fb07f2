"""Shared prefixes: the cache that attends to them once, and the store that keeps them (arXiv:2402.05099)."""
