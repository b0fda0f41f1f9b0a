"""Files that come with the package: recipes, exports, the tiny checkpoint and the configs of the full model.

They lie under `bagel_compress/data/` in an installed wheel and at their own places in a source tree.
"""

from __future__ import annotations

from pathlib import Path

from bagel_compress.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_TREE = {"recipes": "recipes", "exports": "exports", "tiny": "tests/data/golden/checkpoint"}
FULL_CONFIGS = _PACKAGE / "data" / "bagel-7b-mot"


def resource(kind: str) -> Path:
    """The folder `recipes`, `exports` or `tiny` (a complete small checkpoint), wherever it lies."""
    installed = _PACKAGE / "data" / kind
    return installed if installed.exists() else _PACKAGE.parent / _IN_TREE[kind]


def target_files() -> dict[str, Path]:
    """Name -> YAML file of the targets that come with the package."""
    return {path.stem: path for path in sorted(resource("exports").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe file by its path, or one that comes with the package by its name. Raises RecipeError with the names."""
    if Path(name).is_file():
        return Path(name)
    packaged = resource("recipes") / f"{Path(name).stem if name.endswith('.yaml') else name}.yaml"
    if packaged.is_file() and Path(name).parent.name in ("", "recipes"):
        return packaged
    known = ", ".join(sorted(path.stem for path in resource("recipes").glob("*.yaml")))
    raise RecipeError(f"recipe {name} does not exist; give a YAML file or one of {known}.")
