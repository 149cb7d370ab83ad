"""A frame of results written as CSV comes back as it was, whatever it holds; a line that is wrong is told."""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from test_results import POINT, SINCE_2, SINCE_3, VERSION_1

from dms_lab import results

HYPER_SCALING = Path(__file__).parent / "data" / "schema2"
KVPRESS = Path(__file__).parent.parent / "experiments" / "peers" / "kvpress"
FILLED = {
    "metrics": {"avg": [0.1, None, 1e-300]},
    "settings": {"generation": {"temperature": 0.6, "top_k": None}, "limit": 10, "text": 'a,"b"\n'},
    "problem_scores": [1.0, 1 / 3, 0.0],
    "sampling_seeds": [0, 1],
    "variant": "decided_by=next window=4",
    "truncation_rate": 0.1 + 0.2,
    "max_tokens": 96,
    "num_samples": 8,
}

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | NUMBERS
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)
ROWS = st.builds(
    results.Result,
    run_id=TEXT,
    model=st.just("tiny"),
    method=st.sampled_from(["full", "dms"]),
    task=TEXT,
    target_cr=NUMBERS,
    measured_cr=MAYBE,
    window=st.none() | st.integers(1, 1000),
    seed=st.integers(0, 9),
    num_problems=st.integers(0, 10**12),
    accuracy=MAYBE,
    accuracy_low=MAYBE,
    accuracy_high=MAYBE,
    perplexity=MAYBE,
    kv_reads=MAYBE,
    peak_tokens=MAYBE,
    kv_bytes_peak=MAYBE,
    tokens_generated=st.integers(0, 10**9),
    seconds=NUMBERS,
    config_hash=TEXT,
    max_tokens=st.none() | st.integers(1, 10**6),
    metrics=st.dictionaries(TEXT, st.lists(MAYBE, min_size=3, max_size=3), max_size=2),
    num_samples=st.none() | st.integers(1, 99),
    settings=st.dictionaries(TEXT, st.none() | st.booleans() | NUMBERS | TEXT | st.lists(NUMBERS), max_size=3),
    problem_scores=st.lists(NUMBERS, max_size=4),
    variant=TEXT,
    versions=st.just({"torch": "2"}),
    git_revision=st.just("abc"),
)


