"""Static steps that were captured once and are replayed: one launch per token instead of hundreds.

A `Capture` makes a replay of a step; on a CUDA device that is a CUDA graph. Where a step cannot be captured
the lane goes on as it does everywhere else.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.engine.generation.static_step import Shape, StaticStep
from workers.engine.llama import Llama
from workers.engine.slab import Slab
from workers.engine.stack import Stack

log = logging.getLogger(__name__)

Replay = Callable[[], None]

# Steps of a shape before it is captured, which takes as long as about as many of them.
PATIENCE = 8
# Captured steps that are kept, the last used.
MOST = 24
_WARM_UPS = 2


class Capture(Protocol):
    """How a step is made replayable."""

    def capture(self, run: Callable[[], None]) -> Replay:
        """A call that does what `run` does, on the same tensors; `run` may be called, and more than once.

        Raises RuntimeError.
        """
        ...

    def forget(self) -> None:
        """Nothing that was captured is replayed any more."""
        ...


class CudaGraphs:
    """CUDA graphs in a memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        """One stream for all captures: cuBLAS keeps a workspace for each stream that it has seen."""
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.forget()

    def capture(self, run: Callable[[], None]) -> Replay:
        """See Capture.capture."""
        # What fails in the middle leaves its stream the current one; the outer context sets it back.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            # What is set up by a first call (handles, workspaces, plans) must not be part of the graph.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a snapshot's) may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
        return graph.replay

    def forget(self) -> None:
        """See Capture.forget: a pool ends with the last of its graphs."""
        self._pool = torch.cuda.graph_pool_handle()


def capture_for(device: torch.device) -> Capture | None:
    """How steps are captured on a device; None where calling them is as good."""
    return CudaGraphs(device) if device.type == "cuda" else None


class Replays:
    """The captured steps of one lane, by shape and stack."""

    def __init__(self, decoder: Llama, room: int, capture: Capture) -> None:
        """A shape takes at most `room` positions."""
        self._decoder, self._room, self._capture = decoder, room, capture
        self._steps: OrderedDict[tuple[Shape, int], tuple[StaticStep, Replay]] = OrderedDict()
        self._asked: Counter[tuple[Shape, int]] = Counter()
        self._moves = -1
        # Whether a capture has failed.
        self._given_up = False

    def shape(self, rows: int, length: int) -> Shape | None:
        """The shape for so many rows of at most so many positions; None where it takes too much memory."""
        shape = Shape.over(rows, length)
        return None if self._given_up or shape.rows * shape.length > self._room else shape

    def decode(
        self, tokens: Sequence[int], slab: Slab, stack: Stack | None, owners: Sequence[int]
    ) -> Tensor | None:
        """The hidden states [rows, H] of the last token of each row, valid until the next call; None, with
        nothing changed, where the step is to be computed otherwise.

        `owners` are the rows' adapters by their numbers in the stack, -1: none.
        """
        shape = self.shape(len(tokens), max(slab.lengths) + 1)
        if shape is None or not shape.fits(slab):
            return None
        if slab.moves != self._moves:
            self._forget(slab.moves)
        found = self._find(shape, slab, stack, lambda step: step.fill(tokens, slab.lengths, owners))
        if found is None:
            return None
        step, replay = found
        replay()
        slab.lengths = [length + 1 for length in slab.lengths]
        return step.hidden[: len(tokens)]

    def _find(
        self, shape: Shape, slab: Slab, stack: Stack | None, fill: Callable[[StaticStep], None]
    ) -> tuple[StaticStep, Replay] | None:
        """The step, with its inputs filled; None where it is not captured, or not yet."""
        # The step keeps the stack, so that no other one can have its id.
        key = shape, id(stack)
        found = self._steps.get(key)
        if found is not None:
            self._steps.move_to_end(key)
            fill(found[0])
            return found
        self._asked[key] += 1
        if self._asked[key] <= PATIENCE:
            return None
        step = StaticStep(self._decoder, slab, shape, stack)
        # Before it runs for the first time: it would write to where other tokens lie.
        fill(step)
        replay = self._captured(step)
        if replay is None:
            return None
        self._steps[key] = step, replay
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        return step, replay

    def _captured(self, step: StaticStep) -> Replay | None:
        try:
            return self._capture.capture(step.run)
        except RuntimeError as error:
            log.warning("tokens are decoded without CUDA graphs from now on: %s", error)
        self._given_up = True
        self._forget(self._moves)
        return None

    def _forget(self, moves: int) -> None:
        """Let go of all: they are of where the slab was."""
        self._steps.clear()
        self._asked.clear()
        self._capture.forget()
        self._moves = moves
