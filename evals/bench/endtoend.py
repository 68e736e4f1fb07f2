"""A model of Llama-3.1-8B's shape end to end: DynamicCache beside H2OCache and ShadowKVCache (evals/bench/gpu.py).

Weights are random: speed and memory depend on shapes only. A prompt is prefilled once, as a batch of one, and its
cache is repeated to the batch that decodes, for the same reason. Times are of blocks of steps between two waits for
the device. Beside a time stands what the device cannot beat: for a decode step, the bytes of the weights and of the
cache over the bandwidth of a copy; for a prefill, the products over the rate of a large matrix product.
"""

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from kvcompress import CompressedCache, DenseCache, GEARCache, H2OCache, HydragenCache, ShadowKVCache
from kvcompress.evals.timing import Clock, spread, wait
from kvcompress.evals.timing import limits as measure_limits
from kvcompress.hf import cache_argument, cache_name, sizes

Step = Callable[[Tensor, Tensor, Cache], Tensor]

# more than a row of compiled steps takes: warming up, repeats, the profile
_COMPILED_STEPS = 128


@dataclass(frozen=True)
class Case:
    """What to measure: a prefill, steps of decoding (eager or compiled), the largest batch, or a whole `generate`.

    cache: "dynamic", "static", "full" (DenseCache), "hydragen" (the rows share the context), "h2o" with its share of
        the context (heads of a layer compete for it in "ragged"), "shadowkv" with the tokens it selects, or "gear"
        with its bits.
    """

    kind: str
    cache: str
    tokens: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.kind}, {self.cache}, {self.tokens} tokens, batch {self.batch}"


def _cases(far: int, long: int, short: int, batches: tuple[int, int, int], selected: int) -> list[Case]:
    """In order of importance: where the time runs out, the last are left out."""
    one, some, many = batches
    h2o, ragged, shadow = "h2o 20%", "ragged 20%", f"shadowkv {selected}"
    caches = ("dynamic", h2o, "h2o 10%", "h2o 50%")
    return [
        *(Case("prefill", cache, long) for cache in caches[:2]),
        *(Case("decode", cache, long, many) for cache in caches[:2]),
        Case("compiled", h2o, long, many),
        Case("compiled", ragged, long, many),
        Case("compiled", shadow, long, many),
        Case("largest batch", "dynamic", long),
        Case("largest batch", h2o, long),
        *(Case("largest batch", cache, far) for cache in ("dynamic", shadow)),
        *(Case("prefill", cache, far) for cache in ("dynamic", shadow)),
        *(Case(kind, shadow, long, many) for kind in ("decode", "prefill")),
        *(Case("compiled", f"gear {bits}", long, many) for bits in (2, 4)),
        *(Case("decode", f"gear {bits}", long, many) for bits in (4, 2)),
        *(Case("decode", cache, long, batch) for batch in (some, one) for cache in caches[:2]),
        Case("compiled", h2o, long, one),
        # rows that share the context: one reads it for all, the other as often as there are rows that fit
        *(Case("decode", "hydragen", tokens, 16 * many) for tokens in (short, long)),
        Case("largest batch", "dynamic", short),
        Case("generate", h2o, short, some),
        Case("generate", "dynamic", short, some),
        *(Case("prefill", cache, short) for cache in caches[:2]),
        *(Case("decode", cache, short, many) for cache in caches[:2]),
        *(Case("prefill", cache, long) for cache in caches[2:]),
        *(Case("decode", cache, long, many) for cache in caches[2:]),
        *(Case("largest batch", cache, long) for cache in caches[2:]),
        Case("compiled", h2o, long, some),
        *(Case("compiled", cache, long, some) for cache in ("full", "static")),
        *(Case("compiled", cache, long, many) for cache in caches[2:]),
        *(Case("decode", cache, short, batch) for batch in (some, one) for cache in caches[:2]),
    ]


