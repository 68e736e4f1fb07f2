"""Nodes made from other caches: attention of several rows to what another layer holds of one sequence."""

from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import merge_states
from kvcompress.kernels.prefix import bounded_attention
from kvcompress.layer import CompressedLayer
from kvcompress.storage.segment import Segment
from kvcompress.storage.tail import TailSegment


def segments_of(layer: CompressedLayer) -> list[Segment]:
    """What a layer attends to: its segments that hold something, or those of the layer whose storage it shares."""
    layer = getattr(layer, "kv_source", layer)
    return [one for one in layer.segments() if not isinstance(one, TailSegment) or any(one.held)]


def is_fetched(segments: list[Segment]) -> bool:
    """Whether reading them moves something to the device."""
    return any(tensors for one in segments for _, tensors in one.offloaded().values())


def attend_segments(
    segments: list[Segment], query: Tensor, at: Tensor, spec: LogitSpec, tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of queries [rows, heads, queries, head_dim], at positions [rows, queries], to segments of one row.

    Args:
        tokens: how many the segments stand for, where queries may lie among them; None: all precede every query.
    """
    # all queries as those of one row
    together = query.transpose(0, 1).flatten(1, 2)[None].contiguous()
    out, lse = _merged([segment.attend(together, at.reshape(1, -1), spec) for segment in segments])
    apart = (query.shape[0], query.shape[2])
    out, lse = (part[0].unflatten(1, apart).transpose(0, 1).contiguous() for part in (out, lse))
    if tokens is not None:
        within = (at < tokens - 1).any(-1)
        if bool(within.any()):
            answers = []
            for segment in segments:
                of_tokens = segment.bias
                bias = None if of_tokens is None else of_tokens[0]
                for keys, values, places in segment.pieces():
                    places = places[0].expand(keys.shape[1:3])
                    answers.append(bounded_attention(query[within], keys[0], values[0], places, at[within], spec, bias))
            out[within], lse[within] = _merged(answers)
    return out, lse


def _merged(answers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return answers[0] if len(answers) == 1 else merge_states(*map(list, zip(*answers, strict=True)))
