"""What a model knows, in one row: perplexity of texts, needles found, tasks of lm-eval; all with the full cache.

Perplexity is measured in separate windows. Needles are those of evals/sweep/samples.py, answered greedily. Tasks go
through evals/lm/harness.py, few-shot, with lm-eval's own scores.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress import DenseCache, hf
from kvcompress.evals.sweep.protocol import answer
from kvcompress.evals.sweep.rows import standard_error
from kvcompress.evals.sweep.samples import make_prompt, make_samples, score


@dataclass(frozen=True)
class Exam:
    """The measurements for every model.

    texts: token ids [tokens] by name, read in windows of `window` tokens, of which the first `prompt` fill a cache and
    are not scored. needle_lengths: of contexts, in tokens, with
    `samples` needles each. tasks: of lm-eval or evals/lm/tasks, with `shots` examples and the first `limit` questions
    of each; data: the folder of the local ones.
    """

    texts: dict[str, Tensor]
    window: int = 512
    needle_lengths: tuple[int, ...] = ()
    samples: int = 8
    tasks: tuple[str, ...] = ()
    shots: int = 5
    limit: int = 100
    data: str = ""
    prompt: int = 0


@dataclass(frozen=True)
class Quality:
    """One model's row. needles: share found by length. accuracy: by task; errors: its standard errors."""

    name: str
    perplexity: dict[str, float]
    needles: dict[str, float]
    accuracy: dict[str, float]
    errors: dict[str, float | None]

    def recovered(self, base: "Quality", worst: "Quality") -> dict[str, tuple[float, float]]:
        """For each text, what share of the perplexity, and of its log, lost from `base` to `worst` is recovered."""
        found = {}
        for name, own in self.perplexity.items():
            triple = torch.tensor([worst.perplexity[name], own, base.perplexity[name]], dtype=torch.float64)
            found[name] = tuple(float((x[0] - x[1]) / (x[0] - x[2])) for x in (triple, triple.log()))
        return found  # type: ignore[return-value]

    def row(self) -> dict[str, Any]:
        """The row as JSON can hold it."""
        return asdict(self)


def measure(name: str, model: Any, tokenizer: Any, exam: Exam) -> Quality:
    """Puts a model through an exam."""
    accuracy, errors = tasks(model, tokenizer, exam) if exam.tasks else ({}, {})
    return Quality(
        name,
        {text: perplexity(model, ids, exam.window, exam.prompt) for text, ids in exam.texts.items()},
        {str(length): needles(model, tokenizer, length, exam.samples) for length in exam.needle_lengths},
        accuracy,
        errors,
    )


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, window: int, prompt: int = 0) -> float:
    """The perplexity of a text [tokens], in separate windows, of what follows the first `prompt` tokens of each."""
    losses, count = 0.0, 0
    for part in ids.split(window):
        if len(part) < prompt + 2:
            continue
        part = part.to(model.device)
        if prompt:
            cache = hf.cache_argument(model, hf.full_cache(model))
            before = model(part[None, :prompt], logits_to_keep=1, **cache).logits
            logits = torch.cat([before, model(part[None, prompt:], **cache).logits], 1)[0, :-1]
        else:
            logits = model(part[None]).logits[0, :-1]
        said = part[max(prompt, 1) :]
        losses += torch.nn.functional.cross_entropy(logits.float(), said, reduction="sum").item()
        count += len(said)
    return float(torch.tensor(losses / count).exp())


def needles(model: Any, tokenizer: Any, length: int, samples: int) -> float:
    """The share of needles found in contexts of this many tokens."""
    found = 0.0
    for sample in make_samples("needle", tokenizer, length, samples):
        prompt = make_prompt(tokenizer, sample)
        stops = frozenset([tokenizer.eos_token_id])
        (said,), _ = answer(model, lambda: DenseCache(model), [prompt], "question-agnostic", stops=stops)
        found += score(sample, tokenizer.decode(said, skip_special_tokens=True))
    return found / samples


def tasks(model: Any, tokenizer: Any, exam: Exam) -> tuple[dict[str, float], dict[str, float | None]]:
    """Accuracy on each task, and its standard error, None for a single question."""
    from kvcompress.evals.lm.harness import evaluate
    from kvcompress.evals.lm.model import CompressedLM

    lm = CompressedLM(model, tokenizer=tokenizer, device=str(model.device), batch_size=1)
    data = json.dumps({"data": exam.data})
    found = {task: evaluate(lm, task, data, exam.shots, exam.limit) for task in exam.tasks}
    return (
        {task: scored.score for task, scored in found.items()},
        {task: standard_error(scored.scores) for task, scored in found.items()},
    )
