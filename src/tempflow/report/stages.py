"""Pages about runs that were stages one after the other: one for each, and a short one that lists them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from tempflow.folder import kind_of, write_file
from tempflow.report import figures
from tempflow.report.page import check_page, environment, told_of, write_report
from tempflow.report.runs import read_config, read_evaluation, read_runs, read_suite
from tempflow.report.walks import walks_of

PAGE, STAGED = "report.html", "stages"
"""What a stage's page is called in its folder; what the folder of all stages is marked as."""


def stage_folders(home: Path) -> list[Path]:
    """The folders of a recipe's stages, in order, also those that are not there yet; none where `home` has no stages.

    Raises ValueError where its configuration cannot be read.
    """
    if kind_of(home) != STAGED:
        return []
    told = read_config(home).get("stages")
    stages = told if isinstance(told, list) else []
    names = [str(stage.get("name")) if isinstance(stage, dict) else "" for stage in stages]
    return [home / Path(f"{number}-{name}").name for number, name in enumerate(names, 1)]


def write_stages(home: Path, out: Path, suites: Sequence[Path] = (), evaluations: Sequence[Path] = ()) -> Path:
    """Writes a page into the folder of each stage that was begun, and `out`, which lists them and shows suites and
    evaluations; returns `out`.

    Raises what `write_report` does, and ValueError where no stage was begun.
    """
    check_page(out)
    folders = stage_folders(home)
    there = [folder for folder in folders if (folder / "config.yaml").is_file()]
    if not there:
        raise ValueError(f"runs: no stage in {str(home)!r} was begun; nearest valid: once `tempflow train` runs")
    runs = dict(zip(there, read_runs(there), strict=True))
    told, last = [read_suite(suite) for suite in suites], runs[there[-1]]
    walks = walks_of([*runs.values()], [read_evaluation(file) for file in evaluations], last.metric)
    pages = {folder: write_report([folder], folder / PAGE) for folder in there}
    around = out.absolute().parent
    rows = [
        {
            "name": folder.name,
            "link": Path(os.path.relpath(pages[folder].absolute(), around)).as_posix() if folder in pages else "",
            "run": told_of(runs[folder]) if folder in runs else None,
        }
        for folder in folders
    ]
    text = (
        environment()
        .get_template("stages.html")
        .render(
            title=str(read_config(home).get("name", home.name)),
            stages=rows,
            metric=last.metric,
            whole=figures.across(runs[there[0]], last, last.metric) if len(there) == len(folders) else None,
            forwards=sum(row["run"]["costs"].get("forward_equivalents", 0.0) for row in rows if row["run"]),
            minutes=sum(run.minutes for run in runs.values()),
            suites=told,
            walks=walks,
            now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )
    )
    return write_file(out, text, "output")
