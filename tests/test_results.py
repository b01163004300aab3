import itertools
import json
import math
import multiprocessing
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ftlib import results
from ftlib.results import (
    SCHEMA,
    Interval,
    Metric,
    NotRecordedError,
    Record,
    RecordError,
    Results,
    append,
    bootstrap,
    format_interval,
    load,
    merge,
    paired_by_item,
    paired_by_seed,
    read,
    results_directory,
    table,
)


def record(seed=0, arm="relax", value=0.5, **changes):
    known = {
        "method": "cgm",
        "experiment": "mixture",
        "arm": arm,
        "seed": seed,
        "scale": "cpu",
        "settings": {"steps": 10, "layers": (1, 2)},
        "metrics": {"kl": Metric(value, 100)},
        "seconds": 1.5,
        "peak_memory_bytes": 2**20,
        "device": "cpu, 2 cores",
        "versions": {"torch": "2.13.0"},
        "data": {"gsm8k/test.jsonl": "0" * 64},
        "commit": None,
        "finished": "2026-01-31T12:00:00Z",
    }
    return Record(**(known | changes))


def arm_of(values, arm="relax"):
    return Results(record(seed, arm, value) for seed, value in enumerate(values))


def stored(directory):
    return read(directory / "cgm" / "cpu.json")


# --- files -------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path):
    first = record(value=1 / 3)
    append([first], tmp_path)
    assert list(stored(tmp_path)) == [first]


def test_numpy_numbers_are_recorded(tmp_path):
    append([record(metrics={"kl": Metric(np.float32(0.5), np.int64(7))})], tmp_path)
    assert stored(tmp_path)[0].metrics == {"kl": Metric(0.5, 7)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_run_is_stored_as_null_and_read_as_nan(tmp_path, value):
    append([record(value=value)], tmp_path)
    document = json.loads((tmp_path / "cgm" / "cpu.json").read_text())
    assert document["records"][0]["metrics"]["kl"] == {"value": None, "n": 100}
    assert math.isnan(stored(tmp_path)[0].metrics["kl"].value)


def test_file_is_sorted_indented_and_ends_in_one_newline(tmp_path):
    append([record(2), record(10), record(0, "reward"), record(0)], tmp_path)
    text = (tmp_path / "cgm" / "cpu.json").read_text()
    order = [(r["arm"], r["seed"]) for r in json.loads(text)["records"]]
    assert order == [("relax", 0), ("relax", 2), ("relax", 10), ("reward", 0)]
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")
    assert max(map(len, text.splitlines())) < 100


def test_order_of_appending_does_not_change_the_file(tmp_path):
    records = [record(seed, arm) for seed in range(2) for arm in ("a", "b")]
    written = set()
    for i, order in enumerate(itertools.permutations(records)):
        for one in order:
            append([one], tmp_path / str(i))
        written.add((tmp_path / str(i) / "cgm" / "cpu.json").read_bytes())
    assert len(written) == 1


def test_same_key_replaces_even_with_an_earlier_clock(tmp_path):
    append([record(value=1.0)], tmp_path)
    append([record(value=2.0, finished="2020-01-01T00:00:00Z")], tmp_path)
    assert stored(tmp_path).values("kl").tolist() == [2.0]


def test_records_go_to_the_file_of_their_method_and_scale(tmp_path):
    append([record(), record(scale="gpu"), record(method="cft")], tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json")) == [
        "cft/cpu.json",
        "cgm/cpu.json",
        "cgm/gpu.json",
    ]


def _append_five(directory, arm):
    for seed in range(5):
        append([record(seed, arm)], directory)


def test_processes_appending_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    arms = ["a", "b"]
    workers = [context.Process(target=_append_five, args=(tmp_path, a)) for a in arms]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    kept = {(r.arm, r.seed) for r in stored(tmp_path)}
    assert kept == set(itertools.product(arms, range(5)))


def test_a_write_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    append([record(0)], tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        append([record(1)], tmp_path)
    monkeypatch.undo()
    assert [r.seed for r in stored(tmp_path)] == [0]
    append([record(1)], tmp_path)
    assert [r.seed for r in stored(tmp_path)] == [0, 1]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"scale": "huge"}, "scale"),
        ({"method": "../cgm"}, "method"),
        ({"data": {"x": "123"}}, "data.x"),
        ({"finished": "2026-01-31 12:00"}, "finished"),
        ({"metrics": {"kl": Metric(0.5, -1)}}, "metrics.kl.n"),
        ({"seconds": "long"}, "seconds"),
    ],
)
def test_a_bad_record_is_refused_by_field_and_nothing_is_written(
    tmp_path, changes, field
):
    with pytest.raises(RecordError) as error:
        append([record(**({"seed": 3} | changes))], tmp_path)
    assert f"field {field}:" in str(error.value)
    assert "arm 'relax'" in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


