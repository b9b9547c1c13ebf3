"""The numbers of a device that the plan needs, from a YAML file: one of `devices/`, or the user's own."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_opd.errors import UserError

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Peak(_Numbers):
    """Dense matrix products, TFLOP/s."""

    bf16: Positive
    fp32: Positive


class Link(_Numbers):
    """From one device to others: GB/s in one direction, microseconds until a message arrives."""

    bandwidth: Positive
    latency: Positive


class Hardware(_Numbers):
    """A device, and the links between devices. GB is 10^9 bytes, GiB 2^30."""

    name: str
    kernels: Literal["cpu", "torch", "transformer-engine"] = Field(
        description="Whose kernels run: torch's on a CPU, torch's on a GPU, or attention by transformer-engine."
    )
    memory: Positive = Field(description="GiB that a process can use.")
    reserve: Annotated[float, Field(ge=0)] = Field(
        description="GiB of it for the context, communication buffers and fragmentation."
    )
    peak: Peak
    achieved: Share = Field(
        description="Share of the peak that large matrix products reach, all around included."
    )
    memory_bandwidth: Positive = Field(description="GB/s.")
    memory_achieved: Share = Field(description="Share of it that is reached.")
    launch: Annotated[float, Field(ge=0)] = Field(
        description="Microseconds that starting an operation takes."
    )
    devices_per_node: Annotated[int, Field(ge=1)]
    within_node: Link
    between_nodes: Link

    @property
    def usable(self) -> int:
        """Bytes for the run itself."""
        return int((self.memory - self.reserve) * 2**30)


def known_hardware() -> list[str]:
    """Names of the files that come with the package."""
    return sorted(
        file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml")
    )


def load_hardware(name: str) -> Hardware:
    """The hardware of this name, or of this YAML file. Raises UserError when there is none or it is broken."""
    file: Traversable | Path = (
        _folder() / f"{name}.yaml" if name in known_hardware() else Path(name).expanduser()
    )
    try:
        numbers = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--hardware: {name} is no file and none of {', '.join(known_hardware())}") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"--hardware: {name} is not valid YAML") from None
    try:
        return Hardware.model_validate(numbers)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"--hardware: {name}: {key}: {first['msg']}") from None


def _folder() -> Traversable:
    return files(__package__) / "devices"
