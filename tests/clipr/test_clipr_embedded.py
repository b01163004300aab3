"""Words: vectors against the encoder itself, and rules that are read by them."""

import numpy as np
import pytest
import torch
from clipr_toys import draw, of_materials, option, task
from transformers import BertConfig, BertModel, BertTokenizerFast

from ftlib import models
from ftlib.clipr.baselines import NearestExamples
from ftlib.clipr.conversation import History
from ftlib.clipr.embedded import EmbeddedReasoner, Words, like_places, like_seen
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.tidybot import Scenario, accuracy
from ftlib.clipr.users import SimulatedUser
from ftlib.metrics.bertscore import Encoder

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] steel glass mug cup big small red".split()


class Axes(Words):
    """Texts along the axes of the words that are in them."""

    def __init__(self, *axes):
        self.axes = axes

    def embed(self, texts):
        found = np.array([[a in t.split() for a in self.axes] for t in texts], float)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16)
    return Encoder(BertModel(config).eval(), tokenizer, 2, "toy")


# --- embeddings ---------------------------------------------------------------


def test_a_text_is_the_mean_of_its_last_hidden_states(encoder):
    texts = ["steel mug", "a big red glass cup", "steel", "steel mug"]
    found = Words(encoder).embed(texts)
    for vector, text in zip(found, texts, strict=True):
        ids = encoder.tokenizer(text, return_tensors="pt")
        mean = encoder.model(**ids).last_hidden_state[0].mean(dim=0).detach().numpy()
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1)


def test_a_text_is_embedded_once(encoder, monkeypatch):
    words, asked = Words(encoder), []
    real = words._embedded
    monkeypatch.setattr(words, "_embedded", lambda t: asked.extend(t) or real(t))
    first = words.cosine("steel", ["mug", "steel", "mug"])
    again = words.cosine("mug", ["steel"])
    assert asked == ["steel", "mug"]
    assert first == pytest.approx([again[0], 1, again[0]])


def test_many_and_long_texts_are_embedded(encoder):
    texts = [f"{'steel ' * (n % 40)}mug {n}" for n in range(150)]
    words = Words(encoder)
    together = words.embed(texts)
    assert together.shape == (150, 16)
    alone = Words(encoder).embed(texts[77:78])
    assert together[77] == pytest.approx(alone[0], abs=1e-5)


def test_the_real_encoder_knows_steel_from_glass():
    if not models.available("minilm-l6"):
        pytest.skip("minilm-l6 is not here")
    words = Words()
    steel, glass = words.cosine("steel", ["small steel mug", "small glass mug"])
    assert steel > glass + 0.1


# --- rules --------------------------------------------------------------------


def decide(text, one, words=None):
    words = words or Axes("glass", "steel", "plastic", "red", "blue", "big")
    return EmbeddedReasoner(words).decide(one, RuleSet.from_text(text))


def test_a_rule_is_read_by_its_words_alone():
    one = task(*(option(words=w) for w in ("steel", "glass", "plastic")))
    made = decide("Prefer material glass over steel. (weight 3)", one)
    assert made.index == 1
    assert made.scores == pytest.approx((-3, 3, 0))
    assert made.fired == (0,)


def test_rules_add_up_by_weight():
    one = task(option(words="red steel"), option(words="blue glass"))
    text = "Prefer material glass. (weight {})\nPrefer colour red. (weight 2)"
    half = np.sqrt(0.5)
    made = decide(text.format(1), one)
    assert made.index == 0
    assert made.scores == pytest.approx((2 * half, half))
    assert decide(text.format(3), one).index == 1


def test_a_rule_speaks_in_its_families_and_not_of_its_exceptions():
    cups, bowls = (
        of_materials("steel", "glass"),
        of_materials("steel", "glass", family="bowls"),
    )
    only = "For bowls, prefer material glass."
    assert decide(only, bowls).index == 1
    assert decide(only, cups).scores == (0, 0)
    assert decide(only, cups).fired == ()
    assert decide("Prefer material glass, except for bowls.", bowls).index == 0
    red = task(option(words="red glass"), option(words="blue glass"))
    assert decide("Prefer material glass.", red).index == 0
    made = decide("Prefer material glass, except with colour Red.", red)
    assert made.index == 1
    assert made.scores[0] == 0


def test_without_rules_the_first_is_taken():
    made = decide("", of_materials("steel", "glass"))
    assert (made.index, made.scores) == (0, (0, 0))


def test_attributes_are_not_looked_at():
    named = task(option(material="glass"), option(material="steel"))
    swapped = task(
        *(
            type(o)(o.name, other.attributes)
            for o, other in zip(named.options, named.options[::-1], strict=True)
        )
    )
    text = "Prefer material steel over glass."
    assert decide(text, named).scores == decide(text, swapped).scores
    assert decide(text, named).index == 1


def test_it_asks_and_writes_as_without_words_and_counts():
    tasks = draw(12, seed=2)
    rules = RuleSet.from_text("Prefer material glass.")
    ours, plain = EmbeddedReasoner(Axes("glass")), SymbolicReasoner()
    question = ours.ask(tasks, History())
    assert question == plain.ask(tasks, History())
    history = History().add(question, SimulatedUser(rules).answer(question))
    assert ours.synthesise(history, RuleSet()) == plain.synthesise(history, RuleSet())
    assert ours.revise(rules, []) == plain.revise(rules, [])
    ours.decide(tasks[0], rules)
    assert ours.usage.calls == 4
    assert ours.usage.seconds > 0


def test_examples_are_alike_by_words():
    words = Axes("glass", "steel")
    glass, steel = option(words="glass"), option(words="steel")
    assert words.likeness(glass, glass) == pytest.approx(1)
    assert words.likeness(glass, steel) == pytest.approx(0)
    baseline = NearestExamples(likeness=words.likeness)
    user = SimulatedUser(RuleSet.from_text("Prefer words glass."))
    example = task(steel, glass)
    baseline.learn(user, [example], turns=1)
    unseen = task(option(words="big steel"), option(words="big glass"))
    assert baseline.decide(unseen).index == 1


# --- TidyBot ------------------------------------------------------------------

ROOM = Scenario(
    1,
    "kitchen",
    ("red box", "blue bag"),
    seen=(("glass mug", "blue bag"), ("steel spoon", "red box")),
    unseen=(
        ("glass cup", "blue bag"),
        ("steel fork", "blue bag"),
        ("red cap", "red box"),
    ),
    note="",
    tags=(),
)


def test_things_go_where_the_most_similar_thing_goes():
    trial = like_seen(Axes("glass", "steel", "red"), ROOM)
    assert trial.placements["glass cup"] == "blue bag"
    assert trial.placements["steel fork"] == "red box"
    assert trial.condition == "examples"
    assert trial.asked == 3


def test_things_go_where_the_name_is_most_similar():
    trial = like_places(Axes("red", "blue"), ROOM)
    assert trial.placements["red cap"] == "red box"
    assert set(trial.placements.values()) <= set(ROOM.receptacles)
    assert (trial.condition, trial.part) == ("zero-shot", "unseen")
    assert accuracy([trial]) == trial.accuracy
