"""Plots and a summary in Markdown of what kvcompress bench gpu measured."""

import importlib.util
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def errors(results: dict[str, Any]) -> dict[str, str]:
    """What failed, by step and case."""
    return _of_all(results, "error")


def _of_all(results: dict[str, Any], what: str) -> dict[str, str]:
    return {
        f"{step}: {name}": row[what]
        for step, rows in results.items()
        if isinstance(rows, dict)
        for name, row in rows.items()
        if isinstance(row, dict) and what in row
    }


def summary(results: dict[str, Any]) -> str:
    """What was found, in few lines: a tool may show no more than the end of what is printed."""
    source = results["provenance"]
    limits = results.get("kernels", {}).get("limits", {}).get("limits", {})
    endtoend = results.get("endtoend", {})
    parts = [
        "# GPU run",
        f"{source['machine']}, commit {source['commit']}, {source['versions']}, {source['time']}",
        "Measured limits: " + (", ".join(f"{value:.4g} {unit}" for unit, value in limits.items()) or "none"),
        *_tests(results.get("tests", {})),
        *_kernels(results.get("kernels", {})),
        *_prefill(endtoend),
        *_decode(endtoend),
        *_device_times(endtoend),
        *_largest(endtoend),
        *_generate(endtoend),
    ]
    failed = errors(results)
    parts += ["", "## Failed" if failed else "Nothing failed."]
    parts += [f"- {name}: {error[:300]}" for name, error in failed.items()]
    left = _of_all(results, "left_out")
    if left:
        parts += ["", "Left out for time: " + "; ".join(left)]
    return "\n".join(parts) + "\n"


def _section(title: str, lines: list[str], heads: str = "") -> list[str]:
    """A section of Markdown, a table where there are heads; nothing where there are no lines."""
    table = [f"| {heads} |", "|---" * (heads.count("|") + 1) + "|"] if heads else []
    return ["", f"## {title}", *table, *lines] if lines else []


def _tests(rows: dict[str, Row]) -> list[str]:
    lines = []
    for name, row in rows.items():
        lines.append(f"- tests/{name}: {row.get('counts', row.get('error'))} {row.get('left_out', '')}")
        lines += [f"  - {which}: {message[:150]}" for which, message in list(row.get("failed", {}).items())[:12]]
    return _section("Tests", lines)


def _kernels(rows: dict[str, Row]) -> list[str]:
    lines = []
    for row in (part for case in rows.values() for part in case.get("rows", [])):
        ours = row["seconds"]["ours"]
        # the fastest of the others
        others = {name: times["median"] for name, times in row["seconds"].items() if name not in ("ours", "reference")}
        best = min(others, key=lambda name: others[name]) if others else "reference"
        best_time = row["seconds"].get(best, {}).get("median")
        shape = row["shape"]
        lines.append(
            f"| {row['kernel']} | {shape['batch']} x {shape['tokens']} | {ours['median'] * 1e6:.0f} "
            f"({ours['p20'] * 1e6:.0f} to {ours['p80'] * 1e6:.0f}) | {row['achieved']['ours']:.4g} {row['unit']} "
            f"| {row['achieved']['ours'] / row['limit']:.0%} "
            + (f"| {ours['median'] / best_time:.2f}x {best} |" if best_time else "| |")
            + (f" {row['host_seconds']['ours'] * 1e6:.0f} |" if row["host_seconds"] else " |")
            + (" no graph" if "ours" in row["uncaptured"] else "")
            + {True: "", False: " DISAGREES", None: " not compared"}[row["agrees"]]
        )
    return _section("Kernels", lines, "kernel | batch x tokens | us | achieved | of limit | time, to | host us")


def _measured(rows: dict[str, Row], *kinds: str) -> list[Row]:
    return [row for row in rows.values() if row.get("kind") in kinds and "seconds" in row]


def _prefill(rows: dict[str, Row]) -> list[str]:
    heads = "prompt | cache | s to first token | to dynamic | limit s | peak over the model | cache"
    lines = []
    measured = _measured(rows, "prefill")
    for row in measured:
        base = [other for other in measured if other["cache"] == "dynamic" and other["tokens"] == row["tokens"]]
        ratio = f"{row['seconds']['median'] / base[0]['seconds']['median']:.2f}x" if base else ""
        lines.append(
            f"| {row['tokens']} | {row['cache']} | {_spread(row['seconds'], 1)} | {ratio} "
            f"| {row['limit_seconds']:.3g} | {_gib(row['peak_bytes_over_model'])} | {_gib(row['cache_bytes'])} |"
        )
    return _section("Time to first token, batch 1", lines, heads)


