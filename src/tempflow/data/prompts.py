"""Where prompts come from: a split of the embedded `shapes` world, or a file; and what each key of a prompt means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from tempflow.data.files import READERS, files_of, listed, nearest_file, records, short, suffix_of
from tempflow.request import Prompt, Source
from tempflow.shapes import prompts as world

SHAPES = "shapes:"
KEY = "prompt"
"""What the text is called, unless the source names another key."""

NEGATIVE = "negative_prompt"
"""What a prompt's negative text is called: what guidance leads away from."""

SOURCES = ("image", "images")
"""What the pictures are called that an editing model starts from: a path, or a list of them."""

SYNONYMS = ("prompt_en", "caption", "text", "prompts", "captions", "description", "instruction", "query", "input", "p")
"""What other files call the text."""

CHANGES = re.compile(
    # what is drawn: another branch of guidance, further encoders' texts
    r"neg(ative)?(_?(prompts?|texts?|captions?))?(_\d)?|uncond(itional)?_prompt|prompt_[23]"
    # what it starts from, or is held to
    r"|((source|src|input|init|initial|ref|reference|cond|condition|conditioning|control|edit|edited|start|end|first"
    r"|last|original|mask|depth|pose)_)?(images?|imgs?|pictures?|photos?|videos?|audios?|sounds?|masks?|frames?|latents?)"
    r"(_(paths?|files?|urls?))?|control|controls"
    # how it is drawn
    r"|(image_|target_)?(seeds?|height|width|size|resolution|aspect_ratio)|guidance|guidance_scale|cfg|cfg_scale"
    r"|true_cfg_scale|steps|num_steps|num_inference_steps|sampler|scheduler|strength|eta|noise_level|num_frames|fps"
    r"|duration|seconds|num_images(_per_prompt)?|num_samples|lora|loras|lora_scale"
)
"""Names of keys that would change what is drawn. Nothing reads them, so they are refused, never passed over."""

OTHER_NEGATIVES = re.compile(r"neg(ative)?(_?(prompts?|texts?|captions?))?|uncond(itional)?_prompt")
"""Other names of the negative text. Which of two would count is not for us to say, so one name is read."""


