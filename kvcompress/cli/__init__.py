"""The command line: sweep, report, eval, generate, chat, plan, check, methods, profile, calibrate, distill; and groups.

Heavy imports wait until a command runs. A user's mistake gives one line on stderr and exit status 2.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvcompress.cli import (
    calibrations,
    chats,
    checks,
    distillation,
    evaluations,
    generation,
    measurements,
    methods,
    plans,
    profiles,
    sweeps,
)
from kvcompress.cli.arguments import IN_USUAL, KNOWN, KNOWN_TASKS, USUAL, UsageError, with_options

app = typer.Typer(
    name="kvcompress",
    help="Compressed KV caches for transformers: measure them, use them, plan for them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# as lm-eval writes options: --num_fewshot
_OF_EVAL = {"token_normalize_func": lambda name: name.replace("_", "-")}
app.command("eval", context_settings=_OF_EVAL)(with_options(evaluations.evaluate))
for function in (
    *(sweeps.sweep, sweeps.report, generation.generate, chats.chat, plans.plan, checks.check, methods.methods),
    *(profiles.profile, calibrations.calibrate, distillation.distill),
):
    app.command()(with_options(function))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 1 if a point failed, 2 for a user's mistake, 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command: Any = typer.main.get_command(app)
    command.commands |= measurements.make_groups(arguments)
    if "--help" in arguments:
        _name_what_is_known(command, arguments)
    try:
        status = command.main(args=arguments or ["--help"], prog_name="kvcompress", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # the reader of our output is gone; leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, UsageError):
            message = str(error)
        elif hasattr(error, "format_message"):
            # typer may bundle click or import it: its errors are recognised by this
            message = error.format_message()
            if not message.strip():
                # a group without a command
                command.main(args=[*arguments, "--help"], prog_name="kvcompress", standalone_mode=False)
                return 2
        else:
            raise
        print("kvcompress: " + " ".join(message.split()), file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def _name_what_is_known(command: Any, arguments: Sequence[str]) -> None:
    """Writes the known methods and tasks into the help of the command that the arguments name."""
    for name, part in getattr(command, "commands", {}).items():
        for option in part.params if name in arguments else ():
            for placeholder, known in _KNOWN.items():
                if placeholder in (getattr(option, "help", None) or ""):
                    option.help = option.help.replace(placeholder, ", ".join(known()))


def _methods() -> list[str]:
    from kvcompress.registry import names

    return names()


def _usual() -> list[str]:
    from kvcompress.registry import expanded

    return list(expanded([USUAL]))


def _tasks() -> list[str]:
    from kvcompress.evals.tasks import OWN

    return list(OWN)


_KNOWN = {KNOWN: _methods, IN_USUAL: _usual, KNOWN_TASKS: _tasks}


def _show_versions(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version
        from platform import python_version

        from kvcompress import __version__

        print(f"kvcompress {__version__}\npython {python_version()}")
        for package in ("torch", "transformers", "triton"):
            try:
                print(package, version(package))
            except PackageNotFoundError:
                print(package, "not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show kvcompress's version and its dependencies'.",
        ),
    ] = False,
) -> None:
    pass
