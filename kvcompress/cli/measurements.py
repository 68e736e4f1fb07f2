"""The commands `bench NAME`, `study NAME` and `peers NAME`: functions of evals, whose parameters are their options.

A function's docstring is the command's help. The functions do not need typer, as some run on GPU machines that have
little installed.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from kvcompress.cli.arguments import user_errors, with_options

# for each group its help, and for each of its commands module, function and help: known without importing the module,
# which takes seconds
GROUPS: dict[str, tuple[str, dict[str, tuple[str, str, str]]]] = {
    "bench": (
        "Measure speed and memory, against transformers' own caches and torch's own attention.",
        {
            "speed": ("bench.speed", "main", "Decode and prefill against transformers' DynamicCache."),
            "shared-prefix": ("bench.shared_prefix", "main", "Prompts with a common beginning, against DynamicCache."),
            "stream": ("bench.stream", "main", "Perplexity past the length the model was trained for."),
            "kernels": ("bench.kernels", "main", "Each kernel against its reference and the best alternatives."),
            "gpu": ("bench.gpu", "run", "Everything that needs a GPU, in under ten minutes."),
            "aot": ("bench.aot", "main", "Compile every kernel for GPUs that are not present."),
            "sass": ("bench.sass", "main", "A static roofline of every kernel, from its machine code."),
        },
    ),
    "study": (
        "Measure what a method costs in quality.",
        {
            "bits": ("studies.bits", "main", "Packed keys and values at their measured bits."),
            "swiftkv": ("studies.swiftkv", "main", "Prefill time, flops and quality of a SwiftKV conversion."),
            "frontier": ("studies.frontier", "main", "What SwiftKV conversions cost and keep, layer by layer."),
        },
    ),
    "peers": (
        "Run the prompts of a sweep through other libraries.",
        {
            "prompts": ("peers.exchange", "prompts", "Write the prompts of a sweep for a peer."),
            "rows": ("peers.exchange", "rows", "Score a peer's answers, as rows of a sweep."),
        },
    ),
}


class _RepeatsOptions(TyperCommand):
    """Takes several values after an option that may be given more than once: --fit one.txt two.txt."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        repeated = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        words: list[str] = []
        option = ""
        for word in arguments:
            if word.startswith("-"):
                option = word if word in repeated else ""
            elif option and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(context, words)


def make_groups(arguments: Sequence[str]) -> dict[str, Any]:
    """The groups of commands; the command that the arguments name has its options."""
    groups = {}
    for group, (about, commands) in GROUPS.items():
        app = typer.Typer(name=group, help=about, no_args_is_help=True, add_completion=False)
        for name, (module, function, line) in commands.items():
            if [group, name] == list(arguments[:2]):
                measure = getattr(importlib.import_module(f"kvcompress.evals.{module}"), function)
                _add(app, name, measure)
            else:
                app.command(name, help=line)(lambda: None)
        groups[group] = typer.main.get_group(app)
    return groups


def _add(app: typer.Typer, name: str, measure: Callable[..., Any]) -> None:
    if name == "aot":
        # it parses its own arguments
        settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

        @app.command(name, context_settings=settings)
        def pass_on(context: typer.Context) -> int:
            return int(measure(context.args))

        return

    @functools.wraps(measure)
    def command(**values: Any) -> int:
        # only the user's values are checked here
        with user_errors():
            return measure(**values) or 0

    app.command(name, cls=_RepeatsOptions)(with_options(command))
