"""Lists that come in pages: fetched as far as somebody looks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, overload

T = TypeVar("T")

# From the cursor of a page, None for the first: its items, and the cursor of the next, None after the last.
Fetch = Callable[[str | None], tuple[list[T], str | None]]


class PagedList(Generic[T]):
    """Items in pages.

    Iterating fetches a page when it is needed; the length, or an index, as much as it takes. What has been
    fetched is kept: a second iteration asks for nothing again.
    """

    def __init__(self, fetch: Fetch[T]) -> None:
        """Fetches nothing."""
        self._fetch = fetch
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._cursor: str | None = None
        self._whole = False

    def __iter__(self) -> Iterator[T]:
        index = 0
        while self._has(index):
            yield self._items[index]
            index += 1

    def __len__(self) -> int:
        self._fill()
        return len(self._items)

    def __bool__(self) -> bool:
        return self._has(0)

    @overload
    def __getitem__(self, key: int) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> list[T]: ...
    def __getitem__(self, key: int | slice) -> T | list[T]:
        """As of a list."""
        if isinstance(key, slice) or key < 0:
            self._fill()
        else:
            self._has(key)
        return self._items[key]

    def __repr__(self) -> str:
        more = "" if self._whole else " so far"
        return f"<PagedList of {len(self._items)}{more}>"

    def _has(self, index: int) -> bool:
        while index >= len(self._items) and not self._whole:
            self._fetch_page()
        return index < len(self._items)

    def _fill(self) -> None:
        while not self._whole:
            self._fetch_page()

    def _fetch_page(self) -> None:
        with self._lock:
            if not self._whole:
                page, self._cursor = self._fetch(self._cursor)
                self._items += page
                self._whole = self._cursor is None
