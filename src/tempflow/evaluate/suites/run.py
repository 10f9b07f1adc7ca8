"""Runs a suite: draws pictures of its prompts, has them judged, and writes its tables, all in one folder.

What is in the folder already is kept, so that a run that was ended goes on. The folder has

    suite.json      what the results depend on; other settings are refused there
    pictures/       {number}_{sample}.png; those of a comparison's second model lie in against/
    results.jsonl   a line a picture: its value, null where it failed
    summary.json    the tables
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempflow.data.prompts import NO_SOURCES
from tempflow.evaluate.source import (
    Settings,
    Source,
    check_source,
    check_walk,
    find,
    guidance_for,
    load_source,
    settings,
    stated,
)
from tempflow.evaluate.suite import drawn
from tempflow.evaluate.suites.figures import Judged, Table, Value, to_json
from tempflow.evaluate.suites.gallery import FOLDER, PICTURES, Key, gallery, is_gallery, load_picture, missing, named
from tempflow.evaluate.suites.readers import number_of
from tempflow.evaluate.suites.scorers import Scorer
from tempflow.evaluate.suites.table import Suite
from tempflow.folder import check, claim, free, held, write_json
from tempflow.grid import SCHEDULER
from tempflow.models import EMBEDDED_MODELS, local_folder, resolved_device
from tempflow.models.finite import WHY
from tempflow.request import Prompt
from tempflow.strict import cut, shown

SETTINGS, RESULTS, SUMMARY, AGAINST = "suite.json", "results.jsonl", "summary.json", "against"

AT_ONCE = 32
"""Pictures that are drawn, and judged, before they are written down."""

WITHOUT_EFFECT = ("url", "key_env", "concurrency", "timeout", "retries", "cache", "device", "batch", "threads")
"""A scorer's options that change where and how fast it works, and no score: a run may go on with others."""

SHOWN = 12
"""Prompts whose pictures the page shows."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """Whose pictures: those in a folder, or those of a model, drawn as `how` says."""

    what: str
    folder: Path | None = None
    source: Source | None = None
    how: Settings | None = None


@dataclass(frozen=True)
class Job:
    """What is to be done.

    every    the suite's prompts; the first `count` of them are used
    samples  pictures a prompt
    sides    one, or two to compare
    said     what else the results depend on: files, the scorer and its options
    """

    name: str
    suite: Suite
    every: tuple[Prompt, ...]
    count: int
    samples: int
    sides: tuple[Side, ...]
    scorer: Scorer
    output: Path
    said: Mapping[str, Any]

    @property
    def prompts(self) -> dict[int, Prompt]:
        """By number."""
        return {number_of(prompt, place): prompt for place, prompt in enumerate(self.every[: self.count])}

    @property
    def keys(self) -> list[Key]:
        """All pictures."""
        return [(number, sample) for number in self.prompts for sample in range(self.samples)]


def side_of(what: str, base: str, given: Mapping[str, Any]) -> Side:
    """Whose pictures `what` means: a folder of pictures (`gallery`), or anything that `source.find` knows.

    given  settings that go before the source's own (`source.Settings`), and height and width

    Looks at names only. Raises ValueError for anything else, and for settings of a folder, whose pictures are there.
    """
    place = Path(what).expanduser()
    if is_gallery(place) and not any((place / sign).is_file() for sign in ("config.yaml", "model_index.json")):
        if base:
            raise ValueError(f"base: {base!r} is for a LoRA, and {what!r} holds pictures; nearest valid: no base")
        return Side(what, folder=place)
    source = find(what, base)
    own = settings(source)
    size = replace(own.size, **{side: given[side] for side in ("height", "width") if side in given})
    if size.frames > 1:
        raise ValueError(f"what: {what!r} makes clips of {size.frames} frames; nearest valid: a model of pictures")
    how = replace(own, size=size, **{k: v for k, v in given.items() if k not in ("height", "width")})
    check_source(source, how.size, how.guidance, how.guidance_options)
    check_walk(source, how.grid, how.steps)
    return Side(what, source=source, how=how)


def samples_of(suite: Suite, sides: Sequence[Side], asked: int | None) -> int:
    """Pictures a prompt: as asked, or as many as a folder of pictures has, or the suite's number."""
    folders = [gallery(side.folder) for side in sides if side.folder is not None]
    there = min((1 + max(sample for _, sample in found) for found in folders), default=suite.samples)
    samples = there if asked is None else asked
    if samples < suite.least:
        raise ValueError(f"samples: {samples} is too few for this suite; nearest valid: {suite.least}")
    return samples


