import json
import math
import random
import sys
import types

import pytest

import ftlib
from ftlib import experiments
from ftlib.experiments import Arm, PlanError, RunsFailedError, RunsInterrupted, run_plan
from ftlib.results import Metric, RecordError, read

SHA = "a" * 64


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("CI", "true")


@pytest.fixture
def plan(monkeypatch):
    """Let the method ``toy`` have the arms that are put into this list."""
    arms = []
    module = types.ModuleType("toy_experiment")
    module.plan = lambda scale: list(arms)
    monkeypatch.setitem(sys.modules, "toy_experiment", module)
    monkeypatch.setitem(experiments.METHODS, "toy", "toy_experiment")
    return arms


class Counted:
    """A run that counts its calls and can be told to raise at a seed."""

    def __init__(self, raises=None):
        self.seeds = []
        self.raises = raises or {}

    def __call__(self, seed):
        self.seeds.append(seed)
        if seed in self.raises:
            raise self.raises[seed]
        return {"kl": Metric(seed / 10, 5), "draw": random.random()}


def stored(tmp_path):
    return read(tmp_path / "toy" / "cpu.json")


def test_every_arm_runs_with_every_seed_and_is_recorded(plan, tmp_path):
    plan += [
        Arm("e", "a", {"rate": 0.1}, Counted(), data={"x.csv": SHA}),
        Arm("e", "b", {}, Counted()),
    ]
    results = run_plan("toy", "cpu", range(3))
    assert [(r.arm, r.seed) for r in results] == [
        (arm, seed) for arm in "ab" for seed in range(3)
    ]
    assert list(stored(tmp_path)) == list(results)
    first = results[0]
    assert first.metrics["kl"] == Metric(0.0, 5)
    assert first.metrics["draw"].n is None
    assert (first.settings, first.data) == ({"rate": 0.1}, {"x.csv": SHA})
    assert first.versions["torch"]
    assert first.device.startswith("cpu")
    assert first.peak_memory_bytes > 2**20


def test_a_run_depends_on_its_seed_and_not_on_what_ran_before(plan):
    plan += [Arm("e", name, {}, Counted()) for name in "ab"]
    together = run_plan("toy", "cpu", range(2))
    draws = together.select(arm="a").values("draw")
    assert draws.tolist() == together.select(arm="b").values("draw").tolist()
    alone = run_plan("toy", "cpu", [1], arms=["b"], force=True)
    assert alone.values("draw")[0] == draws[1] == random.Random(1).random()


def test_seconds_are_the_run_s_own(plan, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=iter([10.0, 12.5]).__next__)
    plan.append(Arm("e", "a", {}, Counted()))
    monkeypatch.setattr(experiments, "time", clock)
    assert run_plan("toy", "cpu", [0])[0].seconds == 2.5


def test_what_is_recorded_is_not_run_again(plan, tmp_path):
    run = Counted()
    plan.append(Arm("e", "a", {"sizes": (1, 2)}, run))
    run_plan("toy", "cpu", range(2))
    before = stored(tmp_path)
    results = run_plan("toy", "cpu", range(3))
    assert run.seeds == [0, 1, 2]
    assert list(results[:2]) == list(before)
    assert len(run_plan("toy", "cpu", [1])) == 1


@pytest.mark.parametrize(
    "changed", [{"settings": {"rate": 2}}, {"data": {"x.csv": "b" * 64}}]
)
def test_changed_settings_or_data_run_anew(plan, tmp_path, changed):
    run = Counted()
    known = {"settings": {"rate": 1}, "data": {"x.csv": SHA}}
    plan.append(Arm("e", "a", run=run, **known))
    run_plan("toy", "cpu", [0])
    plan[:] = [Arm("e", "a", run=run, **(known | changed))]
    run_plan("toy", "cpu", [0])
    assert run.seeds == [0, 0]
    (record,) = stored(tmp_path)
    assert {"settings": record.settings, "data": record.data} == known | changed


def test_force_runs_again(plan):
    run = Counted()
    plan.append(Arm("e", "a", {}, run))
    run_plan("toy", "cpu", [0])
    run_plan("toy", "cpu", [0], force=True)
    assert run.seeds == [0, 0]


def test_experiment_and_arms_choose(plan):
    plan += [Arm(e, a, {}, Counted()) for e in "ef" for a in "ab"]
    chosen = run_plan("toy", "cpu", [0], experiment="f", arms=["b"])
    assert [(r.experiment, r.arm) for r in chosen] == [("f", "b")]
    assert [arm.run.seeds for arm in plan] == [[], [], [], [0]]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"experiment": "x"}, "no experiment called x; it has: e/a, f/b"),
        ({"arms": ["a", "x"]}, "no arm called x; it has"),
        ({"experiment": "e", "arms": ["b"]}, "no arm called b"),
    ],
)
def test_what_is_not_in_the_plan_is_refused(plan, chosen, message):
    plan += [Arm("e", "a", {}, Counted()), Arm("f", "b", {}, Counted())]
    with pytest.raises(PlanError, match=message):
        run_plan("toy", "cpu", [0], **chosen)


