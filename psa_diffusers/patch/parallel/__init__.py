"""Context parallelism as diffusers does it: the ranks share the tokens outside attention, and the heads inside it."""
