"""The registry of transformers' pipelines."""

from typing import Any


def register_pipeline(task: str, kind: type[Any], model_kind: type[Any]) -> None:
    """Makes `transformers.pipeline(task)` build a pipeline of this kind, whose model it loads by `model_kind`."""
    # takes as long to import as all else
    from transformers.pipelines import PIPELINE_REGISTRY

    PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=kind, pt_model=model_kind)
