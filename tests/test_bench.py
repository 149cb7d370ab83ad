"""What the benchmarks share: ratios within a run, what is said of two runs, fits; and each kind of measurement once."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from experiments.benchmarks import compare, counts, gpu_check, harness, run
from experiments.benchmarks.floors import measure as floors
from experiments.benchmarks.growth import measure as growth
from experiments.benchmarks.harness import Row
from experiments.benchmarks.where_time_goes import measure as where_time_goes

CPU = torch.device("cpu")


def test_contestants_take_turns_and_what_warms_up_is_not_counted():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = harness.take_turns(calls, 3, CPU, warm_up=2)
    assert order == ["a", "b"] * 5
    assert {name: len(found) for name, found in taken.items()} == {"a": 3, "b": 3}


def test_on_one_thread_what_others_do_on_the_core_is_not_counted():
    torch.set_num_threads(1)
    assert harness.seconds(lambda: time.sleep(0.1), CPU) < 0.05
    assert harness.seconds(lambda: sum(range(10**6)), CPU) > 1e-3
    torch.set_num_threads(2)
    assert harness.seconds(lambda: time.sleep(0.1), CPU) > 0.09


def test_a_ratio_is_the_median_over_turns_so_that_a_slow_turn_of_both_says_nothing():
    rows = [Row("x", "ours", [2.0, 20.0, 2.2], "dense"), Row("x", "dense", [1.0, 10.0, 1.0], "dense")]
    assert harness.ratios(rows) == {("x", "ours"): 2.0}
    rows[1] = Row("x", "dense", [4.0], "dense")
    assert harness.ratios(rows) == {("x", "ours"): 0.55}


def test_what_is_written_is_read_again_with_machine_versions_and_revision(tmp_path):
    rows = [Row("x", "ours", [2.0], "dense", notes={"flops": 1.5}), Row("x", "dense", [1.0], "dense")]
    harness.write(tmp_path / "new" / "results.json", rows, CPU, dtype="float32")
    about, found = harness.read(tmp_path / "new" / "results.json")
    assert found == rows
    assert about["versions"]["torch"] == torch.__version__
    assert "cores" in about["hardware"]
    assert about["dtype"] == "float32"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def record(folder, ratios, unit="s", is_race=True, **more):
    rows = [
        row
        for case, ratio in ratios.items()
        for row in (Row(case, "ours", [ratio], "dense", unit, is_race), Row(case, "dense", [1.0], "dense", unit))
    ]
    harness.write(folder / "speed" / harness.RESULTS, rows, CPU, **more)


def verdicts(capsys):
    """What was said of each case of the last comparison, and all of it."""
    said = capsys.readouterr().out
    lines = [line.removesuffix(" |").split(" | ") for line in said.splitlines() if "speed |" in line]
    return {cells[1]: cells[-1].strip() for cells in lines}, said


def test_a_run_is_held_against_the_committed_one_by_ratios(tmp_path, capsys):
    record(tmp_path / "old", {"same": 1.0, "slow": 1.0, "fast": 1.0, "gone": 1.0})
    record(tmp_path / "new", {"same": 1.2, "slow": 1.4, "fast": 0.5, "new": 9.0})
    words = [str(tmp_path / "new"), "--committed", str(tmp_path / "old")]
    assert compare.main(words) == 1
    found, said = verdicts(capsys)
    assert found == {"same": "", "slow": "worse", "fast": "better", "gone": "gone", "new": "new"}
    assert "5 ratios, 2 of them worse" in said
    assert "not comparable" not in said
    record(tmp_path / "new", {"same": 1.2, "slow": 1.4, "fast": 0.5, "gone": 1.0})
    assert compare.main([*words, "--tolerance", "1.5"]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "nothing")])
    assert "--folder" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["hardware", "threads", "dtype"])
def test_times_under_other_settings_are_not_comparable_and_bytes_are_but_in_another_dtype(tmp_path, capsys, setting):
    words = [str(tmp_path / "new"), "--committed", str(tmp_path / "old")]
    for unit, expected in (("s", "not comparable"), ("byte", "not comparable" if setting == "dtype" else "worse")):
        record(tmp_path / "old", {"same": 1.0, "more": 1.0, "less": 1.0}, unit)
        record(tmp_path / "new", {"same": 1.2, "more": 9.0, "less": 0.1}, unit)
        path = tmp_path / "new" / "speed" / harness.RESULTS
        path.write_text(json.dumps(json.loads(path.read_text()) | {setting: "other"}))
        assert compare.main(words) == (expected == "worse")
        found, said = verdicts(capsys)
        assert found == {"same": "", "more": expected, "less": expected.replace("worse", "better")}
        assert f"speed: {setting} was" in said
        assert ("2 more are not comparable" in said) == (expected != "worse")


def test_a_share_of_a_whole_differs_and_is_never_worse(tmp_path, capsys):
    record(tmp_path / "old", {"share": 0.2}, is_race=False)
    record(tmp_path / "new", {"share": 0.4}, is_race=False)
    assert compare.main([str(tmp_path / "new"), "--committed", str(tmp_path / "old")]) == 0
    assert verdicts(capsys)[0] == {"share": "differs"}
    assert not any(row.is_race for row in where_time_goes.shares("x", lambda: torch.ones(9, 9) @ torch.ones(9, 9)))


def test_a_benchmark_has_as_many_threads_as_the_committed_run_where_there_are_cores(tmp_path):
    record(tmp_path, {"same": 1.0})
    path = tmp_path / "speed" / harness.RESULTS
    for recorded, expected in ((1, 1), (len(os.sched_getaffinity(0)), len(os.sched_getaffinity(0))), (10**4, 1)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": recorded}))
        assert run.threads("speed", tmp_path) == expected
    assert run.threads("nothing", tmp_path) == 1


def test_a_floor_is_that_of_the_ceilings_in_the_same_turn(monkeypatch):
    """The machine halves its speed in the second turn, and a kernel's ratio stays what it was."""
    work, turns = counts.Work(4e9, 1e6), [1.0, 2.0, 1.0]
    monkeypatch.setattr(floors, "kernels", lambda *_: [("k", work, None)])
    monkeypatch.setattr(harness, "take_turns", lambda calls, rounds, device: {name: turns[:rounds] for name in calls})
    rows, ceilings = floors.measure(Namespace(device=CPU, dtype="float32", short=True, shapes=["Qwen3-8B"], rounds=3))
    assert ceilings.flops == 2 * 512**3
    floor = max(4e9 / ceilings.flops, 1e6 / ceilings.bandwidth)
    assert [row.values for row in rows] == [turns, [floor, 2 * floor, floor]]
    assert harness.ratios(rows) == {("Qwen3-8B: k", "measured"): pytest.approx(1 / floor)}


