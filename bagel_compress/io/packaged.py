"""Files that come with the package: recipes, targets, and configs of the full and of a small model.

Recipes and targets are under `bagel_compress/data/` in an installed wheel and at the top of a source tree.
"""

from __future__ import annotations

from pathlib import Path

from bagel_compress.errors import RecipeError
from bagel_compress.io.safe_paths import is_file

_PACKAGE = Path(__file__).resolve().parents[1]
FULL_CONFIGS = _PACKAGE / "data" / "bagel-7b-mot"
SMALL_CONFIGS = _PACKAGE / "data" / "small"  # and its tokenizer


def resource(kind: str) -> Path:
    """The packaged folder of this name: "recipes", "exports" (targets, cases) or "BAGEL-nano"."""
    installed = _PACKAGE / "data" / kind
    return installed if installed.exists() else _PACKAGE.parent / kind


def target_files() -> dict[str, Path]:
    """Name -> YAML file of the targets that come with the package."""
    return {path.stem: path for path in sorted(resource("exports").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The path of a recipe file, or of a packaged recipe by its name. Raises RecipeError, which lists the names."""
    if is_file(name):
        return Path(name)
    packaged = resource("recipes") / f"{Path(name).stem if name.endswith('.yaml') else name}.yaml"
    if is_file(packaged) and Path(name).parent.name in ("", "recipes"):
        return packaged
    known = ", ".join(sorted(path.stem for path in resource("recipes").glob("*.yaml")))
    raise RecipeError(f"recipe {name} does not exist; give a YAML file or one of {known}.")