def test_a_failed_arm_does_not_stop_the_others(plan, tmp_path, capsys):
    bad = Counted({1: ValueError("no such λ")})
    plan += [Arm("e", "a", {}, bad), Arm("e", "b", {}, Counted())]
    with pytest.raises(RunsFailedError) as error:
        run_plan("toy", "cpu", range(3))
    assert str(error.value).startswith("1 of 6 runs failed")
    assert "e/a seed 1: ValueError: no such λ" in str(error.value)
    assert "raise self.raises[seed]\nValueError: no such λ" in capsys.readouterr().err
    kept = [(r.arm, r.seed) for r in stored(tmp_path)]
    assert kept == [("a", 0), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    bad.raises.clear()
    assert len(run_plan("toy", "cpu", range(3))) == 6
    assert bad.seeds == [0, 1, 2, 1]


@pytest.mark.parametrize("metrics", [{"kl": "high"}, {"kl": None}, None])
def test_metrics_that_are_no_numbers_fail_that_run_alone(plan, tmp_path, metrics):
    plan += [Arm("e", "a", {}, lambda seed: metrics), Arm("e", "b", {}, Counted())]
    with pytest.raises(RunsFailedError, match="e/a seed 0"):
        run_plan("toy", "cpu", [0])
    assert stored(tmp_path).arms() == ["b"]


def test_a_diverged_run_is_a_result(plan, tmp_path):
    plan.append(Arm("e", "a", {}, lambda seed: {"kl": math.inf}))
    assert math.isnan(run_plan("toy", "cpu", [0]).values("kl")[0])
    assert len(stored(tmp_path)) == 1


def test_ctrl_c_keeps_the_finished_runs_and_a_repeat_resumes(plan, tmp_path):
    run = Counted({2: KeyboardInterrupt()})
    plan.append(Arm("e", "a", {}, run))
    with pytest.raises(
        RunsInterrupted, match=r"2 of 4 runs are recorded in .*cpu\.json"
    ):
        run_plan("toy", "cpu", range(4))
    assert [r.seed for r in stored(tmp_path)] == [0, 1]
    run.raises.clear()
    assert len(run_plan("toy", "cpu", range(4))) == 4
    assert run.seeds == [0, 1, 2, 2, 3]


def test_each_run_is_written_before_the_next_begins(plan, tmp_path):
    seen = []

    def count(seed):
        path = tmp_path / "toy" / "cpu.json"
        seen.append(len(read(path)) if path.exists() else 0)
        return {"kl": 0.0}

    plan.append(Arm("e", "a", {}, count))
    run_plan("toy", "cpu", range(3))
    assert seen == [0, 1, 2]


def test_a_damaged_file_stops_before_anything_runs(plan, tmp_path):
    run = Counted()
    plan.append(Arm("e", "a", {}, run))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "cpu.json").write_text("{")
    with pytest.raises(RecordError, match=r"cpu\.json"):
        run_plan("toy", "cpu", [0])
    assert run.seeds == []


def test_an_arm_without_its_model_is_skipped_in_one_line(plan, monkeypatch, capsys):
    asked = []

    def available(name):
        asked.append(name)
        return name == "here"

    monkeypatch.setattr(experiments, "_available", available)
    without = Counted()
    plan += [
        Arm("e", "a", {}, without, requires=["here", "gone"]),
        Arm("e", "b", {}, Counted(), requires=["here"]),
    ]
    results = run_plan("toy", "cpu", range(3))
    assert results.arms() == ["b"]
    assert without.seeds == []
    assert sorted(asked) == ["gone", "here"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("skipped e/a: no model gone")
    assert line.endswith("ftlib models fetch gone")


def test_models_are_asked_for_only_when_something_is_to_run(plan, monkeypatch):
    fetched = []
    fake = types.ModuleType("ftlib.models")
    fake.available = lambda name, fetch: fetched.append((name, fetch)) or True
    monkeypatch.setattr(ftlib, "models", fake, raising=False)
    plan.append(Arm("e", "a", {}, Counted(), requires=["small"]))
    run_plan("toy", "cpu", [0])
    run_plan("toy", "cpu", [0])
    assert fetched == [("small", True)]


def test_the_papers_scale_is_never_run(plan):
    with pytest.raises(PlanError, match="never run: choose cpu or gpu"):
        run_plan("toy", "paper", [0])


def test_an_unknown_method_lists_the_known():
    known = ", ".join(experiments.METHODS)
    with pytest.raises(
        PlanError, match=f"unknown method 'nosuch': choose from {known}"
    ):
        run_plan("nosuch", "cpu", [0])


def test_two_arms_with_one_name_are_refused(plan):
    plan += [Arm("e", "a", {"rate": rate}, Counted()) for rate in (1, 2)]
    with pytest.raises(PlanError, match="2 arms called e/a"):
        run_plan("toy", "cpu", [0])


def test_settings_that_cannot_be_recorded_are_refused_before_running():
    with pytest.raises(RecordError, match="cannot be recorded"):
        Arm("e", "a", {"run": object()}, Counted())


def test_methods_are_imported_only_when_asked_for(plan, monkeypatch):
    monkeypatch.setitem(experiments.METHODS, "other", "no_such_module")
    plan.append(Arm("e", "a", {}, Counted()))
    assert len(run_plan("toy", "cpu", [0, 0])) == 1


def test_records_go_to_the_directory_given(plan, tmp_path):
    plan.append(Arm("e", "a", {}, Counted()))
    run_plan("toy", "gpu", [0], directory=tmp_path / "else")
    document = json.loads((tmp_path / "else" / "toy" / "gpu.json").read_text())
    assert len(document["records"]) == 1
    assert not (tmp_path / "toy").exists()


def test_a_bar_counts_the_runs(plan, monkeypatch, capsys):
    monkeypatch.delenv("CI")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    plan.append(Arm("e", "a", {}, Counted()))
    run_plan("toy", "cpu", range(2))
    assert "2/2" in capsys.readouterr().err
