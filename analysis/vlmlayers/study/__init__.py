"""A study: the whole way from a model and datasets to a report, stage by stage."""

from __future__ import annotations

from vlmlayers.study.opened import OpenedRun, open_run
from vlmlayers.study.runner import STAGES, StageContext, run_study
from vlmlayers.study.schema import Study, check_study, read_study, study_file

__all__ = [
    "STAGES",
    "OpenedRun",
    "StageContext",
    "Study",
    "check_study",
    "open_run",
    "read_study",
    "run_study",
    "study_file",
]
