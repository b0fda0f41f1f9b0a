"""A benchmark of somebody else, named on the command line as `module:function`.

The function takes nothing and returns a `Benchmark`: prompts, and a scorer that may call whatever judges them (a
detector, a second model, a table of right answers). Nothing of it need be known here, so nothing is shipped here.
"""

from __future__ import annotations

import importlib

from bagel_compress.errors import TargetError
from bagel_compress.scores.benchmark import Benchmark


def load_benchmark(name: str) -> Benchmark:
    """What `module:function` returns. Raises TargetError if there is no such function or it returns something else."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise TargetError(f"benchmark {name!r} is no MODULE:FUNCTION; write for example geneval:benchmark.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"benchmark {name}: no module named {error.name}; run where it lies or install it."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise TargetError(f"benchmark {name}: {module_name} has no function {function_name}.")
    found = function()
    if not isinstance(found, Benchmark):
        raise TargetError(
            f"benchmark {name} returned {type(found).__name__}; expected bagel_compress.scores.benchmark.Benchmark."
        )
    return found
