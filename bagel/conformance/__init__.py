"""python -m bagel.conformance DIR: is this sampler the official one? Replays golden traces and prints each error.

One row per scenario: the worst relative L2 error over its tensors, which tensor, the limit, ok. Every recorded tensor
must be computed here and compared; integer tensors and resize tables must be equal, pictures may differ by one level
(pixels are truncated), and greedy ids must be equal where the two best logits differ by more than MARGIN.
Exit code 1 if any limit is broken, a scenario was skipped, or a file is missing; 2 for wrong usage.
"""
