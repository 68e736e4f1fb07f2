"""Rows of a sweep as reports read them, made up."""

import statistics


def row(method="h2o", budget=0.5, score=0.5, size=1000, task="needle", protocol="question-aware", **more):
    return {
        "key": f"{task}{protocol}{method}{budget}",
        "status": "ok",
        "task": task,
        "length": 512,
        "protocol": protocol,
        "method": method,
        "budget": budget,
        "metric": "answers found",
        "score": score,
        "stderr": 0.1,
        "bytes": size * 1024,
        "full_bytes": 4000 * 1024,
        "samples": 4,
        "seed": 0,
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "seconds": 1.0,
        "provenance": {
            "time": "2020-01-01",
            "command": "kvcompress sweep <b>",
            "commit": "abc",
            "machine": "m",
            "threads": 1,
            "python": "3",
            "versions": {"torch": "2"},
        },
    } | more


def scored(scores, method="h2o", budget=0.5, **more):
    """A row with its samples' scores, and the score and error that they give."""
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    own = {"scores": list(scores), "stderr": error, "samples": len(scores)}
    return row(method, budget, statistics.fmean(scores), **(own | more))


FAILED = {"status": "failed", "error": "RuntimeError: <no> luck\nmore"}


def rows():
    made = []
    for protocol in ("question-aware", "question-agnostic"):
        made += [
            row("none", None, 1.0, 4000, protocol=protocol),
            row("h2o", 0.5, 0.75, 2000, protocol=protocol),
            row("h2o", 0.2, 0.25, 800, protocol=protocol),
            row("streaming", 0.5, 0.5, 1990, protocol=protocol),
            row("streaming", 0.2, 0.0, 790, protocol=protocol),
        ]
    text = {"task": "text", "protocol": "continuation", "kl_stderr": 0.01}
    return [*made, row("none", None, 1.0, 4000, kl=0.0, **text), row("h2o", 0.5, 0.9, 2000, kl=0.1, **text)]
