"""SGLang's better doors name a page by one hash, and of a prompt often only the pages behind what the device holds. The
core keeps chains of blocks from their first one on: this remembers after which pages a page was kept."""

from __future__ import annotations

from collections.abc import Sequence

# About 200 bytes each. Of what is forgotten, only pages in the middle of a chain are not found by themselves.
_PAGES_MAX = 1 << 20


class _Chain:
    """Pages that follow the first `parent_end` pages of the parent's own."""

    __slots__ = ("pages", "parent", "parent_end")

    def __init__(self, parent: _Chain | None, parent_end: int) -> None:
        self.pages: list[bytes] = []
        self.parent = parent
        self.parent_end = parent_end


class PageChains:
    """Thread-compatible. A page's hash depends on all tokens before it, so any chain that ends with it is a true one."""

    def __init__(self, pages_max: int = _PAGES_MAX) -> None:
        self._pages_max = pages_max
        self._places: dict[bytes, tuple[_Chain, int]] = {}

    def __contains__(self, page: bytes) -> bool:
        return page in self._places

    def before(self, page: bytes) -> list[bytes]:
        """The pages from the beginning of the page's chain to the one before it."""
        place = self._places.get(page)
        parts = []
        while place is not None:
            chain, end = place
            parts.append(chain.pages[:end])
            place = None if chain.parent is None else (chain.parent, chain.parent_end)
        return [page for part in reversed(parts) for page in part]

    def add(self, chain: Sequence[bytes], first: int) -> None:
        """Pages [first, ...) of this chain are kept as such."""
        place = self._places.get(chain[first - 1]) if first > 0 else None
        if place is not None and place[1] + 1 == len(place[0].pages):
            own = place[0]
        elif place is not None:
            own = _Chain(place[0], place[1] + 1)
        else:
            own = _Chain(None, 0)
            first = 0
        for page in chain[first:]:
            self._places.pop(page, None)
            self._places[page] = (own, len(own.pages))
            own.pages.append(page)
        while len(self._places) > self._pages_max:
            del self._places[next(iter(self._places))]
