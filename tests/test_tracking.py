"""What W&B is given, read back from the files that it keeps offline; and that it never is the reason that a run ends."""

import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import frames
import pandas as pd
import pytest
import wandb
from PIL import Image
from tracked import track, write_rows
from wandb_files import OfflineRun, offline_runs
from wandb_stub import WandbStub

from dms_lab import comparison, results, tracking
from dms_lab.config import config_hash
from dms_lab.evaluation import examples
from dms_lab.results import Result
from dms_lab.tracking import Comparison, tables
from dms_lab.tracking.evaluation import evaluation_ids, summary
from dms_lab.tracking.tables import MOST_SAMPLES, evenly

WANDB = Path(sys.executable).parent / "wandb"


@pytest.fixture(autouse=True)
def no_key(tmp_path_factory, monkeypatch):
    """W&B without a key, with settings, caches and a service of the test's own."""
    home = tmp_path_factory.mktemp("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(home / name.lower()))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def online(monkeypatch):
    """A server, and a key that it takes."""
    with WandbStub() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", server.key)
        yield server
        server.answers.set()
        wandb.teardown()


def as_logged(row):
    """A line of metrics.jsonl as W&B has it."""
    heads = {f"retained/layer{i}/head{j}": v for i, h in enumerate(row["retained_per_head"]) for j, v in enumerate(h)}
    return {key: value for key, value in row.items() if key not in ("step", "retained_per_head")} | heads


def metrics(history):
    """Rows of W&B's history by step, without its own columns and pictures."""
    own = ("_step", "_runtime", "_timestamp", "retention")
    assert len({row["_step"] for row in history}) == len(history)
    return {row["_step"]: {key: value for key, value in row.items() if key not in own} for row in history}


def in_file(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: as_logged(row) for row in map(json.loads, lines)}


# -- training ----------------------------------------------------------------------------------------------------------
def test_a_training_is_one_run_named_by_its_hash_with_its_sweep_as_group(make_config, tmp_path):
    config = make_config(tracking="wandb", sweep="windows", steps=60)
    track(config, range(2, 62, 2)).finish()
    ((run_id, run),) = offline_runs(tmp_path).items()
    assert run_id == config_hash(config)
    assert (run.run.job_type, run.run.run_group, run.run.project) == ("train", "windows", "dms_lab")
    assert (run.run.display_name, list(run.run.tags)) == ("run", ["random", "dms", "cr4", "w4"])
    assert run.config["model"]["path"] == config.model.path
    assert run.config["betas"] == [0.9, 0.95]
    assert run.config["versions"] == results.versions()
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", run.config["git_revision"])
    assert metrics(run.history) == in_file(config.out)
    assert run.exit_code == 0


def test_what_each_head_keeps_is_pictured_ten_times_and_at_the_end(make_config, tmp_path):
    config = make_config(tracking="wandb", steps=97)
    track(config, range(1, 98)).finish()
    (run,) = offline_runs(tmp_path).values()
    pictured = {row["_step"]: row["retention"] for row in run.history if "retention" in row}
    assert list(pictured) == [9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 97]
    assert pictured[97]["caption"] == "share of tokens kept, to step 97"
    colours = Image.open(run.file(pictured[97])).convert("RGB")
    assert len(set(colours.get_flattened_data() if hasattr(colours, "get_flattened_data") else colours.getdata())) > 50


def test_a_training_that_is_sent_from_its_files_has_the_pictures_that_it_has_while_it_runs(make_config, tmp_path):
    config = make_config(tracking="wandb", steps=20)

    def pictured():
        (run,) = offline_runs(tmp_path).values()
        return {row["_step"]: run.file(row["retention"]).read_bytes() for row in run.history if "retention" in row}

    track(config, range(1, 21)).finish()
    live = pictured()
    tracking.log_training(tmp_path / "run")
    assert pictured() == live
    assert list(live) == list(range(2, 21, 2))
    assert len(set(live.values())) == 10, "each is of the steps so far"


def test_a_run_that_goes_on_is_kept_whole_in_one_folder_with_each_step_once(make_config, tmp_path):
    config = make_config(tracking="wandb", steps=40)
    track(config, range(2, 22, 2))
    wandb.teardown()  # the process is gone; last.ckpt was of step 12
    (first,) = tmp_path.glob("run/wandb/offline-run-*")
    write_rows(Path(config.out), range(2, 14, 2))
    track(config, range(14, 42, 2)).finish()
    assert not first.exists()
    (run,) = offline_runs(tmp_path).values()
    assert list(metrics(run.history)) == list(range(2, 42, 2))
    assert metrics(run.history) == in_file(config.out)


@pytest.mark.parametrize("cleaned", [False, True])
def test_steps_that_were_synced_are_not_sent_again(make_config, tmp_path, cleaned):
    config = make_config(tracking="wandb", steps=40)
    track(config, range(2, 22, 2)).finish()
    (first,) = tmp_path.glob("run/wandb/offline-run-*")
    (file,) = first.glob("*.wandb")
    file.with_name(f"{file.name}.synced").touch()  # as `wandb sync` does
    if cleaned:
        for path in sorted(first.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        first.rmdir()  # as `wandb clean` does
    write_rows(Path(config.out), range(2, 14, 2))
    track(config, range(14, 42, 2)).finish()
    # Within the same second, what comes after a cleaned folder has its name.
    (place,) = (path for path in tmp_path.glob("run/wandb/offline-run-*") if cleaned or path != first)
    assert list(metrics(OfflineRun(place).history)) == list(range(22, 42, 2))


def test_a_line_that_was_cut_off_by_a_kill_is_left_out(make_config, tmp_path):
    config = make_config(tracking="wandb")
    write_rows(tmp_path / "run", [2])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "k\n')
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config)))
    tracking.log_training(tmp_path / "run")
    (run,) = offline_runs(tmp_path).values()
    assert list(metrics(run.history)) == [2]


