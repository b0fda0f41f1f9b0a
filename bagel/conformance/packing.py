"""The official packing's index vectors, derived from lengths: which row of a packed query or merged cache is what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bagel.context import Context


def merged_slots(contexts: Sequence[Context], lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Slots of query rows and of cached rows in the merged sequence [cache_0, query_0, cache_1, query_1, ...]."""
    query, cached, at = [], [], 0
    for context, n in zip(contexts, lens, strict=True):
        cached.append(torch.arange(at, at + context.length))
        query.append(torch.arange(at + context.length, at + context.length + n))
        at += context.length + n
    return torch.cat(query), torch.cat(cached)


def block_rows(lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of the wrapper tokens and of the image tokens inside the packed query."""
    wrappers, rows, at = [], [], 0
    for n in lens:
        wrappers += [at, at + n + 1]
        rows.append(torch.arange(at + 1, at + n + 1))
        at += n + 2
    return torch.tensor(wrappers), torch.cat(rows)


def lengths(contexts: Sequence[Context]) -> Tensor:
    return torch.tensor([c.length for c in contexts])


def running_positions(contexts: Sequence[Context], lens: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(c.rope, c.rope + n) for c, n in zip(contexts, lens, strict=True)])


def constant_positions(contexts: Sequence[Context], lens: Sequence[int]) -> Tensor:
    return torch.cat([torch.full((n,), c.rope) for c, n in zip(contexts, lens, strict=True)])
