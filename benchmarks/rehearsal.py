"""A CPU plays the GPU's part: the code that measures on a GPU is run to its end on a machine that has none.

The cells are a GPU's with sizes of a few dozen; streams, events and graphs are stand-ins, which refuse what CUDA
refuses of them. The numbers mean nothing, and are put where nobody takes them for measured ones.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from . import harness

SIZE = 40


def case(of: harness.Case) -> harness.Case:
    # Renamed, for AdamW's benchmark looks its tensors up by the model's name.
    return dataclasses.replace(of, model="rehearsal", shape=tuple(min(n, SIZE) for n in of.shape), device="cpu")


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert other is not self


class Event:
    def __init__(self, enable_timing: bool = False):
        self.timing, self.at = enable_timing, None

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at is not None, "an event that was not recorded"

    def elapsed_time(self, end: "Event") -> float:
        assert self.timing and end.timing, "an event without a time"
        return (end.at - self.at) * 1e3


class Cuda:
    """What the harness uses of torch.cuda."""

    Event, Stream = Event, Stream

    def __init__(self):
        self.default = self.current = Stream()
        self.capturing = None

    def get_device_name(self) -> str:
        return "rehearsal"

    def current_stream(self) -> Stream:
        return self.current

    def synchronize(self) -> None:
        assert not self.capturing, "a graph is being captured"

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: "Graph", stream: Stream) -> Iterator[None]:
        assert stream is not self.default, "the default stream cannot be captured"
        self.capturing = graph
        yield
        self.capturing = None
        graph.whole = True

    def CUDAGraph(self) -> "Graph":
        return Graph()

    def memory_allocated(self) -> int:
        return 0

    max_memory_allocated = memory_allocated

    def reset_peak_memory_stats(self) -> None:
        pass


class Graph:
    whole = False

    def replay(self) -> None:
        assert self.whole, "a graph that was not captured"


def begin() -> None:
    """Put the stand-in in the place of torch.cuda, with few laps."""
    harness.cuda, harness.LAPS = Cuda(), (3, 3)
