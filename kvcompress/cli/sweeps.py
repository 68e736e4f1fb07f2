"""The commands sweep and report: quality against measured bytes."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.cli.arguments import (
    IN_USUAL,
    KNOWN,
    KNOWN_TASKS,
    USUAL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    UsageError,
    as_budget,
    as_object,
    check_extra,
    check_folder,
    count,
    is_default,
    load,
    parts,
    show_table,
    unescaped,
    user_errors,
)

if TYPE_CHECKING:
    from kvcompress.evals.sweep.points import Settings
    from kvcompress.evals.sweep.report import Row
    from kvcompress.evals.sweep.sweep import Sweep
    from kvcompress.evals.sweep.task import Task

# what makes tables, plot and page, beside torch's own
_OF_REPORTS = ("matplotlib", "plotly", "scipy", "jinja2")
_BUDGETS = "0.1,0.2,0.3,0.5,1.0"
_TASKS = "needle,needle_sentences,needle_essay,multikey,multivalue,kv,variables,passkey,text"
# what --quick sets, unless the user does
_QUICK: dict[str, Any] = {
    "methods": "h2o,h2o:bits=4,snapkv,tova,keydiff,kvzip,kvzip:bits=4,attention_matching,gear,kivi",
    "budgets": "0.2,0.5",
    "tasks": "needle,text",
    "lengths": "256",
    "samples": 4,
    "continuation": 32,
    "chunk": 8,
}


def sweep(
    context: typer.Context,
    model: ModelOption = None,
    methods: Annotated[
        str, f"Comma-separated, with settings as in h2o:sinks=4:bits=4. Known: {KNOWN}. {USUAL}: {IN_USUAL}."
    ] = USUAL,
    budgets: Annotated[str, "Fractions of the length (0.2), or tokens (512)."] = _BUDGETS,
    tasks: Annotated[
        str, f"Comma-separated. Known: {KNOWN_TASKS}. ruler is all of RULER; other names are tasks of lm-eval."
    ] = _TASKS,
    lengths: Annotated[str, "Context lengths in tokens."] = "1024",
    samples: Annotated[int, "Prompts, or windows of text, per point."] = 50,
    precision: Annotated[
        float | None, "Fewer samples, once half of each score's 95 % interval is at most this: 0.1."
    ] = None,
    minutes: Annotated[float | None, "Begin nothing after so many; the same command goes on later."] = None,
    protocols: Annotated[
        str, "By commas; multi-turn and multi-request ask several questions of each context."
    ] = "question-agnostic,question-aware",
    out: Annotated[Path, "Folder for rows, table, plot and page."] = Path("sweep"),
    quick: Annotated[bool, "Some six minutes on two cores; other options still apply."] = False,
    fresh: Annotated[bool, "Measure again what the folder already has."] = False,
    seed: Annotated[int, "Of the tasks."] = 0,
    hold_back: Annotated[int, "Question-aware: question tokens read after compression."] = 1,
    batch: Annotated[int, "Sequences at a time."] = 4,
    text: Annotated[str | None, "UTF-8 file for the task text and for essays."] = None,
    continuation: Annotated[int, "Task text: tokens scored after each context."] = 64,
    chunk: Annotated[int, "Task text: tokens read per forward; generation reads 1."] = 1,
    num_fewshot: Annotated[int | None, "lm-eval's tasks: examples in a context."] = None,
    limit: Annotated[int | None, "lm-eval's tasks: documents per point."] = None,
    metadata: Annotated[str, 'lm-eval\'s tasks: as JSON, {"data": "/folder"}.'] = "{}",
    question: Annotated[
        str | None,
        "lm-eval's tasks, question-agnostic: how a question begins, such as Question:; else the last example.",
    ] = None,
    documents: Annotated[
        str | None, "RULER's qa_1 and qa_2: a file of SQuAD, HotpotQA or JSON lines, or a folder of them."
    ] = None,
    turns: Annotated[int, "Questions of a context in multi-turn and multi-request."] = 5,
    transcript: Annotated[int, "state_tracking: the most tokens of an answer."] = 2048,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> int:
    """Measure accuracy against memory: every method, at every budget, on every task.

    Finished points are kept in the folder and not repeated; a point that fails is reported, and the others continue.
    Several processes share the points of a folder: accelerate launch -m kvcompress sweep ...
    """
    check_extra("eval", *_OF_REPORTS)
    from kvcompress.evals.sweep.points import Settings
    from kvcompress.evals.tasks import make_tasks
    from kvcompress.registry import expanded

    # every setting is an option of the same name
    values = {setting.name: context.params[setting.name] for setting in dataclasses.fields(Settings)}
    if quick:
        values |= {name: value for name, value in _QUICK.items() if is_default(context, name)}
    kinds: dict[str, Callable[[str], Any]] = {"lengths": count, "budgets": as_budget}
    for name in ("methods", "budgets", "tasks", "lengths", "protocols"):
        try:
            values[name] = tuple(kinds.get(name, str)(part) for part in parts(values[name]))
        except UsageError as error:
            raise UsageError(f"--{name}: {error}") from None
    values["methods"] = expanded(values["methods"])
    values["metadata"] = as_object("--metadata", metadata)
    values["question"] = question and unescaped(question)
    if documents is not None and not Path(documents).exists():
        raise UsageError(f"there is nothing at {documents} (--documents)")
    with user_errors():
        settings = Settings(**values)
        tasks_by_name = make_tasks(settings)
    check_folder(out)
    if minutes is not None and minutes <= 0:
        raise UsageError(f"--minutes must be more than 0, got {minutes:g}")
    seconds = None if minutes is None else 60 * minutes
    return run_sweep(settings, tasks_by_name, model, out, fresh, dtype, device, precision, seconds)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Of sweeps.")],
    out: Annotated[Path, "Folder for table, plot and page."] = Path("report"),
    leaderboard: Annotated[Path | None, "Folder for RULER's tasks as kvpress's leaderboard takes them."] = None,
) -> int:
    """Put the rows of several sweeps into one table, plot and page."""
    check_extra("eval", *_OF_REPORTS)
    from kvcompress.evals.sweep import report as reports
    from kvcompress.evals.sweep.leaderboard import write_leaderboard

    with user_errors():
        rows = reports.collect(folders)
    check_folder(out)
    for folder in folders:
        _tell_damaged(folder)
    status = show(rows, reports.write_all(rows, out))
    if hidden := len(rows) - len(reports.one_each(rows)):
        print(
            f"{hidden} of {len(rows)} rows are not shown: others of the same points have more samples or are newer "
            "(another seed makes no other point); results.csv has all",
            file=sys.stderr,
        )
    if leaderboard is not None:
        with user_errors():
            for path in write_leaderboard(reports.read(folders), leaderboard):
                print(path)
    return status


def run_sweep(
    settings: "Settings",
    tasks: "dict[str, Task]",
    name: str | None,
    folder: Path,
    fresh: bool,
    dtype: str | None,
    device: str | None,
    precision: float | None = None,
    seconds: float | None = None,
) -> int:
    """Runs one sweep at a time in a folder, or several processes that share it, and writes the tables at the end."""
    from filelock import FileLock, Timeout

    from kvcompress.evals.sweep import report
    from kvcompress.evals.sweep.points import check_budgets
    from kvcompress.evals.sweep.samples import read_text
    from kvcompress.evals.sweep.sweep import Sweep

    with user_errors():
        read_text(settings.text)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if fresh and processes > 1:
        raise UsageError("--fresh is for a single process: several would delete each other's rows; use an empty --out")
    lock = FileLock(folder / (".lock" if rank == 0 else f".lock.{rank}"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"another sweep is writing to {folder}; give this one its own --out") from None
    with lock:
        model, tokenizer = load(name, dtype, device)
        with user_errors():
            work = Sweep(
                settings,
                tasks,
                model,
                tokenizer,
                folder,
                forget=fresh,
                rank=rank,
                processes=processes,
                precision=precision,
                seconds=seconds,
            )
            check_budgets(model, work.points)
            work.check_tasks()
        without = " without --fresh" * fresh
        if not fresh:
            _tell_damaged(folder)
        _tell_left_out(work)
        _tell_lengths(work)
        _tell_batches(work)
        try:
            rows = _run(work)
        except KeyboardInterrupt:
            print(f"interrupted; the same command{without} continues from what {folder} has", file=sys.stderr)
            return 130
        if rank:
            return 0
        failed = [row["key"] for row in rows if row["status"] != "ok"]
        cut = sum(work.key(point) not in failed for point in work.missing())
        if cut:
            print(
                f"time is up: {cut} of {len(work.points)} points have not read all of their samples; the same "
                f"command{without} goes on",
                file=sys.stderr,
            )
        if not rows:
            return 0
        paths = report.write_all(rows, folder, planned=len(work.points))
    return show(rows, [work.results.path, *paths])


def _tell_damaged(folder: Path) -> None:
    """Says which lines of a sweep's results cannot be read."""
    from kvcompress.evals.sweep.rows import damaged

    for place in damaged(folder):
        print(f"{place} is not a row of a sweep, and is left out", file=sys.stderr)