def _decode(rows: dict[str, Row]) -> list[str]:
    heads = (
        "context | batch | cache | ms per step | limit ms | tokens/s | to dynamic | cache | peak | launches | graphs"
    )
    lines = []
    measured = _measured(rows, "decode", "compiled")
    for row in sorted(measured, key=lambda row: (-row["tokens"], -row["batch"], row["cache"], row["kind"])):
        base = _dynamic(rows, row)
        ratio = f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}x" if base else ""
        note = f" (its batch {base['batch']})" if base and base["batch"] != row["batch"] else ""
        off = f", logits off by {row['logits_off_eager']:.1e}" if "logits_off_eager" in row else ""
        lines.append(
            f"| {row['tokens']} | {row['batch']} | {row['cache']}{' compiled' * (row['kind'] == 'compiled')} "
            f"| {_spread(row['seconds'], 1e3)} | {row['limit_seconds'] * 1e3:.3g} | {row['tokens_per_second']:.4g} "
            f"| {ratio}{note} | {_gib(row['cache_bytes'])} | {_gib(row['peak_bytes'])} | {row['launches'] or ''} "
            f"| {row.get('graphs', '')}{off} |"
        )
    for row in rows.values():
        if row.get("fits") is False:
            lines.append(
                f"| {row['tokens']} | {row['batch']} | {row['cache']} | does not fit: {_gib(row['needs_bytes'])} |"
            )
    return _section("Decoding", lines, heads)


def _device_times(rows: dict[str, Row]) -> list[str]:
    lines = [
        f"- {name}: " + ", ".join(f"{kernel} {count} x {us / count:.1f}" for kernel, (count, us) in top.items())
        for name, row in rows.items()
        if (top := dict(list(row.get("device_microseconds", {}).items())[:6]))
    ]
    return _section("What a step's time goes to: launches x us each", lines)


def _dynamic(rows: dict[str, Row], row: Row) -> Row | None:
    """DynamicCache at the same batch, or at the largest that fits."""
    same = [
        other
        for other in rows.values()
        if other.get("cache") == "dynamic"
        and other.get("tokens") == row["tokens"]
        and "tokens_per_second" in other
        and (other["batch"] == row["batch"] or (other["kind"] == "largest batch" and other["batch"] < row["batch"]))
    ]
    return max(same, key=lambda other: other["batch"]) if same else None


def _largest(rows: dict[str, Row]) -> list[str]:
    lines = [
        f"- {row['cache']}, {row['tokens']} tokens: batch {row['batch']} (computed {row['computed']}), "
        f"{row['tokens_per_second']:.4g} tokens/s"
        for row in _measured(rows, "largest batch")
    ]
    return _section("Largest batch", lines)


def _generate(rows: dict[str, Row]) -> list[str]:
    lines = []
    for row in rows.values():
        if row.get("kind") == "generate" and "graphs" in row:
            eager = row.get("decode_tokens_per_second_eager")
            lines.append(
                f"- {row['cache']}, {row['tokens']} tokens, batch {row['batch']}: "
                f"{row['decode_tokens_per_second']:.4g} tokens/s{f', uncompiled {eager:.4g}' if eager else ''}; "
                f"after one call {row['graphs_after_first_call']}, after all {row['graphs']}"
                f"; prompt and 8 steps launch {row['launches']}"
            )
    return _section("model.generate", lines)


def plot(results: dict[str, Any], folder: Path) -> None:
    """Writes decode.png and kernels.png; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results.get("endtoend", {})
    measured = sorted(_measured(rows, "decode", "compiled", "largest batch"), key=lambda row: row["batch"])
    lengths = sorted({row["tokens"] for row in measured})
    if lengths:
        figure, axes = pyplot.subplots(1, len(lengths), figsize=(6 * len(lengths), 4), squeeze=False)
        for axis, tokens in zip(axes[0], lengths, strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            for row in measured:
                if row["tokens"] == tokens:
                    name = row["cache"] + (" compiled" if row["kind"] == "compiled" else "")
                    lines.setdefault(name, []).append((row["batch"], row["tokens_per_second"]))
            for name, points in lines.items():
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(
                xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s", title=f"decoding at {tokens} tokens"
            )
            axis.legend(fontsize=8)
        figure.savefig(folder / "decode.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)

    kernels = [part for case in results.get("kernels", {}).values() for part in case.get("rows", [])]
    if kernels:
        figure, axis = pyplot.subplots(figsize=(8, 5))
        shares: dict[str, list[tuple[int, float]]] = {}
        for row in kernels:
            size = row["shape"]["batch"] * row["shape"]["tokens"]
            shares.setdefault(row["kernel"], []).append((size, 100 * row["achieved"]["ours"] / row["limit"]))
        for name, points in shares.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(xscale="log", xlabel="batch x tokens", ylabel="% of the measured limit")
        axis.legend(fontsize=8)
        figure.savefig(folder / "kernels.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)


def _spread(seconds: Row, factor: float) -> str:
    median, low, high = (seconds[name] * factor for name in ("median", "p20", "p80"))
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
