import copy
import json
from multiprocessing import Pipe

import pytest
from clipr_toys import of_materials, option, task

from ftlib.clipr.tasks import Correction, Decision, Option, Task


def test_values_come_in_order_and_once():
    mugs = task(
        option(material="steel", kind="mug"),
        option(material="glass", kind="mug"),
        Option("bare"),
        Option("more steel", {"material": "steel"}),
    )
    assert mugs.values("material") == ("steel", "glass")
    assert mugs.differing() == ("material",)
    assert mugs.values("colour") == ()


@pytest.mark.parametrize("names", [("one",), (), ("a", "b", "a")])
def test_a_task_without_a_choice_is_refused(names):
    with pytest.raises(ValueError, match="task 't' has"):
        Task("t", "", "", "f", tuple(map(Option, names)))


def test_an_option_is_found_by_name():
    drinks = of_materials("glass", "steel")
    assert drinks.index("steel") == 1
    with pytest.raises(ValueError, match=r"no option 'gold'.*'glass', 'steel'"):
        drinks.index("gold")


def test_attributes_cannot_be_changed_afterwards():
    given = {"material": "steel"}
    made = Option("mug", given)
    given["material"] = "glass"
    assert made.attributes["material"] == "steel"
    with pytest.raises(TypeError):
        made.attributes["material"] = "glass"


def test_tasks_are_hashed_copied_sent_and_written():
    made = of_materials("glass", "steel")
    assert {made: 1}[of_materials("glass", "steel")] == 1
    receiver, sender = Pipe(duplex=False)
    sender.send(made)  # as to another process
    assert receiver.recv() == made == copy.deepcopy(made)
    assert Task.from_json(json.loads(json.dumps(made.to_json()))) == made
    correction = Correction(made, 0, 1, "for the look")
    again = Correction.from_json(json.loads(json.dumps(correction.to_json())))
    assert again == correction


def test_margin_is_to_the_best_of_the_others():
    assert Decision(1, (0.5, 2.0, 1.5)).margin == 0.5
    assert Decision(0, (1.0, 1.0)).margin == 0
