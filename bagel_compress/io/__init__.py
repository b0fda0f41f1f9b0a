"""Files and bits: safetensors, bf16 words, what comes with the package."""
