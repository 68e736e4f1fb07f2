"""A model file for lighteval: its tasks through a compressed cache, as lm-eval's go through `CompressedLM`.

    lighteval custom pretrained=org/name,cache=h2o,budget=0.2 FILE "gsm8k|5"

FILE is this file; what lighteval calls the model's name are the arguments of `CompressedLM`.
"""

from collections.abc import Sequence
from typing import Any

from lighteval.models.abstract_model import LightevalModel
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.utils.cache_management import SampleCache, cached
from lm_eval.api.instance import Instance

from kvcompress.evals.lm.model import CompressedLM


class CompressedModel(LightevalModel):
    """lighteval's model, all of whose answers come through a kvcompress cache.

    Contexts are compressed before the part held back is read. Prompts are in the tokenizer's chat template, if it has
    one. What the cache held on average is printed at the end.
    """

    def __init__(self, config: Any) -> None:
        """
        Args:
            config: lighteval's CustomModelConfig, whose `model_name` has the arguments of `CompressedLM`, as lm-eval's
                `--model_args`.

        Raises:
            ValueError: an argument that `CompressedLM` refuses.
        """
        self.config = config
        self._lm = CompressedLM.create_from_arg_string(config.model_name, {})
        has_template = self.tokenizer.chat_template is not None
        self._prompts = PromptManager(has_template, self.tokenizer, config.system_prompt)
        self._cache = SampleCache(config)

    @property
    def tokenizer(self) -> Any:
        return self._lm.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return bool(self._lm.add_bos_token)

    @property
    def max_length(self) -> int:
        return int(self._lm.max_length)

    @cached(SamplingMethod.GENERATIVE)
    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """ValueError if several answers of a document are asked for: greedy ones are all the same."""
        many = next((doc for doc in docs if doc.num_samples != 1), None)
        if many is not None:
            raise ValueError(f"{many.task_name} asks for {many.num_samples} samples of a document, greedy is one")
        prompts = [self._prompts.prepare_prompt(doc) for doc in docs]
        options: list[dict[str, Any]] = []
        for doc in docs:
            options.append({"until": list(doc.stop_sequences or []), "do_sample": False})
            if doc.generation_size is not None:
                options[-1]["max_gen_toks"] = doc.generation_size
        asked = _requests("generate_until", docs, zip(prompts, options, strict=True))
        texts = self._lm.generate_until(asked, disable_tqdm=self.disable_tqdm)
        return [
            ModelResponse(
                input=prompt, input_tokens=self._tokens(prompt), text=[text], output_tokens=[self._tokens(text)]
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    @cached(SamplingMethod.LOGPROBS)
    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        prompts = [self._prompts.prepare_prompt(doc) for doc in docs]
        pairs = [(doc, (prompt, choice)) for doc, prompt in zip(docs, prompts, strict=True) for choice in doc.choices]
        asked = _requests("loglikelihood", [doc for doc, _ in pairs], (pair for _, pair in pairs))
        scores = iter(self._lm.loglikelihood(asked, disable_tqdm=self.disable_tqdm))
        found = []
        for doc, prompt in zip(docs, prompts, strict=True):
            own = [next(scores) for _ in doc.choices]
            found.append(
                ModelResponse(
                    input=prompt,
                    input_tokens=self._tokens(prompt),
                    output_tokens=[self._tokens(choice) for choice in doc.choices],
                    logprobs=[score for score, _ in own],
                    argmax_logits_eq_gold=[greedy for _, greedy in own],
                )
            )
        return found

    @cached(SamplingMethod.PERPLEXITY)
    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        asked = _requests("loglikelihood_rolling", docs, ((doc.query,) for doc in docs))
        scores = self._lm.loglikelihood_rolling(asked, disable_tqdm=self.disable_tqdm)
        return [
            ModelResponse(input=doc.query, input_tokens=self._tokens(doc.query), logprobs=[score])
            for doc, score in zip(docs, scores, strict=True)
        ]

    def cleanup(self) -> None:
        """Called by lighteval at the end: prints what the cache held."""
        held = self._lm.held()
        if held:
            print(
                f"{self._lm.cache}: {held['tokens_kept']:.1f} of {held['tokens_seen']:.1f} tokens kept, "
                f"{held['bytes_held'] / 2**20:.3g} MiB, {held['ratio']:.1%} of the full cache, on average over "
                f"{held['contexts']} contexts"
            )
        else:
            print(f"{self._lm.cache}: nothing was compressed: all answers were in lighteval's own cache of them")

    def _tokens(self, text: str) -> list[int]:
        return list(self._lm.tok_encode(text))


def _requests(kind: str, docs: Sequence[Doc], arguments: Any) -> list[Instance]:
    return [
        Instance(kind, {}, tuple(words), 0, (doc.task_name, doc.id, 1))
        for doc, words in zip(docs, arguments, strict=True)
    ]
