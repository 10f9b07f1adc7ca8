"""`tempflow report`: one page about one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tempflow.cli.options import POSITIONAL, parse
from tempflow.cli.parse import writing
from tempflow.strict import Place, Strict


class ReportOptions(Strict):
    """Write one self-contained HTML page about one run, or about several side by side. Of stages each gets a page in
    its folder, and one page lists them; among other runs they stand side by side."""

    runs: Annotated[tuple[Place, ...], POSITIONAL, Field(strict=False)] = Field(
        default=(), description="folders that `tempflow train` wrote"
    )
    suites: Annotated[tuple[Place, ...], Field(strict=False)] = Field(
        default=(), description="folders that `tempflow suite` wrote, whose tables are shown too"
    )
    evaluations: Annotated[tuple[Place, ...], Field(strict=False)] = Field(
        default=(),
        description="files that `tempflow eval --output` wrote, whose rows are drawn over steps and diversity, the "
        "reference's (a student's teacher's) beside the runs'",
    )
    output: Place = Field(default="", description="the page (default: RUN/report.html; of several runs, ./report.html)")


def report_verb(args: Sequence[str]) -> int:
    print(f"wrote {run_report(parse(ReportOptions, 'report', args))}")
    return 0


def run_report(options: ReportOptions) -> Path:
    """Writes the page. Raises ValueError for a folder without a run, or a page not named .html."""
    from tempflow.report import stage_folders, write_report, write_stages

    folders = [Path(run) for run in options.runs]
    stages = {folder: [stage for stage in stage_folders(folder) if stage.is_dir()] for folder in folders}
    usual = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    output = Path(options.output) if options.output else usual
    suites, evaluations = [Path(suite) for suite in options.suites], [Path(file) for file in options.evaluations]
    with writing("output", output):
        if len(folders) == 1 and stages[folders[0]]:
            return write_stages(folders[0], output, suites, evaluations)
        runs = [run for folder in folders for run in stages[folder] or [folder]]
        return write_report(runs, output, suites, evaluations)
