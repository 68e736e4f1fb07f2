"""Words for made-up texts, in lists of our own: names of an adjective and a noun, sentences, and words of syllables.

RULER draws its words from the package wonderwords, which we do without.
"""

import uuid
from collections.abc import Iterator
from random import Random

WORDS, NUMBERS, UUIDS = "word", "number", "uuid"

_CONSONANTS, _VOWELS, _ENDS = "bdfgklmnprstvz", "aeiou", "dklmnprstx"


def names() -> list[str]:
    """Every name of an adjective and a noun."""
    return [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]


def fresh(kind: str, random: Random) -> Iterator[str]:
    """Words, numbers of seven digits or UUIDs at random, none of them twice.

    Words are all names; then, for the longest texts, names of two adjectives.
    """
    if kind == WORDS:
        known = names()
        yield from random.sample(known, len(known))
    made: set[str] = set()
    while True:
        if kind == WORDS:
            one = f"{'-'.join(random.sample(_ADJECTIVES, 2))}-{random.choice(_NOUNS)}"
        else:
            one = str(random.randrange(10**6, 10**7)) if kind == NUMBERS else _uuid(random)
        if one not in made:
            made.add(one)
            yield one


def syllables(random: Random) -> Iterator[str]:
    """Made-up words of two syllables and five letters, such as "tidon", none of them twice.

    Raises:
        ValueError: all have been drawn.
    """
    parts = (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _ENDS)
    count = 1
    for letters in parts:
        count *= len(letters)
    made: set[str] = set()
    while len(made) < count:
        word = "".join(random.choice(letters) for letters in parts)
        if word not in made:
            made.add(word)
            yield word
    raise ValueError(f"there are {count} words of two syllables, too few for this length")


def sentence(random: Random) -> str:
    """A made-up sentence."""
    return " ".join(random.choice(part) for part in _GRAMMAR) + "."


def _uuid(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


_ADJECTIVES, _NOUNS = (
    words.split()
    for words in (
        "amber ancient bitter bold brave bright calm clever cold crimson curious dark distant dusty eager early fancy "
        "fierce gentle golden grand green happy hidden hollow humble icy jolly lively lonely lucky mellow misty noble "
        "odd pale plain proud quick quiet rapid rough round rusty secret shiny silent silver simple slow small smooth "
        "soft solid sour steady strange strong sunny sweet swift tall tender tiny vivid warm wild wise wooden young",
        "anchor apple arrow badge basket beacon bell blanket bottle branch bridge brush bucket cabin candle carpet "
        "castle chain chair cherry circle clock cloud coin comet copper crown desert diamond dragon drum eagle engine "
        "falcon feather fiddle forest fountain garden glacier hammer harbor helmet island jacket kettle ladder lantern "
        "lemon letter lion marble meadow mirror mountain needle ocean orchard otter paddle pebble pencil piano pillow "
        "planet pocket puzzle rabbit ribbon river rocket saddle shadow spider spoon stone sword temple thunder tiger "
        "tower train tunnel turtle valley violin wagon whistle willow window winter",
    )
)
_GRAMMAR = tuple(
    part.split("|")
    for part in (
        "The old fisherman|A young teacher|My neighbour|The tired baker|One of the students|The village doctor|"
        "A travelling musician|The night watchman|Her younger brother|The retired sailor|A visiting scientist",
        "carried|repaired|painted|described|sold|borrowed|cleaned|forgot about|looked for|admired|wrapped up",
        "a wooden boat|the broken radio|an unusual map|two heavy baskets|the blue bicycle|a collection of stamps|"
        "the kitchen table|an old photograph|the garden fence|a pair of boots|the family recipe|a small telescope",
        "near the harbour|behind the church|in the crowded market|at the edge of the forest|on the train to the coast|"
        "beside the river|in front of the library|across the valley|under the stone bridge|at the end of the road",
        "before the storm came|while the children slept|on the first day of spring|after a long discussion|"
        "without telling anybody|as the bells began to ring|although nobody had asked|because the winter was near|"
        "during the summer festival|just before midnight",
    )
)
