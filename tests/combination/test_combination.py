"""The arms train what they name and nothing else, on texts that no test has."""

import dataclasses
import json

import pytest
import torch

from ftlib import results
from ftlib.cft import experiment as cft_experiment
from ftlib.cft import settings as cft_settings
from ftlib.cft.chains import LENGTH, MODULUS
from ftlib.cft.evaluation import VOCABULARY
from ftlib.cft.objective import training_loss
from ftlib.combination import circuit, experiment, skills
from ftlib.combination.experiment import Look
from ftlib.combination.settings import (
    ARMS,
    COMBINATION,
    LEARNING_RATES,
    LOWER,
    OTHER_SIZES,
    Settings,
    tried,
)
from ftlib.ctsft.heads import all_heads, head_slices, norm_parameters
from ftlib.ctsft.tuning import size, weights_of
from ftlib.experiments import PlanError, load_plan
from ftlib.outcomes import outcomes
from ftlib.results import PACKED_PREFIX, NotRecordedError
from ftlib.splits import split_of
from ftlib.training import TrainingSettings

TOY_BASE = cft_settings.BaseSettings(
    width=16,
    layers=3,
    heads=4,
    solutions=64,
    critiques=64,
    training=TrainingSettings(
        steps=4, batch_size=16, learning_rate=1e-3, checkpoint_every=2
    ),
)
TOY = Settings(
    world=dataclasses.replace(
        cft_settings.CHAINS,
        base=TOY_BASE,
        questions=200,
        steps=4,
        batch_size=8,
        validation=8,
        test=12,
    ),
    heads=3,
    looks=2,
    critiques=12,
    draws=2,
)
CONDITIONS = {c.name: c for c in experiment.conditions(TOY)}
HEAD_ARMS = ("circuit", "random")

pytestmark = pytest.mark.usefixtures("base_cache")


@pytest.fixture(scope="module", autouse=True)
def _no_circuit_of_another_cache():
    circuit.circuit_of.cache_clear()


# -- the plan --------------------------------------------------------------------------


def test_the_plan_is_complete():
    names = [str(arm) for arm in load_plan("combination", "cpu")]
    main = {f"combination/{name}" for name in ("base", "full, lower rate", *ARMS)}
    sizes = {f"heads/circuit {n}" for n in OTHER_SIZES}
    searched = {f"learning-rate/{name} {r:g}" for name in ARMS for r in tried(name)}
    assert set(names) == main | sizes | searched | {"discovery/circuit"}


def test_there_is_no_plan_at_scale_gpu():
    with pytest.raises(PlanError, match="no plan at scale 'gpu'"):
        load_plan("combination", "gpu")


def test_every_arm_has_a_rate_that_was_tried():
    assert LEARNING_RATES.keys() == ARMS.keys()
    assert all(LEARNING_RATES[name] in tried(name) for name in ARMS)
    assert LEARNING_RATES["full"] > LOWER


def test_arms_differ_only_in_what_they_name():
    whole = json.loads(json.dumps(dataclasses.asdict(TOY)))
    for arm in experiment.arms(TOY):
        changed = {name for name, value in whole.items() if arm.settings[name] != value}
        assert changed == ({"heads"} if arm.experiment == "heads" else set())
        own = {"method", "recipe", "learning_rate", "sizes"}
        assert arm.settings.keys() - whole.keys() <= own


def test_learning_rates_are_the_best_of_the_records(best_rates):
    """Without records there is nothing yet that the rates could follow."""
    try:
        records = results.load("combination", "cpu").select(experiment="learning-rate")
    except NotRecordedError:
        pytest.skip("the combination is not recorded yet")
    assert best_rates(records, "method") == LEARNING_RATES


@pytest.mark.parametrize("looks", [0, 3])
def test_looks_that_miss_the_end_are_refused(looks):
    with pytest.raises(ValueError, match="the last must be at the end"):
        Settings(looks=looks)


# -- one run ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "full, lower rate", *ARMS])
def test_an_arm_runs_from_end_to_end(name):
    metrics = experiment.run(CONDITIONS[name], 0)
    assert {"surprise", "distance", "trained"} < metrics.keys()
    for test, n in {"gap": 12, "no-gap": 12, "rederive": 12}.items():
        right = outcomes(metrics, test)
        assert len(right) == n
        assert right.mean() == metrics[test].value
    steps = (0,) if name == "base" else (2, 4)
    for step in steps:
        assert f"{PACKED_PREFIX}curve/surprise/{step}" in metrics
    last = metrics[f"{PACKED_PREFIX}curve/gap/{steps[-1]}"]
    assert last == metrics["gap"]
    assert (metrics["distance"] > 0) == (name != "base")
    assert (metrics["trained"] > 0) == (name != "base")