def _edit(directory, change):
    path = directory / "cgm" / "cpu.json"
    document = json.loads(path.read_text())
    del document["sha256"]  # a change that is meant
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["records"][1]["metrics"]["kl"].update(value="x"),
            r"record 1 \(arm 'relax', seed 1\), field metrics\.kl\.value: 'x'",
        ),
        (lambda d: d["records"][0].pop("seed"), r"record 0 \(arm 'relax'\): 'seed' is"),
        (lambda d: d["records"][0].update(note=1), r"record 0 .*'note' was unexpected"),
        (lambda d: d.update(schema=2), r"field schema: 1 was expected"),
        (lambda d: d["records"].append(d["records"][0]), r"2 records of \('cgm'"),
        (lambda d: d["records"].append([]), r"record 2"),
        (lambda d: d.pop("records"), r"'records' is a required"),
    ],
)
def test_a_damaged_file_is_refused_by_name_record_and_field(tmp_path, change, message):
    append([record(0), record(1)], tmp_path)
    path = _edit(tmp_path, change)
    before = path.read_bytes()
    with pytest.raises(RecordError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    with pytest.raises(RecordError):
        append([record(2)], tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", '{"schema": 1, "rec', "[NaN]", "\xff"])
def test_a_file_that_is_not_json_is_refused_by_name(tmp_path, text):
    path = tmp_path / "cpu.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=r"cpu\.json is not valid JSON"):
        read(path)


def test_settings_that_json_cannot_hold_are_refused():
    with pytest.raises(RecordError, match="cannot be recorded"):
        record(settings={"path": Path("x")})
    with pytest.raises(RecordError, match="cannot be recorded"):
        record(settings={"rate": math.nan})


def test_the_schema_asks_for_every_field_of_a_record():
    required = SCHEMA["properties"]["records"]["items"]["required"]
    assert required == [field.name for field in fields(Record)]


def test_merge_keeps_the_run_that_finished_last(tmp_path):
    early, late = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    append([record(0, value=1, finished=late), record(1, value=1, finished=early)],
           tmp_path / "a")  # fmt: skip
    append([record(0, value=2, finished=early), record(1, value=2, finished=late),
            record(2, value=2), record(0, scale="gpu")], tmp_path / "b")  # fmt: skip
    merge((tmp_path / "b").rglob("*.json"), tmp_path / "a")
    assert stored(tmp_path / "a").values("kl").tolist() == [1, 2, 2]
    assert len(read(tmp_path / "a" / "cgm" / "gpu.json")) == 1


def test_merge_of_a_damaged_file_writes_nothing(tmp_path):
    append([record()], tmp_path / "a")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(RecordError, match=r"bad\.json"):
        merge([tmp_path / "a" / "cgm" / "cpu.json", bad], tmp_path / "to")
    assert not (tmp_path / "to").exists()


# --- where -------------------------------------------------------------------


def _install_in(place, monkeypatch):
    place.mkdir(parents=True)
    monkeypatch.setattr(results, "_installed_records", lambda: place)
    monkeypatch.delenv("FTLIB_RESULTS_DIR", raising=False)


def test_results_directory_is_the_variable_first(monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    assert results_directory() == tmp_path


def test_results_directory_of_a_checkout(monkeypatch, tmp_path):
    (tmp_path / ".git").mkdir()
    _install_in(tmp_path / "book" / "results", monkeypatch)
    assert results_directory() == tmp_path / "book" / "results"


@pytest.mark.parametrize(
    ("place", "git"),
    [
        ("book/results", False),
        ("ftlib/records", True),  # installed into the top of some checkout
        (".venv/lib/site-packages/ftlib/records", True),
    ],
)
def test_results_directory_of_an_installation(monkeypatch, tmp_path, place, git):
    if git:
        (tmp_path / ".git").mkdir()
    _install_in(tmp_path / place, monkeypatch)
    assert results_directory() == Path("ftlib-results")


def test_load_prefers_the_directory_and_falls_back_on_the_package(
    monkeypatch, tmp_path
):
    _install_in(tmp_path / "installed", monkeypatch)
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path / "mine"))
    append([record(value=1)], tmp_path / "installed")
    assert load("cgm", "cpu").values("kl") == [1]
    append([record(value=2)], tmp_path / "mine")
    assert load("cgm", "cpu").values("kl") == [2]


def test_load_of_nothing_says_where_and_how(monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    (tmp_path / "cgm").mkdir()
    (tmp_path / "cgm" / "gpu.json").write_text('{"schema": 1, "records": []}')
    with pytest.raises(NotRecordedError) as error:
        load("cgm", "gpu")
    assert str(tmp_path) in str(error.value)
    assert "ftlib run cgm --scale gpu" in str(error.value)


def test_importing_results_imports_neither_torch_nor_jsonschema():
    code = (
        "import sys, ftlib.results; sys.exit(bool({'torch', 'jsonschema', 'scipy'}"
        " & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- selecting ---------------------------------------------------------------


def test_values_are_ordered_by_seed():
    shuffled = Results(record(seed, value=seed / 10) for seed in (10, 2, 0))
    assert shuffled.values("kl").tolist() == [0.0, 0.2, 1.0]


def test_select_by_experiment_arm_and_setting():
    every = Results(
        record(seed, arm, settings={"rate": rate, "betas": [0.9, 0.99]})
        for seed in range(2)
        for arm, rate in (("a", None), ("b", 1))
    )
    assert every.select(arm="a").arms() == ["a"]
    assert every.select(rate=None).arms() == ["a"]
    assert every.select(betas=(0.9, 0.99)).arms() == ["a", "b"]
    assert len(every.select("mixture", "b", rate=1)) == 2
    assert len(every[1:]) == 3


@pytest.mark.parametrize(
    "asked", [{"arm": "relx"}, {"experiment": "gpt"}, {"steps": 11}, {"stepz": None}]
)
def test_select_of_nothing_lists_what_there_is(asked):
    with pytest.raises(NotRecordedError, match="there are: mixture/relax"):
        arm_of([1]).select(**asked)


@pytest.mark.parametrize(
    "other", [{"arm": "b"}, {"experiment": "gpt"}, {"scale": "gpu"}, {"method": "cft"}]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_of_several_arms_are_refused(other, seed):
    both = Results([record(0), record(**({"seed": seed} | other))])
    with pytest.raises(ValueError, match=r"select one arm of: .*mixture/relax"):
        both.values("kl")


def test_values_with_a_repeated_seed_are_refused():
    with pytest.raises(ValueError, match=r"more than once in Results\(2 records"):
        Results([record(0), record(0)]).values("kl")


def test_an_unknown_metric_lists_the_known():
    with pytest.raises(NotRecordedError, match="no metric 'loss'; it has: kl"):
        arm_of([1]).values("loss")


# --- statistics --------------------------------------------------------------


def test_bootstrap_against_every_resample():
    values = [0.1, 0.7, 0.2, 0.9, 0.3]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    interval = bootstrap(values)
    assert interval.mean == pytest.approx(0.44)
    assert interval.n == 5
    low, high = np.quantile(means, [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.021)


def test_bootstrap_of_many_approaches_the_normal_interval():
    values = np.random.default_rng(0).exponential(size=3000)
    interval = bootstrap(values, confidence=0.9)
    half = 1.6449 * values.std() / math.sqrt(3000)
    assert interval.high - interval.mean == pytest.approx(half, rel=0.05)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.05)


def test_bootstrap_is_the_same_each_time_and_leaves_the_global_state():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_bootstrap_of_degenerate_samples():
    one = bootstrap([3.0])
    assert (one.mean, one.n) == (3.0, 1)
    assert np.isnan([one.low, one.high]).all()
    same = bootstrap([0.1] * 5)
    assert (same.low, same.high) == pytest.approx((0.1, 0.1), abs=1e-15)
    lost = bootstrap([1.0, math.nan, 2.0])
    assert np.isnan(lost[:3]).all()
    assert lost.n == 3


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0])
def test_bootstrap_refuses_other_shapes(values):
    with pytest.raises(ValueError, match="shape"):
        bootstrap(values)


def _sign_flip_by_hand(difference):
    flips = itertools.product((1, -1), repeat=len(difference))
    means = [np.mean(np.multiply(difference, signs)) for signs in flips]
    observed = np.mean(difference)
    tails = np.mean(means >= observed - 1e-12), np.mean(means <= observed + 1e-12)
    return min(1.0, 2 * min(tails))


@pytest.mark.parametrize(
    "difference",
    [[1, 2, 3, 4, 5], [0.3, -0.2, 0.5, 0.1], [0, 0, 0], [-1, -1, -1, 2], [5, 5]],
)
def test_paired_p_value_is_the_exact_sign_flip(difference):
    a = np.asarray(difference) + 10.0
    compared = paired_by_item(a, np.full(len(a), 10.0))
    assert compared.p_value == pytest.approx(_sign_flip_by_hand(difference))
    assert compared.difference.mean == pytest.approx(np.mean(difference))


def test_five_seeds_give_at_best_one_in_sixteen():
    a, b = arm_of([5, 6, 7, 8, 9], "a"), arm_of([1, 1, 2, 2, 3], "b")
    assert paired_by_seed(a, b, "kl").p_value == pytest.approx(2 / 2**5)


def test_pairing_is_by_seed_and_not_by_position():
    a = Results(record(seed, value=seed) for seed in (4, 0, 7))
    b = Results(record(seed, value=seed - 1) for seed in (7, 4, 0))
    compared = paired_by_seed(a, b, "kl")
    assert compared.difference == Interval(1.0, 1.0, 1.0, 3)
    assert compared.n == 3


def test_seeds_without_a_partner_are_named():
    a = Results(record(seed) for seed in (0, 1, 2))
    b = Results(record(seed) for seed in (1, 2, 5, 6))
    with pytest.raises(ValueError, match="seeds 0, 5, 6"):
        paired_by_seed(a, b, "kl")


def test_pairs_of_items_keep_their_level_by_chance():
    rng = np.random.default_rng(3)
    items = rng.normal(size=300)
    shifted, balanced = rng.normal(0.3, 1, 300), rng.permutation([1.0, -1.0] * 150)
    assert paired_by_item(items + shifted, items).p_value < 0.01
    assert paired_by_item(items + balanced, items).p_value > 0.5


def test_pairs_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        paired_by_item([1, 2], [1, 2, 3])
    assert paired_by_item([1], [2]).p_value == 1.0
    assert math.isnan(paired_by_item([1, math.inf], [2, 3]).p_value)


# --- showing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.1931, 0.18999, 0.2, 5), "0.193 [0.190, 0.200]"),
        (Interval(100.2, 99.96, 101, 5), "100 [100, 101]"),
        (Interval(0.5, math.nan, math.nan, 1), "0.500"),
        (Interval(math.nan, math.nan, math.nan, 5), "not finite"),
    ],
)
def test_format_interval(interval, text):
    assert format_interval(interval) == text


