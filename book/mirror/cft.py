# %% [markdown]
# # CFT: learn to criticise instead of to imitate
#
# *Wang, Yue and Chen, “Critique Fine-Tuning: Learning to Critique is More Effective
# than Learning to Imitate”* {cite:p}`wang2025critique`.
#
# Take fifty thousand questions with answers from the web, of which nearly half are
# wrong. Fine-tune on them as they are, and the model learns the mistakes along with
# the rest. Throw the wrong ones out, and you need someone who can tell. Critique
# fine-tuning does a third thing. It shows the model the question *and* the doubtful
# answer, and has it write what a stronger model says about that answer. At the exam
# there is no critique any more: the model simply answers. The paper reports that this
# beats imitation, even imitation of the stronger model's own answers.
#
# Is it the criticising that helps? In this chapter you will take the method apart,
# piece by piece, in a world where every answer can be checked.

# %% [markdown]
# ## What you will be able to do
#
# * write the data, the mask and the loss of critique fine-tuning for any model with a
#   chat template, and fine-tune a model of your own in ten lines;
# * say what imitation of noisy answers converges to, and why nothing in the critique
#   objective promises a better answer;
# * tell by experiment which part of a critique helps, and which part hurts;
# * grade mathematical answers exactly, and see what a lenient grader does to a table;
# * read a results table with the standard errors that it leaves out.
#
# You need: cross-entropy, PyTorch, and some idea of what a chat template is.

# %% tags=["generated", "hide-cell", "nbval-skip", "skip-execution"]
# Written by `make generate`. On Colab this installs ftlib and what is not
# there yet; torch, triton and numpy stay as they are. Colab's torchao is
# older than peft accepts, and ftlib does not use it.
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/finetuning-book/finetuning-book@v0.1.0"
    # !pip list --format=freeze | grep -E "^(numpy|torch|triton)=" > kept.txt
    # !pip install -q -c kept.txt "ftlib[models] @ {source}"
    # !pip uninstall -q -y torchao

# %% tags=["generated"]
# Written by `make generate`: where this runs, at which scale, with what.
from ftlib import runtime

print(runtime.report())

# %% tags=["hide-input"]
import re
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from torch import nn
from torch.nn import functional as F

from ftlib import data, metrics, models, plots, published, results, runtime
from ftlib.cft import annotations, chains, equations, evaluation, experiment
from ftlib.cft.critiques import first_wrong_step, write_critique
from ftlib.cft.data import PaddingCollator, criticise, tokenize_examples
from ftlib.cft.evaluation import VOCABULARY
from ftlib.cft.objective import Learner, masked_loss, training_loss
from ftlib.cft.settings import CHAINS, LEARNING_RATES, Recipe
from ftlib.cft.solutions import CHAIN, EQUATION, GSM8K
from ftlib.models.tiny import tiny_gpt
from ftlib.outcomes import outcomes
from ftlib.training import TrainingSettings, train

plots.use_style()
records = results.load("cft", "cpu")
paper = published.load("cft")

# %% [markdown]
# ## The idea in one picture
#
# Our questions are chains of sums modulo 11, worked from left to right. The student who
# answered this one has a misconception. Below is what each way of fine-tuning makes of
# question and answer. The model **reads** what is pale and **writes** what is dark.

# %% mystnb={"image": {"alt": "Six rows of boxes, one word in each. In every row the question comes first, pale. SFT noisy then has the student's wrong solution in dark boxes, SFT teacher the right one. The four CFT rows show the wrong solution in pale boxes with red frames around its wrong values, then a word that asks for a critique, then in dark boxes the critique: only a verdict; the first wrong step and the verdict; that step corrected as well; or the whole right solution and the verdict."}} tags=["hide-input"]
work = experiment.homework(CHAINS, seed=0)
CHOSEN = next(  # goes wrong in the middle
    i
    for i, (ours, theirs) in enumerate(
        zip(work.responses, work.references, strict=True)
    )
    if ours.answer != theirs.answer
    and first_wrong_step(ours, theirs) in (1, 2)
)
shown_arms = {
    "SFT noisy": Recipe("response"),
    "SFT teacher": Recipe("solution"),
    **{f"CFT {f}": Recipe("critique", f) for f in experiment.FORMS},
}


def wrong_places(recipe):
    """Positions of the response's wrong values in an example."""
    response, reference = work.responses[CHOSEN], work.references[CHOSEN]
    given = VOCABULARY.encode(response.text(CHAIN))
    right = VOCABULARY.encode(reference.text(CHAIN))
    start = len(evaluation.ask(response.question))
    if recipe.target == "solution":
        return []
    pairs = enumerate(zip(given, right, strict=True), start)
    return [place for place, (a, b) in pairs if a != b]


def draw_words(ax, y, words, learned, wrong):
    x = 0.0
    for i, (word, dark) in enumerate(zip(words, learned, strict=True)):
        word = {"\n": "↵", "<eos>": "■"}.get(word, word)
        box = {
            "boxstyle": "round,pad=0.18",
            "facecolor": plots.colour(0) if dark else "#eeeeee",
            "edgecolor": "#c00000" if i in wrong else "none",
            "linewidth": 1.4,
        }
        ax.text(
            x, y, word, fontsize=6.9, family="monospace", va="center",
            color="white" if dark else "black", bbox=box,
        )
        x += len(word) + 1.0


fig, ax = plt.subplots(figsize=(7, 2.5))
for row, (name, recipe) in enumerate(shown_arms.items()):
    one = experiment.features(recipe, work, seed=0)[CHOSEN]
    words = [VOCABULARY.words[i] for i in one["input_ids"]]
    learned = [label >= 0 for label in one["labels"]]
    draw_words(ax, -row, words, learned, wrong_places(recipe))
    ax.text(-2, -row, name, ha="right", va="center", fontsize=8)
ax.set(xlim=(-15, 84), ylim=(-len(shown_arms) + 0.4, 0.6))
ax.axis("off")
plt.show()

# %% [markdown]
# Framed in red are the student's wrong values. SFT noisy is taught to write them. The
# critics only read them. ↵ is the end of a line and ■ the token that ends a text.
#
# ## What the paper claims

# %% tags=["hide-input"]
table = paper["sft-and-cft"]


def theirs(arm, column, model="Qwen2.5-Math-7B"):
    return table.value(model, arm, column=column)


gain = {
    column: theirs("CFT", column) - theirs("SFT GPT-4o", column)
    for column in table.columns
}
claims = [
    ["", "claim", "where we answer it"],
    ["cft‑1", "Training to critique beats training to imitate",
     "the arms; the controls"],
    ["cft‑2", f"{gain['MATH']:+.1f} points on MATH and"
     f" {gain['Minerva']:+.1f} on Minerva over standard fine-tuning",
     "the grader; paper beside ours"],
    ["cft‑3", "50,000 examples rival models trained on over two million",
     "paper beside ours"],
    ["cft‑4", "Better reasoning at a lower computational cost",
     "equal tokens; paper beside ours"],
]
Markdown(
    f"""
{results.markdown_table(claims)}

The gains of cft‑2 are over imitation of GPT-4o's answers, on
Qwen2.5-Math-7B. This is the paper's main table for that model
({table.source}; percent of problems solved):

{table.markdown(["Qwen2.5-Math-7B"])}
"""
)


