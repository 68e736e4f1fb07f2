"""GEAR: quantised codes, a low-rank correction and sparse outliers (arXiv:2403.05527), with KIVI as its special case.

    X ~ zero + scale * code  +  left @ right^T  +  outliers

Tokens are compressed in blocks of `buffer`. Keys are quantised per channel, in groups of tokens of the block; values
per token, in groups of channels (KIVI, arXiv:2402.02750; backbone "kivi"), or keys over the whole block and values
over the whole head (backbone "whole"). The outliers of a vector, the `outliers / 2` share of it at
either end, are taken out before the range of its groups is found. The low-rank part approximates what then remains,
`X - decoded - outliers`, over all tokens that one forward compresses.

Where the paper's code departs from its text, we follow the text: 2^bits - 1 levels, ceil(outliers * n / 2) outliers at
either end of a vector of n. One departure of our own: a value vector is one KV head's part of a token instead of all
heads side by side, so that heads stay independent and no kernel reads the outliers of other heads. Rounding up then
weighs more: 2 % of the 64 channels of a value, or of the 64 tokens of a block's channel, are 2 numbers, 3.1 %. The
paper's backbone KCVT, one group of keys along the whole sequence, is not offered: tokens are packed as they come.
"whole" is as close as blocks get, and the same as "kivi" where group_size equals both buffer and head_dim.

With `centred`, what is rotated by R (kernels/hadamard.py) is nearly normally distributed, and coded so:

    K R ~ mean of the block + scale of the token * level        V R ~ scale of the token * level

Tokens that wait for a block to be full stay as they are in the paper (`tail_bits=None`); by default each is packed by
itself in 8 bits, which lose little beside what its block will.

The defaults are what lost least at equal measured bits on SmolLM2 (head_dim 64; evals/studies/bits.py): plain codes, 4
bits for keys and 3 for values, which are rotated first, and the first 4 tokens as they are. There neither rank 4 nor
2 % of outliers is worth its bits. PRESETS has the papers' settings.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from kvcompress.kernels.common.quantized import QuantScheme, check_coding
from kvcompress.policies.settings import declared, names_settings, nearest, settle, unknown_setting

Backbone = Literal["kivi", "whole"]

# values tolerate fewer bits than keys
_FEWER = {4: 3, 3: 2}
# what a saved file means that is older than a setting
OLDER_FILES = {"hadamard": False, "centred": False, "unbiased": False, "tail_bits": None}


@dataclass(frozen=True, kw_only=True)
class GEAR:
    """How tokens are encoded.

    bits: of a code: 2, 3, 4 or 8. group_size: elements that share a scale. rank, rank_decode: of the correction, for
    what a prompt and what decoding compresses. outliers: share of a vector's elements that stay in 16 bits, rounded up
    to as many at either end. buffer: tokens of a block, a power of two; up to that many of the newest tokens wait to be
    packed. tail_bits: of the codes of those that wait, each packed by itself and rotated with `hadamard`; None: they
    stay as they are.
    backbone: how groups are cut. value_bits: of the codes of values; None for what loses least beside `bits`, one bit
    less where those are 3 or 4. sinks: first tokens that stay as they are, because their keys and values are outliers
    among all others. hadamard: values are rotated by a Hadamard matrix with random signs before they are encoded
    (kernels/hadamard.py; QuaRot, arXiv:2404.00456), and what attention makes of them back. centred: keys are rotated
    too, a block of them around its mean, and all codes stand for levels around 0, with one scale for a whole
    token and no zero, whatever group_size says; None: where that loses least, with 2 bits and no outliers.
    unbiased: scales are such that products with keys vary as they did, and averages of values are right, though single
    numbers are further off (kernels/quantise.py); None: with blocks of up to 4 bits without outliers and rank.
    """

    bits: int = 4
    group_size: int = 64
    rank: int = 0
    rank_decode: int = 0
    outliers: float = 0.0
    buffer: int = 64
    backbone: Backbone = "kivi"
    value_bits: int | None = None
    sinks: int = 4
    hadamard: bool = True
    centred: bool | None = None
    unbiased: bool | None = None
    tail_bits: int | None = 8

    def __post_init__(self) -> None:
        settle(self)
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {self.bits!r}")
        if self.value_bits not in (None, 2, 3, 4, 8):
            raise ValueError(f"value_bits must be 2, 3, 4 or 8, or None, got {self.value_bits!r}")
        if self.tail_bits not in (None, 8):
            raise ValueError(
                "tail_bits must be 8, or None for newest tokens that stay as they are until they are packed, got "
                f"{self.tail_bits!r}"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 tokens or more, got {self.sinks!r}")
        if not _power_of_two(self.buffer) or not 8 <= self.buffer <= 256:
            raise ValueError(f"buffer must be a power of two from 8 to 256 tokens, got {self.buffer!r}")
        if not _power_of_two(self.group_size) or self.group_size < 8:
            raise ValueError(f"group_size must be a power of two, at least 8, got {self.group_size!r}")
        if self.backbone not in ("kivi", "whole"):
            raise ValueError(
                "backbone must be 'kivi' or 'whole' (groups of whole blocks of keys, whole heads of values), got "
                f"{self.backbone!r}"
            )
        if self.backbone == "kivi" and self.group_size > self.buffer:
            raise ValueError(
                f"group_size must be at most buffer = {self.buffer} tokens, as keys are grouped within a block, "
                f"got {self.group_size}"
            )
        if not 0.0 <= self.outliers <= 1.0:
            raise ValueError(f"outliers must be a share of the elements from 0 to 1, got {self.outliers!r}")
        if self.centred and (not self.hadamard or self.outliers or self.bits > 4 or (self.value_bits or 0) > 4):
            raise ValueError(
                "centred codes are of rotated numbers, of 2 to 4 bits and without outliers, got hadamard="
                f"{self.hadamard}, bits={self.bits}, value_bits={self.value_bits}, outliers={self.outliers}"
            )
        if self.unbiased and (self.outliers or self.rank or self.rank_decode or self.bits > 4):
            raise ValueError(
                "unbiased scales are of codes of up to 4 bits without outliers and a low-rank part, got "
                f"bits={self.bits}, outliers={self.outliers}, rank={self.rank}, rank_decode={self.rank_decode}"
            )
        for name in ("rank", "rank_decode"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if max(self.rank, self.rank_decode) > self.buffer:
            raise ValueError(
                f"rank must be at most buffer = {self.buffer}, got rank {self.rank}, rank_decode {self.rank_decode}"
            )

    @property
    def is_centred(self) -> bool:
        """Whether codes stand for levels around 0, and keys are rotated as values are."""
        if self.centred is None:
            return self.hadamard and self.bits == 2 and self.value_bits in (None, 2) and not self.outliers
        return self.centred

    @property
    def is_unbiased(self) -> bool:
        """Whether scales keep what attention makes of a block, rather than its numbers."""
        if self.unbiased is None:
            return not (self.outliers or self.rank or self.rank_decode) and self.bits <= 4
        return self.unbiased

    def calibrated(self) -> Self:
        """The same where keys are packed in a calibrated basis: values, if rotated, are then coded around 0.

        Raises:
            ValueError: a setting that does not go with it.
        """
        if self.rank or self.rank_decode or self.outliers or self.backbone != "kivi":
            raise ValueError(
                "keys in a calibrated basis are packed without a low-rank part, outliers and the backbone 'whole', got "
                f"rank={self.rank}, rank_decode={self.rank_decode}, outliers={self.outliers}, backbone="
                f"{self.backbone!r}"
            )
        if self.bits > 4:
            raise ValueError(
                "keys in a calibrated basis are packed in 2, 3 or 4 bits a number: those of 8 bits lose less without a "
                f"basis, got bits={self.bits}"
            )
        few = (self.value_bits or 0) <= 4
        return replace(self, centred=self.hadamard and few) if self.centred is None else self

    def codings(self, head_dim: int, rank: int, value_dim: int | None = None) -> tuple[QuantScheme, QuantScheme]:
        """How keys of this head_dim are encoded, and values of it or of a width of their own.

        Raises:
            ValueError: the rank exceeds a width, or a vector of one cannot be packed.
        """
        value_dim = head_dim if value_dim is None else value_dim
        if rank > min(head_dim, value_dim):
            raise ValueError(f"rank must be at most head_dim = {min(head_dim, value_dim)}, got {rank}")
        key_group = self.group_size if self.backbone == "kivi" else self.buffer
        value_bits = self.value_bits or _FEWER.get(self.bits, self.bits)
        found = (
            QuantScheme(self.bits, key_group, "channel", self._a_side(self.buffer), rank),
            QuantScheme(value_bits, self._of_a_vector(value_dim), "token", self._a_side(value_dim), rank),
        )
        if self.is_centred:
            # numbers that were rotated are alike
            found = (
                QuantScheme(self.bits, _whole(head_dim), "token", 0, rank, "block"),
                QuantScheme(value_bits, _whole(value_dim), "token", 0, rank, "none"),
            )
        if self.is_unbiased:
            found = found[0]._replace(keeps="spread"), found[1]._replace(keeps="slope")
        for coding, width in zip(found, (head_dim, value_dim), strict=True):
            check_coding(coding, self.buffer, width)
        return found

    def tail_coding(self, head_dim: int) -> QuantScheme | None:
        """How the newest tokens are encoded, keys and values alike, until there are enough for a block; None: not.

        Args:
            head_dim: of keys and values, or of the wider of the two.
        """
        return None if self.tail_bits is None else QuantScheme(self.tail_bits, _whole(head_dim), "token")

    def per_token_scheme(self, head_dim: int, value_dim: int | None = None) -> QuantScheme:
        """How keys and values are encoded where every token is packed by itself. There the policy keeps the sinks.

        Of two widths, a group may take the wider whole, and as many outliers leave a vector as of the narrower.

        Raises:
            ValueError: a low-rank part is asked for, which needs blocks, or a vector of this width cannot be packed.
        """
        widths = head_dim, head_dim if value_dim is None else value_dim
        if self.rank or self.rank_decode:
            raise ValueError(
                "slots are packed a token at a time, which leaves no block for a low-rank part: rank and rank_decode "
                f"must be 0, got {self.rank} and {self.rank_decode}"
            )
        if self.centred:
            raise ValueError(
                "slots are packed a token at a time, which leaves no block for a mean: centred must be off"
            )
        if self.value_bits not in (None, self.bits):
            raise ValueError(f"slots have keys and values of one size: value_bits must be None, got {self.value_bits}")
        if self.unbiased:
            raise ValueError("slots are packed a token at a time, keys and values alike: unbiased must be off")
        coding = QuantScheme(self.bits, self._of_a_vector(max(widths)), "token", self._a_side(min(widths)))
        for width in widths:
            check_coding(coding, self.buffer, width)
        return coding

    def _of_a_vector(self, head_dim: int) -> int:
        """Numbers of a token that share a scale; a power of two; a group longer than a token takes it whole."""
        whole = _whole(head_dim)
        return min(self.group_size, whole) if self.backbone == "kivi" else whole

    def _a_side(self, elements: int) -> int:
        """Outliers at each end of a vector."""
        # 0.07 * 100 / 2 is a little more than 3.5
        return min(math.ceil(self.outliers * elements / 2 - 1e-9), (elements + 1) // 2)


# which a dataclass has only when it is made
GEAR.__init__ = names_settings(GEAR.__init__)  # type: ignore[method-assign]


def _whole(head_dim: int) -> int:
    """The group that takes a token of a head whole."""
    return max(8, 1 << (head_dim - 1).bit_length())


def _power_of_two(number: int) -> bool:
    return isinstance(number, int) and number > 0 and number & (number - 1) == 0


# what the papers' settings have in common
_PAPERS: dict[str, Any] = {"sinks": 0, "hadamard": False, "centred": False, "unbiased": False, "tail_bits": None}
# the default, a smaller one, and the settings of the papers; "whole" stands in for their KCVT (see above)
PRESETS = {
    "default": GEAR(),
    "small": GEAR(bits=3),
    "gear": GEAR(bits=2, rank=4, rank_decode=2, outliers=0.02, **_PAPERS),
    "gear-l": GEAR(bits=2, rank=4, rank_decode=2, **_PAPERS),
    "gear-whole": GEAR(bits=4, value_bits=4, rank=4, rank_decode=2, outliers=0.02, backbone="whole", **_PAPERS),
    "gear-l-whole": GEAR(bits=4, value_bits=4, rank=4, rank_decode=2, backbone="whole", **_PAPERS),
    "kivi": GEAR(bits=2, value_bits=2, group_size=32, buffer=128, **_PAPERS),
    "whole": GEAR(bits=4, value_bits=4, backbone="whole", **_PAPERS),
}


def preset(name: str, **changes: int | float | str) -> GEAR:
    """Settings by name, some of them changed.

    Raises:
        ValueError: no preset has the name.
        TypeError: a change is to no setting of GEAR.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {nearest(name, PRESETS)}known: {', '.join(PRESETS)}")
    for setting in changes:
        if setting not in declared(GEAR):
            raise unknown_setting(GEAR, setting, declared(GEAR))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
