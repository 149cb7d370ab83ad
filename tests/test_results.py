"""Results come back as they were written, strictly."""

import dataclasses
import importlib.metadata
import json
import resource
from pathlib import Path

import pytest
from result_rows import POINT, some_results

from dms_lab import results


def test_results_come_back_as_written(tmp_path):
    path = tmp_path / "run" / results.RESULTS
    results.append(path, some_results()[:2])
    results.append(path, some_results()[2:])
    frame = results.load(tmp_path)
    assert list(frame["task"]) == ["road", "road", "ledger", "held_out_text"]
    assert frame["versions"][0]["torch"]


def test_only_what_computed_results_is_in_their_versions(monkeypatch):
    def without_extras(name):
        if name in ("lm_eval", "math_verify"):
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(results.schema, "version", without_extras)
    assert set(results.versions()) == {"python", "torch", "transformers"}


@pytest.mark.parametrize("name", ["lm_eval", "math_verify"])
def test_an_extra_that_is_installed_is_in_the_versions(name):
    pytest.importorskip(name, reason="the extra `eval` is not installed")
    assert results.versions()[name] == importlib.metadata.version(name)


# -- results that are there already --------------------------------------------------------------------------------------


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_that_are_there_but_for_the_time_they_took_and_what_computed_them_are_not_written_again(tmp_path):
    path = tmp_path / "run" / results.RESULTS
    results.append_new(path, some_results())
    first = path.read_text()
    assert len(first.splitlines()) == 4
    later = {"seconds": 9.0, "versions": {"torch": "0"}, "git_revision": "another"}
    results.append_new(path, [dataclasses.replace(row, **later) for row in some_results()])
    assert path.read_text() == first
    more = dataclasses.replace(POINT, width=4)
    results.append_new(path, [POINT, more])
    assert path.read_text().startswith(first)
    assert [row["width"] for row in written(path)] == [1, 1, 1, 1, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"prompts": "b", "generation": {"temperature": 0.6}}},
        {"settings": {"prompts": "a", "generation": {"temperature": 0.7}}},
        {"settings": {}},
        {"accuracy": 0.8},
        {"max_tokens": 96},
        {"sampling_seeds": [1]},
        {"method": "full"},
        {"run_id": "another"},
        {"metrics": {"avg": [0.5, 0.4, 0.6]}},
    ],
)
def test_a_row_that_differs_in_anything_else_is_written(tmp_path, changes):
    path = tmp_path / results.RESULTS
    row = dataclasses.replace(POINT, settings={"prompts": "a", "generation": {"temperature": 0.6}})
    results.append_new(path, [row])
    for _ in range(2):
        results.append_new(path, [dataclasses.replace(row, **changes)])
    assert len(written(path)) == 2


NULLS = dict.fromkeys(
    ("measured_cr", "window", "accuracy", "accuracy_low", "accuracy_high", "kv_reads", "peak_tokens", "kv_bytes_peak")
)


@pytest.mark.parametrize(
    "beside", [[], [POINT], [dataclasses.replace(POINT, max_tokens=96, num_samples=4, perplexity=2.0)]]
)
def test_nulls_do_not_make_a_row_look_new_whatever_stands_beside_it(tmp_path, beside):
    path = tmp_path / results.RESULTS
    settings = {"limit": None, "deterministic": False, "generation": {"temperature": 1.0, "top_k": 20}}
    row = dataclasses.replace(
        POINT, **NULLS, metrics={"bits,none": [0.5, None, None], "ppl,none": [2.0, float("nan"), 3.0]}, settings=settings
    )
    nan = dataclasses.replace(row, accuracy_low=float("nan"), accuracy_high=float("nan"))
    results.append_new(path, [*beside, row])
    for again in ([row], [nan], [*beside, row]):
        results.append_new(path, again)
        assert len(written(path)) == len(beside) + 1


