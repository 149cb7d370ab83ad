"""What a sweep file may say, and what is said of one that is wrong."""

import re
from pathlib import Path

import pytest

from dms_lab.sweep_config import Resources, build_resources, build_sweep, load_sweep

PART = {"overrides": ["model=tiny", "window=1,4"]}


def write(folder, text, name="sweep.yaml"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def build(**values):
    return build_sweep({"parts": [PART]} | values, "windows", Path("experiments/windows"))


def test_a_sweep_is_called_as_its_folder_and_one_in_another_file_as_both(tmp_path):
    text = (
        'question: Why?\nparts:\n- overrides: [model=tiny, "window=1,4"]\n  then: [[eval=reasoning, tasks=a]]\nworkers: 2\n'
    )
    folder = write(tmp_path / "windows", text)
    write(folder, text, "full.yaml")
    sweep = load_sweep(folder)
    assert (sweep.name, sweep.question, sweep.workers, sweep.cluster) == ("windows", "Why?", 2, "local")
    assert sweep.parts[0].overrides == ("model=tiny", "window=1,4")
    assert sweep.parts[0].then == (("eval=reasoning", "tasks=a"),)
    assert load_sweep(folder / "sweep.yaml") == sweep
    assert (sweep.results, sweep.records) == (folder / "results.csv", Path("runs/sweeps/windows"))
    full = load_sweep(folder / "full.yaml")
    assert (full.name, full.results) == ("windows-full", folder / "windows-full.csv")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wrkers": 2}, "unknown key 'wrkers' (did you mean workers?)"),
        ({"workers": "two"}, "workers='two' must be a whole number"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"cluster": "slrum"}, "cluster='slrum' is not known; choose one of local, slurm"),
        ({"parts": []}, "parts is missing or empty"),
        ({"parts": [{"override": []}]}, "unknown key 'parts[0].override' (did you mean parts[0].overrides?)"),
        ({"parts": ["model=tiny"]}, "parts[0]='model=tiny' must be a mapping"),
        ({"parts": [PART | {"command": "trian"}]}, "parts[0].command='trian' is not known; choose one of train, evaluate"),
        ({"parts": [{"overrides": "model=tiny"}]}, "parts[0].overrides='model=tiny' must be a list of key=value"),
        (
            {"parts": [{"overrides": ["window=1", 4]}]},
            "parts[0].overrides holds 4, which is no key=value; a value with commas",
        ),
        ({"parts": [PART | {"then": [["eval"]]}]}, "parts[0].then[0] holds 'eval', which is no key=value"),
        ({"parts": [PART | {"command": "evaluate", "then": [["a=b"]]}]}, "parts[0].then is for what follows a training"),
        ({"resources": {"timeout_mins": 3}}, "unknown key 'resources.timeout_mins' (did you mean resources.timeout_min?)"),
        ({"resources": {"timeout_min": 0}}, "resources.timeout_min=0 must be above 0"),
        ({"resources": {"mem_gb": "8G"}}, "resources.mem_gb='8G' must be a finite number"),
        ({"resources": {"setup": "module load cuda"}}, "resources.setup='module load cuda' must be a list"),
        ({"resources": {"additional_parameters": ["nice"]}}, "resources.additional_parameters=['nice'] must be a mapping"),
        ({"resources": {"sizes": {"big": {"gpus": 2}}}}, "unknown key 'resources.sizes.big.gpus'"),
        ({"resources": {"timeout_min": 2, "signal_delay_s": 180}}, "leaves a job of timeout_min=2 no time to run"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_told_with_what_would_be_right(values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build(**values)


def test_a_file_that_is_none_is_told_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"no .*nowhere/sweep.yaml: give a sweep's folder"):
        load_sweep(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"torn/sweep.yaml is not YAML"):
        load_sweep(write(tmp_path / "torn", "parts: [\n"))
    with pytest.raises(ValueError, match=r"list/sweep.yaml holds no sweep"):
        load_sweep(write(tmp_path / "list", "- model=tiny\n"))
    with pytest.raises(ValueError, match=r"is no name of letters"):
        load_sweep(write(tmp_path / "my sweep", "parts: [{overrides: [model=tiny]}]\n"))


def test_a_command_line_has_the_last_word_on_where_a_sweep_runs_and_on_nothing_else(tmp_path):
    folder = write(
        tmp_path / "a", "parts: [{overrides: [model=tiny]}]\nworkers: 2\nresources: {timeout_min: 9, partition: x}\n"
    )
    sweep = load_sweep(folder, ["cluster=slurm", "workers=3", "resources.timeout_min=60", "resources.sizes.cpu.mem_gb=1"])
    assert (sweep.cluster, sweep.workers) == ("slurm", 3)
    assert sweep.resources == {"timeout_min": 60, "partition": "x", "sizes": {"cpu": {"mem_gb": 1}}}
    with pytest.raises(ValueError, match=r"did you mean resources.timeout_min"):
        load_sweep(folder, ["resources.timeout_mn=60"])
    with pytest.raises(ValueError, match="unknown key 'steps'"):
        load_sweep(folder, ["steps=3"])


def test_resources_are_those_of_the_defaults_but_for_what_is_given():
    assert build_resources({}) == Resources()
    found = build_resources({"mem_gb": 8, "setup": ["module load cuda"], "additional_parameters": {"nice": 100}})
    assert found == Resources(mem_gb=8.0, setup=("module load cuda",), additional_parameters={"nice": 100})
