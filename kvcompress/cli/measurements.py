"""The commands `bench NAME`, `study NAME` and `peers NAME`: functions of evals, whose parameters are their options.

Its docstring is the command's help. The functions need no typer: some run on a GPU where there is little else.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from kvcompress.cli.arguments import user_errors, with_options

# of each group what it does, and of each of its commands module, function and what it does: known without the import of
# the module, which takes seconds
GROUPS: dict[str, tuple[str, dict[str, tuple[str, str, str]]]] = {
    "bench": (
        "Measure speed and memory, beside transformers' own caches and torch's own attention.",
        {
            "speed": ("bench.speed", "main", "Decode and prefill beside transformers' DynamicCache."),
            "shared-prefix": ("bench.shared_prefix", "main", "Prompts with one beginning, beside DynamicCache."),
            "stream": ("bench.stream", "main", "Perplexity past the length the model was trained for."),
            "kernels": ("bench.kernels", "main", "Each kernel beside its reference and the best alternatives."),
            "gpu": ("bench.gpu", "run", "All that needs a GPU, in under ten minutes."),
            "aot": ("bench.aot", "main", "Compile every kernel for GPUs that are not there."),
            "sass": ("bench.sass", "main", "A static roofline of every kernel, from its machine code."),
        },
    ),
    "study": (
        "Measure what a method costs in quality.",
        {
            "bits": ("studies.bits", "main", "Packed keys and values at their measured bits."),
            "swiftkv": ("studies.swiftkv", "main", "Prefill time, flops and quality of a SwiftKV conversion."),
        },
    ),
    "peers": (
        "Ask other libraries the prompts of a sweep.",
        {
            "prompts": ("peers.exchange", "prompts", "Write the prompts of a sweep for a peer."),
            "rows": ("peers.exchange", "rows", "Score a peer's answers, as rows of a sweep."),
        },
    ),
}


class _RepeatsOptions(TyperCommand):
    """Takes several words after an option that may be given more than once: --fit one.txt two.txt."""

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
    """The groups of commands; the command that the arguments name comes with its options."""
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
        # it reads its words itself
        settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

        @app.command(name, context_settings=settings)
        def pass_on(context: typer.Context) -> int:
            return int(measure(context.args))

        return

    @functools.wraps(measure)
    def command(**values: Any) -> int:
        # nothing but the user's values is looked at
        with user_errors():
            return measure(**values) or 0

    app.command(name, cls=_RepeatsOptions)(with_options(command))
