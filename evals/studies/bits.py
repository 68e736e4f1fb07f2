"""What packed keys and values cost in quality at their measured bits: kvcompress study bits

    KL = mean over scored tokens of sum_v p_full(v) (log p_full(v) - log p(v))

The context of each window of text is read once, by a full cache, and packed with every setting (`GEARCache.fill`); what
follows is read with the packed cache, `chunk` tokens per forward, and compared with the full cache's own continuation.
Bits count everything that the cache keeps of the packed tokens (codes, scales, outliers, factors, positions) per number
of their keys and values; the tail counts only in `all bits`.

If they are installed, transformers' own QuantizedCache backends (optimum-quanto, hqq) are measured on the same context.

With a codec (`dense:codec_bits=2`, `dense:codec=zstd`, `gear:bits=4:codec=zstd`) the cache goes through a file: bits
are those of the whole file per number of keys and values in it. Saving and loading are timed beside the prefill, in
seconds of the CPU, which other work on the machine hardly changes. `dtype=bfloat16` says in which numbers a dense cache
is kept.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcompress import Basis, CompressedCache, DenseCache, GEARCache, TransformCodec, load_model
from kvcompress.evals.provenance import provenance, write_results
from kvcompress.evals.sweep.agreement import distances, make_windows
from kvcompress.evals.sweep.baselines import BASELINES, build, installed
from kvcompress.evals.sweep.rows import mean_of
from kvcompress.evals.sweep.samples import read_text
from kvcompress.hf import cache_argument
from kvcompress.registry import parse


def _plain(bits: int) -> str:
    return f"bits={bits}:value_bits={bits}:sinks=0"


SETTINGS = [
    *(f"gear:bits={bits}" for bits in (2, 3, 4, 8)),
    *(f"gear:bits={bits}:value_bits={bits}" for bits in (3, 4)),
    *(f"gear:{_plain(bits)}:group_size={group}" for bits in (2, 3, 4, 8) for group in (16, 32, 64)),
    *(f"gear:{_plain(bits)}:group_size=128:buffer=128" for bits in (2, 3, 4, 8)),
    *(f"gear:preset=gear-l:{_plain(bits)}" for bits in (2, 3, 4)),
    *(f"gear:preset=gear:{_plain(bits)}" for bits in (2, 3, 4)),
    *(f"gear:{_plain(bits)}:group_size={group}:outliers=0.02" for bits in (2, 3, 4) for group in (32, 64)),
    "gear:preset=gear-whole",
]
PEERS = [f"{backend}:bits={bits}" for backend in ("quanto", "hqq") for bits in (2, 4)]


@dataclass(frozen=True)
class Row:
    """One setting. bits: per packed number, everything counted. all_bits: per number held, with the tail.

    kl: nats; top1: share of positions whose most likely token is unchanged; perplexity, full_perplexity: of each text.
    file: of a cache that went through a file.
    """

    setting: str
    bits: float | None
    all_bits: float
    kl: float
    top1: float
    perplexity: dict[str, float]
    full_perplexity: dict[str, float]
    file: "OfFile | None" = None

    @property
    def losses(self) -> dict[str, float]:
        """By what share the perplexity of each text rose."""
        return {name: self.perplexity[name] / self.full_perplexity[name] - 1 for name in self.perplexity}


@dataclass(frozen=True)
class OfFile:
    """nbytes: of the file, plain_nbytes: of the same cache's without a codec; seconds of the CPU for 1000 tokens."""

    nbytes: int
    plain_nbytes: int
    save_seconds: float
    load_seconds: float
    prefill_seconds: float


