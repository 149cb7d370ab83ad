"""The command of the README that turns results into tables, figures and a report, run as a user runs it."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dms_lab import results
from dms_lab.html_report import content, sources
from dms_lab.pareto.__main__ import main

ROOT = Path(__file__).parent.parent
STUDY = Path(__file__).parent / "data" / "schema2"  # many chains a problem, three seeds, as an older version wrote it
POINT = results.load(STUDY / "results_seed0.jsonl").iloc[0].to_dict()


@pytest.fixture
def study(tmp_path):
    """A copy of a study's results, of two seeds."""
    folder = tmp_path / "hyper_scaling"
    folder.mkdir()
    for seed in (0, 1):
        shutil.copy(STUDY / f"results_seed{seed}.jsonl", folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures for papers are left out: they take most of the time."""
    monkeypatch.setattr(content, "write_figures", lambda analysis, origin, folder: [])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def a_result(**changes):
    known = {field.name for field in dataclasses.fields(results.Result)}
    row = {name: None if value != value else value for name, value in POINT.items() if name in known}
    return results.Result(**(row | {"schema_version": results.SCHEMA_VERSION, "window": None} | changes))


# -- what it makes -------------------------------------------------------------------------------------------------------
def test_a_study_s_folder_gets_tables_figures_and_a_report(study, capsys):
    assert main([str(study)]) == 0
    text = capsys.readouterr().out
    figures = {f"accuracy-{name}" for name in ("kv_reads", "peak_tokens", "kv_bytes_peak", "cr")} | {"margins"}
    assert {path.name for path in (study / "figures").iterdir()} == {f"{f}.{s}" for f in figures for s in ("png", "svg")}
    points, margins = rows_of(study / "pareto.csv"), rows_of(study / "margins.csv")
    assert len(points) == 24
    assert {row["method"] for row in points} == {"full", "dms"}
    assert {row["budget"] for row in margins} == {"kv_reads", "peak_tokens", "kv_bytes_peak"}
    assert {row["target_cr"] for row in margins} == {"", "4.0", "8.0"}, "whole curves, then each compression ratio"
    assert "tiny: dms_tiny_ledger, dms_tiny_program, dms_tiny_road" in text
    assert "Against full attention" in text
    (best,) = (row for row in margins if row["budget"] == "kv_reads" and row["target_cr"] == "")
    assert f"{100 * float(best['margin']):+.1f}" in text
    assert "warning:" in text
    assert str(study / "report.html") in text.replace("\n", "")
    report = (study / "report.html").read_text()
    assert f"python -m dms_lab.pareto {study}" in report
    assert POINT["config_hash"] in report
    assert POINT["git_revision"] in report
    assert f"torch {POINT['versions']['torch']}" in report


def test_the_same_results_give_the_same_files(study, tmp_path, undrawn):
    files = []
    for _ in range(2):
        assert main([str(study), "--out", str(tmp_path / "out")]) == 0
        files.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        shutil.rmtree(tmp_path / "out")
    assert files[0].keys() == {"pareto.csv", "margins.csv", "report.html"}
    assert files[0] == files[1]
    assert not (study / "report.html").exists()


def test_a_file_of_results_will_do_and_tasks_can_be_chosen(study, capsys, undrawn):
    file = study / "results_seed1.jsonl"
    assert main([str(file), "--task", "dms_tiny_road"]) == 0
    assert {row["tasks"] for row in rows_of(study / "pareto.csv")} == {"dms_tiny_road"}
    assert {row["num_seeds"] for row in rows_of(study / "pareto.csv")} == {"1"}


def test_several_places_are_compared_in_a_folder_of_their_own(study, tmp_path, undrawn):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(ROOT / "experiments" / "tiny_demo" / "results_seed0.jsonl", other)
    assert main([str(study), str(other), "--out", str(tmp_path / "both")]) == 0
    tasks = {row["tasks"] for row in rows_of(tmp_path / "both" / "pareto.csv")}
    assert tasks == {"dms_tiny_ledger, dms_tiny_program, dms_tiny_road", "ledger, program, road of 512 tokens"}
    report = (tmp_path / "both" / "report.html").read_text()
    assert "tiny: ledger, program, road" in report


def test_where_only_perplexities_were_measured_there_is_a_table_and_a_report(tmp_path, capsys):
    unknown = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "kv_reads", "peak_tokens", "kv_bytes_peak"))
    row = a_result(task="held_out_text", perplexity=12.5, metrics={}, **unknown)
    results.append(tmp_path / "run" / results.RESULTS, [row, dataclasses.replace(row, method="dms", target_cr=4.0)])
    assert main([str(tmp_path / "run")]) == 0
    assert "12.50" in capsys.readouterr().out
    assert not (tmp_path / "run" / "figures").exists()
    assert "Perplexity alone" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_s_metrics_become_a_map_and_its_configuration_is_told(study, capsys):
    lines = [{"step": step, "retained_per_head": [[1.0, 0.5], [0.2, 0.1]]} for step in (10, 20)]
    for name in ("a", "b"):
        (study / name).mkdir()
        (study / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (study / name / "config.json").write_text(
            json.dumps({"window": 4 if name == "a" else 16, "data": {"kind": "tiny"}})
        )
    assert main([str(study)]) == 0
    assert (study / "figures" / "retention-hyper_scaling-a.png").is_file()
    report = (study / "report.html").read_text()
    assert "configuration of 2 runs" in report
    assert "data.kind=&#34;tiny&#34;" in report
    assert '<pre tabindex="0">window=16</pre>' in report


def test_scores_that_were_published_stand_beside_the_measured_ones(tmp_path, capsys, undrawn):
    known = {"model": "qwen_r1_1_5b", "task": "dms_aime24", "max_tokens": 32768, "width": 1}
    full = a_result(method="full", target_cr=1.0, accuracy=0.29, accuracy_low=0.2, accuracy_high=0.4, **known)
    results.append(tmp_path / results.RESULTS, [full, dataclasses.replace(full, method="dms", target_cr=4.0)])
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Published beside measured" in text
    assert "30.0" in text
    assert "-1.0" in text
    assert "AIME24" not in text, "by the project's names"


def test_published_scores_are_held_against_single_chains_alone_and_an_unknown_length_is_told(tmp_path, capsys, undrawn):
    known = {"model": "qwen3_8b", "task": "dms_aime24", "max_tokens": 32768, "method": "full", "target_cr": 1.0}
    results.append(tmp_path / results.RESULTS, [a_result(width=8, accuracy=0.9375, **known)])
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    table = text[text.index("Published beside measured") :]
    assert "75.0" in table
    assert "not stated" in table
    assert "93.8" not in table, "eight chains are not one"


def test_what_was_published_of_tasks_that_are_not_ours_is_told(tmp_path, capsys, undrawn):
    row = a_result(model="llama32_1b", task="gsm8k", method="full", target_cr=1.0, width=1, max_tokens=256)
    results.append(tmp_path / results.RESULTS, [row])
    assert main([str(tmp_path)]) == 0
    told = "of GSM8K, HellaSwag, MMLU, NIAH-3k, NIAH-4k, NIAH-8k, VT-3k, VT-4k, VT-8k there are published scores"
    assert told in " ".join(capsys.readouterr().out.split())
    assert told in (tmp_path / "report.html").read_text()


def test_a_mean_over_tasks_of_which_one_margin_was_not_published_is_told(tmp_path, capsys, undrawn):
    known = {"model": "qwen_r1_7b", "width": 1, "max_tokens": 32768}
    rows = [
        a_result(task=task, method=method, target_cr=cr, **known)
        for task in ("dms_aime24", "dms_gpqa_diamond")
        for method, cr in (("full", 1.0), ("quest", 4.0))
    ]
    results.append(tmp_path / results.RESULTS, rows)
    assert main([str(tmp_path)]) == 0
    told = (
        "no published margin in kv_reads of quest stands beside the mean over dms_aime24, dms_gpqa_diamond: there is none"
    )
    assert f"{told} of dms_gpqa_diamond" in " ".join(capsys.readouterr().out.split())
    assert told in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("scores", "num_seeds", "accuracies", "between"),
    [
        ([1.0, 0.0], 2, "seeds and problems that are drawn again", "problems and seeds are drawn again, the same ones"),
        ([], 2, "How seeds differ is not in them", "has no intervals: what single problems scored is not known"),
        ([1.0, 0.0], 1, "of the problems of a single seed", "problems and seeds are drawn again, the same ones"),
    ],
)
def test_the_report_says_what_its_intervals_are_over(tmp_path, undrawn, capsys, scores, num_seeds, accuracies, between):
    rows = [
        a_result(method=method, target_cr=cr, seed=seed, accuracy=0.5, problem_scores=scores, num_problems=2)
        for method, cr in (("full", 1.0), ("dms", 4.0))
        for seed in range(num_seeds)
    ]
    results.append(tmp_path / results.RESULTS, rows)
    assert main([str(tmp_path)]) == 0
    report = (tmp_path / "report.html").read_text()
    said = [text for text in re.findall(r"<p>(.*?)</p>", report, re.DOTALL) if text.startswith(("Intervals", "What lies"))]
    assert any(accuracies in text for text in said)
    assert any(between in text for text in said)
    assert len(said) == 2
    over = "seeds and problems" if scores and num_seeds > 1 else "problems"
    assert f"95 % intervals over {over}\n" in re.sub(r" +\n", "\n", capsys.readouterr().out)


# -- sweeps --------------------------------------------------------------------------------------------------------------
SWEEP = """
question: Does it need a window?
parts:
  - overrides: [model=tiny, trained=all, steps=20, cr=2, "cr_family=[2]", context=128, "window=4,8"]
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of two points whose trainings and own evaluations are done, with a result each."""
    from dms_lab.evaluation.evaluated import own_evaluation, record
    from dms_lab.sweep_config import load_sweep
    from dms_lab.sweeping.points import expand

    monkeypatch.chdir(tmp_path)
    folder = Path("experiments/windows")
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    points = expand(load_sweep(folder))
    for point, accuracy in zip(points, (0.5, 0.75), strict=True):
        place = Path(point.folder)
        place.mkdir(parents=True)
        (place / "done.json").write_text(json.dumps({"config_hash": point.hash}))
        (place / "metrics.jsonl").write_text('{"step": 10, "retained_per_head": [[1.0, 0.5]]}\n')
        own = {"run_id": place.name, "width": 1, "max_tokens": None, "settings": {}}
        full = a_result(method="full", target_cr=1.0, **own)
        results.append(place / results.RESULTS, [full, a_result(method="dms", target_cr=2.0, accuracy=accuracy, **own)])
        record(place, own_evaluation(point.config), range(2))
    return folder, points


def test_a_sweep_s_results_are_collected_first_and_its_variants_told_apart(sweep, capsys):
    folder, _ = sweep
    assert main([str(folder)]) == 0
    found = {(row["method"], row["variant"], row["accuracy"]) for row in rows_of(folder / "pareto.csv")}
    assert {f for f in found if f[0] == "dms"} == {("dms", "window=4", "0.5"), ("dms", "window=8", "0.75")}
    assert len(rows_of(folder / "results.csv")) == 3, "full attention once"
    report = (folder / "report.html").read_text()
    assert "Does it need a window?" in report
    assert "DMS (window=4)" in report
    assert "steps=20" in report, "sweep.yaml is in it"
    assert len(list((folder / "figures").glob("retention-*.png"))) == 2


def test_results_of_another_machine_are_not_lost(sweep):
    folder, points = sweep
    assert sources.origin_of([folder]).notices == ()
    before = sources.load(sources.origin_of([folder]))
    shutil.rmtree(points[0].folder)
    origin = sources.origin_of([folder])
    assert origin.notices == ()
    columns = ["method", "variant", "accuracy"]
    assert sorted(sources.load(origin)[columns].values.tolist()) == sorted(before[columns].values.tolist())
    shutil.rmtree("runs")
    written = (folder / "results.csv").read_bytes()
    assert len(sources.load(sources.origin_of([folder]))) == 3
    assert (folder / "results.csv").read_bytes() == written


def test_results_of_runs_that_the_sweep_no_longer_has_are_not_dropped_unasked(sweep):
    folder, _ = sweep
    assert sources.origin_of([folder]).notices == ()
    before = (folder / "results.csv").read_bytes()
    sweep_file = folder / "sweep.yaml"
    sweep_file.write_text(sweep_file.read_text().replace("window=4,8", "window=8"))
    (notice,) = sources.origin_of([folder]).notices
    assert "is used as it is: 1 of its 2 runs are no points of sweep.yaml" in notice
    assert (folder / "results.csv").read_bytes() == before


def test_a_sweep_with_points_to_come_is_shown_as_far_as_it_is(sweep):
    folder, points = sweep
    (Path(points[1].folder) / "done.json").unlink()
    origin = sources.origin_of([folder])
    assert origin.notices == ("1 of 2 points of windows are not done yet",)
    assert set(sources.load(origin)["variant"]) == {"", "window=4"}


# -- what is wrong -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{study}/nowhere"], "there is no {study}/nowhere: give a folder of results"),
        (
            ["{study}", "--task", "dms_tiny_rod"],
            "task 'dms_tiny_rod' is not in these results; choose from dms_tiny_ledger,",
        ),
        (["{study}", "--against", "fulll"], "against='fulll' is not in these results; choose one of 'dms', 'full'"),
        (["{study}", "--within", "nan"], "an accuracy nan points lower cannot count as equal; give 0 to 100 points"),
        (["{study}", "--within", "-5"], "an accuracy -5 points lower cannot count as equal"),
        (["{study}", "{study}"], "several places are compared: say with --out where"),
        (["{study}/empty"], "no results in {study}/empty: run an evaluation first"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(study, capsys, words, sentence):
    (study / "empty").mkdir()
    assert main([word.format(study=study) for word in words]) == 1
    said = capsys.readouterr()
    assert sentence.format(study=study) in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (study / "report.html").exists()


def test_an_unwritable_place_and_a_bad_row_are_told(study, capsys):
    (study / "results_seed0.jsonl").write_text("{}\n")
    assert main([str(study)]) == 1
    assert "results_seed0.jsonl:1 has schema version None" in capsys.readouterr().err
    (study / "results_seed0.jsonl").unlink()
    (study / "figures").write_text("in the way")
    assert main([str(study)]) == 1
    assert f"error: {study / 'figures'} cannot be read or written" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_pandas():
    probe = "import sys, dms_lab.pareto.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
    probe += "sys.exit(bool({'torch', 'pandas', 'plotly', 'matplotlib', 'hydra'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--against METHOD" in done.stdout


def test_the_files_of_a_folder_are_those_that_results_load_takes(study):
    (study / "results_draft.txt").write_text("no results")
    assert [path.name for path in sources.origin_of([study]).files] == ["results_seed0.jsonl", "results_seed1.jsonl"]
    shutil.copy(study / "results_seed0.jsonl", study / results.RESULTS)
    assert sources.origin_of([study]).files == (study / results.RESULTS,)
    assert sources.origin_of([study / "results_seed1.jsonl"]).files == (study / "results_seed1.jsonl",)
