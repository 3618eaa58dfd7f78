"""Look at tensors of a unit of a walk, batch by batch, as the constants are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from qpass.graph import Graph
from qpass.live_tensors import Side
from qpass.stream import Stream

Array = NDArray[Any]


class Probe:
    """Some tensors of one graph, made from what is alive in one session."""

    def __init__(
        self,
        stream: Stream,
        side: Side,
        graph: Graph,
        names: Sequence[str],
        *,
        as_written: bool = False,
    ) -> None:
        """Build the session; `as_written` as for `Stream.session`."""
        self._stream, self._side, self._names = stream, side, tuple(names)
        alive = stream.feeds(side, 0)
        made = list(dict.fromkeys(name for name in names if name not in alive))
        self._session = stream.session(graph, side, made, as_written=as_written) if made else None

    def run(self, batch: int) -> Mapping[str, Array]:
        """Return the tensors of a batch by name."""
        feeds = self._stream.feeds(self._side, batch)
        found = {} if self._session is None else self._session.run(feeds)
        return {name: found[name] if name in found else feeds[name] for name in self._names}
