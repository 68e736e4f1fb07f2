"""Kills writers at random moments and looks at what they leave: python -m tests.kills --kills 1000 [--seed 0]

Real processes, ended by SIGKILL. What a writer said it had written must be there, whole, with nobody having to repair
anything, and what is read must be what was written, while another writer works in the same folder.
"""

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvcompress import DenseCache, HydragenCache, PrefixStore
from kvcompress.hf import cache_argument
from tests.contract.models import prompt, tiny

# a child takes the modules of its parent, so that it writes at once
PROCESSES: Any = multiprocessing.get_context("fork")
DOCUMENTS = 24
# seconds until a writer is killed, at most; and until one that does nothing is taken for stuck
LONGEST, STUCK = 0.15, 120


class Writer:
    """A process that writes until it is killed, and says what it has written."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._said, says = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_alone, args=(work, says, *arguments), daemon=True)
        self._process.start()
        says.close()

    def said(self) -> list[Any]:
        """What it has said since it was asked last."""
        found = []
        try:
            while self._said.poll():
                found.append(self._said.recv())
        except (EOFError, OSError):
            pass
        return found

    def wait(self) -> bool:
        """True once it has ended by itself, without an error."""
        self._process.join(STUCK)
        assert self._process.exitcode is not None, f"a process is stuck for {STUCK} s"
        return self._process.exitcode == 0

    def kill(self) -> bool:
        """Ends it at once; False where it had ended by itself, which must have been without an error."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        assert self._process.exitcode in (0, -signal.SIGKILL), f"a writer ended with {self._process.exitcode}"
        return self._process.exitcode != 0


