"""Published benchmarks on a build: their own files in, pictures and answers out, scores with intervals."""