# %% [markdown]
# Read the arms with one question in mind: who told the model what is right? *SFT*
# imitates answers from the web. *SFT verified* imitates web answers that GPT-4o found
# right, to other questions. *SFT GPT-4o* imitates GPT-4o's answers. *CFT* imitates
# GPT-4o's critiques of the web answers, and these usually contain the right solution.
# So CFT against SFT compares two things at once, the form of the target and the
# knowledge in it. The fair rival is SFT GPT-4o, on the same questions.
#
# ## The equations
#
# With question $x$, response $y$ and critique $c$ the two objectives are
#
# $$
# \text{SFT:}\;\; \max_\theta\, \mathbb{E} \log P_\theta(y \mid x),
# \qquad
# \text{CFT:}\;\; \max_\theta\, \mathbb{E} \log P_\theta(c \mid x, y)
# = \max_\theta\, \mathbb{E}\sum_t \log P_\theta(c_t \mid x, y, c_{<t}) .
# $$
#
# That is all of it. No reward, no KL, no weighting. The exam asks for $P_\theta(y \mid
# x)$ in both cases.
#
# **What SFT converges to.** A model that can represent anything ends at the
# distribution of its data, $P(y \mid x)$. If on some kind of question a share $m$ of the
# students makes the *same* mistake, a sampled answer is wrong with probability $m$, and
# the most likely answer turns from right to wrong as $m$ passes one half. If instead
# their mistakes are accidents, spread over many wrong answers, the right one stays
# the most frequent long after $m$ has passed one half. So noise that has a system is
# the enemy of imitation, and noise without one hardly is.
#
# **What CFT converges to.** For a model that can represent anything, nothing. Its
# optimum fixes $P(c \mid x, y)$, and $P(y \mid x)$ does not occur in the objective: it
# may stay as it was. Whatever CFT does for the answers, it does because a *network*
# uses the same weights for both. This is ours, not the paper's, and it leads to a
# prediction: the more a critique looks like an answer, the more it should teach
# answering. A critique that works the question out again (*rederive*) contains an
# answer in the very words of the exam. One that only judges (*verdict*) does not.
#
# **How the terms are averaged** the paper does not say. With $n$ examples of $T_i$
# target tokens, transformers' loss divides by $\sum_j T_j$, so that long critiques
# weigh more. `ftlib`'s default divides by $n\,T_i$: every example weighs the same, and
# accumulating gradients over chunks changes nothing. Exercise 2 shows the difference.
#
# ## Build it in forty lines
#
# First the mask and the loss. Labels of −100 are what PyTorch's cross-entropy ignores.

# %% tags=["nbval-check-output"]
def make_example(prompt, target, end):
    """Token ids, and labels that leave the prompt out."""
    ids = [*prompt, *target, end]
    return ids, [*[-100] * len(prompt), *target, end]


def make_batch(examples):
    """Pad on the right; padding has no label."""
    length = max(len(ids) for ids, _ in examples)
    ids = [ids + [0] * (length - len(ids)) for ids, _ in examples]
    labels = [row + [-100] * (length - len(row)) for _, row in examples]
    return torch.tensor(ids), torch.tensor(labels)


def critique_loss(model, ids, labels):
    """Mean over examples of the mean over their target tokens."""
    logits, targets = model(ids).logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return (loss.sum(1) / (targets != -100).sum(1)).mean()


question = work.responses[CHOSEN].question
response = VOCABULARY.encode(work.responses[CHOSEN].text(CHAIN))
prompt = evaluation.ask_critique(question, response, "verdict")
verdict = VOCABULARY.encode("Conclusion: wrong")
example = make_example(prompt, verdict, VOCABULARY.end)
for i, label in zip(*example, strict=True):
    print(f"{VOCABULARY.words[i]!r:14} {'' if label < 0 else '← learned'}")


# %% [markdown]
# Then a model for which everything is known: a **table**. It has one row of logits for
# each text that can come before a token, and shares nothing between rows. Three
# questions, three answers, and students who are right 70 %, 40 % and 10 % of the time.
# Train it both ways.

# %% tags=["nbval-check-output"]
class Table(nn.Module):
    """A language model without generalisation: one row a context."""

    def __init__(self, words=9, longest=4):
        super().__init__()
        self.rows = nn.Embedding((words + 1) ** longest, words)
        nn.init.zeros_(self.rows.weight)
        self.base = words + 1

    def forward(self, ids):
        context = torch.zeros(len(ids), dtype=torch.long)
        rows = []
        for token in ids.T:
            context = context * self.base + token + 1
            rows.append(self.rows(context % self.rows.num_embeddings))
        return results_like(torch.stack(rows, 1))


def results_like(logits):
    """What a model of transformers returns, as far as we need it."""
    return type("Output", (), {"logits": logits})


END, RIGHT, WRONG, ANSWERS = 0, 1, 2, (3, 4, 5)
QUESTIONS = {6: 0.7, 7: 0.4, 8: 0.1}  # and how often students are right
sft, cft = [], []
for asked, share in QUESTIONS.items():
    solution = ANSWERS[0]
    for k in range(100):
        given = solution if k < 100 * share else ANSWERS[1]
        judged = RIGHT if given == solution else WRONG
        sft.append(make_example([asked], [given], END))
        cft.append(make_example([asked, given], [solution, judged], END))
for name, examples in {"SFT": sft, "CFT": cft}.items():
    torch.manual_seed(0)
    model = Table()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ids, labels = make_batch(examples)
    for _ in range(300):
        optimizer.zero_grad()
        critique_loss(model, ids, labels).backward()
        optimizer.step()
    exam = model(torch.tensor(list(QUESTIONS))[:, None]).logits.softmax(-1)
    right = exam[:, 0, ANSWERS[0]].detach().numpy()
    expected = list(QUESTIONS.values()) if name == "SFT" else [1 / 9] * 3
    np.testing.assert_allclose(right, expected, atol=5e-3)
    print(f"{name}: P(right answer) =", right.round(2))

# %% [markdown]
# The theory to two digits: imitation reproduces the students, and critique leaves a
# table where it was, at one in nine words, although every critique it learned contains
# the solution. What CFT does must come from generalisation, so from here on the model is
# a network.
#
# The same loss in `ftlib` never stores the logits (it goes through
# [the vocabulary head](vocabulary_head.ipynb)). On a small network the two agree, and so do
# their gradients, with the one of the tokens that are only read exactly zero:

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
small = tiny_gpt(len(VOCABULARY), context=evaluation.CONTEXT)
rows = [make_example(prompt, verdict, VOCABULARY.end)]
other = work.responses[CHOSEN + 1]
rows.append(
    make_example(
        evaluation.ask(other.question),
        VOCABULARY.encode(other.text(CHAIN)),
        VOCABULARY.end,
    )
)
ids, labels = make_batch(rows)
by_hand = critique_loss(small, ids, labels)
ours = masked_loss(small, ids, labels)
torch.testing.assert_close(by_hand, ours.loss, rtol=1e-6, atol=0)
gradients = [
    torch.autograd.grad(loss, list(small.parameters()))
    for loss in (by_hand, ours.loss)
]
torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
logits = small(ids).logits.detach().requires_grad_()
critique_loss(lambda _: results_like(logits), ids, labels).backward()
read_only = torch.cat([labels[:, 1:] < 0, torch.ones(2, 1).bool()], 1)
assert logits.grad[read_only].abs().max() == 0
print("loss and gradients agree;", int(ours.tokens), "tokens are learned,",
      int(read_only.sum()), "positions have gradient 0")

# %% [markdown]
# ## Use ftlib's
#
# ### Critiques by rule
#
# The paper has GPT-4o write the critiques. We write them by rule, in four forms, so
# that we know what is in them. `ftlib.cft` does it for the chains above, for linear
# equations, and for real solutions. All end in one line with the verdict, the wording
# that the paper asks its teacher for.

# %% tags=["nbval-check-output"]
equation = equations.Equation(factor=3, shift=5, root=5)
mistaken = equations.solve(equation, ["sign"])
print(equation.question, "\n" + mistaken.text(EQUATION))
for form in experiment.FORMS:
    critique = write_critique(
        form, mistaken, equations.solve(equation), EQUATION
    )
    print(f"\n--- {form} ---\n{critique}")

# %% [markdown]
# ### A real problem, from text to grade
#
# GSM8K {cite:p}`cobbe2021training` has grade-school problems whose solutions annotate
# each calculation, as in `<<48/2=24>>`. That lets us make a wrong solution by rule: change
# one calculation, and let the wrong value run on through everything that follows from
# it. Where we could not be sure which later numbers follow from it, the item is refused.

# %% tags=["hide-input"]
try:
    ITEMS = data.gsm8k("test")
