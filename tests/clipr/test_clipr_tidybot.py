"""TidyBot: the published accuracies, exactly, and what is made of odd replies."""

import json
from fractions import Fraction

import pytest
from clipr_toys import right_options

from ftlib import data
from ftlib.clipr import tidybot
from ftlib.clipr.models import RecordedReplies, ReplyNotRecordedError

# Mean over scenarios, and things placed right of all 672, both as fractions.
EXACT = {
    ("unseen", "zero-shot"): (Fraction(1751, 3840), 287),
    ("unseen", "examples"): (Fraction(377, 480), 538),
    ("unseen", "llm-rule"): (Fraction(10507, 11520), 608),
    ("unseen", "human-rule"): (Fraction(5617, 5760), 655),
    ("seen", "zero-shot"): (Fraction(1037, 2304), 277),
    ("seen", "llm-rule"): (Fraction(10577, 11520), 613),
    ("seen", "human-rule"): (Fraction(2237, 2304), 655),
}
PUBLISHED = {
    ("unseen", "zero-shot"): "0.456",
    ("unseen", "examples"): "0.785",
    ("unseen", "llm-rule"): "0.912",
    ("unseen", "human-rule"): "0.975",
    ("seen", "zero-shot"): "0.450",
    ("seen", "llm-rule"): "0.918",
}


@pytest.fixture(scope="module")
def rooms():
    skip_unless_here()
    return tidybot.scenarios()


@pytest.fixture(scope="module")
def replies():
    skip_unless_here()
    return data.tidybot_replies()


@pytest.fixture(scope="module")
def prompts(replies):
    return tidybot.Prompts.recorded(replies)


@pytest.fixture
def model(replies):
    return RecordedReplies(replies)


def skip_unless_here():
    here = {row.name: row.where for row in data.catalogue()}
    if "not here" in (here["tidybot"], here["tidybot-replies"]):
        pytest.skip("TidyBot is not here")


# --- the recorded rows --------------------------------------------------------


@pytest.mark.parametrize(("part", "condition"), EXACT)
def test_recorded_accuracies_are_the_published_ones(
    part, condition, rooms, prompts, model
):
    trials = [tidybot.run(room, condition, prompts, model, part) for room in rooms]
    found = tidybot.accuracy(trials)
    assert (found, sum(trial.right for trial in trials)) == EXACT[part, condition]
    if (part, condition) in PUBLISHED:
        assert f"{float(found):.3f}" == PUBLISHED[part, condition]
    assert sum(trial.asked for trial in trials) == 672
    assert sum(trial.skipped for trial in trials) == 0
    assert all(len(trial.placements) == trial.asked for trial in trials)


def test_accuracies_are_those_of_a_reading_as_json(rooms, prompts, replies, model):
    """An oracle of its own: arguments of the calls, read as JSON arrays."""
    right = Fraction(0)
    for room in rooms:
        trial = tidybot.run(room, "llm-rule", prompts, model)
        prompt = prompts.to_place(room, "unseen", "llm-rule", trial.rule)
        calls = prompt.rpartition("pick_and_place(")[2] + replies[prompt]
        lines = [
            line.removeprefix("pick_and_place(").rstrip(")")
            for line in calls.split("\n")
        ]
        placed = dict(json.loads(f"[{line}]") for line in lines)
        truth = dict(room.unseen)
        hits = sum(placed[thing] == place for thing, place in truth.items())
        right += Fraction(hits, len(truth))
    assert right / 96 == EXACT["unseen", "llm-rule"][0]


def test_a_model_that_puts_everything_in_one_place_scores_by_chance(rooms, prompts):
    class Lazy:
        def complete(self, prompt, *, max_tokens, stop=()):
            line = prompt.rpartition("receptacles = ")[2].partition("\n")[0]
            first = json.loads(line)[0]
            things = json.loads(prompt.rpartition("objects = ")[2].partition("\n")[0])
            calls = [f'pick_and_place("{t}", "{first}")' for t in things[1:]]
            return "\n".join([f' "{first}")', *calls])

    trials = [tidybot.run(room, "human-rule", prompts, Lazy()) for room in rooms]
    expected = [
        Fraction(sum(place == room.receptacles[0] for _, place in room.unseen))
        / len(room.unseen)
        for room in rooms
    ]
    assert tidybot.accuracy(trials) == sum(expected) / 96
    assert 0.2 < tidybot.accuracy(trials) < 0.4


