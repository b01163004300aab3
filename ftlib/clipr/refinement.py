"""From corrections to better rules: add, specialise, except, reweight, delete.

The paper refines rules by feedback; a language model does it. What is done here without
one is ours. Each correction has a **lesson**: a rule for what was chosen over what was
decided, the user's reason if it can be read as one, else a dimension on which the two
differ. Rules on the lesson's dimension that spoke for the decision are to blame:

* A blamed rule with no more answers for it than against it is deleted.
* Any other gets the task's family as an exception, and the lesson is for that family.
* A rule that said the same with the family as an exception loses the exception.
* If other dimensions still outweigh the lesson, its weight is raised.

In the end, what is said of enough families, and against which there is less, is said of
all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ftlib.clipr.rules import Rule, RuleError, RuleSet, parse_rule
from ftlib.clipr.settings import RefinementSettings
from ftlib.clipr.tasks import Correction, Task

Attributes = Mapping[str, str]


def revise(
    rules: RuleSet, corrections: Iterable[Correction], settings: RefinementSettings
) -> RuleSet:
    """Change rules by corrections, one after the other.

    Args:
        rules: that decided.
        corrections: one whose choice is the decision confirms the rules.
        settings: of counting and deleting.
    """
    for correction in corrections:
        if correction.chosen == correction.decided:
            rules = confirm(rules, correction.task, correction.decided, settings)
        else:
            rules = _corrected(rules, correction, settings)
    return generalised(rules, settings.spread)


def confirm(
    rules: RuleSet, task: Task, index: int, settings: RefinementSettings
) -> RuleSet:
    """Count an accepted decision for the rules that spoke for it and not against it."""
    decided = task.options[index].attributes
    counted = []
    for rule in rules:
        said = {rule.compare(task.family, decided, o.attributes) for o in task.options}
        agrees = 1 in said and -1 not in said
        counted.append(_agreeing(rule, settings) if agrees else rule)
    return RuleSet(tuple(counted))


# --- one correction -----------------------------------------------------------


def lesson_said(correction: Correction) -> Rule | None:
    """Read a reason as a rule; ``None`` if it is none, or not one for the choice."""
    try:
        said = parse_rule(correction.reason).claim
    except RuleError:
        return None
    chosen, decided = _both(correction)
    return said if said.compare(correction.task.family, chosen, decided) > 0 else None


def lesson_guessed(
    rules: RuleSet, correction: Correction, settings: RefinementSettings
) -> Rule | None:
    """Return a rule on a dimension on which choice and decision differ, if any does.

    The first of those on which a rule was wrong and will be deleted, else of those on
    which no rule spoke.
    """
    chosen, decided = _both(correction)
    spoken, weak = set(), set()
    for rule in rules:
        opinion = rule.compare(correction.task.family, chosen, decided)
        if opinion:
            spoken.add(rule.dimension)
        if opinion < 0 and _net(rule) - 1 <= settings.minimum:
            weak.add(rule.dimension)
    differing = [d for d, value in chosen.items() if decided.get(d) != value]
    if not differing:
        return None
    dimension = min(differing, key=lambda d: (d not in weak, d in spoken))
    return Rule(dimension, chosen[dimension], decided.get(dimension))


def _corrected(
    rules: RuleSet, correction: Correction, settings: RefinementSettings
) -> RuleSet:
    said = lesson_said(correction)
    lesson = said or lesson_guessed(rules, correction, settings)
    if lesson is None:
        return rules  # equal attributes: no rule can tell the two apart
    family = correction.task.family
    chosen, decided = _both(correction)
    kept: list[Rule] = []
    excepted = outvoted = False
    for rule in rules:
        opinion = rule.compare(family, chosen, decided)
        on_topic = rule.dimension == lesson.dimension
        if opinion > 0:
            rule = _agreeing(rule, settings)
        elif opinion < 0 and (on_topic or said is None):
            rule = replace(rule, against=rule.against + 1)
            if _net(rule) <= settings.minimum:
                continue
            if on_topic and rule.families:
                outvoted = True
            elif on_topic:
                excepted = True
                exceptions = (*rule.except_families, family)
                rule = replace(rule, except_families=exceptions)
        kept.append(rule)
    if outvoted:  # the family has said otherwise more often
        return RuleSet(tuple(kept))
    if excepted and not lesson.families:
        lesson = replace(lesson, families=(family,))
    kept = _with_lesson(kept, lesson, correction)
    return _outweighing(RuleSet(tuple(kept)), correction, lesson.dimension, settings)


def _with_lesson(
    rules: Sequence[Rule], lesson: Rule, correction: Correction
) -> list[Rule]:
    """Add a lesson, unless a rule says so already or did but for an exception."""
    family = correction.task.family
    for at, rule in enumerate(rules):
        if _content(rule) != _content(lesson):
            continue
        if rule.families not in ((), lesson.families):
            continue
        others = tuple(name for name in rule.except_families if name != family)
        freed = replace(rule, except_families=others)
        if freed.compare(family, *_both(correction)) <= 0:
            continue  # it is silent about these options
        if freed != rule:
            freed = replace(freed, support=rule.support + 1)
        return [*rules[:at], freed, *rules[at + 1 :]]
    return [*rules, replace(lesson, support=1)]


def _content(rule: Rule) -> tuple[str, str, str | None]:
    return rule.dimension, rule.preferred, rule.over


def _outweighing(
    rules: RuleSet, correction: Correction, dimension: str, settings: RefinementSettings
) -> RuleSet:
    """Raise a weight on a dimension until the choice is better than the decision."""
    task = correction.task
    chosen, decided = _both(correction)
    options = task.options[correction.chosen], task.options[correction.decided]
    margin = rules.margin(task.family, *options)
    agreeing = [
        rule
        for rule in rules
        if rule.dimension == dimension
        and rule.compare(task.family, chosen, decided) > 0
    ]
    if margin > 0 or not agreeing:
        return rules
    heaviest = max(agreeing, key=lambda rule: (rule.specificity, rule.weight))
    # Rules are read by people: a sum of decimals must not show as 3.9000000000000004.
    weight = round(min(settings.max_weight, heaviest.weight - margin + 1), 6)
    raised = replace(heaviest, weight=max(weight, heaviest.weight))
    return RuleSet(tuple(raised if rule is heaviest else rule for rule in rules))


def _both(correction: Correction) -> tuple[Attributes, Attributes]:
    """Return the attributes of what was chosen and of what was decided."""
    options = correction.task.options
    return options[correction.chosen].attributes, options[correction.decided].attributes


def _agreeing(rule: Rule, settings: RefinementSettings) -> Rule:
    return replace(rule, support=min(settings.memory, rule.support + 1))


def _net(rule: Rule) -> int:
    return rule.support - rule.against


# --- from families to all -----------------------------------------------------


def generalised(rules: RuleSet, spread: int) -> RuleSet:
    """Make one rule for all of what is said of enough families.

    Rules for all families that say the opposite go, and if one of them has as many
    answers as the families' rules together, nothing changes.

    Args:
        rules: to look through.
        spread: how many families are enough.
    """
    groups: dict[Rule, list[Rule]] = {}
    for rule in rules:
        if rule.families:
            groups.setdefault(replace(rule.claim, families=()), []).append(rule)
    for claim, group in groups.items():
        families = {family for rule in group for family in rule.families}
        common = replace(
            claim,
            weight=max(rule.weight for rule in group),
            support=sum(rule.support for rule in group),
            against=sum(rule.against for rule in group),
        )
        contrary = [
            rule for rule in rules if not rule.families and _opposed(rule, claim)
        ]
        outvoted = all(_net(rule) < _net(common) for rule in contrary)
        if len(families) >= spread and outvoted:
            left = [rule for rule in rules if rule not in (*group, *contrary)]
            same = [rule for rule in left if rule.claim == claim]
            left = [rule for rule in left if rule not in same]
            support = common.support + sum(rule.support for rule in same)
            rules = RuleSet((*left, replace(common, support=support)))
    return rules


def _opposed(a: Rule, b: Rule) -> bool:
    """Return whether two rules prefer, of their two preferred values, their own."""
    return (
        a.dimension == b.dimension
        and a.preferred != b.preferred
        and a.over in (None, b.preferred)
        and b.over in (None, a.preferred)
    )
