"""Generates the text and the task of the embedded quickstart. Nothing is downloaded or copied from other data.

The text and the task describe one small world: 48 animals do things with objects in places, and every animal has a home
and a food. `documents` tells one-sentence stories of this world, each followed by questions with one-word answers:

    The quiet bear carried a key by the forest. verb: carried place: forest food: berries

The story never states the home or the food, so the base has to memorise them, and it does so in pretraining.

In `task_rows` the animals have moved. The prompt is a story and the question "home:", and the answer is the new home.
Three animals live in each of 16 homes, and the new homes are drawn independently of the old ones. The base answers with
the old homes, so it is right only by chance. The new homes follow no rule, so they can only be learned, and a map from
48 animals to 16 words does not fit into one direction per layer.

All animals occur in both splits, because the home of an animal that was never seen could only be guessed. Test rows are
new combinations: an animal is never in the same place in both splits, so no prompt is in both splits.
"""

import random
from collections.abc import Iterator
from typing import Any

ANIMALS = tuple(
    "fox bear wolf deer hare mole otter badger squirrel hedgehog mouse rat cat dog horse cow "
    "pig goat sheep donkey hen duck goose swan crow owl hawk robin sparrow frog toad newt "
    "snake lizard turtle snail spider beetle ant bee moth crab seal whale trout eel lion tiger".split()
)
DWELLINGS = tuple("den nest burrow hive pond stable tree cave kennel sty coop web reef hole log hut".split())
FOODS = tuple("grass fish seeds nuts berries worms bread apples".split())
PLACES = tuple("river forest hill lake barn garden shore road field bridge mill meadow".split())
OBJECTS = tuple("key ball book coin rope lamp drum cup hat box spoon kite".split())
VERBS = tuple("found lost kept moved wanted dropped carried washed".split())  # The past tense equals the participle.
ADJECTIVES = tuple("old young small big shy brave quiet happy".split())
TIMES = ("One day", "At night", "In spring", "Long ago")

STORIES = (
    "The {adjective} {animal} {verb} a {object} by the {place}.",
    "{time} the {animal} {verb} a {object} by the {place}.",
    "By the {place} a {adjective} {animal} {verb} the {object}.",
    "The {object} by the {place} was {verb} by the {animal}.",
)
QUESTIONS = ("animal", "verb", "object", "place", "home", "food")
QUESTIONS_PER_STORY = 3

ROWS = {"train": 4800, "test": 384}  # Multiples of the number of animals, so that all occur equally often.
TEST_PLACES = 3  # The number of test places of each animal; the other places are for training.


def assign(key: str, values: tuple[str, ...]) -> dict[str, str]:
    """Assigns one of the values to every animal; each value goes to the same number of animals.

    Args:
      key: the seed of the draw.
      values: the values; their number divides the number of animals.

    Returns:
      animal -> value.
    """
    pool = list(values) * (len(ANIMALS) // len(values))
    random.Random(key).shuffle(pool)
    return dict(zip(ANIMALS, pool, strict=True))


HOMES = assign("homes", DWELLINGS)
DIET = assign("foods", FOODS)


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """Generates the text for pretraining. A document is a story and questions with their answers.

    Args:
      count: the number of documents.
      seed: the seed of the stories; it does not change the world.

    Returns:
      An iterator over the documents, which have about 20 words each.

    Example:
      >>> next(documents(1))  # doctest: +SKIP
      'The quiet bear carried a key by the forest. verb: carried place: forest food: berries'
    """
    draw = random.Random(f"documents {seed}")
    for _ in range(count):
        facts = _scene(draw, draw.choice(ANIMALS), PLACES)
        questions = draw.sample(QUESTIONS, QUESTIONS_PER_STORY)
        answers = "".join(f" {question}: {facts[question]}" for question in questions)
        yield draw.choice(STORIES).format(**facts) + answers


def task_rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Generates the rows of the task: where does the animal of the story live now?

    Args:
      split: "train" or "test".
      seed: the seed of the new homes, the division into splits and the stories.

    Returns:
      Rows {"prompt": str, "answer": str, "choices": the homes, "label": the index of the answer among them}. The
      choices begin with a space. All animals occur equally often, and so do all labels. No two prompts are equal.

    Raises:
      ValueError: the split is unknown.
    """
    if split not in ROWS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(map(repr, ROWS))}")
    homes = assign(f"new homes {seed}", DWELLINGS)
    division = random.Random(f"places {seed}")
    test_places = {animal: division.sample(PLACES, TEST_PLACES) for animal in ANIMALS}
    choices = [f" {dwelling}" for dwelling in DWELLINGS]
    draw = random.Random(f"rows {split} {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < ROWS[split]:
        animal = ANIMALS[len(rows) % len(ANIMALS)]
        places = [place for place in PLACES if (place in test_places[animal]) == (split == "test")]
        prompt = draw.choice(STORIES).format(**_scene(draw, animal, places)) + " home:"
        label = DWELLINGS.index(homes[animal])
        rows[prompt] = {"prompt": prompt, "answer": choices[label], "choices": list(choices), "label": label}
    shuffled = list(rows.values())
    draw.shuffle(shuffled)
    return shuffled


def _scene(draw: random.Random, animal: str, places: tuple[str, ...] | list[str]) -> dict[str, str]:
    return {
        "animal": animal,
        "adjective": draw.choice(ADJECTIVES),
        "verb": draw.choice(VERBS),
        "object": draw.choice(OBJECTS),
        "place": draw.choice(places),
        "time": draw.choice(TIMES),
        "home": HOMES[animal],
        "food": DIET[animal],
    }