def run(job: Job, say: Say) -> tuple[Table, ...]:
    """Draws, judges and counts; the tables, which summary.json has too.

    say  told in a line what goes on

    Raises ValueError for an output that is not ours, that another process is at work in, or that was made with other
    settings, for prompts that cannot be judged, and for pictures of prompts that there are not; RewardError for what
    ends a judge's work.
    """
    check(job.output, FOLDER)
    _check_settings(job)
    galleries = [None if side.folder is None else _gallery(side.folder, job) for side in job.sides]
    job.scorer.check(list(job.prompts.values()))
    with held(claim(job.output, FOLDER)) as folder:
        return _run(job, folder, galleries, say)


def _run(job: Job, folder: Path, galleries: Sequence[Mapping[Key, Path] | None], say: Say) -> tuple[Table, ...]:
    """`run`, in a folder that is this process's alone; `galleries` of the sides whose pictures are there."""
    _check_settings(job)  # another process may have written them meanwhile
    prompts, results = job.prompts, Results(folder / RESULTS)
    if any(key not in results.values for key in job.keys):
        job.scorer.prepare()
    _write(folder / SETTINGS, json.dumps(_said(job), indent=1, ensure_ascii=False) + "\n")
    pictures: list[Mapping[Key, Path]] = []
    for n, (side, found) in enumerate(zip(job.sides, galleries, strict=True)):
        home = folder / (AGAINST if n else PICTURES)
        pictures.append(_drawn(job, side, home, results, say) if found is None else found)
    _judge(job, pictures, results, say)
    lost = sorted({key for found in pictures for key in missing(found, prompts, job.samples)} - results.broken)
    judged = [Judged(p, tuple(results.values.get((n, k)) for k in range(job.samples))) for n, p in prompts.items()]
    tables = job.suite.figures(judged)
    summary = {
        "suite": job.name,
        "about": job.suite.about,
        "judge": job.scorer.about,
        "settings": _said(job),
        "prompts": len(prompts),
        "pictures": len(job.keys),
        "failed": sum(value is None for one in judged for value in one.values),
        "missing": named(lost, 20),
        "tables": [to_json(table) for table in tables],
        "shown": _shown(job, pictures, results, folder),
    }
    write_json(folder / SUMMARY, summary)
    if lost:
        say(f"{len(lost)} of {len(job.keys)} pictures are not there and count as failed: {named(lost)}")
    return tables


# ------------------------------------------------------------------------------------------------------------- settings
def _said(job: Job) -> dict[str, Any]:
    """What the results depend on."""
    texts = [
        [number, p.text, p.negative, dict(p.metadata), *(source.digest for source in p.sources)]
        for number, p in job.prompts.items()
    ]
    content = json.dumps(texts, sort_keys=True, default=str).encode()
    sides = {name: _side(side) for name, side in zip(("what", "against"), job.sides, strict=False)}
    return {
        "suite": job.name,
        **sides,
        "prompts": f"{len(texts)} of content {hashlib.sha256(content).hexdigest()[:16]}",
        "samples": job.samples,
        **job.said,
    }


def _side(side: Side) -> dict[str, Any]:
    if side.how is None or side.source is None:
        return {"pictures": str(Path(side.what).expanduser().resolve())}
    how, source = side.how, side.source
    grid = stated(source, how.grid)
    return {
        **({} if grid.how == SCHEDULER else {"grid": str(grid)}),
        "model": source.base,
        "lora": None if source.lora is None else str(source.lora.resolve()),
        "weights": _weights(source),
        "steps": how.steps,
        "guidance": how.guidance,
        "guidance_options": dict(how.guidance_options),
        "seed": how.seed,
        "height": how.size.height,
        "width": how.size.width,
        "dtype": how.dtype,
    }


def _weights(source: Source) -> str:
    """Tells weights that were written anew by their files' sizes and times; "" for what ships with the package."""
    base = [] if source.base in EMBEDDED_MODELS else [local_folder(source.base, source.revision)]
    return stamp(base if source.lora is None else [*base, source.lora])