def test_wandb_chooses_project_entity_and_more_tags_by_its_own_variables(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    monkeypatch.setenv("WANDB_ENTITY", "us")
    monkeypatch.setenv("WANDB_TAGS", "mine")
    track(make_config(tracking="wandb"), [2]).finish()
    (run,) = offline_runs(tmp_path).values()
    assert (run.run.project, run.run.entity) == ("elsewhere", "us")
    assert list(run.run.tags) == ["mine", "random", "dms", "cr4", "w4"]


def test_a_training_that_ends_by_an_error_is_a_failed_run(make_config, tmp_path):
    config = make_config(tracking="wandb")
    with pytest.raises(RuntimeError, match="the loss"), tracking.closing(track(config, [2])):
        raise RuntimeError("the loss is not finite")
    (run,) = offline_runs(tmp_path).values()
    assert run.exit_code == 1


# -- evaluation --------------------------------------------------------------------------------------------------------
OWN, SAMPLED = {}, {"chat": True, "generation": {"temperature": 0.6}, "limit": None, "data": {"start": 1}, "budget": None}


def result(method="dms", cr=4.0, settings=OWN, **changes):
    values = {
        "run_id": "run",
        "model": "tiny",
        "method": method,
        "task": "ledger",
        "target_cr": cr,
        "measured_cr": cr - 0.1,
    }
    values |= {"window": 16, "seed": 0, "num_problems": 2, "accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8}
    values |= {"perplexity": None, "kv_reads": 100.0, "peak_tokens": 20.0, "kv_bytes_peak": 1e4, "tokens_generated": 9}
    values |= {"seconds": 1.0, "config_hash": "abc", "settings": settings, "problem_scores": [0.0, 1.0]}
    return Result(**(values | changes))


def example(problem, method="dms", cr=4.0, text="so 7", **changes):
    values = {
        "run_id": "run",
        "config_hash": "abc",
        "task": "ledger",
        "problem": problem,
        "method": method,
        "target_cr": cr,
    }
    values |= {"prompt": "what is 3 + 4?", "text": text, "answer": "7", "score": 1.0, "note": "", "finish_reason": "eos"}
    return values | {"num_tokens": 3, "kv_reads": 12.5, "peak_tokens": 6.0, "settings": SAMPLED} | changes


@pytest.fixture
def evaluated(tmp_path, make_config):
    """A run's folder with its own evaluation and a benchmark at two widths."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(make_config(sweep="windows"))))
    wide = [result(settings=SAMPLED, width=width, max_tokens=96, kv_reads=50.0 * width) for width in (1, 2)]
    text = result(task="held_out_text", accuracy=None, accuracy_low=None, accuracy_high=None, perplexity=3.5, kv_reads=None)
    results.append(folder / results.RESULTS, [result("full", 1.0), result(), text, *wide])
    rows = [example(f"p{i}", method, cr) for method, cr in (("full", 1.0), ("dms", 4.0)) for i in range(50)]
    examples.keep(folder / examples.EXAMPLES, [*rows, example("p0", text="x" * 9000, method="tova")])
    return folder


def test_each_way_of_measuring_is_a_run_of_its_own_with_results_and_samples(evaluated, tmp_path):
    ids = evaluation_ids(results.load(evaluated / results.RESULTS))
    assert ids[:3] == [ids[0]] * 3
    assert ids[3:] == [ids[3]] * 2
    assert all(run_id.startswith("abc-eval-") for run_id in ids)
    tracking.log_evaluations(evaluated / results.RESULTS, set(ids))
    runs = offline_runs(tmp_path)
    own, sampled = runs[ids[0]], runs[ids[3]]
    for run in (own, sampled):
        assert (run.run.job_type, run.run.run_group) == ("evaluate", "windows")
        assert run.config["model"] == "tiny"
    rows = own.table(own.summary["results"])
    assert [row["method"] for row in rows] == ["full", "dms", "dms"]
    assert rows[0]["accuracy_high"] == 0.8
    assert rows[2]["accuracy"] is None
    assert "problem_scores" not in rows[0]
    assert "samples" not in own.summary
    assert own.summary["held_out_text/dms/cr4/perplexity"] == 3.5
    assert sampled.summary["ledger/dms/cr4/W2L96/kv_reads"] == 100.0
    assert json.loads(sampled.table(sampled.summary["results"])[0]["settings"]) == SAMPLED
    assert sampled.config["settings"] == {"chat": True, "generation": {"temperature": 0.6}, "limit": None}


def test_samples_are_bounded_in_number_and_length_and_come_from_every_method(evaluated, tmp_path):
    ids = evaluation_ids(results.load(evaluated / results.RESULTS))
    tracking.log_evaluations(evaluated / results.RESULTS, ids[3:])
    (run,) = offline_runs(tmp_path).values()
    rows = run.table(run.summary["samples"])
    assert len(rows) == MOST_SAMPLES
    counts = pd.Series([row["method"] for row in rows]).value_counts().to_dict()
    assert counts == {"full": 32, "dms": 31, "tova": 1}
    assert rows[0] == {
        "task": "ledger",
        "problem": "p0",
        "method": "full",
        "CR": 1.0,
        "prompt": "what is 3 + 4?",
        "text": "so 7",
        "answer": "7",
        "verdict": 1.0,
        "note": "",
        "finish reason": "eos",
        "tokens": 3,
        "KV reads": 12.5,
        "peak tokens": 6.0,
    }
    assert len(rows[-1]["text"]) < 4300


def test_rows_are_taken_evenly_in_their_order():
    rows = [{"task": "a", "method": m, "target_cr": 1.0, "place": i} for i, m in enumerate("xxxxyyz")]
    assert [row["place"] for row in evenly(rows, 4)] == [0, 1, 4, 6]
    assert evenly(rows, 99) == rows


def test_an_evaluation_that_is_logged_again_replaces_what_was_not_sent(evaluated, tmp_path):
    ids = evaluation_ids(results.load(evaluated / results.RESULTS))
    tracking.log_evaluations(evaluated / results.RESULTS, ids[:1])
    results.append(evaluated / results.RESULTS, [result("tova")])
    tracking.log_evaluations(evaluated / results.RESULTS, ids[:1])
    (run,) = offline_runs(tmp_path).values()
    assert [row["method"] for row in run.table(run.summary["results"])] == ["full", "dms", "dms", "tova"]


def test_an_evaluation_that_was_sent_is_not_logged_again_until_it_says_something_else(evaluated, tmp_path):
    ids = evaluation_ids(results.load(evaluated / results.RESULTS))
    place = evaluated / results.RESULTS

    def logged():
        """Logs it, and returns the steps of what there is to send, which then is sent."""
        tracking.log_evaluations(place, ids[:1])
        wandb.teardown()
        (folder,) = (one for one in evaluated.glob("wandb/offline-run-*") if not any(one.glob("*.synced")))
        (file,) = folder.glob("*.wandb")
        file.with_name(f"{file.name}.synced").touch()  # as `wandb sync` does
        time.sleep(1.1)  # folders are named by the second
        return [row["_step"] for row in OfflineRun(folder).history]

    assert [logged(), logged()] == [[0], []]
    results.append(place, [result("tova")])
    assert [logged(), logged()] == [[1], []]


def test_the_names_of_a_summary_have_the_budget_and_the_length_that_were_asked_for():
    budgets = [
        result("tova", 0.0, settings=SAMPLED | {"budget": size}, max_tokens=96, accuracy=size / 64) for size in (16, 32)
    ]
    lengths = [result(settings={"length": length}, accuracy=length / 1024) for length in (128, 256)]
    found = summary(pd.DataFrame([asdict(row) for row in budgets + lengths]))
    assert {name: value for name, value in found.items() if name.endswith("/accuracy")} == {
        "ledger/tova/budget16/W1L96/accuracy": 0.25,
        "ledger/tova/budget32/W1L96/accuracy": 0.5,
        "ledger/dms/cr4/length128/accuracy": 0.125,
        "ledger/dms/cr4/length256/accuracy": 0.25,
    }


def test_a_table_that_is_cut_says_so_in_the_log_and_in_the_summary(evaluated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tables, "MOST_ROWS", 2)
    ids = evaluation_ids(results.load(evaluated / results.RESULTS))
    tracking.log_evaluations(evaluated / results.RESULTS, ids[:1])
    assert warnings(caplog) == ["W&B gets the first 2 of 3 rows of results; the files have all"]
    (run,) = offline_runs(tmp_path).values()
    assert run.summary["results/rows_left_out"] == 1
    assert len(run.table(run.summary["results"])) == 2


def test_long_texts_keep_their_beginning_and_their_end():
    text = "a" * 3000 + "the answer"
    short = examples.shortened(text, 100)
    assert short.startswith("a" * 50)
    assert short.endswith("the answer")
    assert "2910 characters" in short
    assert examples.shortened("short", 100) == "short"


def test_examples_of_the_same_task_and_method_replace_each_other(tmp_path):
    path = tmp_path / "examples.jsonl"
    examples.keep(path, [example("p0"), example("p0", method="full")])
    examples.keep(path, [example("p1"), example("p2")])
    assert [(row["method"], row["problem"]) for row in examples.load(path)] == [
        ("full", "p0"),
        ("dms", "p1"),
        ("dms", "p2"),
    ]


# -- comparison --------------------------------------------------------------------------------------------------------
def test_a_comparison_is_tables_a_scatter_a_figure_with_frontiers_and_the_report(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<html>all of it</html>")
    points, margins = frames.points(), frames.margins()
    sent = tracking.log_pareto(tmp_path, "windows", Comparison(points, margins, ("a single seed",), report))
    ((found, run),) = offline_runs(tmp_path).items()
    assert found == sent.label.run_id == "pareto-windows"
    assert (run.run.job_type, run.run.run_group, run.config["warnings"]) == ("pareto", "windows", ["a single seed"])
    rows = run.table(run.summary["points"])
    assert [row["accuracy"] for row in rows] == pytest.approx(points["accuracy"].tolist())
    assert [row["is_frontier_kv_reads"] for row in rows] == points["is_frontier_kv_reads"].tolist()
    assert len(run.table(run.summary["margins"])) == len(margins)
    assert run.summary["margin/qwen_r1_1_5b/dms_aime24/tova/kv_reads"] == pytest.approx(0.03)
    assert run.summary["margin_unheld/qwen_r1_1_5b/dms_aime24/tova/kv_reads"] == pytest.approx(0.015)
    assert run.summary["held_share/qwen_r1_1_5b/dms_aime24/tova/kv_reads"] == 0.25
    assert {"held_share", "margin_unheld", "area"} <= set(run.table(run.summary["margins"])[0])
    assert not any("h2o" in name and name.startswith(("margin", "held")) for name in run.summary)  # it shares no budget
    name = "qwen_r1_1_5b dms_aime24"
    drawn = run.table(run.summary[f"scatter/{name}_table"])
    assert [(row["kv_reads"], row["method"]) for row in drawn] == list(
        zip(points["kv_reads"], points["method"], strict=True)
    )
    chart = run.config["_wandb"]["visualize"][f"scatter/{name}"]["panel_config"]
    assert chart["panelDefId"] == "wandb/scatter/v0"
    assert chart["fieldSettings"] == {"x": "kv_reads", "y": "accuracy"}
    figure = json.loads(run.file(run.summary[f"frontier/{name}"]).read_text())
    assert {"best of all", "full attention", "TOVA"} <= {trace["name"] for trace in figure["data"]}
    full = 100 * points[points["method"] == "full"]["accuracy"].max()
    assert [shape["y0"] for shape in figure["layout"]["shapes"]] == pytest.approx([full])
    (artifact,) = (artifact for artifact in run.artifacts if artifact.type == "report")
    (entry,) = artifact.manifest.contents
    assert Path(entry.local_path).read_text() == report.read_text()


def compared(*places):
    return Comparison(comparison.curve_points(results.load(*places)))


# -- from files alone --------------------------------------------------------------------------------------------------
def test_all_of_a_folder_is_made_again_under_the_same_ids(evaluated, tmp_path, make_config):
    config = make_config(sweep="windows", out=str(evaluated))
    live = track(config, range(2, 8, 2))
    live.finish()
    before = offline_runs(tmp_path)
    found = [sent.label.run_id for sent in tracking.rebuild([evaluated], compared(evaluated))]
    runs = offline_runs(tmp_path)
    assert set(found) == set(runs)
    assert {run.run.job_type for run in runs.values()} == {"train", "evaluate", "pareto"}
    (run_id,) = before
    assert metrics(runs[run_id].history) == metrics(before[run_id].history)
    assert runs[run_id].run.run_group == "windows"
    assert runs["pareto-run"].summary["num_points"] == len(runs["pareto-run"].table(runs["pareto-run"].summary["points"]))


def test_of_a_collected_sweep_the_table_is_enough(tmp_path):
    frame = pd.DataFrame([asdict(row) for row in (result("full", 1.0), result(), result(run_id="other", seed=1))])
    results.save_csv(frame, tmp_path / "results.csv")
    found = [sent.label.run_id for sent in tracking.rebuild([tmp_path], compared(tmp_path))]
    runs = offline_runs(tmp_path)
    assert set(found) == set(runs)
    assert sorted(run.run.job_type for run in runs.values()) == ["evaluate", "evaluate", "pareto"]


def test_without_a_comparison_none_is_made_up(evaluated, tmp_path):
    """Runs and the table of their sweep say the same rows twice, with variants and without."""
    frame = results.load(evaluated / results.RESULTS).assign(variant="window=16")
    results.save_csv(frame, evaluated / results.TABLE)
    tracking.rebuild([evaluated])
    assert {run.run.job_type for run in offline_runs(tmp_path).values()} == {"evaluate"}


def test_a_rebuild_ends_at_the_first_run_that_wandb_does_not_take(evaluated, tmp_path):
    (evaluated / "wandb").write_text("a file")
    with pytest.raises(ValueError, match=r"did not take the run abc-eval-\w+ \(.*the same command goes on"):
        tracking.rebuild([evaluated])


def test_the_pareto_command_sends_a_training_that_was_not_evaluated(make_config, tmp_path, capsys):
    from dms_lab.pareto.__main__ import main

    track(make_config(tracking="wandb"), [2, 4]).finish()
    assert main([str(tmp_path), "--wandb"]) == 0
    (run,) = offline_runs(tmp_path).values()
    assert run.run.job_type == "train"
    assert main([str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither trainings nor results"):
        tracking.rebuild([tmp_path])


# -- what W&B cannot do ------------------------------------------------------------------------------------------------
def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("dms_lab.tracking")]


def test_a_disabled_wandb_leaves_nothing(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(make_config(tracking="wandb"), [2, 4]).finish()
    assert not list(tmp_path.rglob("*wandb*"))


def test_wandb_mode_offline_is_kept_to_with_a_key(make_config, tmp_path, monkeypatch, online):
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(make_config(tracking="wandb"), [2, 4]).finish()
    assert len(offline_runs(tmp_path)) == 1
    assert not online.runs


def test_a_bad_key_is_told_once_and_the_run_is_kept_offline(make_config, tmp_path, monkeypatch, online, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with caplog.at_level(logging.INFO):
        track(make_config(tracking="wandb"), [2, 4]).finish()
    (run,) = offline_runs(tmp_path).values()
    assert list(metrics(run.history)) == [2, 4]
    cannot, later = warnings(caplog)
    assert "W&B cannot be reached" in cannot
    assert f"wandb sync {run.place}" in later


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_training_goes_on_when_the_service_of_wandb_is_killed(make_config, tmp_path, monkeypatch, online, caplog, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    config = make_config(tracking="wandb")
    tracker = track(config, [2])
    (service,) = children("wandb-core")
    os.kill(service, signal.SIGKILL)
    time.sleep(0.3)
    track(config, [4, 6], tracker).finish()
    assert list(in_file(config.out)) == [2, 4, 6]
    (told,) = warnings(caplog)
    assert f"python -m dms_lab.pareto {config.out} --wandb sends what is missing" in told
    tracking.log_training(tmp_path / "run")
    wandb.teardown()
    runs = offline_runs(tmp_path)
    found = online.history(config_hash(config)) if mode == "online" else next(iter(runs.values())).history
    assert list(metrics(found)) == [2, 4, 6]


def children(name):
    """Processes of this one's, by the name of their program."""
    words = ["ps", "-o", "pid=,stat=,comm=", "--ppid", str(os.getpid())]
    lines = [line.split() for line in subprocess.run(words, capture_output=True, text=True).stdout.splitlines()]
    return [int(pid) for pid, state, program, *_ in lines if program.startswith(name) and not state.startswith("Z")]


def test_a_full_disk_below_wandb_ends_no_training(make_config, monkeypatch, caplog):
    config = make_config(tracking="wandb")
    tracker = track(config, [2])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tracker._run._run), "log", full)
    track(config, [4, 6], tracker).finish()
    (told,) = warnings(caplog)
    assert "No space left on device" in told