@settings(deadline=None, max_examples=25)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_lines_and_cells_say_the_same(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("csv")
    results.append(folder / results.RESULTS, rows)
    frame = results.load(folder / results.RESULTS)
    results.save_csv(frame, folder / "sweep" / results.TABLE)
    again = results.load(folder / "sweep")
    assert_frame_equal(again, frame, check_exact=True)
    for found, row in zip(again.to_dict("records"), rows, strict=True):
        known = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
        assert {name: found[name] for name in known} == known


@pytest.mark.parametrize("place", [VERSION_1, HYPER_SCALING / "results_seed1.jsonl", KVPRESS])
def test_every_record_of_old_comes_back_with_its_version_and_its_own_columns(tmp_path, place):
    frame = results.load(place)
    results.save_csv(frame, tmp_path / "out.csv")
    assert_frame_equal(results.load(tmp_path / "out.csv"), frame, check_exact=True)
    results.save_csv(results.load(tmp_path / "out.csv"), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()
    if place == KVPRESS:
        assert "live_kv_reads" in frame


def test_rows_that_lack_a_column_of_others_and_whole_numbers_beside_nulls_come_back(tmp_path):
    lines = [
        dataclasses.asdict(dataclasses.replace(POINT, **FILLED)) | {"own": 3, "note": "a,b"},
        dataclasses.asdict(POINT) | {"window": None, "measured_cr": None, "perplexity": 2.0},
    ]
    (tmp_path / results.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    frame = results.load(tmp_path)
    results.save_csv(frame, tmp_path / "table" / results.TABLE)
    again = results.load(tmp_path / "table")
    assert_frame_equal(again, frame, check_exact=True)
    text = (tmp_path / "table" / results.TABLE).read_text()
    assert ",16," in text  # the window, which stands beside a null
    assert "16.0" not in text
    assert "nan" not in text.lower()
    assert again["max_tokens"].tolist()[0] == 96
    assert again["settings"][0] == FILLED["settings"]


def test_a_frame_of_results_that_never_was_a_file_is_written(tmp_path):
    rows = [vars(dataclasses.replace(POINT, **FILLED)), vars(dataclasses.replace(POINT, accuracy_low=math.nan))]
    results.save_csv(pd.DataFrame(rows).assign(variant="window=4", place=[1, None]), tmp_path / "x.csv")
    frame = results.load(tmp_path / "x.csv")
    assert frame["variant"].tolist() == ["window=4"] * 2
    assert frame["problem_scores"].tolist() == [FILLED["problem_scores"], []]
    assert frame["place"].tolist()[0] == 1


def test_several_places_are_one_frame_and_no_file_counts_twice(tmp_path):
    results.append(tmp_path / "a" / results.RESULTS, [POINT])
    results.append(tmp_path / "b" / "c" / results.RESULTS, [dataclasses.replace(POINT, task="ledger")])
    results.save_csv(results.load(tmp_path / "a"), tmp_path / "d" / results.TABLE)
    frame = results.load(tmp_path / "b", tmp_path / "a", tmp_path, str(tmp_path / "a" / results.RESULTS))
    assert frame["task"].tolist() == ["ledger", "road", "road"]
    with pytest.raises(ValueError, match=r"no results in .*nothing: run an evaluation first"):
        results.load(tmp_path, tmp_path / "nothing")


def test_a_folder_s_tables_are_told_by_their_headers_whatever_their_names(tmp_path):
    """As the results of two sweeps beside each other, and what was made of them."""
    results.append(tmp_path / "run" / results.RESULTS, [POINT])
    frame = results.load(tmp_path / "run")
    for name in (results.TABLE, "windows-full.csv"):
        results.save_csv(frame.assign(run_id=name), tmp_path / name)
    for name in ("pareto.csv", "margins.csv", "empty.csv"):
        (tmp_path / name).write_text("" if name == "empty.csv" else "model,method,tasks\ntiny,dms,road\n")
    (tmp_path / "results_seed0.jsonl").write_text((tmp_path / "run" / results.RESULTS).read_text())
    names = [str(file.relative_to(tmp_path)) for file in results.files_in(tmp_path)]
    assert names == ["results.csv", f"run/{results.RESULTS}", "windows-full.csv"]
    assert results.load(tmp_path)["run_id"].tolist() == [results.TABLE, POINT.run_id, "windows-full.csv"]


def test_records_of_seeds_are_taken_where_a_folder_has_nothing_of_the_usual_names(tmp_path):
    for seed in (0, 1):
        results.append(tmp_path / f"results_seed{seed}.jsonl", [dataclasses.replace(POINT, seed=seed)])
    (tmp_path / "below").mkdir()
    results.append(tmp_path / "below" / "results_seed2.jsonl", [POINT])
    assert results.load(tmp_path)["seed"].tolist() == [0, 1]


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / results.TABLE
    frame = pd.DataFrame([vars(POINT)])
    results.save_csv(frame, path)
    before = path.read_text()
    with pytest.raises(ValueError, match="row 2 has accuracy='much', which should be a number or null"):
        results.save_csv(pd.concat([frame, frame.assign(accuracy="much")]), path)
    with pytest.raises(ValueError, match=r"row 1 has task='a\\rb', with a carriage return"):
        results.save_csv(frame.assign(task="a\rb"), path)
    with pytest.raises(ValueError, match="row 1 lacks accuracy;"):
        results.save_csv(frame.drop(columns="accuracy"), path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        results.save_csv(frame.assign(seed=5), path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == [results.TABLE]


def table(tmp_path):
    """A table of one row, its lines split, and where it stands."""
    path = tmp_path / results.TABLE
    results.save_csv(pd.DataFrame([vars(dataclasses.replace(POINT, **FILLED))]), path)
    return path, path.read_text()


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("accuracy", "much", r"accuracy='much', which cannot be read"),
        ("seed", "1.5", r"seed='1.5', which cannot be read"),
        ("seed", "", r"seed=None, which should be a whole number;"),
        ("target_cr", "", r"target_cr=None, which should be a number;"),
        ("metrics", "{", r"metrics='\{', which cannot be read"),
        ("metrics", "[]", r"metrics=\[\], which should be an object"),
        ("problem_scores", '["a"]', r"problem_scores=\['a'\], which should be a list of numbers"),
        ("problem_scores", "", r"problem_scores=None, which should be a list of numbers"),
        ("sampling_seeds", "[0.5]", r"sampling_seeds=\[0.5\], which should be a list of whole numbers"),
        ("schema_version", "9", "schema version 9"),
        ("schema_version", "", "schema version None"),
    ],
)
def test_a_cell_that_is_wrong_is_told_with_file_and_line(tmp_path, column, cell, message):
    path, _ = table(tmp_path)
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows[column] = cell
    rows.to_csv(path, index=False)
    number = len(path.read_text().splitlines())
    with pytest.raises(ValueError, match=rf"results.csv:{number} has {message}"):
        results.load(tmp_path)


def test_a_line_or_header_that_is_wrong_is_told_with_file_and_line(tmp_path):
    path, text = table(tmp_path)
    path.write_text(text.rsplit(",", 1)[0] + "\n")  # the last cell is cut off
    with pytest.raises(ValueError, match=r"results.csv:\d+ has \d+ cells where the header has"):
        results.load(path)
    path.write_text(text + '"open')
    with pytest.raises(ValueError, match=r"results.csv:\d+ is no line of a CSV file"):
        results.load(path)
    path.write_text(text + "a,b\n")
    with pytest.raises(ValueError, match=r"results.csv:3 has 2 cells where the header has \d+"):
        results.load(path)
    for head in ("a,b\n", text.split("\n")[0].replace("model", "run_id") + "\n"):
        path.write_text(head)
        with pytest.raises(ValueError, match=r"results.csv:1 is not the header"):
            results.load(path)
    path.write_text(text.replace("problem_scores", "scores", 1))
    with pytest.raises(ValueError, match=r"results.csv:2 lacks problem_scores"):
        results.load(path)


def test_lines_hold_values_of_their_types(tmp_path):
    path = tmp_path / results.RESULTS
    for changes, message in (
        ({"accuracy": "0.9"}, "accuracy='0.9', which should be a number or null"),
        ({"seed": True}, "seed=True, which should be a whole number"),
        ({"window": 1.5}, "window=1.5, which should be a whole number or null"),
        ({"settings": []}, r"settings=\[\], which should be an object"),
        ({"variant": None}, "variant=None, which should be text"),
        ({"problem_scores": [None]}, r"problem_scores=\[None\], which should be a list of numbers"),
    ):
        path.write_text(json.dumps(dataclasses.asdict(POINT) | changes) + "\n")
        with pytest.raises(ValueError, match=f"results.jsonl:1 has {message}"):
            results.load(path)
    path.write_text(json.dumps(dataclasses.asdict(POINT) | {"target_cr": 8, "accuracy": math.nan}) + "\n")
    (row,) = results.load(path).to_dict("records")
    assert row["target_cr"] == 8.0
    assert isinstance(row["target_cr"], float)
    assert row["accuracy"] is None


# -- rows of before that say less -----------------------------------------------------------------------------------------
SCORED = dataclasses.replace(POINT, problem_scores=[1.0] * 9 + [0.0], settings={"prompts": "a"})


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_version(row, version):
    since = SINCE_3 if version == 2 else SINCE_2 | SINCE_3
    return {name: value for name, value in dataclasses.asdict(row).items() if name not in since} | {
        "schema_version": version
    }


def test_a_row_that_does_not_say_what_problems_scored_is_the_same_as_one_that_does(tmp_path):
    path = tmp_path / results.RESULTS
    path.write_text(json.dumps(as_version(SCORED, 2)) + "\n")
    before = path.read_text()
    results.append_new(path, [SCORED])
    assert path.read_text() == before
    results.append_new(path, [dataclasses.replace(SCORED, accuracy=0.8), SCORED])
    assert [row["accuracy"] for row in written(path)] == [0.9, 0.8]
    path.write_text(json.dumps(dataclasses.asdict(SCORED)) + "\n")
    results.append_new(path, [dataclasses.replace(SCORED, problem_scores=[])])
    assert len(written(path)) == 1


def test_a_row_whose_problems_scored_otherwise_is_another_and_a_variant_is_but_a_name(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_new(path, [SCORED])
    results.append_new(path, [dataclasses.replace(SCORED, variant="window=4"), SCORED])
    assert len(written(path)) == 1
    other = dataclasses.replace(SCORED, problem_scores=[0.0] + [1.0] * 9)
    for _ in range(2):
        results.append_new(path, [other])
    assert [row["problem_scores"][0] for row in written(path)] == [1.0, 0.0]


def test_measurements_are_told_apart_by_what_was_measured():
    row = dataclasses.asdict(SCORED)
    same = row | {"seconds": 9.0, "variant": "x", "problem_scores": [], "window": 16.0, "perplexity": math.nan}
    assert results.measurement(same) == results.measurement(row)
    for changes in ({"seed": 1}, {"accuracy": None}, {"window": None}, {"settings": {}}):
        assert results.measurement(row | changes) != results.measurement(row)


def test_equal_scores_are_kept_once(tmp_path):
    """A set of thousands of problems, in hundreds of rows, is mostly the same few numbers."""
    results.append(tmp_path / results.RESULTS, [dataclasses.replace(POINT, problem_scores=[1.0, 0.5, 1.0])] * 2)
    first, second = results.load(tmp_path)["problem_scores"]
    assert first[0] is first[2] is second[0]


def test_the_scores_of_many_problems_fit_a_cell(tmp_path):
    frame = pd.DataFrame([vars(dataclasses.replace(POINT, problem_scores=[1 / 3] * 20_000))])
    results.save_csv(frame, tmp_path / "x.csv")
    assert results.load(tmp_path / "x.csv")["problem_scores"][0] == [1 / 3] * 20_000
