"""How much queries care for chunks of the cache, by their landmarks (ShadowKV, arXiv:2410.21465, algorithm 2).

    probability[query, head, c] = softmax over the open chunks c of logit(query, landmark[c])
    score[kv_head, c] = max over the heads of the group of ( sum over queries of probability )

A chunk that is not open (an outlier, which is read anyway, or a place no chunk has taken) takes no part and scores
-inf.
"""

import torch
from torch import Tensor


def chunk_scores_reference(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
    group: str,
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads, chunks = landmarks.shape[1:3]
    rows = query.reshape(batch, kv_heads, -1, head_dim).to(landmarks.dtype)
    logits = (rows @ landmarks.mT).float().mul_(scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    closed = ~is_open[:, :, None]
    shares = logits.masked_fill_(closed, -1e30).softmax(-1).view(batch, kv_heads, heads // kv_heads, queries, chunks)
    if visible is not None:
        shares = shares * visible[:, None, None, :, None]
    shares = shares.sum(3)
    scores = shares.amax(2) if group == "max" else shares.mean(2) if group == "mean" else shares.sum(2)
    return scores.masked_fill(~is_open, -torch.inf)


def chunk_scores(query, landmarks, is_open, visible, *, scale, softcap=None, group="max"):
    return chunk_scores_reference(query, landmarks, is_open, visible, scale, softcap, group)
