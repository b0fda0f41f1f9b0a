"""bagel-compress: compress, validate and publish BAGEL checkpoints.

    import bagel_compress as bc

    checkpoint, recipe = bc.Checkpoint.open("BAGEL-7B-MoT"), bc.Recipe.load("nf4-12gb")
    artifact = bc.compress(bc.make_plan(checkpoint, recipe), checkpoint, "out/nf4")
    bc.open_model(artifact.path, device="cuda").run(["a red cat"], size=(1024, 1024)).image.save("cat.png")

The names in `__all__` are the public API (docs/api.md); everything else may change in any version. They are loaded when
they are first used, so that this import alone loads neither torch nor anything else that is large.

Progress is logged under the logger name "bagel_compress". Every error that a user can cause is a BagelCompressError.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagel_compress.api import budget, export, open_model, publish, trace, validate
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.errors import BagelCompressError
    from bagel_compress.run.target import Target
    from bagel_compress.source.checkpoint import Checkpoint

    __version__: str

__all__ = [
    "Artifact",
    "BagelCompressError",
    "Checkpoint",
    "Recipe",
    "Target",
    "__version__",
    "budget",
    "compress",
    "export",
    "make_plan",
    "open_model",
    "publish",
    "trace",
    "validate",
]

_MODULES = {
    "Artifact": "build.artifact",
    "BagelCompressError": "errors",
    "Checkpoint": "source.checkpoint",
    "Recipe": "build.recipe",
    "Target": "run.target",
    "budget": "api",
    "compress": "build.compress",
    "export": "api",
    "make_plan": "build.plan",
    "open_model": "api",
    "publish": "api",
    "trace": "api",
    "validate": "api",
}
_MODEL_PACKAGE = "the model package of bagel-compress"  # how bagel/__init__.py identifies itself

logging.getLogger("bagel_compress").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Loads a name of the public API when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("bagel-compress")
    elif name in _MODULES:
        value = getattr(import_module(f"bagel_compress.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'bagel_compress' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _refuse_foreign_bagel() -> None:
    """Raises ImportError, in one sentence, if another project's package `bagel` stands in the place of the model's.

    Another project on the public index installs a package of that name too. Whichever was installed last wins.
    """
    try:
        import bagel
    except ImportError:
        found = "cannot be imported"
    else:
        if getattr(bagel, "IDENTITY", None) == _MODEL_PACKAGE:
            return
        found = f"({getattr(bagel, '__file__', None) or 'a folder without __init__.py'}) is another project's"
    from importlib.metadata import packages_distributions

    owners = sorted(set(packages_distributions().get("bagel", ())) - {"bagel-compress"})
    remove = f"`pip uninstall {' '.join(owners)}`, then " if owners else ""
    raise ImportError(
        f"the package `bagel` {found}, but bagel-compress needs its own package of that name, the model; run {remove}"
        "`pip install --force-reinstall --no-deps bagel-compress`, or use an environment without the other project."
    ) from None


_refuse_foreign_bagel()