def test_a_benchmark_runs_in_a_process_of_its_own_and_is_held_against_the_committed_one(tmp_path):
    module = [sys.executable, "-m", "experiments.benchmarks.run", "distillation_loss", "--folder", str(tmp_path)]
    many = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run(module, check=True, cwd=harness.ROOT, stdout=subprocess.DEVNULL, env=many)
    about, committed = (harness.read(f / "distillation_loss" / harness.RESULTS)[0] for f in (tmp_path, run.HERE))
    assert about["threads"] == committed["threads"]
    assert [path.name for path in tmp_path.iterdir()] == ["distillation_loss"]
    assert compare.main([str(tmp_path), "--tolerance", "1000"]) == 0


def test_without_a_gpu_the_check_says_so_and_nothing_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run", None)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_every_benchmark_of_the_list_has_results_that_are_committed():
    for name in run.COMMANDS:
        about, rows = harness.read(run.HERE / name / harness.RESULTS)
        assert about["git_revision"].rstrip("+") != "unknown"
        assert harness.ratios(rows), name


def test_exponents_and_shares_of_a_quadratic_term():
    sizes = [2**n for n in range(7)]
    assert growth.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [100 if n < 8 else n for n in sizes]) == pytest.approx(1.0)  # the upper half alone
    assert growth.quadratic_share(sizes, [5 + 2 * n for n in sizes]) == pytest.approx(0, abs=1e-6)
    assert growth.quadratic_share(sizes, [7 * n + 0.5 * n**2 for n in sizes]) == pytest.approx(32 / 39)


def test_the_sizes_of_a_series_take_turns(monkeypatch):
    order = []
    monkeypatch.setitem(growth.TIMED, "train", lambda place: lambda: order.append(place.context))
    growth.measure(growth.Series("train", "context", [growth.Place(n, 4) for n in (300, 400)], 2.0), 2)
    assert order == [300, 400] * 3


@pytest.mark.parametrize("quantity", growth.QUANTITIES)
def test_each_quantity_is_measured_along_a_series(quantity):
    series = growth.Series(quantity, "context", [growth.Place(n, 4, heads=2) for n in (300, 400, 520)], 1.0)
    rows = growth.measure(series, 2)
    assert [row.name for row in rows] == ["300", "400", "520"]
    assert all(min(row.values) > 0 for row in rows)
    assert growth.cells(series, rows)[0] == f"{quantity} against context (cr 4, heads 2, batch 1)"
    if quantity == "bytes":
        live = growth.filled(series.places[-1])
        assert rows[-1].values == [live.allocated_bytes]


def test_results_are_plain_json(tmp_path):
    record(tmp_path, {"same": 1.0})
    assert json.loads((tmp_path / "speed" / harness.RESULTS).read_text())["rows"][0]["unit"] == "s"
