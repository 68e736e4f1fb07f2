"""Random cases against the oracle: python -m tests.fuzz --cases 5000 [--cache h2o] [--first 0]

A case that fails is shrunk, and printed with the command that plays it again.
"""

import argparse
import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.fuzz.cases import Case, draw
from tests.fuzz.play import play

# seconds; a case takes a fraction of one, and the machine may have other work
HANGS = 300
# cases that a process takes at a time
PART = 25


def failure(case: Case) -> Exception | None:
    """What goes wrong in a case; one that does not end goes wrong."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(HANGS)
    try:
        play(case)
    except Exception as error:  # any is a finding
        return error
    finally:
        signal.alarm(0)
    return None


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"no end after {HANGS} s")


def shrunk(case: Case) -> list[int]:
    """Which of a failing case's calls are enough for it to fail in the same way."""
    kind = type(failure(case))
    needed = list(range(len(case.calls)))
    for index in reversed(range(len(case.calls))):
        fewer = [other for other in needed if other != index]
        if type(failure(case.only(fewer))) is kind:
            needed = fewer
    return needed


def command(seed: int, calls: list[int], cache: str | None = None) -> str:
    only = f" --cache {cache}" if cache else ""
    return f"python -m tests.fuzz --seed {seed}{only} --calls {','.join(map(str, calls))}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random cases against the oracle.")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cache", help="of one entry of tests/contract/caches.py only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--stop", action="store_true", help="at the first case that fails")
    parser.add_argument("--seed", type=int, help="play one case again")
    parser.add_argument("--calls", help="of that case only these calls, by their numbers")
    options = parser.parse_args(arguments)

    if options.seed is not None:
        case = draw(options.seed, options.cache)
        if options.calls is not None:
            case = case.only([int(index) for index in options.calls.split(",") if index])
        print(case, flush=True)
        _one_thread()
        play(case)
        return 0

    failed: Counter[str] = Counter()
    began = time.monotonic()
    last = options.first + options.cases
    parts = [range(start, min(start + PART, last)) for start in range(options.first, last, PART)]
    with _players(options.jobs) as in_order:
        played = in_order(functools.partial(findings, name=options.cache, stop=options.stop), parts)
        for part, found in zip(parts, played, strict=True):
            for name, text in found:
                failed[name] += 1
                print(text, flush=True)
            if options.stop and failed:
                break
            if (part.stop - options.first) % 250 < PART:
                print(f"{part.stop - options.first} cases, {sum(failed.values())} failed", flush=True)
    print(f"{options.cases} cases in {time.monotonic() - began:.0f} s, {sum(failed.values())} failed", dict(failed))
    return 1 if failed else 0


def findings(seeds: Iterable[int], name: str | None = None, stop: bool = False) -> list[tuple[str, str]]:
    """What fails of these cases, shrunk: the entry, and what to print of it. stop: at the first."""
    found: list[tuple[str, str]] = []
    for seed in seeds:
        case = draw(seed, name)
        error = failure(case)
        if error is None:
            continue
        calls = shrunk(case)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"FAILED {case.only(calls)}\n  {type(error).__name__}: {str(error)[:300]}\n"
        found.append((case.entry.name, text + f"  {where.filename}:{where.lineno}\n  {command(seed, calls, name)}"))
        if stop:
            break
    return found


@contextmanager
def _players(jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over processes; one job is this process."""
    if jobs == 1:
        _one_thread()
        yield map
    else:
        # fresh interpreters: torch's threads do not outlive a fork
        with multiprocessing.get_context("spawn").Pool(jobs, _one_thread) as pool:
            yield pool.imap


def _one_thread() -> None:
    # models so small are slower on more
    torch.set_num_threads(1)