def _alone(work: Callable[..., None], says: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    work(says.send, *arguments)


# a folder of prefixes, and two processes that add to it


def document(number: int) -> torch.Tensor:
    """[tokens]; all of one length, half of them with a beginning in common."""
    own = prompt(40, seed=100 + number)[0]
    return torch.cat([prompt(20)[0], own[:20]]) if number % 2 else own


def add_documents(say: Callable[[Any], None], folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    model = tiny()
    while True:
        # an index that is there once is always there
        begun = (folder / "prefixes.json").exists()
        store = PrefixStore.load(folder, model) if begun else PrefixStore(model)
        for _ in range(3):
            number = generator.randrange(DOCUMENTS)
            store.prefix(document(number))
            store.save(folder)
            say(number)


def contents(cache: HydragenCache) -> list[torch.Tensor]:
    """Keys and values by layer, node by node, as those of one sequence."""
    return [
        torch.cat([getattr(node[0], part) for node in layer.held.values()], 2)
        for layer in cache.layers
        for part in ("prefix_keys", "prefix_values")
    ]


def kill_stores(kills: int, seed: int, folder: Path) -> int:
    """Kills writers of one folder so many times; how many documents were read meanwhile.

    Raises:
        AssertionError: a document is lost, or is another.
    """
    generator = random.Random(seed)
    model = tiny()
    wanted = [contents(HydragenCache.from_prefix(model, document(number))) for number in range(DOCUMENTS)]
    read = done = rounds = 0
    while done < kills:
        # few documents, so that a folder is full soon
        place = folder / str(rounds)
        rounds += 1
        saved: set[int] = set()
        writers = [Writer(add_documents, place, generator.randrange(1 << 30)) for _ in range(2)]
        for _ in range(min(20, kills - done)):
            time.sleep(generator.random() * LONGEST)
            index = generator.randrange(2)
            done += writers[index].kill()
            saved |= {number for writer in writers for number in writer.said()}
            writers[index] = Writer(add_documents, place, generator.randrange(1 << 30))
            if not saved:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                store = PrefixStore.load(place, model)
            for number in range(DOCUMENTS):
                cache = store.get(document(number))
                held = 0 if cache is None else cache.get_seq_length()
                assert held == 40 or number not in saved, f"document {number} was saved and is lost ({held} tokens)"
                if cache is not None and held == 40:
                    read += 1
                    for found, own in zip(contents(cache), wanted[number], strict=True):
                        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
        for writer in writers:
            writer.kill()
    return read


# one file, written over and over by two processes


def rewrite(say: Callable[[Any], None], path: Path, seed: int) -> None:
    model = tiny()
    cache = filled(seed)
    while True:
        cache.save(path)
        say(seed)
        assert DenseCache.load(path, model).get_seq_length() in (20, 21)


def filled(seed: int) -> DenseCache:
    """A cache of 20 + seed tokens."""
    model = tiny()
    cache = DenseCache(model)
    with torch.no_grad():
        model(prompt(20 + seed, seed=seed), **cache_argument(model, cache))
    return cache


def kill_caches(kills: int, seed: int, folder: Path) -> int:
    """Kills writers of one file so many times; how often it was read meanwhile.

    Raises:
        AssertionError: the file is not as either writer wrote it.
    """
    generator = random.Random(seed)
    model, path = tiny(), folder / "cache.safetensors"
    wanted = {20 + number: filled(number) for number in range(2)}
    wanted[20].save(path)
    writers = [Writer(rewrite, path, number) for number in range(2)]
    done = read = 0
    while done < kills:
        time.sleep(generator.random() * LONGEST)
        index = generator.randrange(2)
        done += writers[index].kill()
        found = DenseCache.load(path, model)
        own = wanted[found.get_seq_length()]
        for layer, same in zip(found.layers, own.layers, strict=True):
            assert torch.equal(layer.dense.held()[0], same.dense.held()[0])
            assert torch.equal(layer.dense.held()[1], same.dense.held()[1])
        read += 1
        writers[index] = Writer(rewrite, path, index)
    for writer in writers:
        writer.kill()
    return read


# a distillation that is begun again until it is through


def train(say: Callable[[Any], None], folder: Path) -> None:
    from kvcompress.swiftkv.distill import Distillation, distill
    from tests.swiftkv.runs import SMALL, rows, student

    lines = distill(student(), rows(), Distillation(**SMALL, save_every=1), folder, lambda line: say(line["step"]))
    say(None)
    assert len(lines) == SMALL["steps"]


def kill_distillations(kills: int, seed: int, folder: Path) -> int:
    """Kills runs so many times; how many came through.

    Raises:
        AssertionError: a run ends otherwise than one that was left alone, or goes back behind what it had saved.
    """
    # before children are made, so that each need not import it
    import matplotlib.figure  # noqa: F401

    import kvcompress.swiftkv.distill  # noqa: F401
    import tests.swiftkv.runs  # noqa: F401

    generator = random.Random(seed)
    undisturbed = Writer(train, folder / "undisturbed")
    began = time.monotonic()
    assert undisturbed.wait()
    longest = time.monotonic() - began
    expected = _result(folder / "undisturbed")
    done = through = 0
    while done < kills:
        place = folder / str(through)
        reached = 0
        while True:
            run = Writer(train, place)
            time.sleep(generator.random() * longest)
            killed = run.kill()
            steps = run.said()
            if steps and steps[0] is not None:
                # a step is told of once it is saved
                assert steps[0] > reached, f"step {steps[0]} was run again, after {reached} was saved"
            reached = max([reached, *(step for step in steps if step is not None)])
            done += killed
            if not killed:
                break
        found = _result(place)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        through += 1
    return through


def _result(folder: Path) -> tuple[Any, Any, Any]:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len((folder / "losses.jsonl").read_text().splitlines()) == state["step"]
    lines = [{**line, "seconds": 0} for line in state["lines"]]
    return state["trained"], state["optimiser"], lines


KINDS: dict[str, tuple[Callable[[int, int, Path], int], str]] = {
    "stores": (kill_stores, "documents read"),
    "caches": (kill_caches, "files read"),
    "distillations": (kill_distillations, "runs through"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description="Kills writers at random moments.")
    parser.add_argument("--kills", type=int, default=1000, help="of writers of prefix stores; of others a tenth")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, (kill, what) in KINDS.items():
        kills = given.kills if name == "stores" else max(1, given.kills // 10)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = kill(kills, given.seed, Path(folder))
        print(f"{name}: {kills} writers killed, {found} {what}, {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