except data.DataUnavailable:  # no network: one problem of our own
    ITEMS = [
        {
            "question": "Ann has 4 boxes of 6 eggs. She breaks 5 eggs."
            " How many are whole?",
            "answer": "Ann has 4 * 6 = <<4*6=24>>24 eggs.\n"
            "24 - 5 = <<24-5=19>>19 are whole.\n#### 19",
            "reference": "19",
        }
    ]

# %% tags=["hide-input"]
made, refused = annotations.corrupt_all(ITEMS, seed=0)
broken = next(  # wrong from the first of three steps on, and short
    (c for c in made
     if first_wrong_step(c.response, c.reference) == 0
     and len(c.reference.steps) == 3 and len(c.reference.question) < 200),
    made[0],
)
item = next(
    i for i in ITEMS if i["question"] == broken.reference.question
)


def show(title, text):
    print(f"--- {title} ---")
    for line in text.splitlines():
        print(textwrap.fill(line, 74))
    print()


show("question", item["question"])
show("solution, as GSM8K has it", item["answer"])
show(f"response: a wrong {broken.kind}", broken.response.text(GSM8K))
for form in experiment.FORMS:
    critique = write_critique(
        form, broken.response, broken.reference, GSM8K
    )
    show(f"critique: {form}", critique)
print(f"{len(made):,} of {len(ITEMS):,} test problems can be made wrong;"
      f" refused: {refused.total()}")

# %% [markdown]
# The text becomes tokens through the model's own chat template. The mask that
# transformers offers for this needs templates with `{% generation %}` marks, which
# published templates seldom have, and without them it is all zeros. So
# `tokenize_examples` writes the prompt just as it will be written at the exam, checks
# token by token that the conversation begins with it, and learns what follows: the
# critique and the token that ends the turn. Any tokenizer will do. Here is one made
# on the spot, a token for each word, with a template of its own.

# %%
from tokenizers import Tokenizer, models as words, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(texts):
    """One token a word, and a chat template."""
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(words.WordLevel(unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=marks)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>",
        additional_special_tokens=marks[:2],
    )
    wrapped.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return wrapped


located = write_critique(
    "locate", broken.response, broken.reference, GSM8K
)
one = criticise(item["question"], broken.response.text(GSM8K), located)
words_only = word_tokenizer([one.prompt, one.target])
(features,) = tokenize_examples([one], words_only, max_length=512).features
pieces = words_only.convert_ids_to_tokens(features["input_ids"])
learned = [label >= 0 for label in features["labels"]]
first = learned.index(True)
print("read:   ", textwrap.shorten(" ".join(pieces[:first]), 60), "…",
      " ".join(pieces[first - 3 : first]))
print("learned:", textwrap.fill(" ".join(pieces[first:]), 66))
assert not any(learned[:first])
assert pieces[-1] == "<|end|>"
assert all(learned[first:])

# %% [markdown]
# ### Ten lines for a model of yours
#
# Bring questions, responses and critiques, three strings for each example. Here SmolLM2
# with 135 million parameters stands for your model, and eight short GSM8K problems for
# your data.

# %%
if models.available("smollm2-135m", fetch=True):
    model, tokenizer = models.load_causal_lm("smollm2-135m")
    short = sorted(made, key=lambda c: len(c.reference.question))[:8]
    triples = [
        (c.response.question, c.response.text(GSM8K),
         write_critique("rederive", c.response, c.reference, GSM8K))
        for c in short
    ]
    # From here on it is your code.
    examples = [criticise(*triple) for triple in triples]
    ready = tokenize_examples(examples, tokenizer, max_length=512)
    print(f"{len(ready.features)} examples; {ready.truncated} cut short;"
          f" dropped: {ready.dropped or 'none'}")
    settings = TrainingSettings(
        steps=4, batch_size=min(2, len(examples)), learning_rate=2e-5
    )
    history = train(
        Learner(model), ready.features, training_loss, settings,
        collate=PaddingCollator(tokenizer.pad_token_id),
    )
    print("loss:", np.round(history.column("loss"), 2))
else:
    print("smollm2-135m is not here: `ftlib models` says where to get it")


# %% [markdown]
# `tokenizer` may have any chat template, or none; `PackingCollator` packs examples into
# one row where the model allows it; `Learner(model)` runs under Accelerate with several
# processes; and since the features are those of transformers, its `Trainer` takes them
# as well.
#
# Things go wrong with such data, and each has a stated outcome:

# %% tags=["nbval-check-output"]
def outcome(question, response, critique, max_length=64):
    """What becomes of one example."""
    made = criticise(question, response, critique)
    texts = [made.prompt, made.target]
    tokenizer = word_tokenizer(texts)
    done = tokenize_examples([made], tokenizer, max_length)
    if done.dropped:
        return f"dropped: {next(iter(done.dropped))}"
    ids = done.features[0]["labels"]
    ends = ids[-1] == tokenizer.eos_token_id
    cut = " (cut short)" if done.truncated else ""
    return f"kept{cut}, {'ends' if ends else 'no end token is learned'}"


long = "word " * 80
for case, triple in {
    "all is well": ("1 + 1?", "3", "Conclusion: wrong"),
    "empty response": ("1 + 1?", "", "Conclusion: wrong"),
    "critique too long": ("1 + 1?", "3", long),
    "question too long": (long, "3", "Conclusion: wrong"),
    "empty critique": ("1 + 1?", "3", "  "),
    "control token in a text": ("1 + 1?", "<|end|>", "Conclusion: wrong"),
}.items():
    print(f"{case:26} {outcome(*triple)}")

# %% [markdown]
# A critique that is cut teaches what is left of it, and not to stop there. A prompt
# is never cut: the critique would then speak of something that cannot be seen.
#
# ### A grader that you can trust
#
# A number in a table of results is made by a grader. The one published with the paper
# compares answers in many ways, one of them local to it: two numbers that agree when
# rounded to one decimal are equal (the function's name says two). `ftlib.metrics` reads
# integers, decimals, fractions, roots, tuples, intervals and LaTeX into exact numbers,
# and compares those. No text is ever run as code.

# %% tags=["nbval-check-output"]
print(f"{'answer':25} {'reference':12} {'ours':18} published rule")
for answer, reference in [
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"the answer is \sqrt{8}", r"2\sqrt{2}"),
    (r"\boxed{(1, -3)}", "(1,-3)"),
    (r"\boxed{[0, 1]}", "(0,1)"),
    ("#### 1,234", "1234"),
    ("0.12", "0.14"),
    ("1.6e-5", "1.9e-5"),
    (r"no idea", "7"),
    (r"\boxed{__import__('os')}", "7"),
]:
    graded = metrics.grade(answer, reference)
    try:
        lenient = metrics.published_rounding_rule(
            float(answer), float(reference)
        )
    except ValueError:
        lenient = "–"  # the rule is about plain numbers
    print(f"{answer:25.25} {reference:12} {graded.reason:18} {lenient}")


# %% [markdown]
# How much can such a rule matter? Ask the references themselves: for how many problems
# would *any* tiny number pass?

# %%
def tiny_references(problems):
    """How many references round to 0.0 without being zero."""
    numbers = []
    for problem in problems:
        try:
            numbers.append(float(problem["reference"]))
        except ValueError:
            continue
    passes = metrics.published_rounding_rule
    return sum(n != 0 and passes(n, 0) for n in numbers)


try:
    for name, problems in {
        "Minerva": data.minerva(), "MATH-500": data.math500(),
    }.items():
        tiny = tiny_references(problems)
        print(f"{name}: {tiny} of {len(problems)} problems"
              f" ({tiny / len(problems):.1%})")
except data.DataUnavailable as missing:
    print(missing)

# %% [markdown]
# On Minerva that is the size of the differences under discussion. It does not follow
# that the paper's numbers are wrong: we have not seen what the models wrote. It does
# follow that this benchmark wants an exact grader, or a stated relative tolerance.
# `grade` takes one. Its `relative_tolerance` is zero by default, and so it is in every
# record of this book. For Minerva, whose references are rounded measurements, we would
# state 0.01; no record here is of Minerva.
#
# An answer that takes too long must not stop the run. `grade_all` works in a process of
# its own and kills it when an item's time is up. To see it, we give it a judge that
# hangs: a regular expression that needs years.

