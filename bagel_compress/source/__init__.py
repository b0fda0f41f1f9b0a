"""Sources of weights: checkpoints in any layout, LoRA adapters, downloads from the Hub, synthetic checkpoints."""
