"""Where models lie: the folders of ComfyUI's kind `bagel`, and what a loader lists."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bagel_compress.errors import CheckpointError
from bagel_compress.io.packaged import FULL_CONFIGS, target_files

NANO = "BAGEL-nano"  # comes with the package
RELEASED = "ByteDance-Seed/BAGEL-7B-MoT"


def list_models() -> list[str]:
    """What a loader offers: the user's folders first."""
    return [*model_folders(), NANO, RELEASED]


def model_folders() -> list[str]:
    """Names of the folders in models/bagel that hold a build or a checkpoint."""
    return sorted(
        {folder.name for root in model_roots() if root.is_dir() for folder in root.iterdir() if holds(folder)}
    )


def model_roots() -> list[Path]:
    """ComfyUI's folders of kind `bagel`: models/bagel, and those of extra_model_paths.yaml."""
    import folder_paths

    folder_paths.add_model_folder_path("bagel", str(Path(folder_paths.models_dir) / "bagel"))
    return [Path(path) for path in folder_paths.get_folder_paths("bagel")]


def holds(folder: Path) -> bool:
    """Whether a folder looks like a model."""
    return any((folder / name).is_file() for name in ("manifest.json", "llm_config.json"))


def find_model(name: str, download: bool) -> Path:
    """The folder of a name that the loader lists. Raises CheckpointError."""
    if name == NANO:
        return FULL_CONFIGS.parent / NANO
    if name in model_folders():
        return next(root / name for root in model_roots() if holds(root / name))
    if name == RELEASED and download:
        from bagel_compress.run.load import downloaded

        return downloaded(name)
    raise CheckpointError(
        f"{name} is not in models/bagel; put the model's folder there"
        + (", or switch allow_auto_download on." if name == RELEASED else " and reload the page.")
    )


@cache
def device_targets() -> list[str]:
    """Packaged targets that place a model on a GPU; those of exports place nothing."""
    from bagel_compress.run.target import Target

    return [name for name in target_files() if Target.load(name).export is None]
