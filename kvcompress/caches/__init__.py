"""The caches that are passed to generate, and their layers."""
