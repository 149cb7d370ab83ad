"""What lm-eval finds as it reads a task file: the filter that keeps every sample, and with it the model `dms`.

lm-eval has no list of models of others. A task file of this project names `all_samples`, so that reading one by its path
imports this module, and `lm-eval run --model dms` knows the name by then.
"""

from collections.abc import Iterable

import lm_eval.models  # noqa: F401  lm-eval fills its registry only while it is empty
from lm_eval.api.registry import model_registry

if "dms" not in model_registry:  # who imported `lm` has registered it
    model_registry.register("dms", target="dms_lab.evaluation.lm:DmsLM")


def all_samples(responses: Iterable[list[str]], docs: Iterable[dict]) -> list[list[str]]:
    """Every response of every document, so that `process_results` is given a list a document: lm-eval's filter."""
    return [list(response) for response in responses]
