"""What the sections of the configuration have in common: strict, immutable, unknown keys refused."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expand_home(path: Path) -> Path:
    return path.expanduser() if path.parts[:1] == ("~",) else path


LocalPath = Annotated[Path, Field(strict=False), AfterValidator(_expand_home)]
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveWeight = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section of the configuration: immutable, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
