"""The sweep command: one at a time in a folder, with a bar of the time left, and its tables in the end."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.cli.arguments import UsageError, load, user_errors

if TYPE_CHECKING:
    from kvcompress.evals.sweep.points import Settings
    from kvcompress.evals.sweep.report import Row
    from kvcompress.evals.sweep.sweep import Sweep


def run_sweep(settings: "Settings", name: str | None, folder: Path, fresh: bool, dtype: str, device: str | None) -> int:
    from filelock import FileLock, Timeout

    from kvcompress.evals.sweep import report
    from kvcompress.evals.sweep.points import check_budgets
    from kvcompress.evals.sweep.sweep import Sweep
    from kvcompress.evals.sweep.tasks import read_text

    with user_errors():
        read_text(settings.text)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if fresh and processes > 1:
        raise UsageError("--fresh is for a single process: several would forget one another's rows; use an empty --out")
    # of several processes the first has the folder for all
    lock = FileLock(folder / (".lock" if rank == 0 else f".lock.{rank}"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"another sweep is writing to {folder}; give this one its own --out") from None
    with lock:
        model, tokenizer = load(name, dtype, device)
        with user_errors():
            work = Sweep(settings, model, tokenizer, folder, forget=fresh, rank=rank, processes=processes)
            check_budgets(model, work.points)
            work.check_tasks()
        try:
            rows = _run(work)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on from what {folder} has", file=sys.stderr)
            return 130
        if rank:
            return 0
        paths = report.write_all(rows, folder)
    return show(rows, [work.results.path, *paths])


def _run(work: "Sweep") -> "list[Row]":
    """Measures what is missing, with a bar of the time left; where there is no terminal, with a line a point."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    missing = work.missing()
    done = len(work.points) - len(missing)
    had = f"; {done} of them are already in {work.folder}" if done else ""
    print(f"{len(work.points)} points on {work.model_name}{had}", flush=True)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.fields[count]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # several processes would draw over one another
    hidden = not console.is_terminal or work.processes > 1
    bar = Progress(*columns, console=console, disable=hidden, speed_estimate_period=3600)
    with bar:
        # progress counts tokens to read, so that long points weigh more
        total = sum(work.cost(point) for point in missing)
        task = bar.add_task(missing[0].title if missing else "", total=total, count=f"{done}/{len(work.points)}")
        finished = 0

        def on_row(point: Any, row: "Row") -> None:
            nonlocal finished
            finished += 1
            following = missing[finished].title if finished < len(missing) else "done"
            # what other processes have done counts too
            count = f"{max(done + finished, len(work.points) - len(work.missing()))}/{len(work.points)}"
            bar.update(task, advance=work.cost(point), description=following, count=count)
            said = f"{row['score']:.3f}" if row["status"] == "ok" else f"failed: {row['error'].splitlines()[0]}"
            if bar.disable:
                print(f"{count} {point.title}: {said} ({row['seconds']:.1f} s)", flush=True)
            elif row["status"] != "ok":
                bar.console.print(f"{point.title}: {said}", style="red", markup=False)

        return work.run(on_row)


def show(rows: "list[Row]", paths: list[Path]) -> int:
    from rich.console import Console
    from rich.table import Table

    from kvcompress.evals.sweep import report

    console = Console()
    for table in report.make_tables(rows) + report.make_comparisons(rows):
        shown = Table(title=table.title, title_justify="left")
        shown.add_column("method")
        for budget in table.budgets:
            shown.add_column(budget, justify="right")
        for line in table.lines:
            shown.add_row(*line)
        console.print(shown)
    for path in paths:
        print(path)
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed:
        print(f"kvcompress: failed: {report.describe(row)}: {row['error'].splitlines()[0]}", file=sys.stderr)
    return 1 if failed else 0