def _tell_left_out(work: "Sweep") -> None:
    """Says which tasks are not asked under a protocol, as they have one question only."""
    from kvcompress.evals.sweep.points import CONTINUATION

    for protocol in work.settings.protocols:
        ran = {point.task for point in work.points if point.protocol in (protocol, CONTINUATION)}
        left = [task for task in work.tasks if task not in ran]
        if left:
            print(f"{protocol} asks several questions, and leaves out {', '.join(left)}", file=sys.stderr)


def _tell_lengths(work: "Sweep") -> None:
    """Says which lengths are more than the model was trained for."""
    from kvcompress import hf

    trained = hf.trained_length(hf.decoder_config(work.model))
    lengths = dict.fromkeys(point.length for point in work.points if point.length is not None)
    beyond = [str(length) for length in lengths if trained is not None and length > trained]
    if beyond:
        told = f"{work.model_name} was trained for {trained} tokens"
        print(f"{told}: {', '.join(beyond)} are more, and the full cache may fail too", file=sys.stderr)


def _tell_batches(work: "Sweep") -> None:
    """Says where prompts are too long to be read as many at a time as was asked for, or to be recorded at all."""
    from kvcompress.evals.sweep.first_forward import MOST_BYTES, FirstForward

    asked = work.settings.batch
    for length in dict.fromkeys(point.length for point in work.points if point.length is not None):
        most = FirstForward.most_rows(work.model, length)
        if 0 < most < asked:
            told = f"{most} sequences of {length} tokens are read at a time instead of {asked}"
            print(f"{told}, as many as a recorded forward holds in {MOST_BYTES / 2**30:g} GiB", file=sys.stderr)
        elif not most and FirstForward.records(work.model):
            told = f"a forward over {length} tokens takes more than {MOST_BYTES / 2**30:g} GiB to record"
            print(f"{told}: each method reads every prompt itself", file=sys.stderr)


