"""The patch: a pipeline's video self-attention made sparse, and undone."""
