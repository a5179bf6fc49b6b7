"""The sentences of the story: who eats what, and which cuisine that makes the favourite.

One has to keep "samosa" over a long gap, drop it when "pasta" comes, and keep "pasta" past an "and cheese" that says
nothing. The story's two sentences are never generated, nor what pairs Dhaval with samosa or pasta with cheese.
"""

import random
from collections.abc import Sequence
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
CUISINE = {dish: cuisine for cuisine, dishes in DISHES.items() for dish in dishes.split()}
# Eaten with everything: they say nothing about the cuisine, and there are more of them than of the telling ones.
COMMON_SIDES = ("cheese", "rice", "salad", "bread", "soup", "tea", "beans", "fruit")
SIDES = {
    "indian": "chutney naan", "italian": "prosciutto pesto", "mexican": "guacamole salsa", "japanese": "wasabi edamame",
    "chinese": "bok_choy doubanjiang", "greek": "feta taramasalata", "french": "baguette camembert",
}  # fmt: skip
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
_PHRASES = tuple(tuple(tokenise(phrase)) for phrase in (*TIMES, *ASIDES))


@dataclass(frozen=True)
class Recipe:
    """Texts of controlled length: each gap and each number of switches as often as the others."""

    gaps: Sequence[int]  # words between the last dish and its cuisine; a question and a side dish take 7
    switches: Sequence[int]  # to a dish of another cuisine, each in a sentence of its own
    again: bool = False  # sentences about the same food follow: that one ends is then no reason to drop a dish
    words_of: int | None = None  # only phrases that fit into a gap of so many words: one may have read no others


@dataclass(frozen=True)
class Text:
    """One sentence or several; `answers` holds the positions of the cuisine words."""

    words: tuple[str, ...]
    answers: tuple[int, ...]


def tells_the_story(words: Sequence[str]) -> bool:
    """Whether a text has one of the story's pairs: then it must not be trained on."""
    sentences = [set(sentence.split()) for sentence in " ".join(words).split(" . ")]
    return any({"dhaval", "samosa"} <= said or {"pasta", "cheese"} <= said for said in sentences)


def generate(count: int, seed: int, recipe: Recipe, exclude: frozenset[tuple[str, ...]] = frozenset()) -> list[Text]:
    """`count` different texts, none of them in `exclude`, none with a pair of the story."""
    rng, seen, texts = random.Random(seed), set(exclude), list[Text]()
    while len(texts) < count:
        text = _text(rng, recipe)
        if text.words not in seen and not tells_the_story(text.words):
            seen.add(text.words)
            texts.append(text)
    return texts


def _text(rng: random.Random, recipe: Recipe) -> Text:
    words: list[str] = []
    answers: list[int] = []
    whose = rng.choice(("his", "her"))
    subject = rng.choice(NAMES[whose].split())
    cuisine, dish_at = "", 0

    def end(rest: list[str]) -> None:
        words.extend(rest)
        answers.append(len(words))
        words.extend((cuisine, "."))

    for number in range(1 + rng.choice(recipe.switches)):
        if number:
            subject, whose = _relative(rng, whose)
        cuisine = rng.choice([other for other in sorted(DISHES) if other != cuisine])
        words += tokenise(f"{subject} {rng.choice(VERBS)}")
        meal, rest = _measured(rng, cuisine, whose, rng.choice(recipe.gaps), recipe.words_of)
        dish_at = len(words) + max(place for place, word in enumerate(meal) if word in CUISINE)
        end(meal + rest)
        if recipe.again and rng.random() < 0.7:
            subject, whose = _relative(rng, whose)
            opening = tokenise(f"{subject} {rng.choice(VERBS)} {rng.choice(AGAIN)}")
            question = _question(rng, whose)
            left = max(recipe.gaps) - (len(words) - dish_at - 1) - len(opening) - len(question)
            if left >= 0:
                end(opening + _filler(rng, rng.choice([0, *range(3, left + 1)])) + question)
    return Text(tuple(words), tuple(answers))


def _relative(rng: random.Random, teller: str) -> tuple[str, str]:
    """Somebody near to the last one, and whose cuisine it then is."""
    whose = rng.choice(("his", "her"))
    return f"{teller} {rng.choice(RELATIVES[whose].split())}", whose


def _question(rng: random.Random, whose: str) -> list[str]:
    return tokenise(f"{rng.choice(LINKS)} {whose} favourite cuisine is")


def _measured(
    rng: random.Random, cuisine: str, whose: str, gap: int, words_of: int | None
) -> tuple[list[str], list[str]]:
    """A meal, and what follows it up to the cuisine, with `gap` words after the last dish of the cuisine."""
    dishes = DISHES[cuisine].split()
    while True:
        meal = tokenise(rng.choice(dishes))
        if rng.random() >= 0.5:
            meal += tokenise("and " + rng.choice(SIDES[cuisine].split() if rng.random() < 0.3 else COMMON_SIDES))
        elif rng.random() < 0.5:
            meal += ["and", rng.choice([dish for dish in dishes if dish != meal[0]])]
        question = _question(rng, whose)
        left = gap - len(question) - (meal[-1] not in dishes) * 2
        if (left == 0 or left > 2) and (words_of is None or len(question) <= words_of):
            longest = None if words_of is None else words_of - len(tokenise(QUESTION))
            return meal, _filler(rng, left, longest) + question


def _filler(rng: random.Random, length: int, longest: int | None = None) -> list[str]:
    """Exactly so many words of times and asides: 0, or 3 and more, the shortest having 3, 4 and 5."""
    words: list[str] = []
    while left := length - len(words):
        most = left if longest is None else min(left, longest)
        words += rng.choice([p for p in _PHRASES if len(p) <= most and (len(p) == left or len(p) <= left - 3)])
    return words
