"""psa-calibrate: from a few prompts and a target to a preset in the shape that suits the model."""
