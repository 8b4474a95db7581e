# SPDX-License-Identifier: Apache-2.0
"""Words for keys, and made-up sentences that use none of them."""

import random

__all__ = ["CLASSES", "WORDS", "sentence"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(";"))


WORDS = _words(
    """
    water house light music paper stone river field horse chair glass metal plant bread sugar
    cloud storm beach ocean tower bridge road train ship plane engine wheel clock phone book
    story letter picture color garden flower tree forest bird fish dog cat mouse lion bear wolf
    snake doctor teacher farmer king queen school hospital market bank church office factory
    museum station city town village island mountain valley desert lake winter summer spring
    dinner lunch coffee milk fruit apple orange meat rice oil salt fire smoke gold silver iron
    copper coal wood cotton silk leather shirt shoe coat hat ring coin card game ball film
    camera radio computer machine tool knife gun sword shield window mirror spider guitar bottle
    candle castle pocket lemon anchor magnet ladder basket
    """
)

CLASSES = {
    "animals": _words(
        """
        dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse deer monkey
        elephant camel donkey eagle owl duck goose chicken snake frog shark whale
        """
    ),
    "food": _words(
        """
        bread rice pasta soup cheese butter egg meat apple banana orange lemon grape peach
        potato carrot onion tomato cake cookie honey sugar salt pizza salad sausage yogurt
        pear
        """
    ),
    "clothes": _words(
        """
        shirt coat hat shoe sock glove scarf jacket dress skirt belt boot sweater pants suit
        tie vest robe cap sandal apron blouse jeans hoodie uniform shorts stocking cardigan
        """
    ),
    "places": _words(
        """
        school hospital bank church museum library station airport factory market theater
        restaurant hotel prison farm castle temple stadium garage bakery pharmacy office
        harbor cinema college zoo park cafe
        """
    ),
}
"""Everyday words of four kinds, 28 each."""

_ADJECTIVES = _words(
    """
    old quiet young small bright slow tired clever gentle lonely careful busy famous nervous
    patient
    """
)
_PEOPLE = _words(
    """
    man woman traveler neighbor captain student visitor baker painter guard driver nurse clerk
    singer lawyer
    """
)
_MOVES = _words(
    """
    walked ran looked came moved returned hurried wandered drove sailed
    """
)
_WAYS = _words(
    """
    toward past near behind along around across
    """
)
_SPOTS = _phrases(
    """
    the square; the hill; the shore; the hall; the yard; the corner; the gate; the path; the
    fence; the roof; the kitchen; the stairs
    """
)
_MANNERS = _phrases(
    """
    after the rain; before sunrise; without a word; late at night; with a smile; for the first
    time; as usual; in a hurry; once again; on Monday; by accident; in silence
    """
)
_ENDS = _phrases(
    """
    and thought of home; and did not look back; but nobody noticed; and everyone laughed; while
    others waited; because it was cold; and asked for help; and fell asleep; but forgot why
    """
)


def sentence(rng: random.Random) -> str:
    """Somebody went somewhere."""
    words = [
        rng.choice(("The", "A", "One", "Every", "That")),
        *(rng.choice(x) for x in (_ADJECTIVES, _PEOPLE, _MOVES, _WAYS, _SPOTS, _MANNERS)),
    ]
    if rng.random() < 0.5:
        words.append(rng.choice(_ENDS))
    return " ".join(words) + "."
