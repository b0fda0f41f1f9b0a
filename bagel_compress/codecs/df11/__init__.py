"""DF11: lossless bf16, byte for byte what the `dfloat11` package writes, and readable by it.

Reading order: `codec` (the format as a recipe sees it), `units` (which tensors share a code book), `layout` (what is
stored), `book` (Huffman codes and decode tables), `encode` with `pack`, `decode` with `unpack`, then the run time.
"""

from bagel_compress.codecs.df11.codec import DF11

__all__ = ["DF11"]