class Study:
    """Windows of texts, read once."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: dict[str, list[list[int]]],
        context: int,
        chunk: int,
        basis: Basis | None = None,
    ) -> None:
        """
        Args:
            windows: for each text, by name, windows of token ids, all of one length.
            context: how many tokens of a window are packed; those after them are scored.
            basis: that of settings with `codec_bits`.
        """
        self.model = model
        self.basis = basis
        self.context = context
        self.chunk = chunk
        self.names = [name for name, rows in windows.items() for _ in rows]
        self.rows = torch.tensor([row for rows in windows.values() for row in rows], device=model.device)
        self.full = DynamicCache(config=model.config)
        began = time.process_time()
        with torch.inference_mode():
            model(self.rows[:, :context], **cache_argument(model, self.full), logits_to_keep=1)
        self.prefill_seconds = 1000 * (time.process_time() - began) / self.rows[:, :context].numel()
        layers: Any = self.full.layers
        self.held: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in layers]
        self.expected = list(self._continue(self._filled(DynamicCache(config=model.config))))

    def measure(self, setting: str) -> Row:
        """A setting's row; `gear:...` as in the registry, `quanto:bits=4` and `hqq:bits=4` for transformers' caches,
        `codec=zstd` or `codec_bits=2` for a file."""
        numbers = 2 * sum(key.numel() for key, _ in self.held)
        if ":codec" in setting:
            return self._measure_file(setting, numbers)
        with torch.inference_mode():
            if setting.partition(":")[0] in BASELINES:
                cache, bits = self._filled(build(setting, self.model)), None
                all_bits = 8 * cache.memory().total_bytes / numbers
            else:
                method, settings = parse(setting)
                cache = method.build(self.model, 0, settings)
                if not isinstance(cache, GEARCache):
                    raise ValueError(f"bits can be measured for gear, kivi, {', '.join(BASELINES)}, got {setting!r}")
                report = cache.fill(self.full).memory()
                layers: Any = cache.layers
                apart = [part for layer in layers for part in (layer.first, layer.tail) if part is not None]
                in_tail = sum(sum(part.held) * 2 * part.contents()[0][0, :, 0].numel() for part in apart)
                packed = numbers - in_tail
                # a basis does not grow with the text
                beside = report.by_component["tail"] + report.by_component.get("basis", 0)
                bits = 8 * (report.total_bytes - beside) / packed if packed else None
                all_bits = report.bits_per_element
            return self._compare(setting, bits, all_bits, cache)

    def _measure_file(self, setting: str, numbers: int) -> Row:
        name, *pairs = setting.split(":")
        told = dict(pair.split("=", 1) for pair in pairs)
        codec, bits = told.pop("codec", None), told.pop("codec_bits", None)
        if bits is not None and self.basis is None:
            raise ValueError(f"{setting!r} needs a basis: --basis basis.safetensors, as Basis.save writes it")
        if bits is None and codec != "zstd":
            raise ValueError(f"codec must be zstd, or codec_bits be given, got {setting!r}")
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            cache: CompressedCache
            if name == "dense":
                dtype = getattr(torch, told.pop("dtype", str(self.held[0][0].dtype).rpartition(".")[2]))
                if told:
                    raise ValueError(f"dense takes dtype, codec and codec_bits, got {setting!r}")
                cache = self._dense(dtype)
            else:
                method, settings = parse(":".join([name, *(f"{key}={value}" for key, value in told.items())]))
                built = method.build(self.model, 0, settings)
                if not isinstance(built, GEARCache):
                    raise ValueError(f"files are measured of dense, gear and kivi, got {setting!r}")
                cache = built.fill(self.full)
            path, plain = Path(folder) / "coded.safetensors", Path(folder) / "plain.safetensors"
            cache.save(plain)
            began = time.process_time()
            cache.save(path, codec="zstd" if bits is None else TransformCodec(self.basis or "", float(bits)))
            saved = time.process_time()
            again = type(cache).load(path, self.model, basis=self.basis)
            loaded = time.process_time()
            nbytes, plain_nbytes = path.stat().st_size, plain.stat().st_size
        thousands = self.rows[:, : self.context].numel() / 1000
        seconds = (saved - began) / thousands, (loaded - saved) / thousands, self.prefill_seconds
        of_file = OfFile(nbytes, plain_nbytes, *seconds)
        return replace(
            self._compare(setting, 8 * nbytes / numbers, cache.memory().bits_per_element, again), file=of_file
        )

    def _dense(self, dtype: torch.dtype) -> DenseCache:
        """A dense cache that holds the context in another dtype."""
        cache: Any = DenseCache(self.model)
        for layer, (key, value) in zip(cache.layers, self.held, strict=True):
            key, value = key.to(dtype), value.to(dtype)
            layer.lazy_initialization(key, value)
            layer.dense = layer.storage(key, value)
            layer.dense.append(key, value, None)
            layer.clock.begin_at(self.context)
        return cache

    def _compare(self, setting: str, bits: float | None, all_bits: float, cache: Any) -> Row:
        sums = torch.zeros(4, len(self.names), dtype=torch.float64, device=self.rows.device)
        first = self.context
        for expected, found in zip(self.expected, self._continue(cache), strict=True):
            sums += distances(found, expected, self.rows[:, first + 1 : first + 1 + found.shape[1]])
            first += found.shape[1]
        top1, kl, loss, full_loss = (sums / (first - self.context)).tolist()

        def perplexity(losses: list[float]) -> dict[str, float]:
            return {
                name: math.exp(mean_of([loss for own, loss in zip(self.names, losses, strict=True) if own == name]))
                for name in self.names
            }

        return Row(setting, bits, all_bits, mean_of(kl), mean_of(top1), perplexity(loss), perplexity(full_loss))

    def _continue(self, cache: Any) -> Iterator[Tensor]:
        """Logits of what follows, [windows, chunk, vocabulary] at a time."""
        for first in range(self.context, self.rows.shape[1] - 1, self.chunk):
            piece = self.rows[:, first : min(first + self.chunk, self.rows.shape[1] - 1)]
            with torch.inference_mode():
                yield self.model(piece, **cache_argument(self.model, cache)).logits

    def _filled(self, cache: Any) -> Any:
        for index, (key, value) in enumerate(self.held):
            cache.update(key, value, index)
        return cache


def main(
    model: Annotated[str | None, "hub id, folder or .gguf file; default: SmolLM2-135M-Instruct"] = None,
    settings: Annotated[str | None, "comma-separated, as in the registry, such as gear:bits=3:group_size=32"] = None,
    text: Annotated[list[Path] | None, "UTF-8 file; repeat for more texts"] = None,
    context: Annotated[int, "tokens that are packed"] = 1536,
    scored: Annotated[int, "tokens read after them"] = 256,
    chunk: Annotated[int, "how many of these per forward; generation has 1", 1] = 64,
    windows: Annotated[int, "of each text"] = 2,
    basis: Annotated[Path | None, "file of the basis that codec_bits need, as Basis.save writes it"] = None,
    out: Annotated[Path | None, "JSON"] = None,
) -> None:
    """Quality of packed caches at their measured bits."""
    options = {name: str(value) for name, value in locals().items()}
    loaded, tokenizer = load_model(model)
    texts = {path.stem: read_text(path) for path in text or ()} or {"python's documentation": read_text()}
    encoded = {name: tokenizer.encode(words, add_special_tokens=False) for name, words in texts.items()}
    # the last token is only a target
    cut = {name: make_windows(ids, context, scored + 1, windows) for name, ids in encoded.items()}
    study = Study(loaded, cut, context, chunk, None if basis is None else Basis.load(basis))
    peers = [peer for peer in PEERS if installed(peer.partition(":")[0])]
    rows = []
    print(f"{'setting':52} {'bits':>6} {'all':>6} {'KL':>8} {'top-1':>6}  perplexity against the full cache")
    for setting in settings.split(",") if settings else SETTINGS + peers:
        row = study.measure(setting)
        rows.append(asdict(row))
        bits = "" if row.bits is None else f"{row.bits:.2f}"
        losses = ", ".join(f"{name} {loss:+.1%}" for name, loss in row.losses.items())
        print(f"{setting:52} {bits:>6} {row.all_bits:6.2f} {row.kl:8.4f} {row.top1:6.3f}  {losses}", flush=True)
        if row.file is not None:
            smaller, seconds = row.file.nbytes / row.file.plain_nbytes, (row.file.save_seconds, row.file.load_seconds)
            print(
                f"    a file of {row.file.nbytes / 1e6:.2f} MB, {smaller:.0%} of a plain one; for 1000 tokens "
                f"{seconds[0]:.2f} s to save, {seconds[1]:.2f} s to load, {row.file.prefill_seconds:.2f} s to prefill",
                flush=True,
            )
    write_results({"settings": options, **provenance(loaded.device), "rows": rows}, out)
