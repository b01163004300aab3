"""Prompts, masks and batches, with chat templates of every habit."""

import doctest
import re

import pytest
import torch
from tiny_models import byte_level_bpe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ftlib import models as ftlib_models
from ftlib.cft import data
from ftlib.cft.data import (
    INSTRUCTION,
    Example,
    PackingCollator,
    PaddingCollator,
    check_packing,
    criticise,
    encode_prompts,
    imitate,
    supervise,
    tokenize_examples,
)
from ftlib.sequences import IGNORED

QUESTION, RESPONSE = "What is 3 * 8?", "3*8=25\nThe answer is 25."
CRITIQUE = "Not right: 3*8=24.\nVerdict: wrong"
LONG = 10_000
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|channel|>",
]

# --- templates, each with what it makes of (question, critique) ---------------

CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' }}{% if system and loop.first %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No special token anywhere: turns are lines.
LINES = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n---\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# The model chooses a channel by itself, before the answer.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>assistant<|channel|>final\n' + m.content + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# (template, text before the prompt, text after it, text before the target, the end)
TEMPLATES = {
    "chatml": (
        CHATML,
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
    ),
    "llama-3": (
        LLAMA_3,
        "<s><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, "<s>[INST] ", " [/INST]", " ", "</s>"),
    "gemma": (
        GEMMA,
        "<s><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "",
        "<end_of_turn>",
    ),
    "lines": (LINES, "user:\n", "\n---\nassistant:\n", "", "</s>"),
    "channels": (
        CHANNELS,
        "<|im_start|>user\n",
        "<|im_end|><|im_start|>assistant",
        "<|channel|>final\n",
        "<|im_end|>",
    ),
    "none": (None, "", "\n", "", "</s>"),
}


# GPT-2 splits two line breaks before a word, and joins them at the end of a text.
TEMPLATES_AND_WORDS = [
    (kind, words)
    for kind in TEMPLATES
    for words in ("gpt-2", "llama-3")
    if (kind, words) != ("llama-3", "gpt-2")
]
# How Llama 3 splits a text into words; unlike GPT-2, line breaks are always together.
LLAMA_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def make_tokenizer(template=None, *, words="gpt-2", bos=False, eos=False, **options):
    """A byte-level BPE trained on the spot, which may put BOS and EOS around a text."""
    llama_3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    corpus = [QUESTION, RESPONSE, f" {CRITIQUE}", INSTRUCTION, "assistant user\n\n\n"]
    tokenizer = byte_level_bpe(
        corpus * 20,
        SPECIAL,
        size=400,
        around=f"{'<s>' if bos else ''} $A {'</s>' if eos else ''}".strip(),
        pre_tokenizer={"gpt-2": None, "llama-3": llama_3}[words],
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **named
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


def learned(features):
    return [label for label in features["labels"] if label != IGNORED]


def only(tokenizer, example, max_length=LONG):
    tokenized = tokenize_examples([example], tokenizer, max_length)
    assert tokenized.dropped == {}
    return tokenized.features[0]


# --- records -------------------------------------------------------------------


def test_imitation_learns_the_response_and_critique_reads_it():
    assert imitate(QUESTION, RESPONSE) == (QUESTION, RESPONSE)
    example = criticise(QUESTION, RESPONSE, CRITIQUE)
    assert example.prompt == (
        f"{INSTRUCTION}\n\nQuestion:\n{QUESTION}\n\nSolution:\n{RESPONSE}"
    )
    assert example.target == CRITIQUE


# --- masks ---------------------------------------------------------------------


@pytest.mark.parametrize("example", ["imitate", "criticise"])
@pytest.mark.parametrize(("kind", "words"), TEMPLATES_AND_WORDS)
def test_labels_are_the_target_and_the_end_of_its_turn(kind, words, example):
    template, before, after, header, end = TEMPLATES[kind]
    tokenizer = make_tokenizer(template, words=words)
    record = {
        "imitate": imitate(QUESTION, RESPONSE),
        "criticise": criticise(QUESTION, RESPONSE, CRITIQUE),
    }[example]
    features = only(tokenizer, record)
    asked = before + record.prompt + after
    assert tokenizer.decode(features["input_ids"]) == (
        asked + header + record.target + end
    )
    assert tokenizer.decode(learned(features)) == header + record.target + end
    length = len(encode_prompts(tokenizer, [record.prompt])[0])
    assert features["labels"][:length] == [IGNORED] * length
    assert features["labels"][length:] == features["input_ids"][length:]


@pytest.mark.parametrize(
    ("kind", "words"), [pair for pair in TEMPLATES_AND_WORDS if pair[0] != "none"]
)
def test_prompts_are_those_that_transformers_writes_for_generation(kind, words):
    tokenizer = make_tokenizer(TEMPLATES[kind][0], words=words, bos=True, eos=True)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )["input_ids"]
    assert encode_prompts(tokenizer, [QUESTION]) == [expected]
    features = only(tokenizer, imitate(QUESTION, RESPONSE))
    assert features["input_ids"][: len(expected)] == expected


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_without_a_template_the_tokenizer_begins_and_eos_ends(bos, eos):
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    features = only(tokenizer, imitate(QUESTION, RESPONSE))
    start = "<s>" if bos else ""
    text = tokenizer.decode(features["input_ids"])
    assert text == f"{start}{QUESTION}\n{RESPONSE}</s>"
    assert tokenizer.decode(learned(features)) == f"{RESPONSE}</s>"


def test_an_unknown_last_word_is_not_taken_for_an_end():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "2": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>"
    )
    assert learned(only(tokenizer, imitate("2", "2 3"))) == [2, 0, 1]


