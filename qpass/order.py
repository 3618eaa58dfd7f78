"""A topological order that changes nothing which is in order already."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush

from qpass.errors import InternalError


def stable_order(needs: Sequence[Collection[int]]) -> list[int]:
    """Order items so that each comes after those it needs, otherwise by position.

    Args:
        needs: for each item the positions of the items that must come first.

    Raises:
        InternalError: the items need each other in a circle.
    """
    waiting = [len(makers) for makers in needs]
    readers: dict[int, list[int]] = {}
    for reader, makers in enumerate(needs):
        for maker in makers:
            readers.setdefault(maker, []).append(reader)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    heapify(ready)
    order: list[int] = []
    while ready:
        item = heappop(ready)
        order.append(item)
        for reader in readers.get(item, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heappush(ready, reader)
    if len(order) != len(needs):
        raise InternalError("the graph has a cycle")
    return order
