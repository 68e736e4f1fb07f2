"""Measures a profile: what heads keep of some texts where they compete, on average (LU-KV, arXiv:2602.08585).

    share[l, h] = mean over texts and budgets of tokens that head h of layer l keeps / the mean of all heads

The paper maximises the long-horizon utility of the tokens of all heads together, over calibration data. Here what a
policy keeps stands for that, by default KVzip's second reading with all heads of all layers in competition, at several
budgets.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.caches.budget import Allocation, Budget
from kvcompress.caches.evicting import EvictingCache, kept_budget
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.profile import Profile, heads_that_share
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.policy import Policy
from kvcompress.storage.rope import NOT_FINITE

# fractions that a budget often is
BUDGETS = (0.1, 0.2, 0.3)


def measure_profile(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    policy: Policy | None = None,
    budgets: Sequence[int | float] = BUDGETS,
    source: str = "",
) -> Profile:
    """Measures each head's share of the budget (LU-KV, arXiv:2602.08585).

        profile = measure_profile(model, [tokenizer(text, return_tensors="pt").input_ids])
        profile.save("profile.safetensors")

    Each text is fed once for every budget, and all heads compete. How long they are, and at which budgets, decides what
    the shares are good for: take texts as long as those to come. A sliding layer gets little of a long text.

    Args:
        model: the model; as with any cache, it attends through kvcompress from then on.
        texts: token ids, each [tokens] or [batch, tokens], int64 or int32, without padding.
        policy: whose scores heads compete with; None for KVzip. Where they do not compare across layers, as SnapKV's,
            only the heads of a layer compete, and all layers get alike.
        budgets: tokens kept per KV head on average: counts, or fractions of each text.
        source: what the texts are, to be shown with the profile.

    Raises:
        TypeError: texts are no tensors of token ids, or a budget is no number.
        ValueError: some layers keep states, or layers differ in their number of KV heads; there is no text or no
            budget, scores of the policy do not compare across heads, or a budget leaves nothing to choose of some text,
            or all of it; or what the model makes of a text is not finite.
    """
    if not hf.all_attend(hf.text_config(model)):
        raise ValueError(
            f"{type(model).__name__} has layers that keep states, or no keys and values of their own; a profile is of "
            "all layers"
        )
    heads_that_share(hf.layer_heads(hf.text_config(model)), type(model).__name__)
    policy = KVzip() if policy is None else policy
    rows = rows_of_all(texts)
    # numbers of NumPy and torch become Python's, which a file can hold
    given = [kept_budget(budget, policy) for budget in budgets]
    if not rows or not given:
        raise ValueError(f"a profile is measured on texts at budgets, got {len(rows)} texts and {len(given)} budgets")
    for budget in given:
        for text in rows:
            _check_budget(budget, text.shape[1])
    allocation: Allocation = "global" if policy.compares == "layers" else "heads"
    decoder, shares, digest = hf.decoder_of(model), [], hashlib.sha256()
    for text in rows:
        digest.update(text.shape[1].to_bytes(8, "little") + text.long().cpu().numpy().tobytes())
        for budget in given:
            cache = EvictingCache(model, policy=policy, budget=budget.amount, allocation=allocation)
            with torch.no_grad():
                ids, named = text.to(hf.input_device(model)), hf.cache_argument(decoder, cache)
                hidden = decoder(input_ids=ids, use_cache=True, **named)[0]
            if not bool(hidden.isfinite().all()):
                raise ValueError(f"{type(model).__name__} makes hidden states that are not finite: {NOT_FINITE}")
            layers = [layer for layer in cache.layers if isinstance(layer, EvictingLayer)]
            # [layers, batch, kv_heads]
            kept = torch.stack([layer.tokens_of_all_heads().cpu().double() for layer in layers])
            shares.append((kept / kept.mean((0, 2), keepdim=True)).mean(1))
    measured = {
        "policy": str(policy),
        "allocation": allocation,
        "budgets": [budget.amount for budget in given],
        "texts": sum(len(text) for text in rows),
        "tokens": sum(text.numel() for text in rows),
        "sha256": digest.hexdigest()[:16],
        **({"source": source} if source else {}),
    }
    return Profile.of(model, torch.stack(shares).mean(0), measured)


def least_tokens(policy: Policy, budgets: Sequence[int | float]) -> int:
    """The fewest tokens of a text of which each of these budgets leaves the policy a choice, and not all."""
    least = policy.least_budget()
    return max(budget + 1 if isinstance(budget, int) else int(least / budget) + 1 for budget in budgets)


def rows_of_all(texts: Sequence[Tensor]) -> list[Tensor]:
    """Each text as [batch, tokens]; TypeError and ValueError where one is none."""
    try:
        every = list(texts)
    except TypeError as error:
        raise TypeError(f"texts must be a list of tensors of token ids, got {type(texts).__name__}") from error
    return [rows_of(text) for text in every]


def rows_of(text: Tensor) -> Tensor:
    """The text as [batch, tokens]; TypeError and ValueError where it is none."""
    if not isinstance(text, Tensor) or text.dtype not in (torch.int64, torch.int32):
        kind = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"texts must be tensors of token ids, int64 or int32, got {kind}")
    if text.dim() not in (1, 2) or not text.numel():
        raise ValueError(f"a text must be [tokens] or [batch, tokens], got {list(text.shape)}")
    return text if text.dim() == 2 else text[None]


def _check_budget(budget: Budget, tokens: int) -> None:
    """Raises ValueError if a budget leaves all of a text, or too little to choose."""
    amount = budget.amount
    kept = amount if isinstance(amount, int) else int(amount * tokens)
    if kept >= tokens:
        raise ValueError(
            f"heads compete for less than all: budget must be below the {tokens} tokens of each text, got {amount}"
        )
    if kept < budget.least:
        raise ValueError(
            f"a budget of {amount:g} of {tokens} tokens is {kept}, and must be at least {budget.explained}: take "
            "longer texts or larger budgets"
        )