# %% tags=["nbval-check-output"]
(hung,) = metrics.grade_all(
    ["(a+)+$"], ["a" * 40 + "b"], seconds=0.5, judge=re.match
)
print(hung)

# %% [markdown]
# ## Train it against fair baselines
#
# A tiny GPT (three layers, width 64) learns chain arithmetic from a solver who has
# three misconceptions, and has them nine times out of ten. A question where they change
# the answer is a **gap**, one that does not touch them is a **no-gap** question. The
# base has also seen critiques, in all four forms, but of no-gap answers only. So it
# knows what a critique is, and nowhere has it seen one correct a misconception.
#
# Every arm then fine-tunes that base on the same 500 questions, 60 % of them gaps, in
# the same number of steps and the same batch. The students who answered are mistaken
# three times out of four. What differs is what the model reads, what it writes, and
# how many right solutions it is thereby told:

# %% tags=["hide-input"]
informed = [["arm", "reads", "writes", "examples", "target tokens each",
             "right solutions told, of gap questions"]]
gap = round(CHAINS.questions * CHAINS.gap_share)
right = [
    ours.answer == theirs.answer
    for ours, theirs in zip(work.responses, work.references, strict=True)
]
told = {
    "SFT noisy": ("question", "response", sum(right[:gap])),
    "SFT verified": ("question", "response, if right", sum(right[:gap])),
    "SFT teacher": ("question", "right solution", gap),
    "CFT verdict": ("question, response", "verdict", 0),
    "CFT locate": ("question, response", "first wrong step, verdict", 0),
    "CFT fix": ("question, response", "that step, corrected, verdict", 0),
    "CFT rederive": ("question, response", "right solution, verdict", gap),
}
for arm, (reads, writes, solutions) in told.items():
    ((recipe,),) = experiment.MAIN[arm]
    made_of = experiment.features(recipe, work, seed=0)
    tokens = experiment.mean_target_tokens(made_of)
    informed.append([arm, reads, writes, str(len(made_of)),
                     f"{tokens:.1f}", f"{solutions} of {gap}"])
Markdown(results.markdown_table(informed))

# %% [markdown]
# The exam asks new questions, and all arms in the same way: the question, greedily. All
# questions are assigned to pre-training, training, validation or test by a hash of
# their text, for all seeds alike. Each arm has its own learning rate, the best of four on
# validation, with other seeds than those reported. Ten checkpoints are candidates, and
# validation chooses; the last one is shown too.
#
# **What we expected**, from small earlier runs in a simpler world: CFT rederive beats
# SFT noisy by 30 points or more on gap questions. It does not beat SFT teacher, which is
# told the same solutions. Verdict, locate and fix transfer little. A shuffled response
# does as well as the question's own. Trial runs with other questions came between this
# list and the records; the sizes were chosen in them, by what the base and SFT teacher
# did.
#
# Now live, with the first seed. The base is pre-trained once and then kept on disk.

# %%
torch.set_num_threads(1)  # so small a model is not faster on more
LIVE = ["SFT noisy", "CFT rederive"]
live = {}
for condition in experiment.conditions(CHAINS):
    if condition.experiment == "chains" and condition.name in LIVE:
        runtime.seed_everything(0)
        live[condition.name] = experiment.run(
            condition, condition.learning_rate, seed=0
        )
        scores = live[condition.name]
        print(f"{condition.name:13} gap {scores['gap'].value:6.1%}"
              f"   no-gap {scores['no-gap'].value:6.1%}"
              f"   last checkpoint, gap {scores['last gap'].value:6.1%}")

# %% tags=["nbval-check-output"]
# Sums of float32 differ between machines, and training amplifies that.
TOLERANCE = 0.15
chain_records = records.select(experiment="chains")


def seed_0(arm, metric):
    return float(chain_records.select(arm=arm).by_seed(metric)[0])


for arm in LIVE:
    for metric in ("gap", "no-gap"):
        distance = abs(live[arm][metric].value - seed_0(arm, metric))
        assert distance < TOLERANCE, (arm, metric, distance)
print("the live run agrees with the record of seed 0")
lead = live["CFT rederive"]["gap"].value - live["SFT noisy"]["gap"].value
print("CFT rederive leads SFT noisy by 30 points or more:", lead >= 0.3)

# %% [markdown]
# ## Evaluate it
#
# The records hold five seeds: five bases, five sets of questions, five exams of 500 gap
# and 500 no-gap questions. The dots are seeds; the marker with a black edge is their
# mean, with a bootstrap interval.

# %% mystnb={"image": {"alt": "Three panels with one row an arm. Gap questions, chosen and last checkpoint: base, CFT verdict, CFT locate and CFT fix are at zero, SFT noisy near 0.1, SFT verified near 0.6, CFT rederive near 0.75 and SFT teacher above 0.9. No-gap questions, last checkpoint: all arms are near one, CFT verdict lowest."}} tags=["hide-input"]
MAIN_ARMS = list(experiment.MAIN)
PANELS = {
    "gap": "gap, chosen checkpoint",
    "last gap": "gap, last checkpoint",
    "last no-gap": "no-gap, last checkpoint",
}
fig, axes = plt.subplots(1, 3, figsize=(7, 3.4), sharey=True)
for ax, (metric, label) in zip(axes, PANELS.items(), strict=True):
    plots.dot_plot(ax, chain_records, metric, MAIN_ARMS)
    ax.set(xlim=(-0.03, 1.03), xlabel="share right", title=label)
    ax.title.set_size(9)
plt.show()


# %% tags=["hide-input"]
def percent_table(of, columns, arms):
    """Mean and interval over seeds, in percent."""
    rows = [["arm", *(f"{label} (%)" for label in columns.values())]]
    for arm in arms:
        chosen = of.select(arm=arm)
        intervals = [
            results.bootstrap(100 * chosen.values(metric))
            for metric in columns
        ]
        cells = [f"{m:.1f} [{a:.1f}, {b:.1f}]" for m, a, b, _ in intervals]
        rows.append([arm, *cells])
    return Markdown(results.markdown_table(rows))


percent_table(
    chain_records,
    {
        "gap": "gap",
        "gap valid": "gap, well formed",
        "no-gap": "no-gap",
        "last gap": "gap, last",
        "last gap valid": "gap, well formed, last",
        "last no-gap": "no-gap, last",
    },
    MAIN_ARMS,
)


# %% [markdown]
# *Well formed* is apart from right: whether the model wrote a solution, all of it, and
# nothing else.
#
# Seeds are few. Problems are many, and every arm answered the same ones, so arms can
# also be compared problem by problem: the records keep every outcome.

# %% tags=["hide-input"]
def paired(experiment_a, arm_a, experiment_b, arm_b, kind="gap"):
    """Arm a minus arm b, over all problems of all seeds."""
    a = records.select(experiment=experiment_a, arm=arm_a)
    b = records.select(experiment=experiment_b, arm=arm_b)
    of_b = {record.seed: record for record in b}
    left, right = [], []
    for one in a:
        left.append(outcomes(one.metrics, kind))
        right.append(outcomes(of_b[one.seed].metrics, kind))
    return results.paired_by_item(
        np.concatenate(left), np.concatenate(right)
    )


def points(interval):
    """An interval in points of percent."""
    mean, low, high = (100 * x for x in interval[:3])
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


COMPARED = [
    ("chains", "CFT rederive", "chains", "SFT noisy"),
    ("chains", "CFT rederive", "chains", "SFT verified"),
    ("chains", "CFT rederive", "chains", "SFT teacher"),
    ("chains", "CFT fix", "chains", "base"),
    ("chains", "CFT locate", "chains", "base"),
    ("chains", "CFT verdict", "chains", "base"),
    ("chains", "CFT rederive", "controls", "CFT shuffled response"),
    ("chains", "CFT rederive", "controls", "CFT blank response"),
]
rows = [["", "minus", "gap questions, points", "problems", "p"]]
for pair in COMPARED:
    found = paired(*pair)
    p = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    by = points(found.difference)
    rows.append([pair[1], pair[3], by, f"{found.n:,}", p])
Markdown(results.markdown_table(rows))