def test_white_space_around_a_target_is_taken_off(tokenizer):
    expected = only(tokenizer, imitate(QUESTION, "24"))
    assert only(tokenizer, imitate(QUESTION, "\n\n 24 \n")) == expected


def test_transformers_own_mask_is_all_zeros_without_generation_blocks(tokenizer):
    """Why the mask is not taken from there."""
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": RESPONSE},
    ]
    masked = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True)
    assert not any(masked["assistant_masks"])


HOSTILE = {
    "says how many turns follow": (
        "{{ messages | length }}" + CHATML,
        "another chat_template",
    ),
    "treats the last turn apart": (
        CHATML.replace("m.content", "(m.content if loop.last else 'cut')"),
        "another chat_template",
    ),
    "asks with a space at the end": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "not in a space",
    ),
    "asks with two line breaks, which the tokenizer parts": (
        LLAMA_3,
        "a single line break",
    ),
    "shortens answers": (
        CHATML.replace("m.content", "m.content.split('Verdict')[0]"),
        "was written as 'Not right",
    ),
    "leaves answers out": (
        CHATML.replace("m.content", "(m.content if m.role == 'user' else '')"),
        "keeps answers as they are",
    ),
}


@pytest.mark.parametrize("habit", HOSTILE)
def test_a_template_whose_prompts_cannot_be_told_apart_is_refused_by_name(habit):
    template, message = HOSTILE[habit]
    tokenizer = make_tokenizer(template, name_or_path="hostile/model")
    with pytest.raises(ValueError, match=message) as caught:
        only(tokenizer, criticise(QUESTION, RESPONSE, CRITIQUE))
    assert "chat template of hostile/model" in str(caught.value)
    assert repr(template[:60]) in str(caught.value)


@pytest.mark.parametrize("template", [None, LINES])
def test_a_tokenizer_that_can_end_nothing_is_refused(template):
    tokenizer = make_tokenizer(template, eos_token=None)
    with pytest.raises(ValueError, match="no eos_token"):
        only(tokenizer, imitate(QUESTION, RESPONSE))


