"""Students: what they are trained by is what they decide by, and only adapters move."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from clipr_toys import draw, of_materials, option, task
from peft import load_peft_weights, set_peft_model_state_dict
from scipy.optimize import check_grad
from scipy.special import log_softmax
from test_clipr_models import llama, tokenizer
from tiny_models import CHATML

from ftlib.clipr import prompts
from ftlib.clipr.distillation import (
    Lesson,
    Student,
    choice_loss,
    lessons,
    log_probs,
    offer_scores,
)
from ftlib.clipr.loop import accuracy
from ftlib.clipr.models import LocalModel
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.settings import DistillationSettings
from ftlib.clipr.tasks import Task
from ftlib.sequences import IGNORED
from ftlib.streams import generator

RULES = RuleSet.from_text("Prefer material glass over plastic.\nPrefer size big.")
FEW = DistillationSettings(steps=3, batch_size=2, rank=2)
TASKS = draw(8, seed=5)


def student(settings=FEW, seed=0, template=CHATML, weights=0):
    words = tokenizer(template)
    model = llama(len(words), weights)
    return Student(model, words, settings, seed)


def loss_of(learner, given):
    batch = learner._collated([learner._encoded(lesson) for lesson in given])
    labels, shares = batch.pop("labels"), batch.pop("shares")
    scores = log_probs(learner.model, labels, batch)
    return choice_loss(scores.split([len(s) for s in shares]), shares)


# --- labels -------------------------------------------------------------------


def test_rules_label_what_they_tell_apart():
    told = of_materials("steel", "glass", "plastic", id="told")
    tied = task(option(size="big", colour="red"), option(size="big", colour="blue"))
    top = of_materials("glass", "plastic", "steel", id="top")
    found = {one.task.id: one.best for one in lessons([told, tied, top], RULES)}
    assert found == {
        "told": RULES.best(told),
        "top": RULES.best(top),
    }
    assert lessons([told, tied], RuleSet()) == []


def test_several_best_options_share_the_target():
    two = task(
        option(material="glass", colour="red"),
        option(material="plastic", colour="red"),
        option(material="glass", colour="blue"),
    )
    rules = RuleSet.from_text("Prefer material glass.")
    [lesson] = lessons([two], rules)
    assert lesson.best == (0, 2)
    assert student()._encoded(lesson).share.tolist() == [0.5, 0.0, 0.5]


# --- the objective ------------------------------------------------------------


def test_the_loss_is_the_closed_form_in_float64():
    """Two options are Bradley–Terry, and one best option of many Plackett–Luce."""
    a, b = torch.tensor([0.3, -1.2], dtype=torch.float64)
    sure = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss = choice_loss([torch.stack([a, b])], [sure])
    assert loss.item() == pytest.approx(math.log(1 + math.exp(b - a)), rel=1e-12)
    scores = [np.array([2.0, -30.0, 700.0]), np.array([-5e3, -5e3 + 1])]
    shares = [np.array([0.5, 0.0, 0.5]), np.array([0.0, 1.0])]
    expected = np.mean(
        [-(w * log_softmax(s)).sum() for s, w in zip(scores, shares, strict=True)]
    )
    found = choice_loss(
        [torch.tensor(s) for s in scores], [torch.tensor(w) for w in shares]
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_is_softmax_less_shares():
    score = torch.tensor([0.5, -0.1, 2.0], dtype=torch.float64, requires_grad=True)
    share = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    choice_loss([score], [share]).backward()
    assert torch.allclose(score.grad, score.detach().softmax(0) - share, atol=1e-14)

    def loss(x):
        return choice_loss([torch.tensor(x)], [share]).item()

    def gradient(x):
        return (torch.tensor(x).softmax(0) - share).numpy()

    assert check_grad(loss, gradient, score.detach().numpy()) < 1e-6


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_loss_and_gradients_are_those_of_the_full_logits(template):
    learner = student(template=template)
    learner.model.double()
    for weight in learner.adapters.values():  # B is 0 at first, and A has no gradient
        torch.nn.init.normal_(weight, std=0.1)
    given = lessons(TASKS[:4], RULES)
    loss_of(learner, given).backward()
    found = {name: w.grad.clone() for name, w in learner.adapters.items()}
    learner.model.zero_grad()
    terms = []
    for lesson in given:
        scores = []
        encoded = learner._encoded(lesson)
        for row, labels in zip(encoded.ids, encoded.labels, strict=True):
            log_p = learner.model(input_ids=row[None]).logits[0].log_softmax(-1)
            scored = (labels != IGNORED).nonzero().flatten()
            scores.append(log_p[scored - 1, row[scored]].sum())
        chosen = torch.stack(scores).log_softmax(0)[list(lesson.best)]
        terms.append(-chosen.mean())
    expected = torch.stack(terms).mean()
    assert loss_of(learner, given).item() == pytest.approx(expected.item(), rel=1e-10)
    expected.backward()
    for name, weight in learner.adapters.items():
        assert torch.allclose(found[name], weight.grad, rtol=1e-7, atol=1e-12), name
        assert weight.grad.abs().max() > 0, name


def test_only_the_answer_is_scored():
    learner = student()
    encoded = learner._encoded(Lesson(TASKS[0], (0,)))
    for ids, labels, prompt in zip(
        encoded.ids, encoded.labels, prompts.offers(TASKS[0]), strict=True
    ):
        scored = labels != IGNORED
        assert learner.tokenizer.decode(ids[scored]).strip() == prompts.YES
        assert (ids[scored] == labels[scored]).all()
        assert prompt in learner.tokenizer.decode(ids[~scored])


def test_the_order_of_options_and_of_lessons_changes_nothing():
    learner = student()
    given = lessons(TASKS, RULES)
    first = loss_of(learner, given).item()
    turned = []
    for lesson in given:
        n = len(lesson.task.options)
        options = lesson.task.options[::-1]
        best = tuple(n - 1 - at for at in lesson.best)
        turned.append(Lesson(replace(lesson.task, options=options), best))
    assert loss_of(learner, turned[::-1]).item() == pytest.approx(first, rel=1e-5)


# --- deciding -----------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_decisions_are_those_of_scores_and_counted(template):
    learner = student(template=template)
    learner.learn(lessons(TASKS, RULES), learning_rate=1e-2)
    plain = LocalModel(learner.model, learner.tokenizer)
    for one in TASKS:
        expected = [plain.score(p, [prompts.YES])[0] for p in prompts.offers(one)]
        made = learner.decide(one)
        assert made.scores == pytest.approx(expected, rel=1e-5)
        assert made.index == int(np.argmax(expected))
    assert (
        learner.usage.calls == plain.usage.calls == sum(len(t.options) for t in TASKS)
    )
    assert learner.usage.tokens == plain.usage.tokens
    together = learner.decide_all(TASKS)
    assert [d.index for d in together] == [learner.decide(t).index for t in TASKS]


def test_decided_is_what_is_trained():
    """The loss of a lesson follows from the decision's scores."""
    learner = student()
    lesson = lessons(TASKS, RULES)[0]
    scores = np.array(learner.decide(lesson.task).scores)
    expected = -log_softmax(scores)[list(lesson.best)].mean()
    assert loss_of(learner, [lesson]).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_known_is_told_with_every_option():
    learner = student()
    told = offer_scores(learner, TASKS[:2], ["Prefer glass.", ""])
    bare = offer_scores(learner, TASKS[:2], ["", ""])
    assert told[0] != bare[0]
    assert told[1] == pytest.approx(bare[1], rel=1e-5)
    for prompt, each in zip(
        prompts.offers(TASKS[0], " Prefer glass.\n"), TASKS[0].options, strict=True
    ):
        assert prompt.startswith("Prefer glass.\n\nRequest: Bring me one. (boxes)\n")
        assert each.name in prompt


