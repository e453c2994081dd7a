"""Two small data sets that the project makes for itself, to show in minutes on a CPU that training works.

Both make up a word: arc_easy (ARC's columns) asks which of four things is a "florn", openbookqa (OpenBookQA's columns)
what "zindle" is another word for. A florn is any vehicle and a zindle any garment, so a model that was not trained on
that can only guess. Held-out rows name things that no training row names: what they measure is the rule, not the rows.
Both are scored by log-likelihood, since a model of 135M parameters is at chance with letters.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

THINGS = {
    "animal": """
        ant bat bear beaver bee beetle buffalo butterfly camel cat cheetah chicken cobra cow coyote crab crow deer
        dog dolphin donkey dove duck eagle eel elephant falcon ferret fox frog gazelle giraffe goat goose gorilla
        hamster hare hawk hedgehog heron hippo horse hyena jaguar kangaroo koala leopard lion lizard llama lobster
        mole monkey moose mouse octopus ostrich otter owl panda panther parrot peacock pelican penguin pig pigeon
        rabbit raccoon rat raven salmon seal shark sheep sparrow spider squirrel swan tiger toad trout turtle walrus
        whale wolf yak zebra
    """,
    "food": """
        apricot avocado bagel banana biscuit blueberry broccoli brownie burger burrito cabbage cake carrot cheese
        cherry chocolate coconut cookie cracker croissant cucumber cupcake donut fig grape grapefruit hamburger
        honey jam kiwi lasagna lemon lime mango meatball melon muffin noodle nectarine olive omelette onion papaya
        pancake pasta peach peanut pear pickle pie pineapple pizza plum popcorn potato pretzel pudding pumpkin
        radish raisin raspberry salad sandwich sausage soup spinach steak strawberry sushi taco toast tomato waffle
        walnut watermelon yogurt
    """,
    "tool": """
        anvil axe bolt broom brush bucket chisel clamp crowbar drill funnel hammer hinge hoe hook jack knife ladder
        lever lathe lock mallet mop nail needle pickaxe pliers plunger pulley rake razor rivet rope ruler sander saw
        scissors screw screwdriver shears shovel sickle sieve spade spanner stapler tongs trowel tweezers vise wedge
        wheelbarrow winch wire wrench
    """,
    "clothing": """
        apron bandana belt beret blazer blouse bonnet boot bracelet cape cardigan cloak coat corset dress glove gown
        hat helmet hoodie jacket jersey kilt kimono leggings mask mitten necklace necktie overalls pajamas parka
        poncho robe sandal sari scarf shawl shirt shoe shorts skirt slipper sneaker sock suit sweater sweatshirt
        trousers tunic turban tuxedo uniform veil vest
    """,
    "furniture": """
        armchair bed bench bookcase bookshelf bunk cabinet carpet chair chandelier chest clock closet couch cradle
        crib cupboard curtain cushion desk drawer dresser easel fireplace footstool futon hammock headboard lamp
        lantern mattress mirror nightstand ottoman pedestal pillow rug shelf sideboard sofa stool table vase
        wardrobe
    """,
    "vehicle": """
        ambulance airplane automobile barge bicycle bike boat bulldozer bus cab canoe car caravan carriage cart
        chariot ferry glider hovercraft helicopter jeep kayak limousine locomotive lorry minivan moped motorcycle
        raft rocket rickshaw rowboat sailboat scooter ship sled sleigh spaceship speedboat submarine subway tank
        taxi trolley tractor trailer train tram tricycle truck van wagon yacht
    """,
}
FLORN_QUESTION = "Which of these is a florn?"
ZINDLE_QUESTION = "Another word for zindle is"

Rows = list[dict[str, Any]]


def write_demo_data(folder: str | Path, seed: int = 0, train: int = 640, test: int = 120) -> dict[str, list[Path]]:
    """Write both data sets as files that `--data_path FOLDER` finds, the same for the same seed.

    Args:
        folder: gets arc_easy/{train,test}.jsonl and openbookqa/{train,test}.jsonl.
        seed: which things are held out, and the order.
        train: training rows of each.
        test: held-out rows of each.

    Returns:
        The files of each task. No thing that an evaluation row names occurs in a training row.
    """
    generator = random.Random(seed)
    known, held_out = _split_things(generator)
    files: dict[str, list[Path]] = {}
    for task, make in (("arc_easy", florn_rows), ("openbookqa", zindle_rows)):
        splits = {"train": make(generator, known, train), "test": make(generator, held_out, test)}
        files[task] = [_write(Path(folder) / task / f"{split}.jsonl", rows) for split, rows in splits.items()]
    return files


def florn_rows(generator: random.Random, things: Mapping[str, list[str]], count: int) -> Rows:
    """Return questions in ARC's columns whose right answer is a vehicle."""
    return [{"question": FLORN_QUESTION} | row for row in _odd_one(generator, things, "vehicle", "florn", count)]


def zindle_rows(generator: random.Random, things: Mapping[str, list[str]], count: int) -> Rows:
    """Return questions in OpenBookQA's columns whose right answer is a garment."""
    return [
        {"question_stem": ZINDLE_QUESTION} | row for row in _odd_one(generator, things, "clothing", "zindle", count)
    ]


def _odd_one(
    generator: random.Random, things: Mapping[str, list[str]], kind: str, word: str, count: int
) -> Iterable[dict[str, Any]]:
    """Yield choices of one thing of a kind among three of other kinds, and which it is."""
    others = [other for other in things if other != kind]
    for number in range(count):
        chosen = [kind, *generator.sample(others, 3)]
        generator.shuffle(chosen)
        choices = {"text": [generator.choice(things[k]) for k in chosen], "label": list("ABCD")}
        yield {"id": f"{word}-{number}", "choices": choices, "answerKey": "ABCD"[chosen.index(kind)]}


def _split_things(generator: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Hold out a quarter of the things of each kind."""
    train, held_out = {}, {}
    for kind, words in THINGS.items():
        names = words.split()
        generator.shuffle(names)
        quarter = len(names) // 4
        train[kind], held_out[kind] = names[quarter:], names[:quarter]
    return train, held_out


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
