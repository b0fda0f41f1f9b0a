"""The GPUs, disk space and memory of this machine, and the packaged targets that match its GPUs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from bagel_compress.budgets.recommend import packaged_targets
from bagel_compress.errors import TargetError
from bagel_compress.run.target import Target

VISIBLE = 1.03  # targets give a GPU's memory as nvidia-smi prints it; torch reports up to 3 % less

REHEARSAL = "nano"  # the target that every GPU has room for, and no build of the released model


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources of this machine."""

    disk: int  # free bytes
    memory: int | None  # bytes of main memory; None if unknown
    gpus: tuple[str, ...] = ()  # names of the CUDA devices

    @classmethod
    def found(cls) -> Machine:
        """Queries this machine. The disk is that of the working folder."""
        import torch

        memory = None
        if hasattr(os, "sysconf"):  # not on Windows
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = tuple(torch.cuda.get_device_name(index) for index in range(count))
        return cls(shutil.disk_usage(Path.cwd()).free, memory, names)


def found_targets(machine: Machine) -> list[Target]:
    """A packaged target for each GPU of this machine: the largest with no more memory than it has.

    Raises TargetError if there is no GPU, or if one has less memory than every target.
    """
    import torch

    whole = [t for t in packaged_targets().values() if t.export is None and t.residency is None]
    known = [t for t in whole if t.name != REHEARSAL]
    names = ", ".join(sorted(packaged_targets()))
    if not machine.gpus:
        raise TargetError(f"no CUDA device was found here; name the GPU with --target, one of {names}.")
    found = []
    for index, name in enumerate(machine.gpus):
        memory = torch.cuda.get_device_properties(index).total_memory
        fitting = [t for t in known if t.device.memory_mib * 2**20 <= memory * VISIBLE]
        eight = packaged_targets()["8gb"]
        if not fitting and eight.device.memory_mib * 2**20 <= memory * VISIBLE:
            fitting = [eight]
        if not fitting:
            raise TargetError(f"{name} has {memory / 2**30:.1f} GiB; the smallest packaged target is 8gb.")
        found.append(max(fitting, key=lambda t: (t.limit, -len(t.name))))
    return found
