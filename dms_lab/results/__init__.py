"""Results: one row per (method, task, budget), appended to files as JSON, read back strictly.

evaluation -> append -> results.jsonl of each run -> load -> one frame -> save_csv -> results.csv, which load reads as well
"""

from dms_lab.results.files import RESULTS, files_in
from dms_lab.results.lines import append, append_new, load, measurement
from dms_lab.results.schema import SCHEMA_VERSION, Result, git_revision, versions
from dms_lab.results.table import TABLE, save_csv

__all__ = [
    "RESULTS",
    "SCHEMA_VERSION",
    "TABLE",
    "Result",
    "append",
    "append_new",
    "files_in",
    "git_revision",
    "load",
    "measurement",
    "save_csv",
    "versions",
]
