"""Where a layer's tokens lie: segments, by how they are encoded, and what writes them to files."""
