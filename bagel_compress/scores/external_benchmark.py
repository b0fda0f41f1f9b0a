"""Loads a user's own benchmark, which the command line names as `module:function`.

The function takes no arguments and returns a `Benchmark`: prompts, and a scorer, which may use a detector, another
model or a table of right answers.
"""

from __future__ import annotations

import importlib

from bagel_compress.errors import TargetError
from bagel_compress.scores.benchmark import Benchmark


def load_benchmark(name: str) -> Benchmark:
    """The benchmark that `module:function` returns. Raises TargetError if it does not exist or returns another type."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise TargetError(
            f"benchmark {name!r} is not of the form MODULE:FUNCTION; write for example geneval:benchmark."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"benchmark {name}: no module named {error.name}; run the command in its folder, or install it."
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
