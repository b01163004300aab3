"""Small tasks with everything about them known."""

from ftlib.clipr import tidybot
from ftlib.clipr.tasks import Option, Task
from ftlib.streams import generator

DIMENSIONS = {
    "material": ("glass", "steel", "plastic"),
    "colour": ("red", "blue"),
    "size": ("big", "small"),
}
KNOWN = ("cups", "bowls", "boxes")
NEW = ("plates", "spoons")


def option(**attributes):
    return Option(" ".join(attributes.values()), attributes)


def task(*options, family="cups", id="t"):
    return Task(id, "On the table.", "Bring me one.", family, tuple(options))


def of_materials(*materials, family="cups", id="t"):
    return task(*(option(material=m) for m in materials), family=family, id=id)


def draw(n, seed, families=KNOWN, dimensions=DIMENSIONS):
    """Tasks of two to four options, all attributes at random."""
    rng = generator(seed, "toys")
    tasks = []
    for at in range(n):
        options = {}
        for _ in range(int(rng.integers(2, 5)) * 20):
            if len(options) < 2 + at % 3:
                chosen = {d: str(rng.choice(v)) for d, v in dimensions.items()}
                options[" ".join(chosen.values())] = option(**chosen)
        family = str(rng.choice(families))
        tasks.append(task(*options.values(), family=family, id=f"{seed}-{at}"))
    return tasks


def right_options(scenario, part):
    """Which option of each task of a scenario's half the person takes."""
    given = zip(tidybot.tasks(scenario, part), scenario.placements(part), strict=True)
    return [task.index(place) for task, (_, place) in given]
