"""Measuring in turns, so that a machine that slows down slows everything that is compared."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .floors import Ceilings, FloorCounter


@dataclass
class Contender:
    """
    Args:
        name (`str`): what is measured.
        run (`Callable`): does it once, without arguments.
        amount (`float`, defaults to 1.0): how many of the comparison's units one run makes.
        has_floor (`bool`, defaults to `True`):
            Whether it's a matter of matrix products, which have a floor, and which can be counted.
    """

    name: str
    run: Callable[[], object]
    amount: float = 1.0
    has_floor: bool = True


@dataclass
class Comparison:
    """
    Args:
        unit (`str`): what is made, in the plural, such as "seconds of audio".
        contenders (`list[Contender]`): of which the first is the one that the others are compared with.
    """

    unit: str
    contenders: list[Contender] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """Elapsed seconds, and those that processors worked for this process."""

    seconds: float
    busy_seconds: float


def measure(comparison: Comparison, ceilings: Ceilings, rounds: int, max_seconds: float) -> list[dict]:
    """
    Measures all contenders in turn, after a first call of each, under which its floor is counted, and before a last
    one that tells its memory: to begin with, that hands back what is free, which would take time of the others.

    Args:
        ceilings ([`Ceilings`]): of this machine.
        rounds (`int`): turns of each contender.
        max_seconds (`float`): no further round begins after so many seconds.

    Returns:
        `list[dict]`: a row of the table for each contender; all numbers, and `None` where there is none.
    """
    first_calls, floors = [], []
    for contender in comparison.contenders:
        counter = FloorCounter(ceilings)
        with counter if contender.has_floor else nullcontext():
            first_calls.append(timed_call(contender.run))
        floors.append(counter.seconds if contender.has_floor else None)
    calls = [[] for _ in comparison.contenders]
    end = time.perf_counter() + max_seconds
    for number in range(rounds):
        if number and time.perf_counter() > end:
            break
        for contender, own_calls in zip(comparison.contenders, calls):
            own_calls.append(timed_call(contender.run))
    peaks = [peak_memory(contender.run) for contender in comparison.contenders]
    return [
        summarize(contender, comparison.unit, own_calls, calls[0], comparison.contenders[0].amount, *once)
        for contender, own_calls, *once in zip(comparison.contenders, calls, first_calls, floors, peaks)
    ]


def summarize(
    contender: Contender,
    unit: str,
    calls: list[Call],
    reference_calls: list[Call],
    reference_amount: float,
    first: Call,
    floor: float | None,
    peak_bytes: int | None,
) -> dict:
    """A row of the table, from what was measured of its contender and of the first one."""
    seconds = [call.seconds for call in calls]
    median = statistics.median(seconds)
    # per unit, and from calls of the same round
    ratios = [
        reference.seconds / reference_amount * contender.amount / call.seconds
        for reference, call in zip(reference_calls, calls)
    ]
    return {
        "what": contender.name,
        "median (s)": median,
        "fastest (s)": min(seconds),
        "slowest (s)": max(seconds),
        "processor time (s)": statistics.median(call.busy_seconds for call in calls),
        "rounds": len(calls),
        "unit": unit,
        "units per second": contender.amount / median,
        "speed, first row = 1": statistics.median(ratios),
        "floor (s)": floor,
        "times its floor": median / floor if floor else None,
        "first call, with counting (s)": first.seconds,
        "peak memory (MB)": None if peak_bytes is None else peak_bytes / 1e6,
    }


def timed_call(run: Callable[[], object]) -> Call:
    """Runs it once."""
    gc.collect()
    elapsed, busy = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Call(time.perf_counter() - elapsed, time.process_time() - busy)


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that running it once needs beyond what is held before, at the peak; `None` where no system tells."""
    gc.collect()
    before = _reset_peak_memory()
    if before is None:
        return None
    run()
    return _peak_memory() - before


def _reset_peak_memory() -> int | None:
    """The bytes in use, from which the next peak is counted; `None` where the system tells no peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # what earlier calls freed would otherwise count as held before this one
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # sets the peak to what is resident now, see proc(5)
    return _peak_memory()


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