def test_a_folder_that_cannot_be_made_ends_no_training(make_config, tmp_path, caplog):
    config = make_config(tracking="wandb")
    Path(config.out).mkdir()
    (Path(config.out) / "wandb").write_text("a file")
    track(config, [2, 4]).finish()
    assert list(in_file(config.out)) == [2, 4]
    assert len(warnings(caplog)) == 1


def test_a_server_that_falls_silent_holds_no_job(make_config, tmp_path, monkeypatch, online, caplog):
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    config = make_config(tracking="wandb")
    tracker = track(config, [2])
    online.answers.clear()
    started = time.monotonic()
    track(config, [4, 6], tracker).finish()
    assert time.monotonic() - started < 20
    assert list(in_file(config.out)) == [2, 4, 6]
    (told,) = warnings(caplog)
    assert "sends what is missing" in told


# -- with a server, and with real runs ---------------------------------------------------------------------------------
LOGGER = """
import pickle, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tracked import track
config = pickle.loads(Path(sys.argv[1]).read_bytes())
tracker = None
for step in range(int(sys.argv[2]), 10_000, 2):
    tracker = track(config, [step], tracker)
    print(step, flush=True)
    time.sleep(0.05)
"""


def killed_when(is_time, config, first, tmp_path):
    """A process that logs from step `first` on is killed, and W&B's with it, when `is_time(step)`."""
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    words = [sys.executable, "-c", LOGGER.format(tests=str(Path(__file__).parent)), tmp_path / "config.pickle", str(first)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if is_time(int(line)):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sync(folder):
    places = sorted(folder.glob("wandb/offline-run-*"))
    done = subprocess.run([WANDB, "sync", *places], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return places


@pytest.mark.slow
def test_runs_that_were_killed_and_synced_between_are_one_run_with_each_step_once(
    make_config, tmp_path, online, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(tracking="wandb", sweep="windows", steps=400)
    folder = tmp_path / "run"
    killed_when(lambda step: step >= 100, config, 2, tmp_path)
    write_rows(folder, range(2, 82, 2))  # to the last save, as training cuts it
    killed_when(lambda step: step >= 160, config, 82, tmp_path)
    sync(folder)
    sent = online.history(config_hash(config))
    assert len(sent) >= 60  # of a process that was killed a second's worth may be missing
    write_rows(folder, range(2, 122, 2))
    track(config, range(122, 402, 2)).finish()
    sync(folder)
    found = metrics(online.history(config_hash(config)))
    steps = list(found)
    assert steps == sorted(steps)
    assert steps[-1] == 400
    known = in_file(folder)
    assert all(found[step] == known[step] for step in steps)
    lost = set(known) - set(steps)
    assert all(sent[-1]["_step"] < step <= sent[-1]["_step"] + 60 for step in lost)
    run = online.runs[config_hash(config)]
    assert (run["groupName"], run["jobType"], run["displayName"]) == ("windows", "train", "run")


@pytest.mark.slow
def test_a_run_that_goes_on_online_is_the_same_run_with_each_step_once(make_config, tmp_path, online):
    config = make_config(tracking="wandb", steps=2000)
    killed_when(lambda step: len(online.history(config_hash(config))) > 30, config, 2, tmp_path)  # sent every 15 s
    last = max(metrics(online.history(config_hash(config))))
    write_rows(tmp_path / "run", range(2, last - 20, 2))
    track(config, range(last - 20, last + 100, 2)).finish()
    found = metrics(online.history(config_hash(config)))
    assert found == in_file(config.out)
    assert online.num_received == len(found)  # none of them twice
    assert list(online.runs) == [config_hash(config)]


@pytest.mark.slow
def test_offline_evaluations_and_comparisons_sync_with_their_tables_and_figures(evaluated, tmp_path, online, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = [sent.label.run_id for sent in tracking.rebuild([evaluated], compared(evaluated))]
    sync(evaluated)
    assert set(online.runs) == set(found)
    uploaded = "\n".join(online.files)
    for name in ("media/table/results", "media/table/samples", "media/table/points", "media/plotly/frontier"):
        assert name in uploaded
    tracking.rebuild([evaluated], compared(evaluated))
    places = sync(evaluated)
    assert len(places) == 2 * len(found)
    for run_id in found:
        steps = [row["_step"] for row in online.history(run_id)]
        assert steps == [0], "what was sent is not sent again"


@pytest.mark.slow
def test_no_network_is_told_once_and_the_run_is_kept_offline(make_config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    track(make_config(tracking="wandb"), [2, 4]).finish()
    (run,) = offline_runs(tmp_path).values()
    assert list(metrics(run.history)) == [2, 4]
    assert [message[:24] for message in warnings(caplog)] == ["W&B cannot be reached (C"]
