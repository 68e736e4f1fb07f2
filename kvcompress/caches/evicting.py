"""Caches of fixed capacity that keep, per sequence and KV head, the tokens that a policy scores highest.

Every forward ends with an eviction, in prefill and at every decode step: the tokens just fed join the slots, the
policy scores them all, and those over the budget are dropped. Kept tokens stay at their true positions, or, with
`rerotated`, move up (kvcompress/storage/rerotated.py). A forward's attention is exact, and causal, over what was kept
before and everything that it was fed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.allotment import Allotment
from kvcompress.caches.answers import AnsweringLayer
from kvcompress.caches.budget import ALLOCATIONS, COMPETING, Allocation, Budget
from kvcompress.caches.evicting_layer import EvictingLayer, RerotatedLayer
from kvcompress.caches.pins import Pins
from kvcompress.caches.profile import Profile
from kvcompress.caches.reconstruction import RereadLayer, choose, read_again
from kvcompress.hf.tensor_parallel import TPGroup
from kvcompress.layer import CompressedLayer, ordinary_tensors
from kvcompress.policies.gear import GEAR, OLDER_FILES
from kvcompress.policies.h2o import H2O
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.method import import_policies, is_own
from kvcompress.policies.policy import Policy
from kvcompress.policies.second_stage import has_second_stage
from kvcompress.policies.settings import RENAMED
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from kvcompress.storage.classes import class_name, class_named
from kvcompress.storage.rope import Rope

# how layers and heads share a budget
Shared = Allocation | Profile


# which tokens are never evicted
Pinned = Sequence[tuple[int, int]] | Tensor


def kept_budget(amount: int | float, policy: Policy, pinned: int = 0) -> Budget:
    """A budget of tokens kept, at least those that leave the policy a choice beside so many pinned ones."""
    least = policy.least_budget() + pinned
    parts = f"sinks + recent{' + 1 to choose' * policy.chooses}{f' + {pinned} pinned' * (pinned > 0)}"
    return Budget(amount, least, f"{parts} = {least} tokens for {policy}")


class EvictingCache(CompressedCache):
    """Keeps a budget of tokens, which a policy chooses.

        cache = EvictingCache(model, policy=TOVA(), budget=512)
        output = model.generate(**inputs, cache=cache)

    Policies are TOVA, KeyDiff, Knorm, ChunkKV, ExpectedAttention, Random and others in `kvcompress`, or your own.
    """

    serves_chunks = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        policy: Policy,
        budget: int | float,
        allocation: Shared | None = None,
        rerotated: bool = False,
        packed: GEAR | None = None,
        pin: Pinned | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            policy: what to keep.
            budget: tokens kept per sequence and KV head, on average over the layers: a count, or a fraction of the
                real tokens seen so far, which grows with them. Memory is allocated as needed, up to the budget.
            allocation: how layers and heads share the budget, of which each sequence has its own. "uniform": equally.
                "pyramid": early layers get more. "heads": the heads of a layer compete. "global": all heads of all
                layers compete. A Profile: each head its share, whatever the policy. Where heads differ, memory is what
                is kept, not the longest head times all. None: as the policy does where that can be, "global" for KVzip
                and "uniform" for others and for packed slots.
            rerotated: close gaps between the positions of kept tokens, to go past the length the model was trained for.
            packed: store them as codes, each token by itself: `GEAR(bits=4)`, whose rank must be 0; None for unpacked.
            pin: tokens that are never evicted, and count in the budget: spans (first, last) of places in each sequence,
                padding not counted; or a mask [batch, tokens] of the first tokens fed, such as `input_ids == image`. On
                a sliding layer they leave with the window.

        Raises:
            TypeError: the policy is no Policy, or packed is no GEAR.
            ValueError: the budget is too small for the tokens that the policy always keeps, settings cannot be
                combined, the profile is of another model, or the model is unsupported; with `rerotated`, also if the
                model has no rotary embeddings, or some whose frequencies change with the length.
        """
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a kvcompress.policies Policy such as H2O(), got {policy!r}")
        allocation = policy.allocates if allocation is None else allocation
        _check_allocation(allocation, policy, model)
        self.policy = policy
        self._pins = Pins.of(pin)
        self._budget = kept_budget(budget, policy, 0 if self._pins is None else self._pins.most)
        self.allocation: Shared = allocation
        self._allotments = Allotment.of_layers(allocation.shares) if isinstance(allocation, Profile) else None
        self.rerotated = rerotated
        self.packed = packed
        if packed is not None:
            if not isinstance(packed, GEAR):
                raise TypeError(f"packed must be how tokens are encoded, such as GEAR(bits=4), got {packed!r}")
            for head_dim, value_dim in hf.packed_widths(hf.text_config(model)):
                packed.per_token_scheme(head_dim, value_dim)
            if rerotated:
                raise ValueError("rerotated stores keys without rotation, and cannot be combined with packed")
        super().__init__(model)
        if policy.rereads is not None and rerotated:
            raise ValueError(f"rerotated cannot be combined with {type(policy).__name__}, which reads tokens twice")
        if (
            rerotated
            and not any(isinstance(layer, RerotatedLayer) for layer in self.layers)
            and not self._rotates(model)
        ):
            raise ValueError(
                f"rerotated closes gaps between rotary positions, and {type(model).__name__} has none; leave it off, "
                "and stay within the positions the model knows"
            )

    def _rotates(self, model: PreTrainedModel) -> bool:
        """Whether any layer rotates its keys; those with windows need no gaps closed."""
        return any(hf.has_rotary(model, index) for index in self.attending)

    def _check_model(self, model: PreTrainedModel) -> None:
        pool = hf.pool_of(hf.text_config(model))
        if pool is not None:
            raise ValueError(
                f"{type(model).__name__} has indexers that score pools of {pool} neighbouring tokens, which eviction "
                f"takes apart; {type(self).__name__} does not serve it, DenseCache and GEARCache do"
            )
        if self.policy.rereads is not None and hf.is_multimodal(model):
            raise ValueError(
                f"{type(self.policy).__name__} reads the tokens again, and {type(model).__name__} is multimodal: what "
                "it sees is not among its tokens. Use a policy that reads once, such as SnapKV or H2O"
            )

    def _check_latents(self, name: str) -> None:
        policy = type(self.policy).__name__
        cannot = {
            "packed": self.packed is not None,
            "rerotated": self.rerotated,
            f"{policy}, which undoes rotations,": self.policy.uses_rotary,
            f"second_stage of {policy}, which weighs values by what is made of them,": has_second_stage(self.policy),
            f"{policy}, which reads tokens twice,": self.policy.rereads is not None,
        }
        _refuse_first(
            f"{name} has multi-head latent attention, whose latents are both keys and values",
            cannot,
            "it: use H2O, SnapKV or another policy that goes by attention, unpacked",
        )

    def _check_biases(self, name: str) -> None:
        policy = type(self.policy).__name__
        cannot = {
            "rerotated, which closes gaps between rotary positions,": self.rerotated,
            f"{policy}, which undoes rotations,": self.policy.uses_rotary,
            f"{policy}, which reads tokens twice,": self.policy.rereads is not None,
        }
        _refuse_first(
            f"{name} adds biases to its logits that depend on queries and distances",
            cannot,
            "them: use H2O, SnapKV or another policy that goes by attention or by keys",
        )

    def _check_blocks(self, name: str) -> None:
        policy = type(self.policy).__name__
        cannot = {
            "packed": self.packed is not None,
            "rerotated": self.rerotated,
            f"{policy}, which undoes rotations,": self.policy.uses_rotary,
            f"{policy}, which reads tokens twice,": self.policy.rereads is not None,
        }
        _refuse_first(
            f"{name} chooses what tokens attend to by an indexer",
            cannot,
            "it: use H2O, SnapKV or another policy that reads once, unpacked",
        )

    def check_given(self, fed: Tensor | None, attention_mask: Any, position_ids: Any) -> None:
        if self._pins is not None and fed is not None:
            self._pins.check_rows(len(fed))
        super().check_given(fed, attention_mask, position_ids)

    @property
    def budget(self) -> int | float:
        """Tokens kept per sequence and KV head, on average over the layers: a count, or a fraction of those seen."""
        return self._budget.amount

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        budget = self._budget.per_layer(self.layers_share, len(self.attending))[self.attending.index(index)].amount
        rope = None
        model = self._model()
        assert model is not None
        ranks = TPGroup.of(model)
        if self.policy.uses_rotary or (self.rerotated and window is None):
            rope = Rope.of(model, index)
        kind = EvictingLayer
        # not needed where distances never exceed a window, nor in a layer without positions
        if self.rerotated and window is None and rope is not None:
            kind = RerotatedLayer
        elif self.policy.rereads is not None:
            kind = AnsweringLayer if self.policy.rereads.keeps_answers else RereadLayer
        return kind(
            self.padding,
            self.policy,
            budget,
            window,
            is_first=index == self.attending[0],
            rope=rope,
            packed=self.packed,
            ranks=ranks,
            competes=self.allocation in COMPETING,
            allotment=None if self._allotments is None else self._allotments[index].of_rank(ranks),
            output_projection=hf.output_projection(model, index) if has_second_stage(self.policy) else None,
            pins=self._pins,
        )

    def share_among(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """Lets these layers have the budget of all, where the others store nothing, and get no part of it.

        Raises:
            ValueError: a profile gives none of them a share.
        """
        budgets = self._budget.per_layer(self.layers_share, len(layers))
        allotments = None
        if isinstance(self.allocation, Profile):
            shares = [self.allocation.shares[index] for index in layers]
            if not any(map(any, shares)):
                raise ValueError(f"the profile gives layers {layers} no share, and the others store nothing here")
            allotments = Allotment.of_layers(shares)
        for at, index in enumerate(layers):
            layer = self.layers[index]
            assert isinstance(layer, EvictingLayer)
            layer.budget = budgets[at].amount
            layer.allotment = None if allotments is None else allotments[at].of_rank(TPGroup.of(model))

    @property
    def layers_share(self) -> Allocation:
        """How layers share the budget, by name: with a profile all together have it, as where all heads compete."""
        return "global" if isinstance(self.allocation, Profile) else self.allocation

    def forward_begins(self, decoder: Any, input_ids: Tensor | None) -> None:
        is_same = self._filled_by is not None and self._filled_by() is decoder
        super().forward_begins(decoder, input_ids)
        if has_second_stage(self.policy) and not is_same:
            for index, layer in enumerate(self.layers):
                if isinstance(layer, EvictingLayer):
                    layer.output_projection = hf.output_projection(decoder, index)
        if self.policy.rereads is not None and input_ids is None:
            raise ValueError(
                f"{type(self.policy).__name__} reads the tokens again: pass input_ids instead of inputs_embeds"
            )

    @ordinary_tensors()
    def forward_ended(self, decoder: Any, input_ids: Tensor | None) -> None:
        super().forward_ended(decoder, input_ids)
        waiting = [layer for layer in self.layers if isinstance(layer, RereadLayer) and layer.waiting is not None]
        if waiting and input_ids is not None:
            self._read_again(decoder, waiting, input_ids)
            choose(waiting, self.allocation == "global")

    def _read_again(self, decoder: Any, waiting: Sequence[RereadLayer], input_ids: Tensor) -> None:
        """Lets waiting layers note what a second reading of their tokens attends to."""
        how = self.policy.rereads
        assert how is not None
        read_again(decoder, waiting, input_ids, self.padding, int(self.get_seq_length()), how, self.states)

    def _shown(self) -> dict[str, Any]:
        shown = {"policy": self.policy, **super()._shown(), "allocation": self.allocation, "packed": self.packed}
        del shown["packs_answers"]
        if self._pins is not None:
            shown["pin"] = shown["pin"] if self._pins.spans is not None else f"a mask of {self._pins.most} tokens"
        return shown

    def _parts_of_others(self) -> dict[str, Any]:
        return super()._parts_of_others() | {type(self.policy).__name__: self.policy}

    def _settings(self) -> dict[str, Any]:
        name, settings = class_name(type(self.policy)), dataclasses.asdict(self.policy)
        return {
            # settings of others may have any name
            "policy": {"name": name, **settings} if is_own(type(self.policy)) else {"of": name, "settings": settings},
            "budget": self.budget,
            "allocation": self.allocation.facts() if isinstance(self.allocation, Profile) else self.allocation,
            "rerotated": self.rerotated,
            "packed": None if self.packed is None else dataclasses.asdict(self.packed),
            # those of files without it kept no answers in packed slots, whatever the policy says
            "packs_answers": True,
        } | ({} if self._pins is None else {"pin": self._pins.facts()})

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        settings = {RENAMED.get(name, name): value for name, value in settings.items()}
        policy = dict(settings["policy"])
        import_policies()
        kind = class_named(Policy, policy.pop("of" if "of" in policy else "name"))
        chosen = kind(**policy.get("settings", policy))
        packed = None if settings["packed"] is None else GEAR(**OLDER_FILES | settings["packed"])
        if not settings.pop("packs_answers", False) and packed is not None and isinstance(chosen, KVzip):
            chosen = dataclasses.replace(chosen, keeps_answers=False)
        allocation = settings["allocation"]
        if isinstance(allocation, dict):
            # the file is of the model that it was made for
            allocation = Profile(**allocation, model=hf.Fingerprint.of(model))
        pins = Pins.restored(settings.pop("pin", None))
        cache = cls.__new__(cls)
        # the short names take a policy's settings one by one, but the file has the policy itself
        EvictingCache.__init__(
            cache, model, **{**settings, "policy": chosen, "packed": packed, "allocation": allocation, "pin": pins}
        )
        return cache


def _check_allocation(allocation: Shared, policy: Policy, model: PreTrainedModel) -> None:
    """Raises ValueError if heads are to compete where their scores cannot be compared, or have shares that were
    measured for another model."""
    name, asked = type(policy).__name__, f"allocation={allocation!r}"
    if isinstance(allocation, Profile):
        asked = "allocation=Profile"
    elif allocation not in ALLOCATIONS:
        raise ValueError(
            f"allocation must be one of {', '.join(ALLOCATIONS)}, or a Profile such as Profile.load(path), got "
            f"{allocation!r}"
        )
    elif allocation not in COMPETING:
        return
    elif policy.compares == "no" or (allocation == "global" and policy.compares != "layers"):
        among = "heads" if policy.compares == "no" else "layers"
        instead = "uniform' or 'pyramid" if policy.compares == "no" else "heads"
        raise ValueError(
            f"{asked} ranks the tokens of different {among} against one another, and scores of {name} do not compare "
            f"across {among}: use allocation='{instead}'"
        )
    elif allocation == "global" and policy.rereads is None:
        raise ValueError(f"{asked} needs a policy that reads tokens twice, such as KVzip, got {name}: use 'heads'")
    if isinstance(allocation, Profile):
        allocation.check(model)


class H2OCache(EvictingCache):
    """Keeps heavy hitters and recent tokens (arXiv:2306.14048).

        model, tokenizer = kvcompress.load_model()
        inputs = tokenizer("Why is the sky blue?", return_tensors="pt")
        cache = kvcompress.H2OCache(model, budget=512)
        output = model.generate(**inputs, cache=cache)

    Half of the budget goes to the newest tokens, unless `recent` says otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        recent: int | float = 0.5,
        sinks: int = 0,
        second_stage: float = 0.0,
        allocation: Shared | None = None,
        rerotated: bool = False,
        packed: GEAR | None = None,
        pin: Pinned | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            recent: newest tokens always kept: a count, or a fraction of the budget.
            sinks: first tokens always kept.
            second_stage: share of a head's budget that goes to tokens which change the layer's output most, 0.5 in
                CriticalKV (arXiv:2502.03805).
            allocation, rerotated, packed, pin: as in EvictingCache.
        """
        policy = H2O(recent=recent, sinks=sinks, second_stage=second_stage)
        super().__init__(
            model, policy=policy, budget=budget, allocation=allocation, rerotated=rerotated, packed=packed, pin=pin
        )


class SnapKVCache(EvictingCache):
    """Keeps what the last queries attend to (arXiv:2404.14469).

        cache = SnapKVCache(model, budget=512)
        output = model.generate(**inputs, cache=cache)

    The last `window` tokens are observed, and kept themselves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        window: int = 32,
        kernel: int = 5,
        second_stage: float = 0.0,
        allocation: Shared | None = None,
        rerotated: bool = False,
        packed: GEAR | None = None,
        pin: Pinned | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            window: queries observed, and newest tokens always kept.
            kernel: neighbouring tokens pooled together, an odd number.
            second_stage: as in H2OCache.
            allocation, rerotated, packed, pin: as in EvictingCache.
        """
        policy = SnapKV(window=window, recent=window, kernel=kernel, second_stage=second_stage)
        super().__init__(
            model, policy=policy, budget=budget, allocation=allocation, rerotated=rerotated, packed=packed, pin=pin
        )


class KVzipCache(EvictingCache):
    """Keeps what the model needs to repeat the context, for questions that nobody has asked yet (arXiv:2505.23416).

        cache = KVzipCache(model, budget=512)
        output = model.generate(**inputs, cache=cache)

    Every forward of several tokens is followed by a second one over the same tokens. Until that ends, all of them are
    held.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        sinks: int = 4,
        recent: int | float = 1,
        chunk: int = 2048,
        prompt: Sequence[int] = (),
        keeps_answers: bool = True,
        second_stage: float = 0.0,
        allocation: Shared | None = None,
        rerotated: bool = False,
        packed: GEAR | None = None,
        pin: Pinned | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with; it must be given input_ids.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            sinks: first tokens always kept.
            recent: newest tokens always kept: a count, or a fraction of the budget.
            chunk: how many tokens are read again at a time.
            prompt: token ids read before each chunk; the paper's "Repeat the previous context exactly."
            keeps_answers: tokens fed one at a time stay, on top of the budget, until several are fed again, and compete
                then. False: they compete at once.
            second_stage: as in H2OCache.
            allocation: None for the paper's, "global".
            packed, pin: as in EvictingCache. rerotated: refused, as tokens are read twice.
        """
        policy = KVzip(
            sinks=sinks,
            recent=recent,
            chunk=chunk,
            prompt=tuple(prompt),
            keeps_answers=keeps_answers,
            second_stage=second_stage,
        )
        super().__init__(
            model, policy=policy, budget=budget, allocation=allocation, rerotated=rerotated, packed=packed, pin=pin
        )


class StreamingLLMCache(EvictingCache):
    """Keeps the first tokens and the newest (arXiv:2309.17453).

        cache = StreamingLLMCache(model, budget=512, rerotated=True)
        output = model.generate(**inputs, cache=cache)

    The paper counts positions within the cache, as `rerotated=True` does; without it tokens keep their true positions,
    which works up to the length that the model was trained for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float,
        sinks: int = 4,
        allocation: Shared | None = None,
        rerotated: bool = False,
        packed: GEAR | None = None,
        pin: Pinned | None = None,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens kept per sequence and KV head: a count, or a fraction of those seen so far.
            sinks: first tokens kept; the rest of the budget is the window.
            allocation, rerotated, packed, pin: as in EvictingCache.
        """
        policy = StreamingLLM(sinks=sinks)
        super().__init__(
            model, policy=policy, budget=budget, allocation=allocation, rerotated=rerotated, packed=packed, pin=pin
        )


def _refuse_first(model: str, cannot: dict[str, bool], them: str) -> None:
    """Raises ValueError for the first setting that holds and cannot be combined with what a model has."""
    wrong = next((what for what, holds in cannot.items() if holds), None)
    if wrong is not None:
        raise ValueError(f"{model}; {wrong} cannot be combined with {them}")
