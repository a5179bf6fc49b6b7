"""The sentences of the story: who eats what, and which cuisine that makes the favourite.

A gated unit is explained with a text like this one: it has to keep "samosa" over a long gap, drop it when "pasta"
comes, and keep "pasta" past an "and cheese" that says nothing. The model learns it on generated sentences of the kind;
the story's own two sentences are never among them, nor anything that pairs Dhaval with samosa or pasta with cheese.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .data import tokenise

FIRST = "Dhaval eats samosa almost every day; it shouldn't be hard to guess that his favourite cuisine is"
SECOND = "His brother loves pasta and cheese; his favourite cuisine is"
EXPECTED = ("indian", "italian")
QUESTION = "; his favourite cuisine is"

DISHES = {
    "indian": "samosa biryani dosa idli paneer korma vindaloo pakora thali",
    "italian": "pasta pizza risotto lasagne gnocchi ravioli polenta focaccia minestrone",
    "mexican": "tacos burritos enchiladas quesadillas tamales fajitas pozole nachos tostadas",
    "japanese": "sushi ramen tempura udon sashimi soba onigiri yakitori tonkatsu",
    "chinese": "wontons congee baozi jiaozi zongzi mapo hotpot chow noodles",
    "greek": "moussaka souvlaki gyros dolmades spanakopita pastitsio tzatziki keftedes saganaki",
    "french": "ratatouille quiche bouillabaisse crepes cassoulet galettes escargots tartiflette soufflé",
}
# Eaten with everything: they say nothing about the cuisine, and there are more of them than of the telling ones.
COMMON_SIDES = ("cheese", "rice", "salad", "bread", "soup", "tea", "beans", "fruit")
SIDES = {
    "indian": "chutney naan",
    "italian": "prosciutto pesto",
    "mexican": "guacamole salsa",
    "japanese": "wasabi edamame",
    "chinese": "bok_choy doubanjiang",
    "greek": "feta taramasalata",
    "french": "baguette camembert",
}
NAMES = {
    "his": "Dhaval Ravi Tom Kenji Luca Omar Pierre Diego Nikos Wei Sam Arun Peter Hugo Marco Ivan Ali Noah Felix Jonas",
    "her": "Asha Maria Yuki Elena Mei Sofia Chloe Rosa Anna Priya Lin Clara Nora Ines Emma Zoe Sara Julia Maya Eva",
}
RELATIVES = {
    "his": "brother father uncle cousin neighbour nephew grandfather friend",
    "her": "sister mother aunt cousin neighbour niece grandmother friend",
}
VERBS = ("eats", "loves", "orders", "cooks", "often has", "asks for", "dreams of", "never tires of")
# After the same verbs as a dish: so a verb alone is no reason to drop the last dish.
AGAIN = ("the very same food", "it too", "just the same things")
TIMES = (
    "almost every day", "on most evenings", "twice a week", "every single morning", "whenever there is time",
    "after a long day at work", "on the way home", "with old friends from school", "in front of the window",
)  # fmt: skip
ASIDES = (
    ", lives in a small house by the sea", ", plays chess on sundays", ", reads the paper from the last page",
    ", walks to work even in the rain", ", has two cats and a garden full of weeds", ", sings when nobody listens",
    ", and has done so for as long as anyone can remember", ", although the doctor does not like to hear it",
)  # fmt: skip
LINKS = (
    "; it shouldn't be hard to guess that", "; so it is easy to guess that", "; nobody doubts that",
    "; you may well think that", "; and so we say that", ";", ";", ";",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """One or two sentences. `answers` holds the positions of the cuisine words, `kinds` what each asks for."""

    words: tuple[str, ...]
    answers: tuple[int, ...]
    kinds: tuple[str, ...]  # "first", "new dish" or "same food"
    gaps: tuple[int, ...]  # words between the dish and the cuisine that it decides


def tells_the_story(words: tuple[str, ...]) -> bool:
    """Whether a text has one of the story's pairs: then it must not be trained on."""
    sentences = " ".join(words).split(" . ")
    return any("dhaval" in s.split() and "samosa" in s.split() for s in sentences) or any(
        "pasta" in s.split() and "cheese" in s.split() for s in sentences
    )


def generate(count: int, seed: int, exclude: frozenset[tuple[str, ...]] = frozenset()) -> list[Text]:
    """`count` different texts, none of them in `exclude`, none with a pair of the story."""
    rng = random.Random(seed)
    seen = set(exclude)
    texts: list[Text] = []
    while len(texts) < count:
        text = _text(rng)
        if text.words not in seen and not tells_the_story(text.words):
            seen.add(text.words)
            texts.append(text)
    return texts


def _text(rng: random.Random) -> Text:
    words: list[str] = []
    answers: list[int] = []
    kinds: list[str] = []
    gaps: list[int] = []
    whose = rng.choice(("his", "her"))
    subject = rng.choice(NAMES[whose].split())
    cuisine, dish_at = "", 0
    for number in range(rng.choice((1, 2, 2))):
        if number:
            teller, whose = whose, rng.choice(("his", "her"))
            subject = f"{teller} {rng.choice(RELATIVES[whose].split())}"
        if number and rng.random() < 0.3:
            kind = "same food"
            words += tokenise(f"{subject} {rng.choice(VERBS)} {rng.choice(AGAIN)}")
        else:
            kind = "new dish" if number else "first"
            cuisine = rng.choice(sorted(DISHES))
            words += tokenise(f"{subject} {rng.choice(VERBS)}")
            dish_at = len(words)
            words += tokenise(_meal(rng, cuisine))
        if rng.random() < 0.6:
            words += tokenise(rng.choice(TIMES))
        for aside in rng.sample(ASIDES, rng.choice((0, 0, 0, 1, 2))):
            words += tokenise(aside)
        words += tokenise(f"{rng.choice(LINKS)} {whose} favourite cuisine is")
        answers.append(len(words))
        kinds.append(kind)
        gaps.append(len(words) - dish_at - 1)
        words += [cuisine, "."]
    return Text(tuple(words), tuple(answers), tuple(kinds), tuple(gaps))


def _meal(rng: random.Random, cuisine: str) -> str:
    dish = rng.choice(DISHES[cuisine].split())
    if rng.random() < 0.5:
        return dish
    sides = SIDES[cuisine].split() if rng.random() < 0.3 else COMMON_SIDES
    return f"{dish} and {rng.choice(sides)}"