@pytest.mark.parametrize("name", ["smollm2-135m", "stories15m"])
def test_real_tokenizers(name):
    if not ftlib_models.available(name):
        pytest.skip(f"{name} is neither in FTLIB_MODEL_DIR nor in a cache")
    from transformers import AutoTokenizer

    folder = ftlib_models.locate(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    example = criticise(QUESTION, RESPONSE, CRITIQUE)
    features = only(tokenizer, example)
    text = tokenizer.decode(features["input_ids"])
    if tokenizer.chat_template:
        assert text.startswith("<|im_start|>system\n")
        assert text.endswith(f"<|im_start|>assistant\n{CRITIQUE}<|im_end|>")
    else:
        assert text.split() == f"<s> {example.prompt}\n{CRITIQUE}</s>".split()
    target = tokenizer(CRITIQUE, add_special_tokens=False).input_ids
    assert tokenizer.decode(learned(features)[:-1]) == tokenizer.decode(target)
    assert learned(features)[-1] == tokenizer.eos_token_id


# --- what does not fit ---------------------------------------------------------


def test_a_long_target_is_cut_without_an_end_and_counted(tokenizer):
    example = criticise(QUESTION, RESPONSE, CRITIQUE)
    whole = only(tokenizer, example)
    length = len(whole["input_ids"])
    assert tokenize_examples([example], tokenizer, length).truncated == 0
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for missing in (1, 5):
        cut = tokenize_examples([example], tokenizer, length - missing)
        assert cut.truncated == 1
        assert cut.dropped == {}
        assert cut.features[0] == {k: v[:-missing] for k, v in whole.items()}
        assert end not in learned(cut.features[0])


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tokenizer):
    example = criticise(QUESTION, RESPONSE, CRITIQUE)
    prompt = encode_prompts(tokenizer, [example.prompt])[0]
    for room in (0, -3):
        tokenized = tokenize_examples([example], tokenizer, len(prompt) + room)
        assert tokenized == ([], 0, {"prompt too long": 1})
    one = tokenize_examples([example], tokenizer, len(prompt) + 1)
    assert one.truncated == 1
    assert one.features[0]["input_ids"][:-1] == prompt
    assert len(learned(one.features[0])) == 1


def test_empty_critiques_are_dropped_and_empty_responses_kept(tokenizer):
    examples = [
        criticise(QUESTION, RESPONSE, ""),
        criticise(QUESTION, RESPONSE, " \n"),
        criticise(QUESTION, "", CRITIQUE),
    ]
    tokenized = tokenize_examples(examples, tokenizer, LONG)
    assert tokenized.dropped == {"empty target": 2}
    assert "Solution:\n<|im_end|>" in tokenizer.decode(
        tokenized.features[0]["input_ids"]
    )


@pytest.mark.parametrize("words", ["gpt-2", "llama-3"])
def test_an_empty_response_without_a_template(words):
    """Its prompt ends in a line break of its own."""
    tokenizer = make_tokenizer(words=words)
    features = only(tokenizer, criticise(QUESTION, "", CRITIQUE))
    text = tokenizer.decode(features["input_ids"])
    assert text.endswith(f"Solution:\n{CRITIQUE}</s>")
    assert tokenizer.decode(learned(features)) == f"{CRITIQUE}</s>"


def test_control_tokens_in_the_text_are_dropped_and_counted(tokenizer):
    examples = [
        criticise(QUESTION, "25<|im_end|>\n<|im_start|>assistant\nRight", CRITIQUE),
        criticise(QUESTION, RESPONSE, "It is </s>24</s>."),
        criticise(QUESTION, "25 <b>bold</b> [INST]", CRITIQUE),
    ]
    tokenized = tokenize_examples(examples, tokenizer, LONG)
    assert len(tokenized.features) == 1
    assert tokenized.dropped == {"control token": 2}


def test_nothing_makes_nothing(tokenizer):
    assert tokenize_examples([], tokenizer, 8) == ([], 0, {})
    assert encode_prompts(tokenizer, []) == []


def test_supervise_masks_prompts_of_plain_ids():
    assert supervise([5, 6], [7, 8, 1], 9) == {
        "input_ids": [5, 6, 7, 8, 1],
        "labels": [IGNORED, IGNORED, 7, 8, 1],
    }
    assert supervise([5, 6], [7, 8, 1], 3)["labels"] == [IGNORED, IGNORED, 7]


# --- batches -------------------------------------------------------------------


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, 61, (length,), generator=generator).tolist()

    shapes = [(5, 3), (7, 2), (2, 6), (1, 1)]
    return [supervise(ids(n), [*ids(m), 2], 64) for n, m in shapes]


@pytest.mark.parametrize("multiple", [1, 8])
def test_padding_equals_transformers_collator(features, tokenizer, multiple):
    tokenizer.pad_token = tokenizer.eos_token
    peer = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
    expected = peer([dict(f) for f in features])
    batch = PaddingCollator(tokenizer.pad_token_id, multiple)(features)
    assert batch.keys() == expected.keys()
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.shape[1] % multiple == 0


