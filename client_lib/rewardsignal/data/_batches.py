"""Batches of a dataset: by number of examples or by tokens, shuffled, over epochs, resumable anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

from rewardsignal.data._dataset import Dataset
from rewardsignal.data._errors import DataError
from rewardsignal.data._limits import MAX_EXAMPLES
from rewardsignal.data._order import shuffled

T = TypeVar("T")
_VERSION = 1


class Batches(Generic[T]):
    """An iterator of batches, each a list of rows.

    A batch holds `batch_size` examples (the last one of an epoch may hold fewer; `drop_last` leaves it out),
    or as many as fit `max_tokens`, in their order, at most 128 (what the server takes in one call) or
    `batch_size` if that is given too. `length` counts a row's tokens; rows of `tokens` need none.

    `shuffle` gives each epoch an order of its own, made of `seed` and the epoch's number as
    `rewardsignal.data.shuffled` says. It needs rows by number (a list or a plain file); others are read
    in order. `epochs` None never ends.

    `state()` says where it stands as plain JSON, and `state=` goes on from there with exactly the batches
    that were left. It is of this dataset and these settings; others are refused.
    """

    def __init__(
        self,
        dataset: Dataset[T] | Sequence[T] | Callable[[], Iterable[T]],
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        length: Callable[[T], int] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ValueError for settings that do not go together and a state that is not theirs."""
        _check_settings(batch_size, max_tokens, epochs, drop_last)
        self.dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
        self.epochs = epochs
        if shuffle and not self.dataset.random_access:
            raise TypeError("Shuffling needs rows by number: give dataset.in_memory().")
        self._size = batch_size or MAX_EXAMPLES
        self._max_tokens = max_tokens
        self._length = length or _length
        self._seed = seed
        self._settings = {
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": drop_last,
            "rows": len(self.dataset) if shuffle else None,
        }
        self._epoch, self._position = self._begun(state)
        self._rows: Iterator[T] | None = None
        self._held: list[T] = []

    @property
    def epoch(self) -> int:
        """The epoch of the newest batch, counted from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """How many rows of this epoch are behind: those of the batches that it gave."""
        return self._position

    def state(self) -> dict[str, Any]:
        """Where it stands after the newest batch, as plain JSON."""
        place = {"version": _VERSION, "epoch": self._epoch, "position": self._position}
        return {**place, **self._settings}

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        while self.epochs is None or self._epoch < self.epochs:
            batch = self._taken()
            if batch:
                return batch
            self._epoch, self._position, self._rows = self._epoch + 1, 0, None
        raise StopIteration

    def __len__(self) -> int:
        """How many batches are left.

        Raises TypeError where that is not known: by tokens, without end, or of rows without numbers.
        """
        if self._max_tokens is not None or self.epochs is None:
            raise TypeError("The number of batches is known only with batch_size and epochs.")
        rows = len(self.dataset)
        whole = rows // self._size if self._settings["drop_last"] else math.ceil(rows / self._size)
        given = math.ceil(self._position / self._size)
        return max(0, (self.epochs - self._epoch) * whole - given)

    def __bool__(self) -> bool:
        # Not by the length, which is not always known.
        return True

    def _taken(self) -> list[T]:
        """The next batch of this epoch; empty at its end."""
        if self._rows is None:
            self._rows, self._held = self._rows_left(), []
        try:
            batch = self._filled(self._rows)
        except BaseException:
            # A generator that failed would seem to be at its end: the next call begins where this one did.
            self._rows = None
            raise
        if self._settings["drop_last"] and len(batch) < self._size:
            batch = []
        if not batch and self._position == 0:
            fewer = f"fewer than {self._size} rows" if self._settings["drop_last"] else "no rows"
            raise DataError(f"The dataset has {fewer}: there is no batch to give.")
        self._position += len(batch)
        return batch

    def _filled(self, rows: Iterator[T]) -> list[T]:
        batch, tokens = self._held, sum(map(self._counted, self._held))
        self._held = []
        for row in islice(rows, self._size - len(batch)):
            tokens += self._counted(row, self._position + len(batch))
            if self._max_tokens is not None and tokens > self._max_tokens:
                self._held = [row]
                break
            batch.append(row)
        return batch

    def _counted(self, row: T, place: int | None = None) -> int:
        """A row's tokens, where they matter; `place` is its place in the epoch, if it is a new one."""
        if self._max_tokens is None:
            return 0
        tokens = self._length(row)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise TypeError(f"length must give a number of tokens, not {tokens!r}.")
        if place is not None and tokens > self._max_tokens:
            where = self.dataset.where(self._order()[place])
            raise DataError(
                f"{where}: has {tokens:,} tokens, more than max_tokens ({self._max_tokens:,})."
            )
        return tokens

    def _order(self) -> Sequence[int]:
        """Numbers of this epoch's rows in their order."""
        if not self._settings["shuffle"]:
            return range(2**63)
        return shuffled(len(self.dataset), self._seed, self._epoch)

    def _rows_left(self) -> Iterator[T]:
        """This epoch's rows from the present position on."""
        if self._settings["shuffle"]:
            return map(self.dataset.__getitem__, islice(self._order(), self._position, None))
        rows = iter(self.dataset)
        passed = sum(1 for _ in islice(rows, self._position))
        if passed < self._position:
            raise DataError(f"The dataset has {passed} rows; the state is after {self._position}.")
        return rows

    def _begun(self, state: Mapping[str, Any] | None) -> tuple[int, int]:
        """Epoch and position of a state that fits."""
        if state is None:
            return 0, 0
        for name, own in {"version": _VERSION, **self._settings}.items():
            if name not in state or state[name] != own:
                raise ValueError(f"The state has {name}={state.get(name)!r}, here it is {own!r}.")
        epoch, position = state.get("epoch"), state.get("position")
        for name, number in (("epoch", epoch), ("position", position)):
            if type(number) is not int or number < 0:
                raise ValueError(f"The state's {name} is {number!r}, not a number from 0 on.")
        return int(epoch or 0), int(position or 0)


def _length(row: Any) -> int:
    if not isinstance(row, Mapping) or "tokens" not in row:
        raise TypeError("max_tokens needs length=, a function that counts a row's tokens.")
    return len(row["tokens"])


def _check_settings(
    batch_size: int | None, max_tokens: int | None, epochs: int | None, drop_last: bool
) -> None:
    """Raises ValueError by the setting's name."""
    if batch_size is None and max_tokens is None:
        raise ValueError("batch_size or max_tokens is needed.")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("epochs", epochs)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}, not a number from 1 on.")
    if drop_last and max_tokens is not None:
        raise ValueError("drop_last goes with batch_size alone: by tokens no batch is a full one.")