def test_table():
    every = Results([
        *arm_of([0.5] * 3, "relax"),
        *arm_of([math.nan, 1.0], "base"),
        record(0, "odd", metrics={"loss": Metric(2.0)}),
    ])  # fmt: skip
    labels = {"relax": "relax λ", "base": "b", "odd": "o"}
    shown = table(every, {"kl": "KL(p|q)"}, labels)
    assert shown.splitlines() == [
        "| arm     | seeds | KL(p\\|q)             |",
        "| ------- | ----- | -------------------- |",
        "| relax λ | 3     | 0.500 [0.500, 0.500] |",
        "| b       | 2     | not finite           |",
        "| o       | 1     | –                    |",
    ]
    assert [line.split()[1] for line in table(every, ["kl"]).splitlines()[2:]] == [
        "base",
        "odd",
        "relax",
    ]


def test_table_refuses_what_it_cannot_show():
    two = Results([record(0), record(0, experiment="gpt")])
    with pytest.raises(ValueError, match="select one arm"):
        table(two, ["kl"])
    with pytest.raises(NotRecordedError, match="no record with arm 'x'"):
        table(arm_of([1]), ["kl"], ["x"])
    uneven = Results([record(0), record(1, metrics={"loss": Metric(1)})])
    with pytest.raises(NotRecordedError, match="seed 1 has no metric 'kl'"):
        table(uneven, ["kl"])
