"""What the benchmarks share: ratios within a run, what is said of two runs, fits; and each kind of measurement once."""

import json
import subprocess
import sys

import pytest
import torch

from experiments.benchmarks import compare, gpu_check, harness, run
from experiments.benchmarks.growth import measure as growth
from experiments.benchmarks.harness import Row

CPU = torch.device("cpu")


def test_contestants_take_turns_and_what_warms_up_is_not_counted():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = harness.take_turns(calls, 3, CPU, warm_up=2)
    assert order == ["a", "b"] * 5
    assert {name: len(found) for name, found in taken.items()} == {"a": 3, "b": 3}


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


def record(folder, ratios, **more):
    rows = [
        row
        for case, ratio in ratios.items()
        for row in (Row(case, "ours", [ratio], "dense"), Row(case, "dense", [1.0], "dense"))
    ]
    harness.write(folder / "speed" / harness.RESULTS, rows, CPU, **more)


def test_a_run_is_held_against_the_committed_one_by_ratios(tmp_path, capsys):
    record(tmp_path / "old", {"same": 1.0, "slow": 1.0, "fast": 1.0, "gone": 1.0}, dtype="float32")
    record(tmp_path / "new", {"same": 1.2, "slow": 1.4, "fast": 0.5, "new": 9.0}, dtype="bfloat16")
    words = [str(tmp_path / "new"), "--committed", str(tmp_path / "old")]
    assert compare.main(words) == 1
    said = capsys.readouterr().out
    verdicts = {line.split(" | ")[1]: line.rstrip(" |").split(" | ")[-1] for line in said.splitlines() if "speed |" in line}
    assert verdicts == {"same": "1.2", "slow": "worse", "fast": "better", "gone": "gone", "new": "new"}
    assert "dtype was 'float32' and is 'bfloat16'" in said
    assert "5 ratios, 2 of them worse" in said
    record(tmp_path / "new", {"same": 1.2, "slow": 1.4, "fast": 0.5, "gone": 1.0})
    assert compare.main([*words, "--tolerance", "1.5"]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "nothing")])
    assert "--folder" in capsys.readouterr().err


def test_a_benchmark_runs_in_a_process_of_its_own_and_is_held_against_the_committed_one(tmp_path):
    module = [sys.executable, "-m", "experiments.benchmarks.run", "distillation_loss", "--folder", str(tmp_path)]
    subprocess.run(module, check=True, cwd=harness.ROOT, stdout=subprocess.DEVNULL)
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
