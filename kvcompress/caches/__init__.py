"""The caches that one passes to generate, and their layers."""