def test_what_was_not_recorded_is_an_error_that_says_so(rooms, prompts, model):
    with pytest.raises(ReplyNotRecordedError, match="banana"):
        tidybot.run(rooms[0], "examples", prompts, model, "seen")
    ours = {"objects = [": "a reply"}
    with pytest.raises(ValueError, match="these are not TidyBot's"):
        tidybot.Prompts.recorded(ours)


def test_no_trials_have_no_accuracy():
    with pytest.raises(ValueError, match="no trials"):
        tidybot.accuracy([])


# --- odd replies --------------------------------------------------------------

ROOM = tidybot.Scenario(
    number=1,
    room="bedroom",
    receptacles=("bed", "chair"),
    seen=(("sock", "bed"), ("hat", "chair")),
    unseen=(("shirt", "bed"), ("cap", "chair"), ("shoe", "bed")),
    note="Hats on the chair.",
    tags=("category",),
)
PROMPTS = tidybot.Prompts("W\n\n", "P\n\n", "# Guess.\nG\n\n")


class Says:
    """Replies the same to everything, and keeps the prompts."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.prompts = []

    def complete(self, prompt, *, max_tokens, stop=()):
        self.prompts.append(prompt)
        return self.replies.pop(0)


@pytest.mark.parametrize(
    ("reply", "placements", "skipped"),
    [
        ('"bed")\npick_and_place("cap", "chair")', {"shirt": "bed", "cap": "chair"}, 0),
        (' "bed")\n\npick_and_place("cap", "chair")', {"shirt": "bed"}, 0),
        ('"bed")\npick_and_place("shirt", "chair")', {"shirt": "bed"}, 0),
        ('"bed")\npick_and_toss("cap")\nHm.', {"shirt": "bed"}, 2),
        ('"bed"', {}, 1),
        ("", {}, 1),
        ('"bed")\npick_and_place("hen", "chair")', {"shirt": "bed"}, 0),
        ('__import__("os"))\npick_and_place("cap","bed")', {"cap": "bed"}, 1),
        ('"moon")', {"shirt": "moon"}, 0),
    ],
    ids=[
        "good",
        "empty line",
        "twice",
        "no calls",
        "cut",
        "nothing",
        "not asked for",
        "code",
        "no such place",
    ],
)
def test_odd_replies_lose_what_they_do_not_say(reply, placements, skipped):
    trial = tidybot.run(ROOM, "human-rule", PROMPTS, Says(reply))
    assert dict(trial.placements) == placements
    assert trial.skipped == skipped
    truth = dict(ROOM.unseen)
    assert trial.right == sum(truth[t] == p for t, p in placements.items())
    assert trial.accuracy == Fraction(trial.right, 3)


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        (" Hats on the chair.", "Hats on the chair."),
        ("\n\n Hats.\nMore.", "Hats."),
        ("  \n", ""),
    ],
)
def test_a_rule_is_the_first_line_that_says_something(reply, rule):
    model = Says(reply, '"bed")')
    trial = tidybot.run(ROOM, "llm-rule", PROMPTS, model)
    assert trial.rule == rule
    assert model.prompts[0].startswith("W\n\nobjects = ")
    assert model.prompts[1] == (
        f"P\n\n# Summary: {rule}\n"
        'objects = ["shirt", "cap", "shoe"]\n'
        'receptacles = ["bed", "chair"]\n'
        'pick_and_place("shirt",'
    )


def test_a_trial_is_read_in_a_few_lines():
    model = Says('"bed")\npick_and_place("cap", "bed")')
    assert str(tidybot.run(ROOM, "human-rule", PROMPTS, model)) == (
        "Scenario 1, bedroom: bed, chair\n"
        "Rule (human-rule): Hats on the chair.\n"
        "  shirt -> bed\n"
        "  cap -> bed  (the person: chair)\n"
        "  shoe -> not placed  (the person: bed)\n"
        "1 of 3 right"
    )


# --- choices ------------------------------------------------------------------


def test_things_become_tasks_with_a_right_option():
    tasks = tidybot.tasks(ROOM, "unseen")
    assert [task.goal for task in tasks] == [
        "Put away: shirt.",
        "Put away: cap.",
        "Put away: shoe.",
    ]
    assert {task.scene for task in tasks} == {"A bedroom with bed and chair."}
    assert right_options(ROOM, "unseen") == [0, 1, 0]


def test_all_tasks_have_names_of_their_own(rooms):
    tasks = [
        task
        for room in rooms
        for part in ("seen", "unseen")
        for task in tidybot.tasks(room, part)
    ]
    assert len({task.id for task in tasks}) == len(tasks) == 2 * 672
    assert len({task.family for task in tasks}) == 96