def test_the_search_looks_at_validation_alone_with_seeds_of_its_own(monkeypatch):
    seen, real = [], skills.exams_of

    def noted(world, split, seed):
        seen.append((split, seed))
        return real(world, split, seed)

    monkeypatch.setattr(skills, "exams_of", noted)
    [candidate] = [c for c in experiment.searched(TOY) if c.name == "norms 0.03"]
    metrics = experiment.search(candidate, 1)
    assert seen == [("validation", 1001)]
    assert metrics["validation"] == (metrics["gap"] + metrics["no-gap"]) / 2


def free_weights(model, weights):
    """Where a model's weights may move, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    free = {n: torch.zeros_like(p, dtype=bool) for n, p in model.named_parameters()}
    for piece in weights:
        if isinstance(piece, torch.nn.Parameter):
            free[names[id(piece)]][:] = True
        else:
            mask = free[names[id(piece.parameter)]]
            mask.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    return free


def strayed(model, start, weights):
    """Names of parameters that have moved where they may not."""
    free = free_weights(model, weights)
    return [
        name
        for name, p in model.named_parameters()
        if ((p.detach() != start[name]) & ~free[name]).any()
    ]


@pytest.mark.parametrize("name", [*HEAD_ARMS, "norms"])
def test_frozen_weights_keep_their_bits(name):
    start = weights_of(cft_experiment.base_model(TOY_BASE, 0))
    model, trained = experiment.tune(CONDITIONS[name], 0)
    norms, recipe = norm_parameters(model), ARMS[name]
    find = lambda: circuit.circuit_of(TOY.world, TOY.heads, 0)  # noqa: E731
    heads = experiment.heads_to_train(recipe, find, 0)
    pieces = head_slices(model, heads, recipe.tensors) if heads else []
    assert strayed(model, start, [*pieces, *norms]) == []
    assert trained == size([*pieces, *norms])
    free = free_weights(model, [*pieces, *norms])
    assert trained == sum(int(mask.sum()) for mask in free.values())
    for parameter_name, p in model.named_parameters():
        moved = not torch.equal(p.detach(), start[parameter_name])
        assert moved == bool(free[parameter_name].any())


def test_a_weight_that_strays_is_seen():
    model = cft_experiment.base_model(TOY_BASE, 0)
    start, norms = weights_of(model), norm_parameters(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-6
    assert strayed(model, start, norms) == ["transformer.h.0.mlp.c_fc.weight"]


def test_heads_drawn_and_found_are_as_many_weights_and_lora_nearly():
    trained = {name: experiment.tune(CONDITIONS[name], 0)[1] for name in ARMS}
    assert trained["circuit"] == trained["random"]
    per_rank = TOY_BASE.layers * TOY_BASE.width * (1 + 3 + 1 + 1)  # of c_attn, c_proj
    assert trained["LoRA"] % per_rank == 0
    assert abs(trained["LoRA"] - trained["circuit"]) <= per_rank / 2
    whole = cft_experiment.base_model(TOY_BASE, 0).num_parameters()
    assert trained["full"] == whole
    assert trained["norms"] < trained["circuit"] < whole


def test_the_recorded_arms_of_heads_train_as_many_weights():
    per_head = 4 * 64 * 16 + 3 * 16  # q, k, v, o and three biases
    model = cft_experiment._new_model(COMBINATION.world.base)
    slices = head_slices(model, all_heads(model)[:1], ARMS["circuit"].tensors)
    assert size(slices) == per_head
    assert size(norm_parameters(model)) == 7 * 2 * 64


def test_full_fine_tuning_is_the_rederive_arm_of_cft():
    """The same weights after the same steps; its optimiser is another one."""
    rate = CONDITIONS["full"].learning_rate
    model, _ = experiment.tune(CONDITIONS["full"], 0)
    chapter = cft_experiment.Condition(
        "chains", "CFT rederive", cft_settings.MAIN["CFT rederive"], TOY.world
    )
    tuned = cft_experiment.fine_tune(chapter, rate, 0).load(-1)
    for p, other in zip(model.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-7)


def test_arms_of_a_seed_see_the_same_examples_in_the_same_order(monkeypatch):
    seen = []

    def noted(learner, batch):
        seen[-1].append(batch["input_ids"])
        return training_loss(learner, batch)

    monkeypatch.setattr(experiment, "training_loss", noted)
    for name in ("full", "circuit", "LoRA"):
        seen.append([])
        experiment.tune(CONDITIONS[name], 0)
    assert len(seen[0]) == TOY.world.steps
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


# -- the circuit -----------------------------------------------------------------------


def test_next_values_ask_for_each_step_of_the_right_solution():
    [solution] = cft_experiment.homework(TOY.world, 0).references[-1:]
    asked = circuit.next_values([solution])
    assert [VOCABULARY.words[t] for t in asked.token_ids] == [*map(str, range(MODULUS))]
    written = [VOCABULARY.decode(inputs["input_ids"][0]) for inputs, _ in asked.batches]
    values = [step.claim for step in solution.steps]
    assert written == [
        " ".join([solution.question, "=", *values[:step]]) for step in range(LENGTH)
    ]
    assert [str(labels.item()) for _, labels in asked.batches] == values


def texts(questions):
    return [
        VOCABULARY.decode(row)
        for inputs, _ in questions.batches
        for row in inputs["input_ids"]
    ]


def test_the_circuit_is_found_in_the_homework_alone():
    own = {one.question for one in cft_experiment.homework(TOY.world, 0).references}
    kinds = {}
    for kind in ("gap", "no-gap"):
        found, judged = circuit.evidence(TOY.world, kind, 0)
        asked = [
            {t.partition(" =")[0] for t in texts(half)} for half in (found, judged)
        ]
        assert not asked[0] & asked[1]
        kinds[kind] = asked[0] | asked[1]
    assert kinds["gap"] | kinds["no-gap"] == own
    assert len(kinds["gap"]) == TOY.world.questions * TOY.world.gap_share


def test_critiques_show_the_response_before_the_values():
    found, _ = circuit.evidence(TOY.world, "no-gap", 0, critiques=True)
    work = cft_experiment.homework(TOY.world, 0)
    responses = {r.question: r.text(cft_experiment.CHAIN) for r in work.responses}
    for text in texts(found):
        question, _, rest = text.partition(" = ")
        assert rest.startswith(f"{responses[question]} rederive")


def test_discovery_says_how_good_the_circuit_is():
    metrics = experiment.discover(dataclasses.replace(TOY, heads=4), 0)
    assert metrics["heads"] == 4
    assert {"correlation ours", "beaten", "jaccard gap", "jaccard critique"} < set(
        metrics
    )
    assert metrics[f"{PACKED_PREFIX}faithful/ours/12"] == pytest.approx(1)


# -- what is tested --------------------------------------------------------------------


def test_tests_share_no_question_with_training():
    trained = {one.question for one in cft_experiment.homework(TOY.world, 0).references}
    exams = skills.answers(TOY, "test", 0)
    asked = [*exams["gap"].prompts, *exams["no-gap"].prompts]
    asked += skills.rederivations(TOY, "test", 0).prompts
    asked += [one["input_ids"] for one in skills.other_critiques(TOY, "test", 0)]
    questions = {VOCABULARY.decode(ids).partition(" =")[0] for ids in asked}
    assert {split_of(question) for question in questions} == {"test"}
    assert not questions & trained


def test_other_critiques_have_no_form_that_is_trained():
    decoded = [
        VOCABULARY.decode(one["input_ids"])
        for one in skills.other_critiques(TOY, "test", 0)
    ]
    assert not any("rederive" in text for text in decoded)
    for form in skills.UNTRAINED:
        assert sum(form in text for text in decoded) == TOY.critiques / 3


def test_surprise_is_the_loss_on_the_critique():
    model = cft_experiment.base_model(TOY_BASE, 0)
    texts = skills.other_critiques(TOY, "test", 0)
    by_hand = []
    for one in texts:
        ids, labels = (torch.tensor(one[key]) for key in ("input_ids", "labels"))
        logits = model(ids[None]).logits[0, :-1]
        by_hand.append(torch.nn.functional.cross_entropy(logits, labels[1:]).item())
    expected = sum(by_hand) / len(by_hand)
    assert skills.surprise(model, texts) == pytest.approx(expected, rel=1e-5)


def test_a_skill_counts_what_is_read(monkeypatch):
    written = ["2 3 4 5 A 5", "2 3 4 6 A 6", "2 3"]
    monkeypatch.setattr(
        skills, "complete", lambda *_: [VOCABULARY.encode(text) for text in written]
    )
    skill = skills.Skill([[1]] * 3, ["5"] * 3, skills.read_answer, 12)
    assert skill.right(torch.nn.Linear(1, 1)).tolist() == [True, False, False]


def test_a_look_is_recorded_with_its_counts():
    right = {"gap": torch.tensor([True, False, True, True]).numpy()}
    metrics = Look(right, 0.5, 2.0).metrics()
    assert metrics == {"gap": (0.75, 4), "surprise": 0.5, "distance": 2.0}
