"""Two small data sets that the project makes for itself, to show in minutes on a CPU that training works.

boolq asks whether a thing is an animal (BoolQ's columns, scored by letters): an untrained small model knows animals but
gives every question the same answer, so it is right half the time. arc_easy asks for the "florn" among four things
(ARC's columns, scored by log-likelihood): the word is made up for vehicles, so an untrained model can only guess.
Held-out rows name things that no training row names, so what they measure is the rule and not the rows.
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
ANIMAL_QUESTIONS = ("is a {} an animal", "is the {} a kind of animal", "would you call a {} an animal")
FLORN_QUESTION = "Which of these is a florn?"

Rows = list[dict[str, Any]]


def write_demo_data(folder: str | Path, seed: int = 0) -> dict[str, list[Path]]:
    """Write both data sets as files that `--data_path FOLDER` finds, the same for the same seed.

    Args:
        folder: gets boolq/{train,validation}.jsonl and arc_easy/{train,test}.jsonl.
        seed: which things are held out, and the order.

    Returns:
        The files of each task. No word of an evaluation row occurs in a training row.
    """
    generator = random.Random(seed)
    train, held_out = _split_things(generator)
    written = {
        "boolq": {"train": animal_rows(generator, train), "validation": animal_rows(generator, held_out)},
        "arc_easy": {"train": florn_rows(generator, train, 600), "test": florn_rows(generator, held_out, 200)},
    }
    return {
        task: [_write(Path(folder) / task / f"{split}.jsonl", rows) for split, rows in splits.items()]
        for task, splits in written.items()
    }


def animal_rows(generator: random.Random, things: Mapping[str, list[str]]) -> Rows:
    """Return yes-or-no questions in BoolQ's columns: every animal, and as many other things."""
    animals = things["animal"]
    others = [name for kind, names in things.items() if kind != "animal" for name in names]
    rows: Rows = []
    for question in ANIMAL_QUESTIONS:
        rows += [{"question": question.format(name), "answer": True, "passage": ""} for name in animals]
        rows += [
            {"question": question.format(name), "answer": False, "passage": ""}
            for name in generator.sample(others, len(animals))
        ]
    generator.shuffle(rows)
    return rows


def florn_rows(generator: random.Random, things: Mapping[str, list[str]], count: int) -> Rows:
    """Return four-choice questions in ARC's columns: a vehicle among three things of other kinds."""
    kinds = [kind for kind in things if kind != "vehicle"]
    rows: Rows = []
    for number in range(count):
        chosen = ["vehicle", *generator.sample(kinds, 3)]
        generator.shuffle(chosen)
        choices = {"text": [generator.choice(things[kind]) for kind in chosen], "label": list("ABCD")}
        answer = "ABCD"[chosen.index("vehicle")]
        rows.append({"id": f"florn-{number}", "question": FLORN_QUESTION, "choices": choices, "answerKey": answer})
    return rows


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