# %% [markdown]
# These intervals are about the problems, given these five bases. The spread over bases
# is in the figure above and is the larger one.
#

# %% tags=["hide-input"]
def at(experiment_name, arm, metric="gap"):
    """The mean over seeds, in percent."""
    chosen = records.select(experiment=experiment_name, arm=arm)
    return f"{chosen.values(metric).mean():.0%}"


leads = (
    chain_records.select(arm="CFT rederive").values("gap")
    - chain_records.select(arm="SFT noisy").values("gap")
)
Markdown(
    f"""
**Critique against imitation.** SFT noisy ends at
{at("chains", "SFT noisy")} of gap questions, CFT rederive at
{at("chains", "CFT rederive")}. We expected a lead of 30 points or more;
over the seeds it is {100 * leads.min():.0f} to {100 * leads.max():.0f}. It
also beats imitating the right responses alone
({at("chains", "SFT verified")}), which tells the model fewer solutions. It
does not beat imitating the teacher ({at("chains", "SFT teacher")}).

**The form decides.** Verdict, locate and fix leave gap questions where the
base had them, {at("chains", "base")}. For them validation picks the
smallest learning rate and an early checkpoint: the best they can do is to
change nothing. What they do when they go on is in the no-gap panel of the
last checkpoint. That CFT fix, which is told one corrected step of every
wrong response, teaches so little, was as expected and is still remarkable.

**Format is not the issue here.** Nearly every answer is well formed. Our
base knows both forms, and the prompt tells it which one is wanted. A base
that does not know them is another story, below.
"""
)

# %% [markdown]
# ### Which part of the critique helps?
#
# The controls change one thing each about CFT rederive: what the model reads, which
# questions it gets, whether the critics are right, what else it learns.

# %% mystnb={"image": {"alt": "The same three panels for the controls. On gap questions CFT rederive, with another response, with a blank one, and with wrong responses only lie between 0.7 and 0.8; a fifth of wrong critiques and SFT on slips near 0.63, right responses only below 0.5, mixed with SFT noisy near 0.3, and the arm that reads no response at zero. At the last checkpoint CFT followed by SFT noisy is near zero too. On no-gap questions only the arm that reads none falls, to 0.17."}} tags=["hide-input"]
compared = results.Results(
    [*chain_records, *records.select(experiment="controls")]
)
CONTROL_ARMS = {
    "CFT rederive": "CFT rederive",
    "CFT shuffled response": "reads another's response",
    "CFT blank response": "reads a blank one",
    "CFT no response": "reads none",
    "CFT right only": "right responses only",
    "CFT wrong only": "wrong responses only",
    "CFT 20% wrong": "a fifth of the critiques wrong",
    "CFT + SFT mixed": "mixed with SFT noisy",
    "CFT then SFT": "followed by SFT noisy",
    "SFT teacher": "SFT teacher",
    "SFT noisy": "SFT noisy",
    "SFT slips": "SFT on slips without a system",
}
fig, axes = plt.subplots(1, 3, figsize=(7, 4.2), sharey=True)
for ax, (metric, label) in zip(axes, PANELS.items(), strict=True):
    plots.dot_plot(ax, compared, metric, CONTROL_ARMS)
    ax.set(xlim=(-0.03, 1.03), xlabel="share right", title=label)
    ax.title.set_size(9)
plt.show()


# %% tags=["hide-input"]
def control(arm, metric="gap"):
    return at("controls", arm, metric)


rederive = at("chains", "CFT rederive")
slips = records.select(experiment="controls", arm="SFT slips")
lost = 1 - slips.values("no-gap").mean()
Markdown(
    f"""
**The response hardly matters.** With its own response CFT reaches
{rederive}, with another question's {control("CFT shuffled response")}, and
with a *blank* one, all padding, {control("CFT blank response")}, though
with the widest spread of all. So the gain does not come from reading what
is wrong with the response. It comes from the right solution in the target.

**But a response must be there.** Leave its place out, and nothing is
learned about answering ({control("CFT no response")}; at the last
checkpoint {control("CFT no response", "last no-gap")} of the no-gap
questions are left). The base has never met such a prompt, and nothing ties
it to that of the exam.

**Wrong responses are worth more than right ones.** The critiques of wrong
responses alone do as well as all of them ({control("CFT wrong only")}),
with fewer than half the examples. Those of right ones reach
{control("CFT right only")}; imitating the same right responses, which is
SFT verified, reaches {at("chains", "SFT verified")}. Users asked the
authors for this comparison. Here the reason is plain: the re-derivation of
a right response can be copied from the prompt, and copying teaches less.

**Wrong critiques hurt in proportion**: with a fifth of them wrong,
{control("CFT 20% wrong")}.

**Mixing undoes it.** Mixed with SFT noisy {control("CFT + SFT mixed")}
({control("CFT + SFT mixed", "last gap")} at the last checkpoint); CFT first
and then SFT noisy {control("CFT then SFT")}, of which the last checkpoint
keeps {control("CFT then SFT", "last gap")}. The paper mixes with *good*
SFT data, and loses too, though little.

**Noise without a system harms imitation far less**: SFT on as many
accidental slips reaches {control("SFT slips")}, SFT on the misconceptions
{at("chains", "SFT noisy")}. It is not free: of the no-gap questions it
loses {lost:.0%}.
"""
)

# %% [markdown]
# ### As many tokens instead of as many steps
#
# Critiques have other lengths than solutions. Here each CFT arm takes as many steps as
# it needs to learn from as many target tokens as SFT did.

# %% tags=["hide-input"]
equal = records.select(experiment="equal-tokens")
of_arms = [arm for arm in MAIN_ARMS if arm in equal.arms()]
taken = [
    f"{arm} {equal.select(arm=arm).values('steps').mean():.0f}"
    for arm in of_arms
]
print("steps, where SFT takes 100:", ", ".join(taken))
percent_table(
    equal,
    {
        "gap": "gap",
        "no-gap": "no-gap",
        "last gap": "gap, last",
        "last no-gap": "no-gap, last",
    },
    of_arms,
)

# %% [markdown]
# ### Other bases
#
# Two more bases. One has **never seen a critique**. The other's solver was **always
# mistaken**: in all of its pre-training, no gap question was ever answered rightly.

# %% mystnb={"image": {"alt": "Two rows of three panels, gap above and no-gap questions below, at the last checkpoint, for our base, one that never saw a critique, and one whose solver was always mistaken. On the second base CFT rederive stays near 0.1 on gap questions, and both CFT arms fall to about 0.2 on no-gap ones, where all other arms are near one. On the third base CFT rederive is near 0.6 on gap questions and SFT teacher above 0.8."}} tags=["hide-input"]
BASES = {
    "chains": "our base",
    "never-criticised": "never saw a critique",
    "always-mistaken": "always mistaken",
}
fig, axes = plt.subplots(2, 3, figsize=(7, 4.2), sharex=True, sharey=True)
on_bases = records.select(experiment="never-criticised").arms()
on_bases = [arm for arm in MAIN_ARMS if arm in on_bases]
for column, (name, label) in zip(axes.T, BASES.items(), strict=True):
    on_base = records.select(experiment=name)
    for ax, metric in zip(column, ("last gap", "last no-gap"), strict=True):
        plots.dot_plot(ax, on_base, metric, on_bases)
        ax.set(xlim=(-0.03, 1.03), xlabel="")
    column[0].set_title(label, size=9)
    column[1].set_xlabel("share right, last checkpoint")
axes[0, 0].set_ylabel("gap")
axes[1, 0].set_ylabel("no-gap")
plt.show()


# %% tags=["hide-input"]
def last(base, arm, metric):
    return at(base, arm, f"last {metric}")


