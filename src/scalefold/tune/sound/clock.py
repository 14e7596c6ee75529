"""Device time of calls inside CUDA graphs."""

import gc
import statistics
from collections.abc import Callable

import torch

WAIT_CYCLES = 1 << 19  # of the device's clock: below a millisecond, several times what launching a graph takes
LONG_WAIT_CYCLES = 4 * WAIT_CYCLES  # where no second try can be made
LONGEST_WAIT_CYCLES = WAIT_CYCLES << 8  # a host that is late behind this is not waited for any longer


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


def queued_ms(call: Callable[[], object], cycles: int, first: Callable[[], object] | None = None) -> tuple[float, bool]:
    """Device time of what ``call`` puts in the queue, and whether all of it was there before the device came to it.

    The device waits meanwhile. On an idle one, the host's way from the start event to the launch would count, which
    for a graph of many kernels, or on a busy host, is longer than the kernels take.

    Args:
        cycles: of the device's clock that it waits.
        first: queued between the wait and ``call``, and not timed.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    if first is not None:
        first()
    start.record()
    call()
    stop.record()
    in_time = not start.query()
    stop.synchronize()
    return start.elapsed_time(stop), in_time


def graph_microseconds(call: Callable[[], object], replays: int, warm_up: int) -> float:
    """Median device time of replays of a captured call; where the host was late, once more behind a longer wait."""
    graph = capture(call, warm_up)
    graph.replay()
    times, cycles = [], WAIT_CYCLES
    while len(times) < replays:
        ms, in_time = queued_ms(graph.replay, cycles)
        if in_time or cycles >= LONGEST_WAIT_CYCLES:
            times.append(1000 * ms)
        else:
            cycles *= 4
    return statistics.median(times)


def answers() -> bool:
    """Whether the GPU still serves this process: an access to memory that is not there ends that for good."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
