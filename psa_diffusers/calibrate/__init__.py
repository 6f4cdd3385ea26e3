"""psa-calibrate: from a few prompts and a target to a preset with rules for single layers."""
