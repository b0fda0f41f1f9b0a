"""Target: a GPU with its usable memory, the sizes of requests, and limits; a YAML file under exports/.

A target does not depend on weights or formats, so that any artifact can be compared with any target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.errors import TargetError
from bagel_compress.io.packaged import resource, target_files
from bagel_compress.io.safe_paths import is_file
from bagel_compress.io.yaml_model import FrozenModel, load_yaml
from bagel_compress.run.export_settings import ExportSettings

MIB, GIB = 2**20, 2**30
Task = Literal["t2i", "edit", "understand", "think"]
Phase = Literal["text", "vit", "vae_encode", "latent", "decode", "denoise", "vae_decode"]
Part = Literal["und", "gen", "embed", "head", "vit", "bridges", "vae"]
# What each phase computes with: layers of the understanding expert take part in every pass of the decoder. Bridges
# (norms, time embedder, vae2llm, llm2vae, the latent table) are small and always on the GPU.
NEEDED: dict[Phase, tuple[Part, ...]] = {
    "text": ("und", "bridges"),
    "vit": ("und", "vit", "bridges"),
    "vae_encode": ("vae",),
    "latent": ("und", "gen", "bridges"),
    "decode": ("und", "head", "bridges"),
    "denoise": ("und", "gen", "bridges"),
    "vae_decode": ("vae",),
}


class Device(FrozenModel):
    """A GPU. `reserved_mib` is memory that the driver, a desktop and other programs use."""

    name: str
    memory_mib: int = Field(gt=0, description="total memory as nvidia-smi prints it")
    reserved_mib: int = Field(default=0, ge=0)
    context_mib: int = Field(default=500, ge=0, description="CUDA context and library handles of the process itself")

    @property
    def usable(self) -> int:
        """Bytes that the process may use, its CUDA context included."""
        return (self.memory_mib - self.reserved_mib) * MIB


class Workload(FrozenModel):
    """The sizes of requests to the model; tokens are those of the tokenizer."""

    image: tuple[int, int] = Field(default=(1024, 1024), description="height, width of the output")
    input_image: tuple[int, int] = Field(default=(1024, 1024), description="height, width of an input picture")
    prompt_tokens: int = Field(default=64, ge=2)
    think_tokens: int = Field(default=512, ge=1)
    answer_tokens: int = Field(default=256, ge=1)


class Budget(FrozenModel):
    """Limits. Those on times apply only to measurements on the target's own GPU."""

    peak_gib: float | None = Field(default=None, gt=0, description="device memory; default: all that is usable")
    disk_gb: float | None = Field(default=None, gt=0, description="files of the artifact, in 1e9 bytes")
    seconds_per_image: float | None = Field(default=None, gt=0)
    tokens_per_second: float | None = Field(default=None, gt=0)
    step_ratio: float | None = Field(default=None, gt=0, description="seconds per step over the reference's")


class Target(FrozenModel):
    """Where a build runs: device memory, sizes of requests, limits and, for exports, the runtime.

    A frozen value; memory in MiB or GiB as the field's name says, times in seconds. `load` takes a YAML file or a
    packaged name. Raises TargetError on an unknown key or an impossible value.

        target = bc.Target.load("12gb")
        print(target.device.name, target.limit / 2**30, "GiB")
        larger = target.model_copy(update={"name": "mine", "vae_on_host": True})
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    summary: str = ""
    device: Device
    sizes: Workload = Workload()
    tasks: tuple[Task, ...] = ("t2i", "edit", "understand", "think")
    budget: Budget = Budget()
    speed: SpeedPreset = Field(
        default=SpeedPreset(), description="solver and step cache that memory is predicted and times are measured with"
    )
    residency: dict[Phase, tuple[Part, ...]] | None = Field(
        default=None,
        description="parts on the GPU in each phase; the others wait in host memory, and come layer by layer where a"
        " phase computes with them. None: all, always",
    )
    vae_on_host: bool = Field(
        default=False, description="encode and decode pictures on the CPU, as the official app does"
    )
    export: ExportSettings | None = None

    @property
    def limit(self) -> float:
        """Bytes of device memory that may be used, CUDA context included."""
        return self.device.usable if self.budget.peak_gib is None else self.budget.peak_gib * GIB

    @property
    def disk_limit(self) -> float | None:
        """Bytes that the files of a build may have."""
        return None if self.budget.disk_gb is None else self.budget.disk_gb * 1e9

    def resident(self, phase: Phase) -> tuple[Part, ...] | None:
        """Parts on the GPU in a phase; None: all."""
        return None if self.residency is None else (*self.residency.get(phase, ()), "bridges")

    @classmethod
    def load(cls, path: str | Path) -> Target:
        """A YAML file, or the name of a target that comes with the package. Raises TargetError."""
        if is_file(path):
            return load_yaml(cls, Path(path), "target", TargetError)
        packaged = resource("exports") / f"{str(path).removeprefix('exports/').removesuffix('.yaml')}.yaml"
        if not is_file(packaged):
            known = ", ".join(target_files())
            raise TargetError(f"target {path} does not exist; give a YAML file or one of {known}.")
        return load_yaml(cls, packaged, "target", TargetError)
