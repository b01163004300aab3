"""Text models: recorded replies, and a local model against its full logits."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CHATML, CHATML_TOKENS, byte_level_bpe, tiny_llama
from transformers import PreTrainedTokenizerFast

from ftlib.clipr.models import (
    NOT_CHOSEN,
    LocalModel,
    RecordedReplies,
    ReplyNotRecordedError,
    Usage,
    cut,
    estimated_tokens,
    read_choice,
    votes,
)

CORPUS = ["Which mug do you prefer, the steel mug or the glass mug? A or B"] * 4
PROMPTS = (
    "Which mug do you prefer?\nA. steel mug\nB. glass mug\nAnswer:",
    "A or B?",
    "The steel mug or the glass mug, which do you prefer? Or both? Or none of them?",
)
OPTIONS = ("A", "B", "the steel mug", "the steel mug, or the glass one", "neither")


def tokenizer(template):
    """Byte-level BPE that joins spaces to words and eats some of an option's."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(CORPUS, CHATML_TOKENS),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


def llama(vocabulary, seed=0):
    read = {"max_position_embeddings": 256, "eos_token_id": 0}
    return tiny_llama(vocabulary, seed, **read).eval()


@pytest.fixture(scope="module", params=[CHATML, None], ids=["chat", "plain"])
def local(request):
    words = tokenizer(request.param)
    return LocalModel(llama(len(words)), words, batch_size=4)


# --- usage ----------------------------------------------------------------------------


def test_usage_adds_and_subtracts_every_field():
    spent = Usage(1, 2, 3, 0.5, 4)
    spent.add(Usage(10, 20, 30, 1.5, 40))
    assert (
        spent
        == Usage(11, 22, 33, 2.0, 44)
        == Usage(1, 2, 3, 0.5, 4) + Usage(10, 20, 30, 1.5, 40)
    )
    assert spent - Usage(10, 20, 30, 1.5, 40) == Usage(1, 2, 3, 0.5, 4)
    assert spent.tokens == 55


def test_time_is_counted_even_where_a_block_fails(monkeypatch):
    clock = iter([10.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    usage = Usage()
    with pytest.raises(KeyError), usage.timed():
        raise KeyError
    assert usage.seconds == 3


# --- reading replies ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B", 1),
        (" b.\n", 1),
        ("**B**", 1),
        ("(B)", 1),
        ("B) the glass mug", 1),
        ("B. A steel mug would be colder.", 1),
        ("B\nA is of steel.", 1),
        ("The answer is B.", 1),
        ("I would take B, since it is a mug of glass", 1),
        ("A steel mug", None),
        ("A", 0),
        ("The answer is A", 0),
        ("A or B", None),
        ("B or A", None),
        ("A is best", 0),
        ("neither of them", None),
        ("Bravo", None),
        ("", None),
        ("D", None),
        ("I", None),
    ],
)
def test_letters_are_read(reply, expected):
    assert read_choice(reply, ["A", "B", "C"]) == expected


def test_texts_with_marks_in_them_are_read():
    options = ["mug (steel)", "mug (glass)", "C++ manual"]
    assert read_choice("I take the mug (glass).", options) == 1
    assert read_choice("c++ manual", options) == 2
    assert read_choice("mug", options) is None


def test_the_longest_name_that_is_there_counts_in_either_case():
    options = ["steel mug", "large steel mug", "glass mug"]
    assert read_choice("The Large steel mug it is", options) == 1
    assert read_choice("Steel mug: it is light", options) == 0
    assert read_choice("A steel mug, I think", options) == 0
    assert read_choice("A steel mug, no glass mug", options) is None


def test_a_ninth_option_is_not_taken_for_a_pronoun():
    letters = list("ABCDEFGHI")
    assert read_choice("I would take the F option", letters) == 5
    assert read_choice("I", letters) == 8


def test_votes_are_for_one_option_and_a_problem_is_a_tie():
    usage = Usage()
    assert votes("B", ["A", "B"], usage) == [NOT_CHOSEN, 0.0]
    assert usage.problems == 0
    tied = votes("Hmm!", ["A", "B", "C"], usage)
    assert tied == [-math.log(3)] * 3
    assert usage.problems == 1


def test_a_text_is_cut_at_the_first_stop_string():
    assert cut("one\n\ntwo###", ["###", "\n\n"]) == "one"
    assert cut("one", ["###"]) == "one"
    assert cut("one", []) == "one"


# --- recorded replies -----------------------------------------------------------------