never = "never-criticised"
Markdown(
    f"""
A base that has **never seen a critique** forgets how to answer. CFT
rederive ends with {last(never, "CFT rederive", "no-gap")} of the no-gap
questions
that the base answered without fault, and
{last(never, "CFT rederive", "no-gap valid")} of its answers there are well
formed; the verdict leaves {last(never, "CFT verdict", "no-gap")}. Imitation
of the teacher is unharmed ({last(never, "SFT teacher", "gap")} of gap
questions). A pre-trained language model has read plenty of criticism, and
is large; ours shows what this is worth.

With a solver who was **always mistaken** the base has no right gap answer
to fall back on. CFT still teaches it:
{at("always-mistaken", "CFT rederive")} against
{at("always-mistaken", "SFT teacher")} for imitation of the teacher and
{at("always-mistaken", "SFT noisy")} for imitation of the students. So
CFT need not only call up what the base knows. Here it carries the teacher's
knowledge.
"""
)

# %% [markdown]
# ### Criticise oneself at the exam?
#
# If a model has learned to criticise, let it criticise its own answers: answer, judge,
# answer again what it called wrong, up to eight rounds as in the paper. The paper finds
# that it loses. The fair rivals are a direct answer at the same temperature, and a
# majority vote among as many direct answers as the same number of written tokens pays
# for.

# %% mystnb={"image": {"alt": "Left: share of gap questions right at temperatures 0.3, 0.6 and 1. The direct answer falls from 0.73 to 0.55; self-critique and majority vote lie above it at each temperature, about as high as each other, at or below the dashed line of greedy answering. Right: tokens written a question; the direct answer takes 7, the other two 30 to 40."}} tags=["hide-input"]
asked = records.select(experiment="inference", arm="CFT rederive")
METHODS = ("direct", "self-critique", "majority")
TEMPERATURES = experiment.TEMPERATURES
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2))
for i, method in enumerate(METHODS):
    for k, t in enumerate(TEMPERATURES):
        place = k + 0.18 * (i - 1)
        label = method if k == 0 else None
        score = asked.values(f"gap {method} T={t:g}")
        spent = asked.values(f"gap {method} tokens T={t:g}")
        plots.seed_points(left, place, score, i, label)
        plots.seed_points(right, place, spent, i)
for ax in (left, right):
    labels = [f"{t:g}" for t in TEMPERATURES]
    ax.set_xticks(range(len(TEMPERATURES)), labels)
    ax.set_xlabel("temperature")
greedy = asked.values("gap greedy").mean()
left.axhline(greedy, color="grey", linestyle="--", linewidth=1)
left.set_ylabel("share right, gap questions")
right.set_ylabel("tokens written a question")
right.set_ylim(bottom=0)
fig.legend(loc="outside lower center", ncols=3)
plt.show()


# %% tags=["hide-input"]
def judged(method, t):
    return f"{asked.values(f'gap {method} T={t:g}').mean():.1%}"


low, high = TEMPERATURES[0], TEMPERATURES[-1]
Markdown(
    f"""
At equal temperature self-critique gains over the direct answer:
{judged("direct", low)} to {judged("self-critique", low)} at T = {low:g},
{judged("direct", high)} to {judged("self-critique", high)} at T = {high:g}.
So does a vote that costs no more: {judged("majority", low)} and
{judged("majority", high)}. Neither gets far from one greedy answer
({greedy:.1%}), which writes seven tokens. What sampling loses, both win
back, for several times the price.

"""
)

# %% [markdown]
# ## Turn one knob
#
# ### How noisy are the students?
#
# SFT imitates its students, so it should get worse with them. CFT should not care.

# %% mystnb={"image": {"alt": "Share of gap questions right against the share of mistaken students, 25, 50 and 75 percent. CFT rederive stays near 0.77. SFT noisy falls from 0.56 over 0.28 to 0.1 and lies below a dashed line, the share of right responses."}} tags=["hide-input"]
SHARES = [*experiment.NOISE, CHAINS.mistaken]
fig, ax = plt.subplots(figsize=(6, 3.4))
for i, arm in enumerate(("SFT noisy", "CFT rederive")):
    for share in SHARES:
        if share == CHAINS.mistaken:
            chosen = chain_records.select(arm=arm)
        else:
            chosen = records.select(
                experiment="noise", arm=f"{arm} {share:.0%}"
            )
        plots.seed_points(
            ax, 100 * share, chosen.values("last gap"), i,
            label=arm if share == SHARES[0] else None,
        )
grid = np.array([0, 100])
ax.plot(
    grid, 1 - grid / 100, "--", color="grey",
    label="share of right responses",
)
ax.set(
    xlabel="mistaken students (%)", ylabel="gap questions right, last",
    xlim=(15, 85), ylim=(-0.03, 1.03),
)
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% tags=["hide-input"]
few, half = (f"{share:.0%}" for share in experiment.NOISE)
Markdown(
    f"""
CFT depends little on the students:
{at("noise", f"CFT rederive {few}", "last gap")},
{at("noise", f"CFT rederive {half}", "last gap")} and
{last("chains", "CFT rederive", "gap")} with {few}, {half} and
{CHAINS.mistaken:.0%} of them mistaken. Imitation falls from
{at("noise", f"SFT noisy {few}", "last gap")} over
{at("noise", f"SFT noisy {half}", "last gap")} to
{last("chains", "SFT noisy", "gap")}. In the limit of much training a greedy
answer would be right up to one half, and wrong beyond. In a hundred steps
the model does not get there: it starts from a base that has the
misconceptions itself, and stays below the share of right responses
throughout. Both arms' rates were tuned at {CHAINS.mistaken:.0%}.
"""
)

# %% [markdown]
# ### The learning rate
#
# Chosen for each arm on validation, with two seeds that are not reported. At one common
# rate the table would be another one: at 0.003 most critics forget how to answer. Where
# the smallest rate won, as for verdict, locate and fix, the best that critique can do is
# to leave the base alone.

# %% mystnb={"image": {"alt": "Validation accuracy of seven arms against the learning rate from 0.0001 to 0.003. SFT teacher is highest, near 0.95, and flat. CFT rederive peaks near 0.8 at 0.0003 and falls to 0.5. Verdict, locate and fix stay at 0.5 up to 0.001 and then fall below 0.3."}} tags=["hide-input"]
tuning = records.select(experiment="learning-rate")
fig, ax = plt.subplots(figsize=(6, 3.4))
for i, arm in enumerate(arm for arm in MAIN_ARMS if arm != "base"):
    tried = [
        tuning.select(arm=f"chains/{arm} {rate:g}").values("validation")
        for rate in experiment.TRIED_LEARNING_RATES
    ]
    scores = [values.mean() for values in tried]
    style = plots.arm_style(i)
    ax.plot(experiment.TRIED_LEARNING_RATES, scores, label=arm, **style)
ax.set(
    xscale="log", xlabel="learning rate",
    ylabel="validation, mean of gap and no-gap",
)
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# ## Paper beside ours
#
# ### The same arms in the same order
#
# Their scores average six benchmarks with a 7 B model, ours are gap questions with a
# tiny one. The numbers cannot agree. The order of the arms can.

# %% tags=["hide-input"]
PAIRS = {
    "base": "base",
    "SFT": "SFT noisy",
    "SFT verified": "SFT verified",
    "SFT GPT-4o": "SFT teacher",
    "CFT": "CFT rederive",
}
MODELS = ("DeepSeek-Math-7B", "Qwen2.5-7B", "Qwen2.5-Math-7B")
rows = [["paper's arm", "ours", *MODELS, "ours, gap questions"]]
for arm, ours in PAIRS.items():
    values = 100 * chain_records.select(arm=ours).values("gap")
    rows.append([
        arm, ours,
        *(f"{theirs(arm, 'average', model):.1f}" for model in MODELS),
        results.format_interval(results.bootstrap(values)),
    ])
Markdown(results.markdown_table(rows))

# %% [markdown]
# ### The intervals that the table leaves out
#
# A score on 40 problems has a standard error of about seven points. The paper gives no
# seeds and no intervals; the part that comes from the finite benchmarks can be computed
# from its numbers. Left: CFT minus SFT GPT-4o on Qwen2.5-Math-7B. Right: the Minerva
# scores of versions 1 and 4 of the paper.

