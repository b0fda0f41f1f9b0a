"""Files: safetensors, bf16 values, atomic writes, digests, YAML, the Hub client, files that come with the package."""
