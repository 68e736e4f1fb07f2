"""Interpreters that have imported transformers and nothing of kvcompress, forked from one: importing takes seconds.

They see no GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# a fork leaves the loop, and becomes a program that begins behind its imports
PROGRAM = """
import json, os, sys
import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.models.llama import modeling_llama
assert not [name for name in sys.modules if name.partition(".")[0] == "kvcompress"]
for line in sys.stdin:
    call = json.loads(line)
    if not (process := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
else:
    sys.exit()
for name, number in (("out", 1), ("error", 2)):
    os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT), number)
sys.argv[1:] = call["arguments"]
sys.path[:0] = call["path"]
os.chdir(call["folder"])
code = call["code"]
del call, line, name, number, process
exec(compile(code, "<fresh>", "exec"))
"""


class Interpreters:
    """Runs code, each time in an interpreter of its own."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._first = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=tempfile.gettempdir(),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, code: str, *arguments: str, path: tuple[Any, ...] = (ROOT,), folder: Any = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """What the code did. path: where modules are looked for first, folder: where it runs."""
        assert self._first.stdin
        assert self._first.stdout
        with tempfile.TemporaryDirectory() as place:
            out, error = Path(place, "out"), Path(place, "error")
            call = {"code": code, "arguments": arguments, "path": [*map(str, path)], "folder": str(folder)}
            print(json.dumps(call | {"out": str(out), "error": str(error)}), file=self._first.stdin, flush=True)
            status = int(self._first.stdout.readline())
            return subprocess.CompletedProcess([code, *arguments], status, out.read_text(), error.read_text())

    def close(self) -> None:
        assert self._first.stdin
        self._first.stdin.close()
        self._first.wait()