def test_a_row_of_version_1_is_not_taken_for_a_new_one_that_says_more(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_new(path, [POINT])
    (line,) = written(path)
    old = {key: value for key, value in line.items() if key not in SINCE_2 | SINCE_3} | {"schema_version": 1}
    path.write_text(json.dumps(old) + "\n")
    results.append_new(path, [POINT])
    assert len(written(path)) == 1
    results.append_new(path, [dataclasses.replace(POINT, settings={"storage": "fp8"})])
    assert [row["schema_version"] for row in written(path)] == [1, 3]


def test_a_bad_line_stops_new_rows_before_anything_is_written(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_new(path, [POINT])
    text = path.read_text()[:-40]
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results.jsonl:1 is not a JSON object"):
        results.append_new(path, [POINT])
    assert path.read_text() == text


def test_a_cut_line_and_an_unknown_schema_are_named(tmp_path):
    path = tmp_path / results.RESULTS
    results.append(path, some_results()[:1])
    good = path.read_text()
    path.write_text(good + good[:50])
    with pytest.raises(ValueError, match=r"results.jsonl:2 is not a JSON object"):
        results.load(path)
    path.write_text(json.dumps(json.loads(good) | {"schema_version": 7}) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 has schema version 7"):
        results.load(path)
    with pytest.raises(ValueError, match="no results in"):
        results.load(tmp_path / "nothing")


def test_what_only_has_the_name_of_a_table_is_passed_over_and_one_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    results.append(tmp_path / "run" / results.RESULTS, [POINT])
    for name in ("spark.csv", results.TABLE, f"other/{results.RESULTS}"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "gone.csv").symlink_to("nowhere")
    (tmp_path / "notes.csv").write_text("a,b\n")
    assert results.files_in(tmp_path) == [tmp_path / "run" / results.RESULTS]
    assert results.load(tmp_path)["run_id"].tolist() == [POINT.run_id]
    plain = Path.open

    def refused(path, *args, **options):
        if path.suffix in (".csv", ".jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    for place, file in ((".", "notes.csv"), ("notes.csv", "notes.csv"), ("run", results.RESULTS)):
        with pytest.raises(ValueError, match=rf"{file} cannot be read \(Permission denied\)"):
            results.load(tmp_path / place)


def test_a_line_after_a_cut_one_is_not_lost(tmp_path):
    path = tmp_path / results.RESULTS
    results.append(path, [POINT])
    path.write_text(path.read_text()[:-40])
    results.append(path, [POINT])
    _, second = path.read_text().splitlines()
    assert json.loads(second)["task"] == "road"
    with pytest.raises(ValueError, match=r"results.jsonl:1 is not a JSON object"):
        results.load(path)
    path.write_text(second + "\n")
    results.append(path, [POINT])
    assert len(results.load(path)) == 2


def test_a_full_disk_is_told_and_takes_no_part_of_a_line(tmp_path):
    path = tmp_path / results.RESULTS
    results.append(path, [POINT])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = len(before) * 2 + 100  # for one more line, and the beginning of another
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError, match="No space left"):
            results.append(path, [POINT, POINT])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    results.append(path, [POINT])
    assert len(results.load(path)) == 2


def test_a_line_without_a_key_is_named(tmp_path):
    path = tmp_path / results.RESULTS
    results.append(path, [POINT])
    row = json.loads(path.read_text())
    del row["kv_reads"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 lacks kv_reads"):
        results.load(path)


# -- results of version 1, and of benchmarks ----------------------------------------------------------------------------

VERSION_1 = Path(__file__).parent / "data" / "results_version_1.jsonl"
SINCE_2 = {
    "width": 1,
    "max_tokens": None,
    "headline": "exact_match",
    "metrics": {},
    "truncation_rate": None,
    "num_samples": None,
    "sampling_seeds": [],
    "settings": {},
}
SINCE_3 = {"problem_scores": [], "variant": ""}


def test_a_record_of_version_1_loads_with_what_it_lacks_filled_in():
    rows = results.load(VERSION_1).to_dict("records")
    lines = [json.loads(line) for line in VERSION_1.read_text().splitlines()]
    assert len(rows) == len(lines) == 8
    assert {row["schema_version"] for row in rows} == {1}
    for row, line in zip(rows, lines, strict=True):
        assert {name: row[name] for name in SINCE_2 | SINCE_3} == SINCE_2 | SINCE_3
        assert (row["method"], row["task"], row["target_cr"]) == (line["method"], line["task"], line["target_cr"])
        assert set(row) == set(line) | set(SINCE_2) | set(SINCE_3) == {f.name for f in dataclasses.fields(results.Result)}


def test_what_version_1_has_is_not_replaced_and_what_it_should_have_is_missed(tmp_path):
    line = json.loads(VERSION_1.read_text().splitlines()[0])
    path = tmp_path / results.RESULTS
    path.write_text(json.dumps(line | {"width": 4}) + "\n")
    assert results.load(path)["width"].tolist() == [4]
    del line["kv_reads"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 lacks kv_reads"):
        results.load(path)


def test_a_line_needs_all_keys_of_its_version_and_versions_to_come_are_refused(tmp_path):
    path = tmp_path / results.RESULTS
    results.append(path, [POINT])
    line = json.loads(path.read_text())
    assert line["schema_version"] == 3
    of_2 = {key: value for key, value in line.items() if key not in SINCE_3} | {"schema_version": 2}
    path.write_text(json.dumps(of_2) + "\n")
    assert results.load(path)[list(SINCE_3)].to_dict("records") == [SINCE_3]
    for row, lost in ((of_2, "width"), (line, "width"), (line, "variant"), (of_2, "kv_reads")):
        path.write_text(json.dumps({key: value for key, value in row.items() if key != lost}) + "\n")
        with pytest.raises(ValueError, match=f"results.jsonl:1 lacks {lost};"):
            results.load(path)
    for version in (0, 4, "2", None, True, 2.0):
        path.write_text(json.dumps(line | {"schema_version": version}) + "\n")
        with pytest.raises(ValueError, match=f"results.jsonl:1 has schema version {version!r}; .* reads 1 to 3"):
            results.load(path)