class EndToEndCases:
    """The cases, over one model and the caches that were prefilled last."""

    def __init__(self, limits: dict[str, float] | None, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        cases = _cases(112, 80, 48, (1, 2, 3), 16) if tiny else _cases(122880, 32768, 8192, (1, 8, 32), 2048)
        if tiny:
            # each way of measuring once
            cases = list({(case.kind, case.cache.split()[0]): case for case in reversed(cases)}.values())[::-1]
        self.cases = {str(case): case for case in cases}
        self.model = _model(tiny, self.device, self.dtype)
        self.clock = Clock(self.device, cold=False)
        self.limits = limits or measure_limits(Clock(self.device), self.dtype)
        self.prefilled: dict[tuple[str, int], Cache] = {}

    def names(self) -> Iterable[str]:
        return self.cases

    def measure(self, name: str) -> dict[str, Any]:
        case = self.cases[name]
        measure = {
            "prefill": self._prefill,
            "decode": self._decode,
            "compiled": self._decode,
            "largest batch": self._largest_batch,
            "generate": self._generate,
        }[case.kind]
        self._tidy()
        # transformers' caches run as if kvcompress were not there
        self.model.set_attn_implementation("sdpa" if case.cache in ("dynamic", "static") else "kvcompress")
        with torch.no_grad():
            row = {"kind": case.kind, "cache": case.cache, "tokens": case.tokens, "batch": case.batch} | measure(case)
        print(row, flush=True)
        return row

    # one prompt

    def _prefill(self, case: Case) -> dict[str, Any]:
        prompt = self._tokens(case.tokens)
        self._first(case)
        taken, peak, held = [], 0, 0
        # minutes of device time are few
        for _ in range(1 if case.tokens > 65536 else 3):
            before = self._peak(reset=True)
            cache = self._build(case)
            given = cache_argument(self.model, cache)
            taken.append(self.clock.seconds(functools.partial(self.model, prompt, **given, logits_to_keep=1)))
            peak, held = max(peak, self._peak() - before), _bytes(cache)
            del cache, given
        of = sizes(self.model.config)
        weights = sum(weight.numel() for name, weight in self.model.named_parameters() if "layers." in name)
        flops = 2 * weights * case.tokens + 2 * of.layers * of.hidden * case.tokens**2
        return {
            "seconds": spread(taken),
            "limit_seconds": flops / (self.limits["TFLOP/s"] * 1e12),
            "peak_bytes_over_model": peak,
            "cache_bytes": held,
        }

    def _first(self, case: Case) -> Cache:
        """The prefilled cache of one sequence; a copy of it serves each case."""
        key = (case.cache, case.tokens)
        if key not in self.prefilled:
            # one length at a time: full caches are gigabytes
            self.prefilled = {kept: cache for kept, cache in self.prefilled.items() if kept[1] == case.tokens}
            cache = self._build(case)
            self.model(self._tokens(case.tokens), **cache_argument(self.model, cache), logits_to_keep=1)
            self.prefilled[key] = cache
        return self.prefilled[key]

    # decoding

    def _decode(self, case: Case) -> dict[str, Any]:
        cache = self._repeated(case, case.batch)
        if cache is None:
            return {"fits": False, "needs_bytes": self._needs(case, case.batch)}
        compiled = case.kind == "compiled"
        if compiled and isinstance(cache, DenseCache | GEARCache | ShadowKVCache):
            # compiled steps take no room, and fold nothing
            cache.reserve(_COMPILED_STEPS)
        step = self._step(compiled)
        token, position = self._next(case, case.batch)
        row: dict[str, Any] = {"fits": True}
        if compiled and case.batch == 1 and case.cache != "static":
            twin = copy.deepcopy(cache)
            row["logits_off_eager"] = self._difference(step, token, position, cache, twin)
            position.add_(1)
            del twin
        self._peak(reset=True)
        began = time.perf_counter()
        # the first calls compile, warm up and record the graphs
        for _ in range(4 if compiled else 2):
            step(token, position, cache)
            position.add_(1)
        wait(self.device)
        row["warm_up_seconds"] = time.perf_counter() - began
        block = 2 if self.tiny else 8

        def steps() -> None:
            for _ in range(block):
                step(token, position, cache)
                position.add_(1)

        seconds = spread([self.clock.seconds(steps) / block for _ in range(3 if self.tiny else 7)])
        held = _bytes(cache)
        # of the embedding a step reads one row
        weights = sum(_size(weight) for name, weight in self.model.named_parameters() if "embed_tokens" not in name)
        row |= {
            "seconds": seconds,
            "tokens_per_second": case.batch / seconds["median"],
            "limit_seconds": (_read_bytes(cache) + weights) / (self.limits["GB/s"] * 1e9),
            "cache_bytes": held,
            **_off_device(cache),
            "peak_bytes": self._peak(),
            **self._profile(lambda: step(token, position, cache)),
        }
        if compiled:
            row["graphs"] = _graphs()
        return row

    def _step(self, compiled: bool) -> Step:
        # looked up here: a compiled step cannot look at signatures
        name = str(cache_name(self.model))

        def forward(token: Tensor, position: Tensor, cache: Cache) -> Tensor:
            given: dict[str, Any] = {name: cache}
            return self.model(token, position_ids=position, logits_to_keep=1, **given).logits

        if not compiled:
            return forward
        _forget_graphs()
        how: dict[str, Any] = {"backend": "eager"} if self.tiny else {"mode": "reduce-overhead"}
        fast = torch.compile(forward, fullgraph=True, dynamic=False, **how)

        def step(token: Tensor, position: Tensor, cache: Cache) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return fast(token, position, cache)

        return step

    def _difference(self, step: Step, token: Tensor, position: Tensor, cache: Cache, twin: Cache) -> float:
        """Largest difference of logits between a step and the eager one, over the largest logit."""
        ours, wanted = step(token, position, cache).float(), self._step(False)(token, position, twin).float()
        return float((ours - wanted).abs().max() / wanted.abs().max())

    def _repeated(self, case: Case, batch: int) -> Cache | None:
        """A copy of the prefilled cache as a batch; None where the memory does not suffice."""
        if case.cache == "static":
            return self._static(case, batch)
        if self._needs(case, batch) > self._room():
            return None
        return self._copied(case, batch)

    def _copied(self, case: Case, batch: int) -> Cache:
        cache = copy.deepcopy(self._first(case))
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        return cache

    def _next(self, case: Case, batch: int) -> tuple[Tensor, Tensor]:
        """The token to decode from and its position, each [batch, 1]."""
        token = self._tokens(1).expand(batch, 1).contiguous()
        return token, torch.full((batch, 1), case.tokens, device=self.device)

    def _static(self, case: Case, batch: int) -> Cache:
        cache = StaticCache(config=self.model.config, max_cache_len=case.tokens + 128)
        self.model(self._tokens(1).expand(batch, 1), **cache_argument(self.model, cache), logits_to_keep=1)
        for layer in cache.layers:
            # as if the prompt had been fed: what the tokens hold does not matter
            layer.cumulative_length.fill_(case.tokens)  # type: ignore[union-attr]
        return cache

    # memory

    def _needs(self, case: Case, batch: int) -> int:
        """Bytes of the model, of a batch's caches and of those at hand. Full caches grow by a copy of a layer."""
        of = sizes(self.model.config)
        each = _bytes(self._first(case))
        grows = 1 + 2 / of.layers if case.cache in ("dynamic", "full") else 1
        at_hand = sum(_bytes(cache) for cache in self.prefilled.values())
        logits = batch * of.vocabulary * (self.model.dtype.itemsize + 4)
        copies = each if case.cache == "hydragen" else batch * each * grows
        return int(sum(_size(weight) for weight in self.model.parameters()) + at_hand + copies + logits)

    def _room(self) -> float:
        return 2.0**26 if self.tiny else 0.97 * torch.cuda.get_device_properties(self.device).total_memory

    def _largest_batch(self, case: Case) -> dict[str, Any]:
        """By the sizes, then by trying: a batch that fails is tried once more with a little less."""
        self.prefilled = {(case.cache, case.tokens): self._first(case)}
        one, two = (self._needs(case, batch) for batch in (1, 2))
        computed = max(1, int((self._room() - one) / (two - one)) + 1)
        computed = min(computed, 4) if self.tiny else computed
        for batch in (computed, int(0.93 * computed)):
            try:
                return {"computed": computed, "batch": batch} | self._steps_of(case, batch)
            except torch.OutOfMemoryError:
                print(f"batch {batch} does not fit", flush=True)
            self._tidy()
        return {"computed": computed, "error": f"neither {computed} nor {int(0.93 * computed)} sequences fit"}

    def _steps_of(self, case: Case, batch: int) -> dict[str, Any]:
        cache = self._copied(case, batch)
        token, position = self._next(case, batch)
        step = self._step(False)

        def feed() -> None:
            step(token, position, cache)
            position.add_(1)

        seconds = spread([self.clock.seconds(feed) for _ in range(4)][1:])
        return {
            "seconds": seconds, "tokens_per_second": batch / seconds["median"],
            "cache_bytes": _bytes(cache), **_off_device(cache),
        }  # fmt: skip

    # model.generate, which compiles by itself what promises to be compileable

    def _generate(self, case: Case) -> dict[str, Any]:
        prompt = self._tokens(case.tokens).expand(case.batch, -1).contiguous()
        fresh = 5 if self.tiny else 65
        _forget_graphs()
        row: dict[str, Any] = {"first_call_seconds": self._generated(case, prompt, fresh)}
        row["graphs_after_first_call"] = _graphs()
        start = self._generated(case, prompt, 1)
        whole = [self._generated(case, prompt, fresh) for _ in range(2)]
        row["graphs"] = _graphs()
        row |= self._profile(lambda: self._generated(case, prompt, 9))
        row["decode_tokens_per_second"] = case.batch * (fresh - 1) / (min(whole) - start)
        if case.cache != "dynamic":
            eager = self._generated(case, prompt, fresh, disable_compile=True)
            row["decode_tokens_per_second_eager"] = case.batch * (fresh - 1) / (eager - start)
        return row

    def _generated(self, case: Case, prompt: Tensor, fresh: int, **settings: Any) -> float:
        cache = self._build(case)
        how = {"max_new_tokens": fresh, "min_new_tokens": fresh, "do_sample": False, "pad_token_id": 0, **settings}
        generate: Any = self.model.generate
        mask = torch.ones_like(prompt)
        return self.clock.seconds(
            lambda: generate(prompt, attention_mask=mask, **cache_argument(self.model, cache), **how)
        )

    # means

    def _build(self, case: Case) -> Cache:
        if case.cache in ("dynamic", "static"):
            return DynamicCache(config=self.model.config)
        if case.cache in ("full", "hydragen"):
            return (DenseCache if case.cache == "full" else HydragenCache)(self.model)
        name, size = case.cache.split()
        if name == "shadowkv":
            # the official code's share of outliers
            return ShadowKVCache(self.model, budget=int(size), outlier_chunks=max(2, int(size) // 1024 * 24))
        if name == "gear":
            return GEARCache(self.model, bits=int(size))
        share = float(size.rstrip("%")) / 100
        return H2OCache(self.model, budget=share, allocation="heads" if name == "ragged" else "uniform")

    def _tokens(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, sizes(self.model.config).vocabulary, (1, count), generator=generator).to(self.device)

    def _profile(self, call: Callable[[], Any]) -> dict[str, Any]:
        """What one call launches, kernels one by one and whole CUDA graphs; and what the device spends longest on, by
        kernel: how many launches, and microseconds of all of them."""
        if self.device.type != "cuda":
            return {"launches": {}}
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        events = profile.key_averages()
        calls = {event.key: event.count for event in events}
        kernels = sum(
            calls.get(name, 0)
            for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel")
        )
        on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        on_device.sort(key=lambda event: -event.self_device_time_total)
        return {
            "launches": {"kernels": kernels, "graphs": calls.get("cudaGraphLaunch", 0)},
            "device_microseconds": {
                event.key[:60]: [event.count, round(event.self_device_time_total, 1)] for event in on_device[:12]
            },
        }

    def _peak(self, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def _tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _model(tiny: bool, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if tiny:
        sizes = dict(zip(sizes, (128, 64, 96, 2, 4, 2), strict=True))
    config = LlamaConfig(**sizes, max_position_embeddings=131072, bos_token_id=1, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(cache: Cache) -> int:
    """Bytes on the device."""
    if isinstance(cache, CompressedCache):
        return cache.memory().device_bytes
    layers: list[Any] = cache.layers
    return sum(_size(layer.keys) + _size(layer.values) for layer in layers)


def _read_bytes(cache: Cache) -> int:
    """Bytes on the device that every step reads: of coefficients it reads those of a few chunks."""
    unread = cache.memory().by_component.get("coefficients", 0) if isinstance(cache, ShadowKVCache) else 0
    return _bytes(cache) - unread


def _off_device(cache: Cache) -> dict[str, float]:
    """What a cache that offloads has elsewhere, and what a step moved from there."""
    if not isinstance(cache, ShadowKVCache):
        return {}
    report = cache.memory()
    return {"host_bytes": sum(report.offloaded.values()), "fetched_bytes_per_step": report.fetched_per_forward}


def _forget_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _graphs() -> dict[str, int]:
    """How many graphs were compiled, how often CUDA graphs were given up, and why a graph broke off."""
    return {
        "compiled": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "breaks": sum(counters["graph_break"].values()),
    }