def test_a_recorded_reply_is_replayed_as_it_was(tmp_path):
    path = tmp_path / "replies.jsonl"
    rows = [
        {"prompt": "A or B?\n", "completion": ' B, "b"\u2028\n\nmore', "key": 1},
        {"prompt": "A or B?", "completion": "__import__('os').abort()"},
        {"prompt": "A or B?", "completion": "__import__('os').abort()"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    model = RecordedReplies.read(path)
    assert len(model) == 2
    assert model.complete("A or B?\n", max_tokens=1) == ' B, "b"\u2028\n\nmore'
    assert model.complete("A or B?\n", max_tokens=1, stop=["\n\n"]) == ' B, "b"\u2028'
    assert model.complete("A or B?", max_tokens=1) == "__import__('os').abort()"
    assert model.usage.calls == 3
    # 8, 8 and 7 characters of prompts, 14, 8 and 24 of replies; four a token.
    assert model.usage.prompt_tokens == 2 + 2 + 2
    assert model.usage.completion_tokens == 4 + 2 + 6
    assert estimated_tokens("") == 0


def test_a_missing_reply_is_named_and_costs_nothing():
    model = RecordedReplies({"Which mug is best?": "A", "Which cup?": "B"})
    prompt = "Which mug is worst?" + " x" * 200
    with pytest.raises(ReplyNotRecordedError) as caught:
        model.complete(prompt, max_tokens=1)
    message = str(caught.value)
    assert "'Which mug is worst? x" in message
    assert len(message) < 500
    assert "419 characters" in message
    assert "the nearest of 2 recorded prompts shares the first 13)" in message
    assert "ask a model" in message
    assert model.usage == Usage()
    with pytest.raises(ReplyNotRecordedError):
        RecordedReplies({}).score("Which?", ["A", "B"])


def test_recorded_replies_vote():
    model = RecordedReplies({"Which?": " B, of course"})
    assert model.score("Which?", ["A", "B"]) == [NOT_CHOSEN, 0.0]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"prompt": "p"}], "line 1: give the texts"),
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": 1, "completion": ""}],
            "line 2",
        ),
        (
            [{"prompt": "p", "completion": c} for c in "cd"],
            "line 2.*another completion",
        ),
    ],
)
def test_a_record_that_cannot_be_replayed_is_refused(tmp_path, rows, complaint):
    path = tmp_path / "replies.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=complaint):
        RecordedReplies.read(path)


# --- a local model: scores ------------------------------------------------------------


def full_logits(local, prompt, option):
    """Log p(option | prompt) from the logits of one text."""
    if local.tokenizer.chat_template:
        context = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        text = context + option
    else:
        context, text = prompt, f"{prompt} {option}"
    before = local.tokenizer(context)["input_ids"]
    ids = local.tokenizer(text)["input_ids"]
    assert ids[: len(before)] == before
    logits = local.model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(len(before), len(ids)))


@torch.no_grad()
def test_scores_are_those_of_the_full_logits(local):
    scores = local.score(PROMPTS[0], OPTIONS)
    expected = [full_logits(local, PROMPTS[0], option) for option in OPTIONS]
    assert scores == pytest.approx(expected, abs=2e-5)
    assert len(set(scores)) == len(OPTIONS)


def test_a_batch_scores_as_one_by_one(local):
    questions = [(prompt, OPTIONS[n:]) for n, prompt in enumerate(PROMPTS)]
    together = local.score_all(questions)
    assert [len(scores) for scores in together] == [5, 4, 3]
    for (prompt, options), scores in zip(questions, together, strict=True):
        alone = [local.score(prompt, [option])[0] for option in options]
        assert scores == pytest.approx(alone, abs=2e-5)


def test_the_probabilities_of_all_tokens_sum_to_one():
    """An oracle without logits: the model's next tokens are options, all of them."""
    words = tokenizer(CHATML)
    local = LocalModel(llama(len(words)), words, batch_size=64)
    special = set(words.all_special_ids)
    texts = [words.decode([i]) for i in range(len(words)) if i not in special]
    whole = [t for t in texts if len(words(t)["input_ids"]) == 1 and "�" not in t]
    total = sum(map(math.exp, local.score("A or B?", whole)))
    assert 0.2 < total <= 1 + 1e-6


def test_options_that_differ_in_one_token_are_read_once(local, monkeypatch):
    seen = []
    forward = local.model.forward

    def counted(*args, **inputs):
        seen.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    monkeypatch.setattr(local.model, "forward", counted)
    local.score(PROMPTS[1], ["A", "B"])
    assert [rows for rows, _ in seen] == [1]


def test_scoring_counts_what_is_read(local):
    before = local.usage + Usage()
    context = local._encode(local._context(PROMPTS[1]))
    local.score_all([(PROMPTS[1], ["A", "B"]), (PROMPTS[1], ["A"])])
    spent = local.usage - before
    assert (spent.calls, spent.completion_tokens) == (2, 0)
    assert spent.prompt_tokens == 2 * len(context) + 3
    assert spent.seconds > 0


