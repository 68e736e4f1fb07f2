"""Every cache against the model run without any cache: whether kvcompress works here, with one model."""
