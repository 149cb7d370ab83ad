"""lm-eval's own command, which then knows the model `dms` and this project's tasks.

    python -m dms_lab.harness run --model dms --model_args checkpoint=<folder> --tasks dms_aime24 --apply_chat_template

lm-eval learns a model's name when the module that registers it is imported. Its plain command does that as it reads a task
file given by path, so `lm-eval run --model dms ... --tasks <folder>/dms_aime24.yaml` needs nothing else.
"""

import sys


def main() -> None:
    """Runs lm-eval on this command line, `--include_path` set to this project's tasks unless it is given."""
    from lm_eval.__main__ import cli_evaluate

    from dms_lab.evaluation import lm  # noqa: F401  registers the model
    from dms_lab.evaluation.benchmarks import TASKS

    if len(sys.argv) > 2 and not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
