"""Times calls on a device; calls that are compared take turns, so that a loaded machine slows down all of them."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile; all the same for a single measurement."""
    cuts = statistics.quantiles(seconds if len(seconds) > 1 else 2 * seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": cuts[0], "p80": cuts[3]}


def wait(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call, device work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def take_turns(
    calls: Mapping[str, Call], device: torch.device, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, after some warm-up calls."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(warm_up + repeats):
        for name, call in calls.items():
            took = timed(call, device)
            if repeat >= warm_up:
                seconds[name].append(took)
    return seconds


class Clock:
    """Times calls on a device with its own events.

    cold: fill the L2 cache of a GPU with other data before each call.
    """

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        self.device = device
        # twice the L2 cache of the largest GPU
        size = 2**28 if cold and device.type == "cuda" else 0
        self.flushed = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def seconds(self, call: Call) -> float:
        """Seconds of one call, device work included."""
        if self.device.type != "cuda":
            return timed(call, self.device)
        # read, not written: dirty lines would be written back on the next call's time. It also keeps the device busy
        # while the host launches, so that launches of the host are not what is timed
        self.flushed.sum()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3

    def host_seconds(self, call: Call) -> float:
        """Seconds until the host has launched a call; the median of five."""
        taken = []
        for _ in range(5):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return statistics.median(taken)

    def captured(self, call: Call) -> Call | None:
        """The replay of a CUDA graph of the call, which has run before; None if the call waits for the device."""
        torch.cuda.synchronize(self.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize(self.device)
        # a failed capture leaves its random generator in capture mode: use another one than the inputs'
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        ours = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None
        finally:
            generator.graphsafe_set_state(ours)
        return graph.replay

    def turns(self, calls: Mapping[str, Call], attempts: int) -> dict[str, dict[str, float]]:
        """Spread of each call's seconds; the calls take turns."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(attempts):
            # in a different order each time: a call depends on what the previous one left in the caches
            random.shuffle(order)
            for name in order:
                taken[name].append(self.seconds(calls[name]))
        return {name: spread(seconds) for name, seconds in taken.items()}


def limits(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and TFLOP/s of a matrix product, the best of several."""
    device = clock.device
    big = device.type == "cuda"
    # random numbers: zeros draw less power, and are copied and multiplied faster
    source = torch.randint(-128, 128, (2**30 if big else 2**26,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = 8192 if big else 1024
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix}
    for call in calls.values():
        call()
    best = {name: min(clock.seconds(call) for _ in range(10)) for name, call in calls.items()}
    return {"GB/s": 2 * source.numel() / best["copy"] / 1e9, "TFLOP/s": 2 * side**3 / best["product"] / 1e12}
