"""ecq: entropy-coded quantisation. One uniform step per weight, integer codes, coded at their entropy: any bit rate.

Reading order: `codec` (the format as a recipe sees it), `layout` (what is stored), `book` (frequencies and tables),
`step` (the search for the step that meets a rate), `encode` with `pack`, `decode` with `unpack`, then the run time.
"""

from bagel_compress.codecs.ecq.codec import Ecq

__all__ = ["Ecq"]
