"""One conversation, step by step: what was said, the rules after it, what they decide.

For a notebook and for the page that is built from it, without a kernel. What is shown
is a table of all steps. A script in it, of which a page without scripts, a print and an
e-mail know nothing, shows one step at a time and adds buttons, a slider and keys:

.. code-block:: python

   states = []
   learn(reasoner, user, examples, tasks, settings, save=states.append)
   walkthrough(states, tasks, settings, watched=validation[:3], right=user.right)

All of it is ours; the paper shows no conversation that could be had.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal, NamedTuple

from ftlib.clipr.loop import State
from ftlib.clipr.monitoring import gate
from ftlib.clipr.rules import Rule, RuleSet
from ftlib.clipr.settings import Settings
from ftlib.clipr.tasks import Correction, Task

Change = Literal["added", "changed", "removed", "kept"]


# --- what a step shows --------------------------------------------------------


class Note(NamedTuple):
    """Something that was said or found, and what it is called."""

    label: str
    text: str


class Line(NamedTuple):
    """A rule beside what it was a step before.

    Attributes:
        change: ``kept`` if it says the same, with the same weight; how many answers are
            for and against it may be others.
        text: as it is now, or was before it was removed.
        before: as it was before it was changed; else empty.
    """

    change: Change
    text: str
    before: str = ""


class Choice(NamedTuple):
    """What the rules decide about a watched task.

    Attributes:
        task: that is watched.
        taken: index of the option.
        right: whether it is.
        flipped_from: index of the option that was taken a step before, if another.
    """

    task: Task
    taken: int
    right: bool
    flipped_from: int | None = None


@dataclass(frozen=True)
class Step:
    """One step of a conversation.

    Attributes:
        title: what happened.
        notes: what was said or found.
        rules: after it, and those that it removed.
        choices: on each watched task, by the rules after it.
    """

    title: str
    notes: tuple[Note, ...]
    rules: tuple[Line, ...]
    choices: tuple[Choice, ...]

    @property
    def rules_in_words(self) -> str:
        """How many rules there are, and what became of them."""
        counts = Counter(line.change for line in self.rules)
        there = len(self.rules) - counts["removed"]
        changes = [f"{counts[c]} {c}" for c in _SIGNS if counts[c]]
        noun = "rule" if there == 1 else "rules"
        return f"{there} {noun}" + (f": {', '.join(changes)}" if changes else "")

    @property
    def choices_in_words(self) -> str:
        """How many watched tasks are decided right, and how many decisions flipped."""
        right = sum(choice.right for choice in self.choices)
        flipped = sum(choice.flipped_from is not None for choice in self.choices)
        words = f"{right} of {len(self.choices)} right"
        return words + (f", {flipped} flipped" if flipped else "")


@dataclass(frozen=True, repr=False)
class Walkthrough:
    """The steps of a conversation; a notebook shows them to step through.

    Attributes:
        steps: the first is before anything was said.
    """

    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        """A line for each step: its number, title, rules and decisions."""
        titles = max(len(step.title) for step in self.steps)
        rules = max(len(step.rules_in_words) for step in self.steps)
        return "\n".join(
            f"{number:3}  {step.title:{titles}}  {step.rules_in_words:{rules}}"
            f"  {step.choices_in_words}"
            for number, step in enumerate(self.steps, start=1)
        )

    def _repr_html_(self) -> str:
        """A table of all steps, with the script that shows them one at a time."""
        n = len(self.steps)
        rows = [_row(step, at, n) for at, step in enumerate(self.steps, start=1)]
        return _PAGE.format(n=n, rows="\n".join(rows), style=_STYLE, js=_SCRIPT)


def walkthrough(
    states: Sequence[State],
    tasks: Sequence[Task],
    settings: Settings,
    watched: Sequence[Task],
    right: Callable[[Task, int], bool],
) -> Walkthrough:
    """Make steps of the states of one conversation.

    Args:
        states: all that :func:`ftlib.clipr.loop.learn` saved, from the first on.
        tasks: that were decided, as ``learn`` had them.
        settings: as ``learn`` had them.
        watched: a few tasks to show decisions on. They are decided by the rules
            themselves, :meth:`ftlib.clipr.rules.RuleSet.decide`, whatever reasoner
            learnt them.
        right: whether an option of a watched task is, as
            :meth:`ftlib.clipr.users.SimulatedUser.right`.

    Raises:
        ValueError: there are no states or a state is missing, no task is watched, or
            the tasks or the settings are not those of the states.
    """
    if not states or not watched:
        raise ValueError(
            f"{len(states)} states and {len(watched)} watched tasks: it takes one of"
            " each; learn(..., save=states.append) collects the states"
        )
    states = [State(rules=states[0].rules), *states]
    _check(states, tasks)
    rules = states[0].rules
    given = "given." if rules else "none yet: the first option is taken."
    start = (Note("Rules", given),)
    steps = [Step("Start", start, *_shown(rules, rules, watched, right))]
    for before, after in itertools.pairwise(states):
        for title, notes in _events(before, after, tasks, settings):
            shown = _shown(rules, after.rules, watched, right)
            steps.append(Step(title, tuple(notes), *shown))
            rules = after.rules
    return Walkthrough(tuple(steps))


def _check(states: Sequence[State], tasks: Sequence[Task]) -> None:
    """Raise a ``ValueError`` if a state is missing, or tasks are not those decided."""
    for at, (before, after) in enumerate(itertools.pairwise(states)):
        if not (
            _follows(before.history.turns, after.history.turns)
            and _follows(before.decisions, after.decisions)
            and _follows(before.batches, after.batches)
        ):
            raise ValueError(
                f"states[{at}] does not come next after what is before it: give all"
                " states of one conversation, as learn(..., save=states.append)"
                " collects them"
            )
    decided = [made.task for made in states[-1].decisions]
    if decided != [task.id for task in tasks[: len(decided)]]:
        raise ValueError(
            "the states have decisions about other tasks: give those that learn had,"
            " in the same order"
        )


def _follows(before: Sequence[object], after: Sequence[object]) -> bool:
    """Whether at most one thing was added, and nothing else changed."""
    more = len(after) - len(before)
    return more in (0, 1) and after[: len(before)] == before


def _shown(
    before: RuleSet,
    after: RuleSet,
    watched: Iterable[Task],
    right: Callable[[Task, int], bool],
) -> tuple[tuple[Line, ...], tuple[Choice, ...]]:
    """Return what a step shows of rules, and of what they decide."""
    choices = []
    for task in watched:
        was, now = before.decide(task).index, after.decide(task).index
        flipped_from = was if was != now else None
        choices.append(Choice(task, now, right(task, now), flipped_from))
    return tuple(compared(before, after)), tuple(choices)


# --- what happened ------------------------------------------------------------

Event = tuple[str, list[Note]]


def _events(
    before: State, after: State, tasks: Sequence[Task], settings: Settings
) -> Iterator[Event]:
    """Say what led from a state to the next; of single decisions, nothing."""
    if len(after.history) > len(before.history):
        yield _question(after)
    if before.phase == "write":
        yield "Rules written", [Note("Answers", str(len(after.history.answered)))]
    if len(after.batches) > len(before.batches):
        yield _batch(before, after, tasks, settings)
    if after.frozen and not before.frozen:
        k, target = settings.gate.patience, settings.gate.target
        good = f"{k} batches in a row had at least {target:.0%} accepted"
        yield "Rules frozen", [Note("Reason", f"{good}: the rules stay as they are.")]
    if before.phase == "correct" and after.phase == "decide":
        why = "Nothing of the batch was rejected, or the user says no more."
        yield "Nothing corrected", [Note("Reason", why)]
    if before.phase == "revise":
        yield _revision(before)


def _question(after: State) -> Event:
    turn = after.history.turns[-1]
    said = turn.answer.text if turn.answer else "The user gives none."
    title = f"Question {len(after.history)}"
    return title, [Note("Question", turn.question.text), Note("Answer", said)]


def _batch(
    before: State, after: State, tasks: Sequence[Task], settings: Settings
) -> Event:
    batch = after.batches[-1]
    is_open = after.phase == "correct"
    first = len(after.decisions) - batch.decided
    notes = [
        Note("Rejected", f"{task.goal} Taken: {task.options[made.index].name}.")
        for task, made in zip(tasks[first:], after.decisions[first:], strict=False)
        if made.accepted is False
    ]
    silent = batch.decided - batch.observed
    if silent:
        notes.append(Note("No reaction", f"to {silent} of {batch.decided} decisions."))
    notes.append(Note("Gate", _why(before, after, settings)))
    share = f"{batch.accepted} of {batch.observed} accepted"
    title = f"Batch {len(after.batches)}: {share if batch.observed else 'no reaction'}"
    return title + (", gate open" if is_open else ""), notes


def _why(before: State, after: State, settings: Settings) -> str:
    """Say why the gate is open or closed after a batch.

    Raises:
        ValueError: by the settings it would have been otherwise.
    """
    found = gate(after.batches, settings.gate)
    looked = settings.adaptive and not before.frozen and not after.frozen
    if (looked and found.open) != (after.phase == "correct"):
        raise ValueError(
            f"by these settings, the gate would have been otherwise after batch"
            f" {len(after.batches)}: give the settings that learn had"
        )
    if not settings.adaptive:
        return "none: the rules stay as they are."
    if not looked:
        return "not looked at: the rules are frozen."
    if not after.batches[-1].observed:
        return "closed: nobody reacted, so nobody would answer."
    recent = after.batches[-settings.gate.window :]
    accepted = sum(batch.accepted for batch in recent)
    observed = sum(batch.observed for batch in recent)
    seen = f"Lately, {accepted} of {observed} were accepted."
    if found.open:
        return f"open: {found.reason}. {seen}"
    low = f"below {settings.gate.target:.0%} with probability {found.risk:.0%}"
    return f"closed: {low}. {seen}"


def _revision(before: State) -> Event:
    first = before.corrected - len(before.corrections) + 1
    notes = [
        Note(f"Correction {number}", _said(correction))
        for number, correction in enumerate(before.corrections, start=first)
    ]
    return "Rules revised", notes


def _said(correction: Correction) -> str:
    options, taken = correction.task.options, correction.decided
    words = f"{correction.task.goal} Taken: {options[taken].name}."
    if correction.chosen == taken:
        return f"{words} It will do after all."
    reason = correction.reason or "No reason was given."
    return f"{words} Wanted: {options[correction.chosen].name}. {reason}"


# --- what became of the rules -------------------------------------------------


def compared(before: Iterable[Rule], after: Sequence[Rule]) -> list[Line]:
    """Return the rules that there are, and then those that went, with their changes.

    Rules have no names. So a rule is what a former one became if it says the same, else
    if it prefers the same in the same families, else if it prefers the same somewhere.

    Args:
        before: a step before.
        after: now, an order that is kept.
    """
    left = list(before)
    became: dict[int, Rule] = {}
    for likeness in (_sense, _topic, lambda rule: _topic(rule)[:3]):
        for at, rule in enumerate(after):
            former = [old for old in left if likeness(old) == likeness(rule)]
            if at not in became and former:
                became[at] = former[0]
                left.remove(former[0])
    lines = [_line(became.get(at), rule) for at, rule in enumerate(after)]
    return lines + [Line("removed", rule.to_text()) for rule in left]


def _line(former: Rule | None, rule: Rule) -> Line:
    if former is None:
        return Line("added", rule.to_text())
    if _sense(former) == _sense(rule):
        return Line("kept", rule.to_text())
    return Line("changed", rule.to_text(), former.to_text())


def _sense(rule: Rule) -> tuple[object, ...]:
    return (replace(rule, support=0, against=0),)


def _topic(rule: Rule) -> tuple[object, ...]:
    return rule.dimension, rule.preferred, rule.over, rule.families


# --- as HTML ------------------------------------------------------------------
# Whatever a user, a model or a task says goes through `escape`. There are no ids, so
# that any number of these, also the same one twice, can be on a page.

_SIGNS: dict[Change, str] = {"added": "+", "changed": "~", "removed": "−"}


def _row(step: Step, number: int, of: int) -> str:
    changes = f"{step.rules_in_words}. {step.choices_in_words}."
    said = f"Step {number} of {of}: {step.title}. {changes}"
    title = f"{number}. {step.title}"
    notes = "".join(
        f"<p><b>{escape(label)}:</b> {escape(text)}</p>" for label, text in step.notes
    )
    rules = "".join(map(_rule, step.rules))
    choices = "".join(map(_choice, step.choices))
    return (
        f'<tr data-said="{escape(said)}"><th scope="row">{escape(title)}</th>'
        f'<td data-label="What happened">{notes}</td>'
        f'<td data-label="Rules"><p>{step.rules_in_words}</p><ul>{rules}</ul></td>'
        f'<td data-label="Decisions"><p>{step.choices_in_words}</p>'
        f"<ul>{choices}</ul></td></tr>"
    )


def _rule(line: Line) -> str:
    text = escape(line.text)
    if line.change == "kept":
        return f"<li>{text}</li>"
    text = {"added": "<ins>{}</ins>", "removed": "<del>{}</del>", "changed": "{}"}[
        line.change
    ].format(text)
    before = f" <i>Before:</i> <del>{escape(line.before)}</del>" if line.before else ""
    return (
        f'<li class="cw-new"><b>{_SIGNS[line.change]} {line.change}:</b>'
        f" {text}{before}</li>"
    )


def _choice(choice: Choice) -> str:
    names = [escape(option.name) for option in choice.task.options]
    mark = "✓ right" if choice.right else "✗ wrong"
    flip, new = "", ""
    if choice.flipped_from is not None:
        flip = f"; <b>⇄ flipped</b> from {names[choice.flipped_from]}"
        new = ' class="cw-new"'
    taken = names[choice.taken]
    names[choice.taken] = f"<b>▸ {taken}</b> (taken: {mark}{flip})"
    options = "".join(f"<li>{name}</li>" for name in names)
    return f"<li{new}>{escape(choice.task.goal)}<ul>{options}</ul></li>"


_PAGE = """\
<div class="clipr-walk">
<style>
{style}</style>
<div class="cw-box" role="region" aria-label="Steps of the conversation" tabindex="0">
<table class="cw-table">
<caption>A conversation in {n} steps, the rules after each, and what they decide. \
+ added, ~ changed, − removed, ▸ taken, ⇄ flipped.</caption>
<thead><tr><th scope="col">Step</th><th scope="col">What happened</th>\
<th scope="col">Rules</th><th scope="col">Decisions</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<script>
{js}</script>
</div>"""

# Colours are the page's, else JupyterLab's. What differs by colour differs in words.
_STYLE = """\
.clipr-walk {
  --cw-text: var(--pst-color-text-base, var(--jp-content-font-color1, #1f2328));
  --cw-muted: var(--pst-color-text-muted, var(--jp-content-font-color2, #57606a));
  --cw-back: var(--pst-color-background, var(--jp-layout-color0, #fff));
  background: var(--cw-back); color: var(--cw-text);
  border: 1px solid var(--cw-muted); border-radius: .25rem; padding: .75rem;
  font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere; text-align: left;
}
/* The theme lays a light frame around what cells show when the page is dark. */
.text_html:has(> .clipr-walk) { background: none !important; padding: 0 !important; }
.clipr-walk :focus-visible { outline: 3px solid var(--cw-text); outline-offset: 2px; }
.clipr-walk .cw-box { overflow-x: auto; }
.clipr-walk .cw-box .cw-table {
  display: table; width: 100%; min-width: 40rem; max-width: none; margin: 0;
  border-collapse: collapse; table-layout: fixed; color: inherit; font-size: .9em;
}
.clipr-walk .cw-box caption {
  caption-side: top; color: inherit; padding: 0 0 .5rem; text-align: left;
}
.clipr-walk .cw-box tbody tr, .clipr-walk .cw-box thead tr { background: none; }
.clipr-walk .cw-box th, .clipr-walk .cw-box td {
  border: 0; border-top: 1px solid var(--cw-muted); color: inherit; padding: .5rem;
  text-align: left; vertical-align: top; white-space: normal;
}
.clipr-walk .cw-box th:first-child { width: 15%; }
.clipr-walk .cw-box th:nth-child(3) { width: 32%; }
.clipr-walk .cw-box p { color: inherit; margin: 0 0 .4rem; }
.clipr-walk .cw-box ul { margin: 0; padding-left: 1.1rem; }
.clipr-walk .cw-box ul ul { padding-left: 0; }
.clipr-walk .cw-box li { margin: 0 0 .15rem; }
.clipr-walk ul ul li { display: inline; }
.clipr-walk ul ul li + li::before { content: " · "; }
.clipr-walk .cw-new { border-left: 3px solid var(--cw-text); padding-left: .4rem; }
.clipr-walk ins { text-decoration: none; font-weight: 600; }
.cw-bar { align-items: center; display: flex; flex-wrap: wrap; gap: .5rem; }
.cw-bar button {
  background: none; border: 1px solid var(--cw-text); border-radius: .25rem;
  color: inherit; cursor: pointer; font: inherit; min-height: 2.5rem; padding: 0 .75rem;
}
.cw-bar button[aria-disabled="true"] {
  border-style: dashed; color: var(--cw-muted); cursor: default;
}
.cw-bar label { align-items: center; display: flex; gap: .4rem; min-height: 2.5rem; }
.cw-bar input { accent-color: var(--cw-text); }
.cw-bar [type="range"] { width: min(12rem, 50vw); }
.cw-bar output {
  color: inherit; flex-basis: 100%; font-weight: 600; padding-bottom: .5rem;
}
.clipr-walk[data-mode="table"] .cw-one { display: none; }
@media screen {
  .clipr-walk[data-mode="step"] caption, .clipr-walk[data-mode="step"] th,
  .clipr-walk[data-mode="step"] tbody tr:not([data-now]) { display: none; }
  .clipr-walk[data-mode="step"] .cw-box .cw-table {
    display: block; font-size: inherit; min-width: 0;
  }
  .clipr-walk[data-mode="step"] tbody { display: block; }
  .clipr-walk[data-mode="step"] tr { display: flex; flex-wrap: wrap; }
  .clipr-walk[data-mode="step"] td { flex: 1 1 17rem; min-width: 0; }
  .clipr-walk[data-mode="step"] th + td { flex-basis: 100%; }
  .clipr-walk[data-mode="step"] .cw-box ul ul { padding-left: 1.1rem; }
  .clipr-walk[data-mode="step"] ul ul li { display: list-item; }
  .clipr-walk[data-mode="step"] ul ul li + li::before { content: none; }
  .clipr-walk[data-mode="step"] td::before {
    content: attr(data-label); display: block; font-weight: 600;
  }
}
@media print {
  .clipr-walk { --cw-text: #000; --cw-muted: #555; --cw-back: #fff; border: 0; }
  .clipr-walk .cw-box { overflow: visible; }
  .clipr-walk tr { break-inside: avoid; }
  .clipr-walk .cw-box .cw-table { font-size: .75em; min-width: 0; }
  .cw-bar { display: none; }
}
"""

_SCRIPT = """\
(() => {
  const BAR = `
    <button type="button" class="cw-one" data-to="first">First</button>
    <button type="button" class="cw-one" data-to="back">Back</button>
    <button type="button" class="cw-one" data-to="next">Next</button>
    <button type="button" class="cw-one" data-to="last">Last</button>
    <label class="cw-one">Step <input type="range" min="1" step="1"></label>
    <label><input type="checkbox"> Show all steps as a table</label>
    <output aria-live="polite"></output>`;
  const KEYS = {Home: "first", ArrowLeft: "back", ArrowRight: "next", End: "last"};

  function start(walk) {
    const rows = [...walk.querySelectorAll("tbody > tr")];
    const bar = document.createElement("div");
    bar.className = "cw-bar";
    bar.setAttribute("role", "group");
    bar.setAttribute("aria-label", "Steps");
    bar.innerHTML = BAR;
    walk.prepend(bar);
    const slider = bar.querySelector("[type=range]");
    const all = bar.querySelector("[type=checkbox]");
    const last = rows.length - 1;
    let now = 0;

    function show() {
      walk.dataset.mode = all.checked ? "table" : "step";
      rows.forEach((row, at) => row.toggleAttribute("data-now", at === now));
      slider.value = now + 1;
      slider.setAttribute("aria-valuetext", `${now + 1} of ${rows.length}`);
      bar.querySelectorAll("button").forEach(button => {
        // Not `disabled`: the focus would be lost, and with it the keys.
        button.setAttribute("aria-disabled", target(button.dataset.to) === now);
      });
      bar.querySelector("output").textContent =
        all.checked ? `All ${rows.length} steps.` : rows[now].dataset.said;
    }

    function target(name) {
      const to = {first: 0, back: now - 1, next: now + 1, last}[name];
      return Math.min(Math.max(to, 0), last);
    }

    function go(to) {
      now = to;
      show();
    }

    slider.max = rows.length;
    slider.addEventListener("input", () => go(slider.value - 1));
    all.addEventListener("change", show);
    bar.addEventListener("click", event => {
      const button = event.target.closest("button");
      if (button) go(target(button.dataset.to));
    });
    walk.addEventListener("keydown", event => {
      const held = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
      const moves = KEYS[event.key] && !held && !all.checked;
      if (!moves || event.target === slider) return;  // a slider moves by itself
      event.preventDefault();
      event.stopPropagation();  // or a notebook would go to another cell
      go(target(KEYS[event.key]));
    });
    show();
  }

  document.querySelectorAll(".clipr-walk:not([data-mode])").forEach(start);
})();
"""