def test_padding_with_eos_leaves_its_labels(features):
    batch = PaddingCollator(pad_token_id=2)(features)
    is_eos_label = (batch["labels"] == 2) & (batch["attention_mask"] == 1)
    assert is_eos_label.sum(1).tolist() == [1, 1, 1, 1]
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED).all()


COMMON = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = COMMON | {"intermediate_size": 24, "num_key_value_heads": 2}
PACKABLE = {
    "llama": (LlamaForCausalLM, LlamaConfig, WIDE),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, WIDE),
    "gpt2": (GPT2LMHeadModel, GPT2Config, COMMON),
}


def make_model(kind, **options):
    torch.manual_seed(0)
    model, config, sizes = PACKABLE[kind]
    # Weights larger than usual, so that a leak is not small.
    return model(config(**sizes, initializer_range=0.3, **options)).eval()


def token_losses(model, batch):
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(logits.mT, labels, reduction="none")
    return losses[labels != IGNORED]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_tokens_have_the_losses_of_each_example_alone(kind, attention, features):
    model = make_model(kind, attn_implementation=attention)
    alone = torch.cat([token_losses(model, PaddingCollator()([f])) for f in features])
    padded = token_losses(model, PaddingCollator()(features))
    packed = PackingCollator()(features)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token_losses(model, packed), alone, rtol=1e-4, atol=1e-5)
    assert len(alone) == sum(len(learned(f)) for f in features)
    # With a cache there is no mask between examples: this is what the batch prevents.
    leaking = token_losses(model, packed | {"use_cache": True})
    assert (leaking - alone).abs().max() > 0.01
    check_packing(model, features)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_examples_cannot_reach_each_other(kind, attention, features):
    """Other tokens in the first example leave the rest as it is, bit for bit."""
    model = make_model(kind, attn_implementation=attention)
    first, *rest = features
    other = supervise([9] * 5, [11, 12, 13, 2], 64)
    assert len(other["labels"]) == len(first["labels"])
    with torch.no_grad():
        one, two = (
            model(**PackingCollator()([start, *rest])).logits[0]
            for start in (first, other)
        )
    length = len(first["labels"])
    assert not torch.equal(one[:length], two[:length])
    assert torch.equal(one[length:], two[length:])


def test_packing_resets_positions_and_labels_no_first_token(features):
    batch = PackingCollator()(features)
    assert batch["input_ids"].shape == (1, sum(len(f["labels"]) for f in features))
    starts = batch["position_ids"] == 0
    assert starts.sum() == len(features)
    assert (batch["labels"][starts] == IGNORED).all()
    assert "attention_mask" not in batch


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_head=4)),
        MambaForCausalLM(
            MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2)
        ),
    ],
    ids=["bloom", "mamba"],
)
def test_models_that_cannot_take_packed_examples_are_told(model, features):
    model.train()
    with pytest.raises(ValueError, match="cannot take packed examples"):
        check_packing(model, features)
    assert model.training


def test_packing_is_not_checked_where_that_would_tell_nothing(features):
    with pytest.raises(ValueError, match="two or more"):
        check_packing(make_model("llama"), features[:1])
    with pytest.raises(ValueError, match="load them in float32"):
        check_packing(make_model("llama").bfloat16(), features)


# --- the example of the module -------------------------------------------------


class WhatIsWanted(doctest.OutputChecker):
    """Takes any output where the example shows none: trainers are talkative."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_modules_example_runs(tmp_path):
    """On a tiny model, whose loss then falls."""
    tokenizer = make_tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(**WIDE | {"vocab_size": len(tokenizer), "hidden_size": 32})
    records = [
        (f"What is {n} * 2?", f"{n}*2={2 * n + 1}", f"It is {2 * n}.") for n in range(8)
    ]
    names = {
        "model": LlamaForCausalLM(config),
        "tokenizer": tokenizer,
        "records": records,
        "folder": tmp_path,
    }
    test = doctest.DocTestParser().get_doctest(data.__doc__, names, "data", None, 0)
    assert sum("train" in step.source for step in test.examples) >= 3
    runner = doctest.DocTestRunner(WhatIsWanted())
    assert runner.run(test, clear_globs=False).failed == 0
    names = test.globs
    losses = names["history"].column("loss")
    assert losses[-1] < 0.8 * losses[0]
    assert names["result"].training_loss < losses[-1]
    example = Example(*names["examples"][0])
    assert re.search(r"Solution:\n0\*2=1$", example.prompt)
