"""All formats: one file each, plus its class in CODECS."""

from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.df11 import DF11
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.mxfp import Mxfp4, Mxfp8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.codecs.nvfp4 import Nvfp4
from bagel_compress.codecs.raw import Raw

CODECS: tuple[type[Codec], ...] = (Raw, Nf4, Int8, Fp8, Int4, DF11, Ecq, Nvfp4, Mxfp8, Mxfp4)


def by_name() -> dict[str, type[Codec]]:
    """Format name -> codec, in the order of CODECS."""
    return {codec.name(): codec for codec in CODECS}