def test_options_joined_to_the_prompt_are_scored_from_where_they_part():
    """A space at the prompt's end becomes a part of the option's token."""
    words = tokenizer(None)
    local = LocalModel(llama(len(words)), words)
    prompt = "Which do you prefer, the "
    bare = words(prompt)["input_ids"]
    joined = words(f"{prompt}mug")["input_ids"]
    assert joined[: len(bare)] != bare
    with torch.no_grad():
        logits = local.model(input_ids=torch.tensor([joined])).logits[0].double()
    start = len(bare) - 1
    parts = [
        logits[t - 1].log_softmax(-1)[joined[t]] for t in range(start, len(joined))
    ]
    assert local.score(prompt, ["mug"])[0] == pytest.approx(float(sum(parts)), abs=2e-5)


@pytest.mark.parametrize("options", [[""], ["A", ""]])
def test_empty_options_are_refused(local, options):
    with pytest.raises(ValueError, match="option ''"):
        local.score(PROMPTS[1], options)


def test_what_the_model_cannot_read_is_refused(local):
    with pytest.raises(ValueError, match=r"'mug mug .*the model reads 256: shorten"):
        local.score("mug " * 300, ["A"])
    with pytest.raises(ValueError, match="the model reads 256"):
        local.complete("A or B?", max_tokens=256)


def test_nothing_is_scored_for_nothing(local):
    assert local.score_all([]) == []
    assert local.score(PROMPTS[1], []) == []


def test_dropout_is_off_and_adapters_are_on():
    words = tokenizer(CHATML)
    base = LocalModel(llama(len(words)), words).score(PROMPTS[0], OPTIONS)
    config = LoraConfig(
        target_modules=["q_proj", "lm_head"], lora_dropout=0.5, init_lora_weights=False
    )
    torch.manual_seed(1)
    adapted = get_peft_model(llama(len(words)), config)
    adapted.train()
    local = LocalModel(adapted, words)
    scores = local.score(PROMPTS[0], OPTIONS)
    assert scores == local.score(PROMPTS[0], OPTIONS)
    assert adapted.training
    assert scores != pytest.approx(base, abs=1e-3)
    with torch.no_grad():
        expected = [full_logits(adapted_view(local), PROMPTS[0], o) for o in OPTIONS]
    assert scores == pytest.approx(expected, abs=5e-5)


def adapted_view(local):
    local.model.eval()
    return local


# --- a local model: completions -------------------------------------------------------


def greedy(local, prompt, n):
    """Take the largest logit, n times, without a cache."""
    ids = local._encode(local._context(prompt))
    written = []
    for _ in range(n):
        logits = local.model(input_ids=torch.tensor([ids + written])).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] in (0, local.tokenizer.eos_token_id):
            break
    return written


@torch.no_grad()
def test_completions_are_greedy(local):
    expected = greedy(local, PROMPTS[0], 12)
    before = local.usage + Usage()
    text = local.complete(PROMPTS[0], max_tokens=12)
    assert text == local.tokenizer.decode(expected, skip_special_tokens=True)
    spent = local.usage - before
    assert (spent.calls, spent.completion_tokens) == (1, len(expected))
    assert spent.prompt_tokens == len(local._encode(local._context(PROMPTS[0])))


@torch.no_grad()
def test_writing_ends_at_a_stop_string(local):
    whole = local.complete(PROMPTS[0], max_tokens=20)
    stop = whole[5:7]
    before = local.usage + Usage()
    assert (
        local.complete(PROMPTS[0], max_tokens=20, stop=[stop, "\0"])
        == (whole[: whole.index(stop)])
    )
    assert (local.usage - before).completion_tokens < 20


@torch.no_grad()
def test_writing_ends_at_the_models_end(local, monkeypatch):
    second = greedy(local, PROMPTS[0], 3)[1]
    monkeypatch.setattr(local.model.generation_config, "eos_token_id", [second])
    before = local.usage + Usage()
    local.complete(PROMPTS[0], max_tokens=20)
    assert (local.usage - before).completion_tokens == 2


def test_a_model_is_loaded_by_name(tmp_path, monkeypatch):
    words = tokenizer(CHATML)
    folder = tmp_path / "smollm2-135m"
    words.save_pretrained(folder)
    llama(len(words)).save_pretrained(folder)
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    loaded = LocalModel.load("smollm2-135m", dtype=torch.float64)
    assert loaded.model.dtype == torch.float64
    own = LocalModel(llama(len(words)), words)
    expected = own.score(PROMPTS[0], OPTIONS)
    assert loaded.score(PROMPTS[0], OPTIONS) == pytest.approx(expected, abs=1e-5)