# %% mystnb={"image": {"alt": "Left: difference of CFT and SFT GPT-4o on six benchmarks with 95 percent binomial intervals; those of MATH, narrow, and Minerva, wide, exclude zero, while GSM8K, Olympiad, AIME24 and AMC23 include it. Right: lines from version 1 to version 4; five lines of CFT arms rise, six dashed lines of base and SFT arms are flat."}} tags=["hide-input"]
PROBLEMS = {
    "MATH": 5000, "Minerva": 272, "GSM8K": 1319, "Olympiad": 675,
    "AIME24": 30, "AMC23": 40,
}


def binomial_error(percent, n):
    return (percent * (100 - percent) / n) ** 0.5


fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6))
for row, (name, n) in enumerate(PROBLEMS.items()):
    a, b = theirs("CFT", name), theirs("SFT GPT-4o", name)
    error = 1.96 * np.hypot(binomial_error(a, n), binomial_error(b, n))
    left.errorbar(a - b, row, xerr=error, fmt="o", color=plots.colour(0))
left.axvline(0, color="grey", linewidth=1)
left.set_yticks(
    range(len(PROBLEMS)), [f"{k} ({n})" for k, n in PROBLEMS.items()]
)
left.invert_yaxis()
left.set_xlabel("CFT − SFT GPT-4o (points)")
versions = paper["minerva-by-version"]
for labels, (first, last) in versions.rows.items():
    is_cft = labels[0].startswith("CFT")
    style = plots.arm_style(0 if is_cft else 1)
    right.plot([1, 4], [first, last], **style)
for i, name in enumerate(("CFT arms", "base and SFT arms")):
    right.plot([], [], label=name, **plots.arm_style(i))
right.set_xticks([1, 4])
right.set(xlabel="version of the paper", ylabel="Minerva (% solved)")
right.legend(loc="center", bbox_to_anchor=(0.5, 0.22))
plt.show()

# %% tags=["hide-input"]
rises = [
    last - first
    for labels, (first, last) in versions.rows.items()
    if labels[0].startswith("CFT")
]
minerva_v1 = versions.value("CFT", column="version 1") - theirs(
    "SFT GPT-4o", "Minerva"
)
Markdown(
    f"""
All {len(rises)} Minerva scores of CFT arms that are in both versions rose,
by {min(rises):.1f} to {max(rises):.1f} points. Those of the base and of the
SFT arms are the same to the digit. The paper does not say what changed. The
second number of claim cft‑2 depends on it: the gain over SFT GPT-4o was
{minerva_v1:+.1f} points in version 1 and is {gain["Minerva"]:+.1f} in
version 4.
"""
)


# %% [markdown]
# ### The verdicts
#
# Intervals here are over questions. Over the five trainings they are wider, as the
# [report on all claims](../book/reproduction.md) shows: another training differs by more
# than another exam.

# %% tags=["hide-input"]
def share(experiment_name, arm, metric="gap"):
    chosen = records.select(experiment=experiment_name, arm=arm)
    return f"{chosen.values(metric).mean():.0%}"


more = paper["more-data"]
hours = {name: float(h) for name, _, h in paper["reinforcement"].rows}


def stem(model, examples, column="average"):
    return f"{more.value(model, examples, column=column):.1f}"


def error_of(name):
    """Binomial standard error of CFT minus SFT GPT-4o."""
    arms = ("CFT", "SFT GPT-4o")
    return np.hypot(
        *(binomial_error(theirs(arm, name), PROBLEMS[name]) for arm in arms)
    )


lead = paired("chains", "CFT rederive", "chains", "SFT noisy")
behind = paired("chains", "CFT rederive", "chains", "SFT teacher")
equal_lead = records.select(experiment="equal-tokens", arm="CFT rederive")
verdicts = [
    ["", "claim", "verdict", "measured here, or computed from the paper"],
    [
        "cft‑1",
        "critique beats imitation",
        "**holds against noisy answers, not against the teacher's**",
        f"gap questions, CFT rederive against SFT noisy:"
        f" {points(lead.difference)} points; against SFT teacher:"
        f" {points(behind.difference)}",
    ],
    [
        "cft‑2",
        f"{gain['MATH']:+.1f} on MATH, {gain['Minerva']:+.1f} on Minerva",
        "**not tested; one training run each**",
        f"the first is {gain['MATH'] / error_of('MATH'):.1f} binomial"
        f" standard errors from zero, the second"
        f" {gain['Minerva'] / error_of('Minerva'):.1f}"
        f" ({minerva_v1 / error_of('Minerva'):.1f} in version 1); that"
        " leaves out the spread over runs",
    ],
    [
        "cft‑3",
        "50,000 examples rival two million",
        "**on the paper's average, yes; on MATH, no**",
        f"average of eight: {stem('Qwen2.5-Math-7B-CFT', '50 K')} against"
        f" {stem('Qwen2.5-Math-7B-Instruct', '2.5 M')}; MATH:"
        f" {stem('Qwen2.5-Math-7B-CFT', '50 K', 'MATH')} against"
        f" {stem('Qwen2.5-Math-7B-Instruct', '2.5 M', 'MATH')}",
    ],
    [
        "cft‑4",
        "better at a lower cost",
        "**against RL, without the teacher's cost; not against imitation of"
        " the teacher**",
        f"paper: {hours['CFT']:.0f} H100 hours against"
        f" {hours['SimpleRL']:,.0f}, GPT-4o's calls not counted. Ours, for"
        f" as many target tokens: CFT rederive"
        f" {equal_lead.values('gap').mean():.0%} of gap questions, SFT"
        f" teacher {share('chains', 'SFT teacher')}",
    ],
]
Markdown(results.markdown_table(verdicts))


# %% [markdown]
# ## What did not reproduce, and why
#
# * **CFT above imitation of the teacher** is the heart of the paper, and it is not
#   what we see. Several differences could be the cause, and the first lie on our side.
#   Our teacher's solutions are as short as the students' and always right; GPT-4o's
#   answers are not, and the paper does not say how many were wrong. Our critic says
#   nothing beyond the solution and a verdict; GPT-4o explains. Our base learned all it
#   knows from solutions like those of the exam; Qwen2.5-Math came with a training in
#   mathematics, and a later paper of the same group finds that critiques of a *single*
#   problem raise its average over six benchmarks by 15 % {cite:p}`wang2025unleashing`.
#   That points to calling up what is there, which our gap questions do not test.
# * **Mixing.** In the paper mixing with good SFT data costs two to six points; here
#   mixing with noisy data undoes most of the gain. The two mix different things.
# * **Self-critique at the exam** loses in the paper and gains here, at equal
#   temperature. Most of the paper's loss is the temperature's: its two-stage variant is
#   at most two points below the direct answer at the same temperature. And our critic
#   works the answer out again before it judges, so that it is a second vote in other
#   words; an equally long vote does as well.
# * **Forgetting.** The paper shows hardly any, and reports a gain in instruction
#   following. Others report a large loss with a Llama model
#   {cite:p}`kapusuzoglu2025critique`. Our base that never saw a critique loses most of
#   what it knew, our own base hardly anything. What a base has seen before is the hidden
#   setting here.
# * **No number of theirs could be checked.** We found neither what the models wrote nor
#   the training data of the SFT arms. The released critiques and model were out of reach
#   for this chapter.
#
# ## Exercises
#
# Each has a solution below it that has been run. To try first, take this chapter
# [without its solutions](https://github.com/finetuning-book/finetuning-book/blob/main/notebooks/exercises/cft.ipynb), [on Colab](https://colab.research.google.com/github/finetuning-book/finetuning-book/blob/main/notebooks/exercises/cft.ipynb) if you like: each is a stub that
# says what the solution prints.
#
# [The reference](../book/api/cft.md) describes all of `ftlib.cft`.
#
# **1. Accidents.** Students are mistaken with probability $m$, and their wrong answers
# are spread evenly over the ten other values. Up to which $m$ is the most frequent
# answer still the right one? And with one misconception? Check by counting.

# %% tags=["hide-cell", "nbval-check-output"]
def mode_is_right(m, wrong_values, students=20_000):
    """Whether most students who agree, agree on the right answer."""
    rng = np.random.default_rng(0)
    accident = rng.random(students) < m
    wrong = rng.integers(1, wrong_values + 1, students)
    return np.bincount(np.where(accident, wrong, 0)).argmax() == 0