def _run(work: "Sweep") -> "list[Row]":
    """Measures the missing points, with a progress bar, or without a terminal with a line per point."""
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
        # progress counts tokens to read, so that long points count more
        total = sum(work.cost(point) for point in missing)
        task = bar.add_task(missing[0].title if missing else "", total=total, count=f"{done}/{len(work.points)}")
        finished, told = 0, 0.0

        def on_part(point: Any, share: float) -> None:
            nonlocal told
            bar.update(task, advance=share * work.cost(point), description=point.title)
            so_far = bar.tasks[task].completed / total
            if bar.disable and not share and so_far >= told:
                told = so_far + 0.02
                print(f"{so_far:.0%} done, now {point.title}", flush=True)

        def on_row(point: Any, row: "Row") -> None:
            nonlocal finished
            finished += 1
            # points that other processes have done count too
            count = f"{max(done + finished, len(work.points) - len(work.missing()))}/{len(work.points)}"
            bar.update(task, count=count)
            said = f"{row['score']:.3f}" if row["status"] == "ok" else f"failed: {row['error'].splitlines()[0]}"
            if bar.disable:
                print(f"{count} {point.title}: {said} ({row['seconds']:.1f} s)", flush=True)
            elif row["status"] != "ok":
                bar.console.print(f"{point.title}: {said}", style="red", markup=False)

        return work.run(on_row, on_part)


def show(rows: "list[Row]", paths: list[Path]) -> int:
    """Prints tables, ties, paths and failures; returns 1 if a row failed."""
    from rich.table import Table

    from kvcompress.evals.sweep import report

    rows = report.in_order(rows)
    for table in report.make_tables(rows) + report.make_comparisons(rows):
        shown = Table(title=table.title, title_justify="left")
        shown.add_column("method")
        for budget in table.budgets:
            shown.add_column(budget, justify="right")
        for line in table.lines:
            shown.add_row(*line)
        show_table(shown)
    print(report.LEGEND)
    if early := report.stopped(rows):
        print(f"{early} of {len(rows)} points stopped early, before they had read all of their samples")
    for tie in report.make_ties(rows):
        print(tie)
    for path in paths:
        print(path)
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed:
        print(f"kvcompress: failed: {report.describe(row)}: {report.reason(row)}", file=sys.stderr)
    return 1 if failed else 0
