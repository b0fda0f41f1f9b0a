"""How a codec that can be calibrated says so in a recipe: `rounding: gptq`.

Rounding decides codes and scales; the stored form and the decoder do not depend on it. `nearest` rounds each weight
alone and needs nothing but the weight. `gptq` spreads a weight's rounding error over the columns that are rounded
after it, and needs the second moments of the layer's inputs, which a build takes from a calibration set. With it,
`scale: mse` searches the scale of least error, weighted by what an error of each column costs after feedback.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
)

from bagel_compress.codecs.base import Codec
from bagel_compress.codecs.grid import Grid
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.io.yaml_model import FrozenModel

NEAREST: Literal["nearest"] = "nearest"


class Gptq(FrozenModel):
    """Rounding with error feedback (Frantar et al., arXiv 2210.17323), then coordinate descent on the same error."""

    method: Literal["gptq"] = "gptq"
    act_order: bool = Field(default=True, description="columns of the largest inputs first")
    damping: float = Field(
        default=0.01, gt=0, le=1, description="added to the diagonal of the moments, in units of its mean"
    )
    passes: int = Field(default=2, ge=0, le=16, description="rounds of coordinate descent after the feedback")
    refit: bool = Field(default=False, description="make up for the errors of the layers before")


def parse_rounding(value: Any) -> Any:
    """`nearest`, `gptq` or `{method: gptq, passes: 2}` -> the rounding. Raises ValueError with the known methods."""
    if value in (NEAREST, {"method": NEAREST}):
        return NEAREST
    if value == "gptq":
        return Gptq()
    if isinstance(value, Mapping) and "method" not in value:
        raise ValueError(f"rounding is {dict(value)!r}, expected nearest, gptq or a mapping with `method`")
    name = value.get("method") if isinstance(value, Mapping) else value
    if name != "gptq" and not isinstance(value, Gptq):
        raise ValueError(f"unknown rounding {name!r}; roundings are nearest, gptq")
    return value


def _method(value: Any) -> str:
    return value if isinstance(value, str) else str(value["method"] if isinstance(value, Mapping) else value.method)


Rounding = Annotated[
    Annotated[Literal["nearest"], Tag(NEAREST)] | Annotated[Gptq, Tag("gptq")],
    Discriminator(_method),
    BeforeValidator(parse_rounding),
]


class CalibratedCodec(Codec):
    """Base of the codecs whose codes a calibrated rounding may choose."""

    rounding: Rounding = NEAREST
    later: ClassVar[tuple[str, ...]] = ("rounding",)  # fields younger than the first artifacts of the format

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `later` fields out at their defaults: digests of recipes that never had them stay what they are."""
        fields: dict[str, Any] = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                fields.pop(name, None)
        return fields

    @property
    def calibrated(self) -> bool:
        """Does encoding need the second moments of the layer's inputs?"""
        return self.rounding != NEAREST

    @abstractmethod
    def grid(self, spec: TensorSpec) -> Grid | None:
        """Levels and scales for this weight; None where the format's blocks run over the ends of its rows."""
