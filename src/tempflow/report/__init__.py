"""One page about one run or several: `write_report([folder, …], page)`; about stages `write_stages(folder, page)`."""

from tempflow.report.page import write_report
from tempflow.report.stages import stage_folders, write_stages

__all__ = ["stage_folders", "write_report", "write_stages"]
