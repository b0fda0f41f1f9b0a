"""How to open an artifact in each ecosystem that can: the text that stands on the card, and that the tests execute.

A snippet is offered only where the artifact holds that format; it names a tensor that is really there. None of them
downloads more than it shows, and none needs a GPU unless it says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from bagel_compress.artifact import Artifact


@dataclass(frozen=True)
class Snippet:
    """One way in. `needs` are the packages it imports; `cuda` is set where it cannot run without a GPU."""

    title: str
    text: str
    needs: tuple[str, ...]
    language: str = "python"
    note: str = ""
    cuda: bool = False


def snippets(artifact: Artifact, repo: str) -> list[Snippet]:
    """All that apply, ours first."""
    found = [
        Snippet(
            "bagel-compress",
            f'pip install bagel-compress\nbagel-compress generate {repo} "a red teapot on a table" --out teapot.png',
            (),
            "sh",
        )
    ]
    return found
