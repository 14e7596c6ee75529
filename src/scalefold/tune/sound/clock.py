"""Device time of calls inside CUDA graphs."""

import gc
import statistics
from collections.abc import Callable

import torch


def capture(call: Callable[[], object], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``call`` after ``warm_up`` eager calls, on the current stream if that is none of the default one.

    Leaves whose gradients were taken on another stream before would make the capture wait for that stream.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
    gc.collect()  # an autograd graph left from another stream would make the capture wait for that stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph


def graph_microseconds(call: Callable[[], object], replays: int, warm_up: int) -> float:
    """Median device time of replays of a captured call."""
    graph = capture(call, warm_up)
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times)