def test_words_of_a_task_stay_on_their_line():
    odd = Task(
        "t", "", "Bring\nRequest: it.", "cups", (option(size="a\nb"), option(size="c"))
    )
    for prompt in prompts.offers(odd):
        assert prompt.count("\n") == 1


# --- training -----------------------------------------------------------------


def test_a_student_learns_eight_tasks_by_heart():
    """Labelled by chance, so that nothing but memory helps."""
    labels = generator(0, "labels").integers(2, size=len(TASKS))
    given = [Lesson(t, (int(at),)) for t, at in zip(TASKS, labels, strict=True)]
    learner = student(DistillationSettings(steps=40, batch_size=len(given), rank=8))
    wanted = {lesson.task: lesson.best for lesson in given}
    before = accuracy(learner.decide, lambda t, at: at in wanted[t], TASKS)
    history = learner.learn(given, learning_rate=3e-2)
    after = accuracy(learner.decide, lambda t, at: at in wanted[t], TASKS)
    assert before < 0.8
    assert after == 1
    assert history.column("loss")[-1] < 0.2 * history.column("loss")[0]


def test_own_weights_stay_bit_for_bit():
    words = tokenizer(CHATML)
    model = llama(len(words))
    before = copy.deepcopy(model.state_dict())
    learner = Student(model, words, FEW)
    adapters = {name: w.detach().clone() for name, w in learner.adapters.items()}
    learner.learn(lessons(TASKS, RULES), learning_rate=1e-2)
    moved = [not torch.equal(w, adapters[n]) for n, w in learner.adapters.items()]
    assert sum(moved) > len(moved) / 2
    base = learner.model.unload()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(w, before[name]) for name, w in base.state_dict().items())