for m in (0.45, 0.55, 0.85, 0.95):
    print(f"m = {m:.2f}: one misconception {str(mode_is_right(m, 1)):5}"
          f"  accidents {mode_is_right(m, 10)}")

# %% [markdown]
# With one misconception up to $m = 1/2$. With accidents the right answer has $1 - m$
# and each wrong one $m / 10$, so up to $m = 10/11$. This is why *SFT on slips* lies so
# far above *SFT noisy* in the figure of the controls, with as many wrong responses.
#
# **2. Which mean?** Two examples, with two and with eight target tokens. Compute the
# gradient on both at once, and on one after the other with the two losses averaged, as
# accumulation does. For which of the two means do they agree?

# %% tags=["hide-cell", "nbval-check-output"]
torch.manual_seed(0)
small = tiny_gpt(len(VOCABULARY), context=evaluation.CONTEXT).double()
pair = [make_example([7, 8], [3] * n, VOCABULARY.end) for n in (1, 7)]


def gradient(loss):
    found = torch.autograd.grad(loss, list(small.parameters()))
    return torch.cat([g.flatten() for g in found])


def both_ways(mean):
    def loss_of(rows):
        return masked_loss(small, *make_batch(rows), mean=mean).loss

    chunks = (loss_of(pair[:1]) + loss_of(pair[1:])) / 2
    together, parts = gradient(loss_of(pair)), gradient(chunks)
    return float((together - parts).norm() / together.norm())


for mean in ("example", "token"):
    difference = both_ways(mean)
    print(f"mean over the {mean}s: gradients",
          "agree" if difference < 1e-12 else "differ")

# %% [markdown]
# **3. The best of 49.** The paper saves a checkpoint every second step and reports the
# one that does best on MATH-500. Suppose that all 49 were equally good, right on 70 % of
# all problems, and their errors independent. How good does the best one look on
# 500 problems? On AMC23 with its 40? What changes if the errors are not independent?

# %% tags=["hide-cell", "nbval-check-output"]
for n in (500, 40):
    rng = np.random.default_rng(0)
    best = rng.binomial(n, 0.7, (20_000, 49)).max(axis=1).mean() / n
    print(f"{n} problems: the best of 49 looks {best - 0.7:.1%} better")


# %% [markdown]
# These are upper limits: checkpoints of one run agree on most problems. But MATH-500 is
# part of the MATH test that is then reported, so some of it ends up there. Our own
# checkpoints are chosen on questions that no exam asks.
#
# **4. Vote or greedy?** A model gives the right answer with probability 0.4, one wrong
# answer with 0.35, and others with the rest. How often is the majority of $k$ samples
# right? What does a greedy answer give? And if the two probabilities change places?

# %% tags=["hide-cell", "nbval-check-output"]
def majority_right(k, right, rival, others=5, trials=20_000):
    """How often the right answer wins a vote of k; ties go to the first."""
    rng = np.random.default_rng(0)
    rest = (1 - right - rival) / others
    votes = rng.choice(
        2 + others, (trials, k), p=[right, rival, *[rest] * others]
    )
    texts = votes[: 4000].tolist()
    return np.mean([evaluation.majority(vote) == 0 for vote in texts])


for right, rival in [(0.4, 0.35), (0.35, 0.4)]:
    voted = [majority_right(k, right, rival) for k in (1, 5, 25, 125)]
    print(f"P(right) = {right:.2f}: votes of 1, 5, 25, 125:",
          *(f"{v:.1f}" for v in voted), " greedy:", int(right > rival))


# %% [markdown]
# A vote estimates the most likely answer, which is what greedy decoding takes at once
# (where an answer is one token). It helps where sampling hurts, and it makes a
# misconception worse.
#
# **5. The mask forgotten.** Train CFT rederive with labels on the response too. Predict
# the share of right gap answers first. Look at what stands before the response in
# the prompt.

# %% tags=["hide-cell"]
def without_mask(features, question):
    """The same tokens, with labels from the end of the question on."""
    start = len(evaluation.ask(question))
    return {
        "input_ids": features["input_ids"],
        "labels": [-100] * start + features["input_ids"][start:],
    }


features = experiment.features(Recipe("critique"), work, seed=0)
careless = [
    without_mask(one, response.question)
    for one, response in zip(features, work.responses, strict=True)
]
model = experiment.base_model(CHAINS.base, seed=0)
train(
    Learner(model), careless, training_loss,
    CHAINS.training(
        LEARNING_RATES["chains/CFT rederive"], CHAINS.steps, seed=0
    ),
    collate=PaddingCollator(),
)
exams = experiment.exams_of(CHAINS, "test", seed=0)
forgotten = evaluation.scores(model, exams)["gap"].value
Markdown(
    f"""
{forgotten:.0%} of gap questions right at the last step. With the mask it is
{seed_0("CFT rederive", "last gap"):.0%}, and SFT noisy has
{seed_0("SFT noisy", "last gap"):.0%}. The prompt of a critique begins like
an exam: the question, then its answer. Without the mask every example is
one of SFT noisy with a critique behind it.
"""
)

# %% [markdown]
# ## Run it at scale `gpu`
#
# `make gpu` (or `ftlib run cft --scale gpu --seeds 3`) leaves chain arithmetic and
# fine-tunes SmolLM2-135M-Instruct on GSM8K: the training problems whose solutions can be
# made wrong by rule, 44 % of them made wrong, as in the paper. All weights are trained, or
# LoRA adapters; the arms are SFT noisy, verified and teacher, CFT locate, fix and
# rederive, and CFT with shuffled responses. The exams are GSM8K's 1,319 test problems,
# SVAMP and MATH-500, asked directly and graded exactly. Format has columns of its own:
# did the answer end, and did the model answer with a critique?
#
# What we expect: mistakes made by rule have no system, so imitating them should harm
# little, and CFT rederive should lead SFT noisy by little. Locate and fix should drift
# into critiques.
#
# **What a model of 0.1 to 0.5 billion parameters can show**: which arms keep the form of
# an answer, and the order of arms on easy problems. **What it cannot**: MATH-500 is
# beyond it, so we expect scores of a few percent there, and no order among the arms; and
# two of the paper's three base models came from a training in mathematics, which
# fine-tuning may call up. A small model has nothing of the kind to call up. No result
# here would refute the paper's numbers, and none could confirm them.

# %% tags=["hide-input"]
try:
    gpu = results.load("cft", "gpu").select(experiment="gsm8k")
    minutes = sum(r.seconds for r in gpu) / 60
    memory = max(r.peak_memory_bytes for r in gpu) / 2**30
    text = (
        f"Recorded on {gpu[0].device}: {len(gpu)} runs, "
        f"{minutes:.0f} minutes, at most {memory:.0f} GiB.\n\n"
    )
    text += results.table(
        gpu,
        {
            "gsm8k": "GSM8K",
            "svamp": "SVAMP",
            "math-500": "MATH-500",
            "gsm8k ended": "answer ended",
            "gsm8k critique": "critique instead of answer",
            "last gsm8k": "GSM8K, last",
        },
    )
except results.NotRecordedError:
    text = (
        "No `gpu` run is recorded yet: minutes, memory and results of this "
        "scale are still to be measured."
    )
Markdown(text)

# %% [markdown]
# ## References
#
# * The paper: {cite:t}`wang2025critique`; its code (MIT):
#   <https://github.com/TIGER-AI-Lab/CritiqueFineTuning>, read at commit 44b83b8. Why
#   it works is an open question to its authors too (issue 9 there); issue 11 asks for
#   the split into right and wrong responses that our controls show.
# * GSM8K: {cite:t}`cobbe2021training`. MATH: {cite:t}`hendrycks2021measuring`. Minerva:
#   {cite:t}`lewkowycz2022solving`. SVAMP: {cite:t}`patel2021nlp`.
# * A follow-up by the same group, with critiques of a single problem:
#   {cite:t}`wang2025unleashing`. A different view, with instruction following that
#   suffers under CFT: {cite:t}`kapusuzoglu2025critique`.
