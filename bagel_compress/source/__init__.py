"""Where weights come from: checkpoints in any layout, adapters, downloads, synthetic ones."""
