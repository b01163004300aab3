import subprocess
import sys
import types
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from ftlib import cli, experiments, results
from ftlib.experiments import Arm, RunsInterrupted
from ftlib.results import PACKED_PREFIX, read


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setattr(results, "_installed_records", lambda: tmp_path / "installed")
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("CI", "true")
    monkeypatch.delenv("FTLIB_SCALE", raising=False)


@pytest.fixture
def ftlib():
    """Run the command with arguments."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, arguments)


@pytest.fixture(autouse=True)
def plan(monkeypatch):
    """Make ``toy`` the only method; its arms are those of this list."""
    arms = [
        Arm("e", "a", {}, lambda seed: {"kl": seed / 10}),
        Arm("e", "b", {}, lambda seed: {"kl": 1.0}),
        Arm("f", "a", {}, lambda seed: {"loss": 2.0}),
    ]
    module = types.ModuleType("toy_experiment")
    module.plan = lambda scale: list(arms)
    monkeypatch.setitem(sys.modules, "toy_experiment", module)
    monkeypatch.setattr(experiments, "METHODS", {"toy": "toy_experiment"})
    return arms


def lines_with(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_run_records_and_prints(ftlib, tmp_path):
    done = ftlib("run", "toy", "--scale", "cpu", "--seeds", "3")
    assert done.exit_code == 0, done.output
    path = tmp_path / "results" / "toy" / "cpu.json"
    assert len(read(path)) == 9
    assert f"9 runs are recorded in {path}" in done.stdout
    assert "toy, scale cpu, experiment e" in done.stdout
    assert "| b   | 3     | 1.00 [1.00, 1.00]   |" in done.stdout
    assert len(lines_with(done.stdout, "| a ")) == 2


def test_run_has_five_seeds_by_default_and_takes_the_scale_of_the_machine(
    ftlib, tmp_path
):
    assert ftlib("run", "toy", "--experiment", "f").exit_code == 0
    records = read(tmp_path / "results" / "toy" / "cpu.json")
    assert [r.seed for r in records] == [0, 1, 2, 3, 4]
    assert records.experiments() == ["f"]


def test_gpu_scale_runs_on_a_cpu_that_is_named(ftlib, tmp_path):
    assert ftlib("run", "toy", "--scale", "gpu", "--seeds", "1").exit_code == 0
    assert len(read(tmp_path / "results" / "toy" / "gpu.json")) == 3


def test_run_of_chosen_arms_and_force(ftlib, tmp_path, plan):
    calls = []
    plan.append(Arm("e", "c", {}, lambda seed: calls.append(seed) or {"kl": 0.0}))
    command = ("run", "toy", "--seeds", "1", "--arm", "c", "--arm", "b")
    for extra in ((), (), ("--force",)):
        assert ftlib(*command, *extra).exit_code == 0
    assert calls == [0, 0]
    assert read(tmp_path / "results" / "toy" / "cpu.json").arms() == ["b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch",), "unknown method 'nosuch'"),
        (("toy", "--scale", "paper"), "never run"),
        (("toy", "--scale", "big"), "unknown scale 'big'"),
        (("toy", "--arm", "x"), "no arm called x"),
        (("toy", "--seeds", "0"), "seeds"),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_code_2(ftlib, arguments, message):
    done = ftlib("run", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_a_wrong_device_is_one_line(ftlib, monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "quantum")
    done = ftlib("report")
    assert done.exit_code == 2
    assert done.stderr.startswith("ftlib: FTLIB_DEVICE='quantum' is no device")


def test_failed_runs_exit_with_1_and_the_rest_is_recorded(ftlib, plan, tmp_path):
    plan.append(Arm("e", "bad", {}, lambda seed: 1 / seed))
    done = ftlib("run", "toy", "--seeds", "1")
    assert done.exit_code == 1
    assert "e/bad seed 0: ZeroDivisionError" in done.stderr.splitlines()[-1]
    assert len(read(tmp_path / "results" / "toy" / "cpu.json")) == 3


def test_ctrl_c_says_what_is_recorded(ftlib, plan):
    def stop(seed):
        raise KeyboardInterrupt

    plan.append(Arm("f", "stop", {}, stop))
    done = ftlib("run", "toy", "--seeds", "2")
    assert done.exit_code == 130
    assert done.stderr.startswith("ftlib: stopped: 3 of 8 runs are recorded in")
    assert issubclass(RunsInterrupted, KeyboardInterrupt)


def test_a_defect_keeps_its_traceback(ftlib, monkeypatch):
    def broken(scale):
        raise TypeError("a defect")

    monkeypatch.setattr(sys.modules["toy_experiment"], "plan", broken)
    assert isinstance(ftlib("run", "toy").exception, TypeError)


def test_results_prints_every_method_and_scale_there_is(ftlib):
    for scale in ("cpu", "gpu"):
        ftlib("run", "toy", "--scale", scale, "--seeds", "2")
    everything = ftlib("results")
    assert everything.exit_code == 0
    assert len(lines_with(everything.stdout, "toy, scale")) == 4
    assert len(lines_with(everything.stdout, "on cpu, ")) == 4
    one = ftlib("results", "toy", "--scale", "gpu").stdout
    assert lines_with(one, "toy, scale") == [
        "toy, scale gpu, experiment e",
        "toy, scale gpu, experiment f",
    ]
    assert "| a   | 2     | 0.0500 [0.00, 0.100] |" in one


def test_results_of_benchmarks_are_printed_too(ftlib, tmp_path):
    ftlib("run", "toy", "--seeds", "1")
    [path] = (tmp_path / "results" / "toy").glob("*.json")
    timed = [replace(record, method="timings") for record in read(path)]
    results.append(timed, tmp_path / "installed")
    shown = ftlib("results").stdout
    assert len(lines_with(shown, "toy, scale")) == 2
    assert len(lines_with(shown, "timings, scale")) == 2
    assert lines_with(ftlib("results", "timings").stdout, "timings, scale")


def test_results_leave_out_packed_outcomes(ftlib, plan):
    plan[:] = [Arm("e", "a", {}, lambda seed: {"kl": 0.5, f"{PACKED_PREFIX}x/0": 7.0})]
    shown = ftlib("run", "toy", "--seeds", "1").stdout
    assert "kl" in shown
    assert PACKED_PREFIX not in shown


def test_results_of_nothing_say_how_to_make_them(ftlib):
    done = ftlib("results", "toy", "--scale", "gpu")
    assert done.exit_code == 1
    assert done.stderr.endswith("make them with: ftlib run toy --scale gpu\n")
    assert ftlib("results").exit_code == 1
    done = ftlib("results", "nosuch")
    assert done.exit_code == 2
    assert done.stderr == "ftlib: nothing is called 'nosuch': choose from ['toy']\n"


def test_results_of_a_damaged_file_are_one_line(ftlib, tmp_path):
    path = tmp_path / "results" / "toy" / "cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    done = ftlib("results")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"ftlib: {path} is not valid JSON")
    assert len(done.stderr.splitlines()) == 1


def test_report_is_one_line(ftlib):
    done = ftlib("report")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    assert "torch" in done.stdout


@pytest.fixture(params=["models", "data"])
def mounted(request, monkeypatch):
    """A stand-in for the app of a subpackage, under the name it is mounted by."""
    inner = typer.Typer()

    @inner.callback(invoke_without_command=True)
    def main() -> None:
        typer.echo("the list")

    @inner.command()
    def fetch(name: str, quick: bool = False) -> None:
        if name == "gone":
            raise FileNotFoundError("no file gone")
        typer.echo(f"fetched {name} {quick}")

    module = types.ModuleType(f"ftlib.{request.param}.cli")
    module.app = inner
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return request.param


def test_mounted_commands_get_their_arguments(ftlib, mounted):
    assert "the list" in ftlib(mounted).stdout
    assert "fetched x True" in ftlib(mounted, "fetch", "x", "--quick").stdout
    shown = ftlib(mounted, "--help")
    assert shown.exit_code == 0
    assert f"{mounted} [OPTIONS]" in shown.stdout
    assert "fetch" in shown.stdout
    assert ftlib(mounted, "nosuch").exit_code == 2


def test_mounted_commands_fail_in_one_line(ftlib, mounted):
    done = ftlib(mounted, "fetch", "gone")
    assert done.exit_code == 1
    assert done.stderr.endswith("ftlib: no file gone\n")
    assert "Traceback" not in done.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ftlib', '--help']\n"
        "from ftlib.cli import app\n"
        "try: app()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("run", "results", "models", "data"))
