"""A transformers pipeline that answers questions about a text through a cache. Importing this module registers it:

    import kvcompress.pipelines
    from transformers import pipeline

    pipe = pipeline("kvcompress-text-generation", model="org/name")
    pipe(report, questions=["Who wrote it?", "When?"], cache="kvzip", budget=0.3)["answers"]

Its arguments are those of the pipeline of NVIDIA's kvpress, with `cache` in the place of `press`.
"""

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline

from kvcompress import hf
from kvcompress.asking import ask
from kvcompress.cache import CompressedCache

TASK = "kvcompress-text-generation"


class TextGenerationPipeline(Pipeline):
    """Answers one question about a context, or several, each independently; see `kvcompress.ask`."""

    # read by transformers' `pipeline`: what to load beside the model
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = True

    def __call__(self, context: str | Sequence[str], **settings: Any) -> Any:  # type: ignore[override]
        """
        Args:
            context: a text, or a list of texts, each of which is asked the same.
            question: about it; or `questions`, several.
            cache: a method, such as "kvzip:bits=4" ("none" if not given: the full cache), or an empty kvcompress cache,
                which takes one context.
            budget: with a method, tokens kept per sequence and KV head, or a fraction of those seen.
            max_new_tokens: of each answer, 50 if not given.
            max_context_length: in tokens; what is longer is cut at the end, with a warning. Not given: no limit.
            answer_prefix, prefill_chunk_size: as `ask` takes them.
            enable_thinking: told to the chat template, False if not given.

        Returns:
            {"answer": ...} for `question`, {"answers": [...]} for `questions`; of a list of contexts, one for each.

        Raises:
            ValueError: as `ask`, and if there is not either a question or questions.
            TypeError: a setting that it does not take.
        """
        return super().__call__(list(context) if isinstance(context, tuple) else context, **settings)

    def _sanitize_parameters(
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        enable_thinking: bool | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = ("cache", "budget", "max_new_tokens", "max_context_length", "answer_prefix", "prefill_chunk_size")
        for name in settings:
            if name not in known:
                instead = "; give a cache in its place" if name == "press" else ""
                raise TypeError(
                    f"the pipeline {TASK} does not take {name!r}{instead}; it takes question, questions, "
                    f"enable_thinking, {', '.join(known)}"
                )
        if question is not None and questions is not None:
            raise ValueError(f"give question or questions, not both; got {question!r} and {questions!r}")
        of_forward = {name: value for name, value in settings.items() if value is not None}
        if enable_thinking is not None:
            of_forward["template_options"] = {"enable_thinking": enable_thinking}
        if question is not None or questions is not None:
            of_forward["questions"] = question if questions is None else list(questions)
        return {}, of_forward, {}

    def preprocess(self, context: str, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"context": context}

    def _forward(  # type: ignore[override]
        self,
        inputs: dict[str, Any],
        questions: str | list[str] | None = None,
        cache: CompressedCache | str = "none",
        **settings: Any,
    ) -> dict[str, Any]:
        if questions is None:
            raise ValueError(f"the pipeline {TASK} needs a question, or a list of questions; got neither")
        settings = {"max_new_tokens": 50, "template_options": {"enable_thinking": False}, **settings}
        found = ask(self.model, self.tokenizer, inputs["context"], questions, cache, **settings)
        return {"answer": found.answers[0]} if isinstance(questions, str) else {"answers": found.answers}

    def postprocess(self, found: dict[str, Any], **_: Any) -> dict[str, Any]:  # type: ignore[override]
        return found


hf.register_pipeline(TASK, TextGenerationPipeline, AutoModelForCausalLM)