def stamp(places: Sequence[Path]) -> str:
    """Tells files, and folders' weights, settings and templates, by sizes and times; "" where there are none."""
    files: list[Path] = []
    for place in places:
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        files += [f for f in inside if f.is_file() and (f == place or f.suffix in (".safetensors", ".json", ".toml"))]
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16] if told else ""


def _check_settings(job: Job) -> None:
    """Raises ValueError where the folder's results were made with other settings."""
    file = job.output / SETTINGS
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); nearest valid: {free(job.output)!r}") from error
    now = json.loads(json.dumps(_said(job)))
    for path, old, new in _differences(before, now):
        raise ValueError(
            f"output: {str(job.output)!r} has results with {path} {shown(old)}, and now it is {shown(new)}; "
            f"nearest valid: {free(job.output)!r}"
        )


def _differences(before: object, now: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield path, before, now


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


# ------------------------------------------------------------------------------------------------------------- pictures
def _gallery(folder: Path, job: Job) -> dict[Key, Path]:
    """Raises ValueError where it has pictures of prompts that there are not, and none of those that there are."""
    found = gallery(folder)
    known = {number_of(prompt, place) for place, prompt in enumerate(job.every)}
    other = sorted({number for number, _ in found} - known)
    if other or not any(number in job.prompts for number, _ in found):
        what = f"a picture of prompt {other[0]}" if other else "no picture of these prompts"
        raise ValueError(
            f"what: {str(folder)!r} has {what}, and the prompts are numbered {min(known)} to {max(known)}; "
            "nearest valid: the prompts that its pictures were drawn for"
        )
    return found


def _drawn(job: Job, side: Side, home: Path, results: Results, say: Say) -> dict[Key, Path]:
    """The model's pictures, those drawn that are not there. One that is not finite is failed, and no file."""
    assert side.source is not None and side.how is not None
    home.mkdir(exist_ok=True)
    files = {(number, sample): home / f"{number:05d}_{sample}.png" for number, sample in job.keys}
    lost = [key for key, file in files.items() if not file.exists() and key not in results.broken]
    if not lost:
        return {key: file for key, file in files.items() if file.exists()}
    how, prompts, wanted = side.how, job.prompts, set(lost)
    if any(prompt.sources for prompt in prompts.values()):
        raise ValueError(f"prompts: {NO_SOURCES}")
    say(f"drawing {len(lost)} pictures of {side.what}")
    model = load_source(side.source, dtype=how.dtype, device=resolved_device(how.device))
    for numbers in _stretches(sorted({number for number, _ in lost}), max(1, AT_ONCE // job.samples)):
        parts = drawn(
            model,
            [prompts[number] for number in numbers],
            steps=how.steps,
            guidance=guidance_for(model, how),
            seed=how.seed,
            size=how.size,
            rows=how.rows,
            samples_per_prompt=job.samples,
            first=numbers[0],
        )
        for slots, seen in parts:
            for row, key in enumerate((number, sample) for number in slots for sample in range(job.samples)):
                if key in wanted and bool(seen.ok[row]):
                    new = files[key].with_suffix(".new")
                    new.unlink(missing_ok=True)
                    seen.media.write(row, new)
                    new.replace(files[key])
                elif key in wanted:
                    results.add_broken(key, prompts[key[0]], WHY[int(seen.broken[row])])
        _tell(say, "drawn", sum(key[0] <= numbers[-1] for key in lost), len(lost))
    return {key: file for key, file in files.items() if file.exists()}


def _tell(say: Say, what: str, done: int, total: int) -> None:
    """How far it is, about twenty times on the way."""
    if done < total and done * 20 // total > (done - AT_ONCE) * 20 // total:
        say(f"{what}: {done} of {total}")


def _stretches(numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """Runs of numbers that follow each other, of at most so many."""
    part: list[int] = []
    for number in numbers:
        if part and (number != part[-1] + 1 or len(part) == most):
            yield part
            part = []
        part.append(number)
    if part:
        yield part


# -------------------------------------------------------------------------------------------------------------- results
class Results:
    """results.jsonl: what is there, and more lines behind it. A line that was cut off by the run's end is taken away.

    values  of the pictures that were judged, None where they failed
    sums    of the pictures' files, as they were then
    broken  pictures that a model could not draw

    Raises ValueError for a file that is none of ours.
    """

    def __init__(self, file: Path) -> None:
        self.values: dict[Key, Value] = {}
        self.sums: dict[Key, str] = {}
        self.broken: set[Key] = set()
        self._file = file
        raw = file.read_bytes() if file.is_file() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                told = json.loads(line)
                key, value, digest = (int(told["number"]), int(told["sample"])), told["value"], str(told["sum"])
                self.values[key] = tuple(map(float, value)) if isinstance(value, list) else _number(value)
            except (ValueError, TypeError, LookupError) as error:
                raise ValueError(
                    f"{file}:{number} is no result ({cut(str(error))}); nearest valid: another output"
                ) from error
            self.sums[key] = digest
            if "why" in told:
                self.broken.add(key)
        if len(whole) < len(raw):
            os.truncate(file, len(whole))

    def add(self, key: Key, prompt: Prompt, value: Value, digest: str, why: str | None = None) -> None:
        """Writes a line at once."""
        line = {"number": key[0], "sample": key[1], "value": value, "sum": digest, "prompt": prompt.text}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line if why is None else {**line, "why": why}, ensure_ascii=False) + "\n")
        self.values[key], self.sums[key] = value, digest

    def add_broken(self, key: Key, prompt: Prompt, why: str) -> None:
        """A picture that could not be drawn."""
        if key not in self.broken:
            self.add(key, prompt, None, "", why)
            self.broken.add(key)


def _number(value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ValueError(f"value {shown(value)}")


def _judge(job: Job, pictures: Sequence[Mapping[Key, Path]], results: Results, say: Say) -> None:
    """Has all judged that is not. Where a whole part failed the scorer is asked whether it is there at all: a server
    that is gone ends the run, and what failed for that is not written down."""
    there = [key for key in job.keys if all(key in found for found in pictures) and key not in results.broken]
    sums = {key: _sum([found[key] for found in pictures]) for key in there}
    for key in there:
        if results.sums.get(key, sums[key]) != sums[key]:
            raise ValueError(
                f"what: picture {named([key])} is another than the one that {str(job.output / RESULTS)!r} has a score "
                f"of; nearest valid: {free(job.output)!r}"
            )
    todo = [key for key in there if key not in results.values]
    if todo:
        say(f"judging {len(todo)} of {len(there)} pictures")
    prompts = job.prompts
    for part in _stretched(todo, there, job.scorer.whole):
        seen = [tuple(load_picture(found[key]) for found in pictures) for key in part]
        values = job.scorer(seen, [prompts[number] for number, _ in part], [number for number, _ in part])
        if all(value is None for value in values):
            job.scorer.prepare()
        for key, value in zip(part, values, strict=True):
            if key not in results.values:
                results.add(key, prompts[key[0]], value, sums[key])
        _tell(say, "judged", sum(key in results.values for key in todo), len(todo))


def _stretched(todo: Sequence[Key], there: Sequence[Key], whole: bool) -> Iterator[list[Key]]:
    """Parts of about `AT_ONCE` pictures that have whole prompts; with all of a prompt's pictures where `whole`."""
    numbers = {number for number, _ in todo}
    by_number: dict[int, list[Key]] = {}
    for key in there if whole else todo:
        if key[0] in numbers:
            by_number.setdefault(key[0], []).append(key)
    part: list[Key] = []
    for keys in by_number.values():
        part += keys
        if len(part) >= AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _sum(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _shown(job: Job, pictures: Sequence[Mapping[Key, Path]], results: Results, folder: Path) -> list[dict[str, Any]]:
    """Some prompts evenly from the list, with their pictures' files, and what is said of each."""
    prompts = list(job.prompts.items())
    chosen = prompts[:: max(1, -(-len(prompts) // SHOWN))]
    told: list[dict[str, Any]] = []
    for number, prompt in chosen:
        cells: list[dict[str, Any]] = []
        for sample in range(min(job.samples, 4)):
            key = (number, sample)
            files = [str(_relative(found[key], folder)) for found in pictures if key in found]
            cells.append({"files": files, "value": results.values.get(key)})
        told.append({"number": number, "prompt": prompt.text, "pictures": cells})
    return told


def _relative(file: Path, folder: Path) -> Path:
    return file.relative_to(folder) if file.is_relative_to(folder) else file.resolve()