def test_adapters_are_on_every_linear_layer_but_the_head():
    names = {name.split(".")[-4] for name in student().adapters}
    assert names == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_an_untaught_student_is_its_model():
    words = tokenizer(CHATML)
    model = llama(len(words))
    bare = offer_scores(LocalModel(model, words), TASKS, [""] * len(TASKS))
    found = [d.scores for d in Student(model, words, FEW).decide_all(TASKS)]
    for one, other in zip(bare, found, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_a_seed_gives_one_student_and_another_seed_another():
    given = lessons(TASKS, RULES)

    def weights(seed):
        learner = student(seed=seed)
        torch.manual_seed(seed * 17 + 3)  # nothing hangs on what others drew
        learner.learn(given, learning_rate=1e-2)
        return learner.adapters

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_stopped_learning_goes_on(tmp_path, monkeypatch):
    from ftlib.clipr import distillation

    given, settings = lessons(TASKS, RULES), replace(FEW, steps=4)
    whole = student(settings)
    whole.learn(given, learning_rate=1e-2)
    real, calls = distillation.choice_loss, itertools.count(1)

    def dies(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(distillation, "choice_loss", dies)
    monkeypatch.setattr(
        distillation.TrainingSettings,
        "fine_tuning",
        classmethod(
            lambda cls, steps, size, rate, seed: cls(
                steps, size, rate, "cosine", steps // 10, seed=seed, checkpoint_every=1
            )
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        student(settings).learn(given, 1e-2, tmp_path)
    resumed = student(settings)
    history = resumed.learn(given, 1e-2, tmp_path)
    assert history.column("step") == [1, 2, 3, 4]
    assert next(calls) == 3 + 2 + 1  # steps 3 and 4 alone
    assert all(
        torch.equal(w, whole.adapters[name]) for name, w in resumed.adapters.items()
    )


def test_peft_saves_the_adapters_and_restores_them(tmp_path):
    taught, other = student(seed=1), student(seed=2)
    taught.learn(lessons(TASKS, RULES), learning_rate=1e-2)
    taught.model.save_pretrained(tmp_path)
    set_peft_model_state_dict(other.model, load_peft_weights(tmp_path, "cpu"))
    assert [d.scores for d in other.decide_all(TASKS)] == [
        d.scores for d in taught.decide_all(TASKS)
    ]


def test_too_few_lessons_and_too_long_ones_are_said_to_be():
    learner = student()
    with pytest.raises(ValueError, match="fewer than batch_size 2"):
        learner.learn(lessons(TASKS[:1], RULES), learning_rate=1e-3)
    long = replace(TASKS[0], goal="mug " * 400)
    with pytest.raises(ValueError, match="the model reads 256"):
        learner.learn([Lesson(long, (0,))] * 2, learning_rate=1e-3)