def check_source(source: str) -> None:
    """Raises ValueError, naming the nearest valid source, unless `source` names one: see `load_prompts`.

    Looks at the name only, so that a configuration can be checked on a machine that lacks the files.
    """
    if source.startswith(SHAPES):
        split, kinds = _of_shapes(source)
        close = get_close_matches(split, world.SPLITS, n=1, cutoff=0.0)[0]
        if split not in world.SPLITS:
            raise ValueError(f"{short(source)} names no split of the shapes world; nearest valid: '{SHAPES}{close}'")
        for kind in set(kinds) - set(world.KINDS):
            close = get_close_matches(kind, world.KINDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{short(source)} names no kind {short(kind)}; nearest valid: '{SHAPES}{split}:{close}'")
        return
    name, key = _parts(source)
    suffix = suffix_of(name)
    if name == "shapes" or (":" in name and not suffix and "/" not in name):
        options = [f"{SHAPES}{split}" for split in world.SPLITS]
        nearest = get_close_matches(source, options, n=1, cutoff=0.0)[0]
        raise ValueError(f"{short(source)} is neither a file nor 'shapes:SPLIT'; nearest valid: {nearest!r}")
    if not name or suffix not in READERS:
        close = get_close_matches(suffix, [s for s in READERS if s], n=1) or [".txt"]
        nearest = f"{name.rpartition('.')[0] or name or 'prompts'}{close[0]}"
        kinds = f"nor a {listed(tuple(READERS))} file, nor a folder of .txt files"
        raise ValueError(f"{short(source)} is neither 'shapes:SPLIT' {kinds}; nearest valid: {nearest!r}")
    if key is not None and (suffix in ("", ".txt") or not key):
        raise ValueError(f"{short(source)} names a key, which only tables and JSON have; nearest valid: {name!r}")


def load_prompts(
    source: str, root: str | Path = ".", uses: Collection[str] = (), sources: bool = False
) -> tuple[Prompt, ...]:
    """All prompts of a source, in its order.

    source   "shapes:train" | "shapes:validation" | "shapes:test", whose metadata is {"kind": the task kind}, and
             "shapes:train:single,color" those of some kinds; or
             *.txt    a prompt a line
             *.jsonl  an object {"prompt": …} or a text a line
             *.json   a list of these
             *.csv, *.tsv  a table whose header names a column "prompt"
             *.parquet     the same
             a folder of .txt files, a prompt each, whose metadata is {"file": its name}
             "FILE:KEY" reads the text from another key or column. UTF-8, or UTF-16 with a byte-order mark; at most
             64 MiB; lines end in LF, CR or both; blank lines are skipped
    root     folder that a relative path starts from; "~" is the user's
    uses     keys that the caller reads as pictures
    sources  whether the model takes pictures to start from: "image" or "images", paths beside the file

    "negative_prompt" is the prompt's `negative`. Other keys become metadata, but for those that would change what is
    drawn (`CHANGES`) and that nothing reads: unless their value is empty or the caller `uses` them they are refused.
    Raises ValueError for these, for another kind of source, a missing, oversized or empty file, and a record that
    cannot be read (named as file:line).
    """
    check_source(source)
    if source.startswith(SHAPES):
        name, kinds = _of_shapes(source)
        split = next(s for s in world.SPLITS if s == name)
        return tuple(Prompt(s.prompt, {"kind": s.kind}) for s in world.specs(split) if s.kind in (kinds or world.KINDS))
    path, key = source_path(source, root), _parts(source)[1]
    folder = suffix_of(_parts(source)[0]) == ""
    if folder and not path.is_dir():
        raise ValueError(f"{path} is no folder; {nearest_file(path, tuple(READERS))}")
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is no file; nearest valid: '{source}/', for a folder of .txt files")
    files_of(path)
    home = (path if path.is_dir() else path.parent) if sources else None
    prompts = tuple(prompt_of(record, where, key or KEY, uses, path, home) for where, record in records(path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; a file needs at least one")
    return prompts


def with_sources(read: Callable[[bool], tuple[Prompt, ...]], draws: Callable[[], bool]) -> tuple[Prompt, ...]:
    """What `read(sources)` gives. `draws`, whether the model draws from source pictures, is asked only where a prompt
    has some: it may have to fetch the model's folder."""
    try:
        return read(False)
    except ValueError as plain:
        try:
            prompts = read(True)
        except ValueError as error:
            if str(error) == str(plain) or not draws():
                raise plain from None
            raise
        if draws():
            return prompts
        raise


def source_path(source: str, root: str | Path = ".") -> Path:
    """The file or folder that a source names, "~" and "FILE:KEY" read. Of a split of `shapes` there is none."""
    return Path(root) / Path(_parts(source)[0]).expanduser()


def as_prompts(given: object, uses: Collection[str] = (), sources: bool = False) -> tuple[Prompt, ...]:
    """Prompts given as objects: texts, `Prompt`s, or mappings as a JSON-lines file has them, whose `sources` then are
    relative to the working directory.

    Raises ValueError, naming the item, as `load_prompts` does for a line; also for no prompt, or a single text.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValueError(f"prompts: {short(given)} is no list of prompts; nearest valid: ['a red circle']")
    if len(given) == 0:
        raise ValueError("prompts: the list is empty; at least one prompt is needed")
    found: list[Prompt] = []
    for number, item in enumerate(given):
        where, home = f"prompts[{number}]", Path() if sources else None
        if not isinstance(item, Prompt):
            found.append(prompt_of(item, where, KEY, uses, None, home))
            continue
        if item.sources and not sources:
            raise ValueError(f"{where}: {NO_SOURCES}")
        known = (*uses, *SOURCES) if item.sources else uses  # what its line said of them has been read
        read = prompt_of({**item.metadata, KEY: item.text}, where, KEY, known, None, home)
        negative = _negative(item.negative, where, "negative")
        if negative and read.negative and negative != read.negative:
            two = f'"negative" is {short(negative)} and its metadata\'s "{NEGATIVE}" {short(read.negative)}'
            raise ValueError(f"{where}: {two}; nearest valid: one of them")
        found.append(replace(read, negative=negative or read.negative, sources=item.sources or read.sources))
    return tuple(found)


NO_SOURCES = "pictures would change what is drawn, and this model draws from text alone; nearest valid: without them"


def prompt_of(
    record: object,
    where: str,
    key: str,
    uses: Collection[str],
    path: Path | None = None,
    home: Path | None = None,
) -> Prompt:
    """A record as a prompt; `home`: the folder that source pictures lie in, where the model takes some. Raises
    ValueError that begins with `where`."""
    if isinstance(record, str):
        record = {key: record}
    if not isinstance(record, Mapping):
        raise ValueError(f'{where}: a JSON {type(record).__name__}, not an object with a "{key}"')
    if key not in record:
        raise ValueError(f"{where}: {_missing(record, key, path)}")
    text, rest = record[key], {k: v for k, v in record.items() if k != key}
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: "{key}" is {short(text)}; it must be a text that is not blank')
    if not _encodable(text):
        raise ValueError(f'{where}: "{key}" holds half a character, {short(text)}; nearest valid: whole Unicode text')
    negative = _negative(rest.get(NEGATIVE), where, NEGATIVE)
    found = () if home is None else _sources(rest, where, uses, home)
    _check_keys(rest, where, key, (*uses, NEGATIVE, *(SOURCES if home is not None else ())))
    return Prompt(text.strip(), {k: v for k, v in rest.items() if k != NEGATIVE}, negative, found)


def _negative(text: object, where: str, key: str) -> str:
    """A negative text, which stands under `key`; "" where nothing does."""
    if text is None:
        return ""
    if not isinstance(text, str) or not _encodable(text):
        raise ValueError(f'{where}: "{key}" is {short(text)}; nearest valid: a text')
    return text.strip()


def _sources(rest: Mapping[str, object], where: str, uses: Collection[str], home: Path) -> tuple[Source, ...]:
    """The pictures that the record names, inside `home`; their bytes are read for their sums."""
    found: list[Source] = []
    for key in SOURCES:
        told = rest.get(key)
        if key not in uses and not _blank(told):
            names = told if isinstance(told, list | tuple) else [told]
            found += [_source(name, f'{where}: "{key}"', home) for name in names]
    return tuple(found)


def _source(name: object, where: str, home: Path) -> Source:
    what = f"{where}: the picture {short(name)}"
    try:
        if isinstance(name, str) and not Path(name).is_absolute():
            file = home / name
            if file.resolve().is_relative_to(home.resolve()) and file.is_file():
                return Source.of(file)
    except (OSError, RuntimeError, ValueError) as error:  # no rights, a circle of links, a null byte
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{what} cannot be read ({why}); nearest valid: a file in {home}") from error
    raise ValueError(f"{what} is no file in {home}; nearest valid: a relative path")


def _check_keys(rest: Mapping[str, object], where: str, key: str, uses: Collection[str]) -> None:
    """Refuses the keys that would be without effect and should not be."""
    for other in rest:
        if _plain(other) == _plain(key):
            raise ValueError(f'{where}: both "{key}" and {short(other)}; nearest valid: "{key}" alone')
    lost = [k for k, v in rest.items() if k not in uses and not _blank(v) and CHANGES.fullmatch(_plain(k))]
    if lost:
        named = ", ".join(f'"{k}"' for k in lost)
        if all(OTHER_NEGATIVES.fullmatch(_plain(k)) for k in lost):
            raise ValueError(f'{where}: {named} is not read; nearest valid: "{NEGATIVE}"')
        if all(k in SOURCES for k in lost):
            raise ValueError(f"{where}: {named}: {NO_SOURCES}")
        raise ValueError(
            f"{where}: {named} would change what is drawn, and no prompt can set that yet; nearest valid: without, or "
            "under another name where only a reward reads it"
        )


def _missing(record: Mapping[str, object], key: str, path: Path | None) -> str:
    """What is there in the place of a key that is not."""
    if not record:
        return f'no "{key}", nor anything else'
    texts = [str(k) for k, v in record.items() if isinstance(v, str)]
    same = [k for k in texts if _plain(k) == _plain(key)]
    known = [k for s in SYNONYMS for k in texts if _plain(k) == s]
    close = get_close_matches(key, texts, n=1) + [k for k in texts if "prompt" in _plain(k)]
    near = (same + known + close + (texts if len(texts) == 1 else []))[:1]
    if not near:
        names = listed(tuple(short(str(k), 30) for k in list(record)[:8]))
        return f'no "{key}"; there {"are" if len(record) > 1 else "is"} {names}'.replace(" or ", " and ")
    other = f", or give '{path}:{near[0]}'" if path is not None and suffix_of(path.name) not in ("", ".txt") else ""
    return f'no "{key}", but {short(near[0])}; nearest valid: call that "{key}"{other}'


def _plain(key: object) -> str:
    """ "negative_prompt" of "Negative Prompt", "negativePrompt", "negative-prompt"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key).strip())
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def _blank(value: object) -> bool:
    return (
        value is None or value is False or (isinstance(value, str | Sequence | Mapping) and not value) or value == " "
    )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _of_shapes(source: str) -> tuple[str, tuple[str, ...]]:
    """The split and the kinds of "shapes:SPLIT:KIND,KIND"; no kinds are all."""
    split, colon, kinds = source.removeprefix(SHAPES).partition(":")
    return split, tuple(kinds.split(",")) if colon else ()


def _parts(source: str) -> tuple[str, str | None]:
    """("p.csv", "caption") of "p.csv:caption"; the key is None where none is named."""
    name, colon, key = source.rpartition(":")
    if colon and suffix_of(source) not in READERS.keys() - {""} and suffix_of(name) in READERS.keys() - {""}:
        return name, key
    return source, None


# ------------------------------------------------------------------------------------------------------------- choices
def shared_out(drawn: Sequence[Prompt], prompts: Sequence[Prompt]) -> str:
    """How `drawn` uses the `prompts` that it was picked from: "" where it is each of them once."""
    times = Counter(map(id, drawn))
    count, used = len(drawn), len(times)
    if used < len(prompts):
        left = f"{used} of {len(prompts)} prompts are used"
        return left if count == used else f"{left}, {_each(times)}"
    return "" if count == used else f"{count} are drawn of {used} prompts: {_each(times)}"


def unused_negatives(prompts: Sequence[Prompt], rows: Callable[[], int]) -> str:
    """What becomes of negative prompts where nothing leads away from them; "" where there are none, or something does.
    `rows`: how many of the network the guidance takes for each, which is asked where a prompt has one."""
    count = sum(1 for prompt in prompts if prompt.negative)
    if not count or rows() > 1:
        return ""
    return (
        f'{count} of {len(prompts)} prompts have a "{NEGATIVE}", which this guidance makes no use of; nearest valid: 2'
    )


def _each(times: Mapping[int, int]) -> str:
    low, high = min(times.values()), max(times.values())
    return f"each comes {low} times" if low == high else f"each comes {low} to {high} times"
