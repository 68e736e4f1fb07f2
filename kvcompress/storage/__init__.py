"""Where a layer's tokens are stored: a segment per encoding, and the code that writes them to files."""
