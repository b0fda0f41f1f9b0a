"""All formats: one file each, plus its class in CODECS."""

from typing import Annotated

from pydantic import Field

from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.raw import Raw

CODECS: tuple[type[Codec], ...] = (Raw,)
AnyCodec = Annotated[Raw, Field(discriminator="format")]
