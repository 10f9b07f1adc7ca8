"""Checks tempflow on one large GPU, offline, in a few minutes; writes one page (Markdown) and one JSON beside it.

    PYTHONPATH=src python scripts/gpu_check.py --output runs/gpu_check.md            # Linux, one CUDA GPU, 8 minutes
    PYTHONPATH=src python scripts/gpu_check.py --output runs/tiny.md --tiny          # tiny networks on a CPU, a minute

No weights are read: networks have the released ones' configurations and weights drawn on the GPU, prompts have random
embeddings of the real shapes, the reward is the pictures' brightness. So speed, memory and rounding are measured, and
nothing of quality. Sections come in order of worth, and both files are written anew after each line: a run that is cut
short has told what it found. What fails is a line with its fault, and the next is tried. Ends with status 1 where
something failed or was not run.

What has to be there: Python 3.11, torch with CUDA, numpy, safetensors, pillow, pyyaml, rich, packaging, filelock,
transformers, accelerate, peft, diffusers and pydantic; pytest for the GPU tests, torchao for float8 and NVFP4. tempflow
itself is taken from `src`. What the machine lacks and cannot fetch comes as wheels (12 MB) for its Python and system:

    pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 --dest wheels pydantic
    pip download --only-binary=:all: --no-deps --dest wheels diffusers torchao

and is put beside what is there, touching nothing of it:

    pip install --no-index --no-deps --find-links wheels --target site diffusers torchao pydantic pydantic-core \\
        annotated-types typing-inspection typing-extensions
    PYTHONPATH=src:site python scripts/gpu_check.py --output runs/gpu_check.md
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# tempflow, diffusers and peft are imported where they are used: without one of them the page still says so.
import torch
from drawn_pipelines import Shape, built, flux, sd35, write_configurations
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "torchao", "pydantic", "numpy")
ATTENTION = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "flash", "_flash_3", "sage", "xformers")
PRECISIONS = ("full", "bfloat16", "int8", "float8", "nvfp4")

Facts = dict[str, object]
Part = tuple[str, Callable[[], Facts]]
"""What a line is about, and what finds its facts."""


class LackError(Exception):
    """Something is not here: no fault of ours."""


class OutOfTimeError(BaseException):
    """A section's time is up. No Exception: what passes faults over must not keep it."""


# --------------------------------------------------------------------------------------------------------- measurements
def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_reset(device: torch.device) -> None:
    freed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | str:
    """Of what torch's tensors took since `peak_reset`."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else "needs CUDA"


def timed(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Mean seconds, after one call that is not counted."""
    work()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


class Stopwatch:
    """Time inside a network: its forwards, and backwards from its output to the last of the trained gradients.

    On a GPU by events, so that nothing waits for them. With checkpointing the second forwards are the backwards'.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.forwards, self.backwards = list[list[Any]](), list[list[Any]]()
        trained = [p for p in network.parameters() if p.requires_grad]
        self._hooks = [
            network.register_forward_pre_hook(lambda *_: self.forwards.append([self._now()])),
            network.register_forward_hook(self._out),
            torch.autograd.graph.register_multi_grad_hook(trained, lambda _: self.backwards[-1].append(self._now())),
        ]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _out(self, _module: nn.Module, _inputs: object, out: Any) -> None:
        self.forwards[-1].append(self._now())
        said = out[0]
        if said.requires_grad:
            said.register_hook(lambda _: self.backwards.append([self._now()]))

    def stop(self) -> tuple[float, float]:
        """Seconds of forwards, of backwards."""
        for hook in self._hooks:
            hook.remove()
        if self.cuda:
            torch.cuda.synchronize()
        return self._sum(self.forwards), self._sum(self.backwards)

    def _sum(self, spans: list[list[Any]]) -> float:
        ends = [(span[0], span[-1]) for span in spans]
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in ends)


def training_pass(model: Any, shape: Shape, rows: int | None = None) -> Callable[[], None]:
    """A forward and backward of as many rows as training takes at once, as training asks the network."""
    predict, x, sigma, at = asked(model, shape, rows or shape.rows[1])

    def work() -> None:
        predict(x, sigma, at).float().square().mean().backward()
        model.network.zero_grad()

    return work


def asked(model: Any, shape: Shape, rows: int, network: nn.Module | None = None) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A predictor of one prompt for each row, and what it takes."""
    from tempflow.media import Size
    from tempflow.request import Prompt

    size, device = Size(shape.side, shape.side), model.device
    condition = model.encode([Prompt(f"row {n}") for n in range(rows)], size)
    source = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, *model.noise_shape(size), generator=source, device=device)
    predict = model.predictor(condition, model.guidance(shape.guidance), network)
    return predict, x, torch.full([rows], 0.5, device=device), torch.arange(rows, device=device)


def brightness(images: list[Any], prompts: list[str]) -> list[float]:
    """A reward that costs nothing."""
    import numpy as np

    return [float(np.asarray(image).mean()) for image in images]


def configured(shape: Shape, name: str, device: torch.device, updates: int = 1, folder: str = "shapes") -> Any:
    """The configuration of one iteration of an algorithm; of `folder` configurations alone are read."""
    from tempflow.config import Config

    return Config.model_validate(
        {
            "name": "gpu-check",
            "iterations": 1,
            "device": str(device),
            "rollout_rows": shape.rows[0],
            "train_rows": shape.rows[1],
            "algorithm": {"name": name, **shape.algorithms[name]},
            "model": {
                "path": folder,
                "dtype": "bfloat16",
                "height": shape.side,
                "width": shape.side,
                "guidance": shape.guidance,
                "training": "lora",
                "lora_rank": shape.rank,
                "lora_alpha": 2 * shape.rank,
            },
            "data": {"prompts_per_iteration": 1},
            "optimizer": {"learning_rate": 3e-4, "updates_per_iteration": updates, "ema_decay": 0.0},
            "guards": {"first_ratio": {"action": "warn"}},
        }
    )


def estimated(shape: Shape, name: str, device: torch.device) -> Facts:
    """The peak that `tempflow cost` gives for the same, by configurations alone."""
    from tempflow.cost import memory_of, run_cost

    with TemporaryDirectory() as folder:
        write_configurations(shape, Path(folder))
        config = configured(shape, name, device, folder=folder)
        found = memory_of(config, run_cost(config))
    if isinstance(found, str):
        raise LackError(f"not estimated: {found}")
    return {"peak GiB": found.peak / GIB}


def iteration(model: Any, shape: Shape, name: str, updates: int = 1) -> tuple[Facts, dict[str, Tensor]]:
    """One iteration of an algorithm: what it took, and the trained weights. The model has its old ones after it."""
    from tempflow.request import Prompt
    from tempflow.train.build import context_of, rewards_of
    from tempflow.train.context import Clock, Counter
    from tempflow.train.experience import credit
    from tempflow.train.guards import Guards
    from tempflow.train.parallel import SINGLE
    from tempflow.train.source import collect
    from tempflow.train.update import learn, lessons

    device, said = model.device, list[str]()
    config = configured(shape, name, device, updates)
    rewards, prompts = rewards_of(config, brightness), [Prompt("row 0")]
    algorithm = config.algorithm.build()
    context, learners = context_of(config, model, algorithm, rewards, True, None, SINGLE, lambda _: None)
    trainable = learners["policy"].trainable
    before = trainable.state()
    counter = Counter(guided=context.guidance.rows > 1)
    guards = Guards(config.guards, lambda *_: None, said.append)
    training_pass(model, shape)()  # libraries choose their kernels
    peak_reset(device)
    watch, clock, started = Stopwatch(model.network, device), Clock(), time.perf_counter()
    experience = collect(context, prompts, 0, counter, clock)
    wait(device)
    drawn = time.perf_counter() - started
    given = [credit(context, experience, phase) for phase in algorithm.phases]
    taught = lessons(context, prompts, 0, experience, given)
    metrics = learn(context, prompts, taught, learners, counter, clock, guards)
    wait(device)
    seconds, (forwards, backwards) = time.perf_counter() - started, watch.stop()
    weights = trainable.state()
    peak = peak_gib(device)
    trainable.load(before)
    edges = "log_ratio_max" in metrics and "rollout_gap" in algorithm.first.largest
    return {
        "peak GiB": peak,
        "seconds": seconds,
        "rollout, s": drawn,
        "samples": counter.decodes,
        "samples/s": counter.decodes / seconds,
        "rows": counter.forwards,
        "share in the network": (forwards + backwards) / seconds,
        "share in its backwards": backwards / seconds,
        "|log ratio| at the first update": metrics["log_ratio_max"] if edges else "has none",
        "rollout gap, roundings": metrics["rollout_gap_max"] if edges else "has none",
        "loss": metrics["loss"],
        "gradient norm": metrics["grad_norm"],
        **({"guards": "; ".join(said)} if said else {}),
    }, weights


# ------------------------------------------------------------------------------------------------------------- sections
@dataclass(frozen=True)
class Machine:
    """Where it runs. tiny: a CPU, and networks of its size."""

    device: torch.device
    tiny: bool

    def needs_cuda(self, what: str) -> None:
        """Raises LackError on a CPU."""
        if self.device.type != "cuda":
            raise LackError(f"{what} needs a CUDA device")


def environment(here: Machine) -> Iterator[Part]:
    def packages() -> Facts:
        found = dict[str, object]()
        for name in ("tempflow", *PACKAGES):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        return {"is": ", ".join(f"{name} {told}" for name, told in found.items())}

    def gpu() -> Facts:
        here.needs_cuda("this line")
        told = torch.cuda.get_device_properties(here.device)
        major, minor = torch.cuda.get_device_capability(here.device)
        return {
            "is": f"{told.name}, {told.total_memory / GIB:.0f} GiB, {told.multi_processor_count} multiprocessors, "
            f"compute capability {major}.{minor}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        }

    def precision(name: str) -> Facts:
        from tempflow.models.precision import lack

        missing = lack(name, here.device)  # pyright: ignore[reportArgumentType]
        return {"is": f"needs something: {missing}" if missing else "the device has it"}

    yield "GPU", gpu
    yield "machine", lambda: {"is": f"{platform.platform()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"}
    yield "packages", packages
    for name in PRECISIONS[1:]:
        yield f"drafts in {name}", partial(precision, name)


def gpu_tests(here: Machine) -> Iterator[Part]:
    """The tests that are marked `gpu`, of the files that have some; on a CPU they are only collected."""

    def run(files: Sequence[Path]) -> Facts:
        if find_spec("pytest") is None:
            raise LackError("pytest is not here")
        collect = [] if here.device.type == "cuda" else ["--collect-only"]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", *collect]
        done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if done.returncode:
            raise RuntimeError(" | ".join(lines[-4:]) or done.stderr[-200:])
        return {"is": lines[-1].strip("= "), **({"but": "running them needs a CUDA device"} if collect else {})}

    mark = re.compile(r"mark\.gpu\b")
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if mark.search(p.read_text(encoding="utf-8"))]
    if files:
        yield f"{len(files)} files", partial(run, files)


def family(shape: Callable[[bool], Shape], here: Machine) -> Iterator[Part]:
    """One iteration of each algorithm; under the measured peaks those that `tempflow cost` estimates."""
    told = shape(here.tiny)
    model = built(told, here.device)
    for name in told.algorithms:
        yield name, lambda name=name: iteration(model, told, name)[0]
    for name in told.algorithms:
        yield f"{name}, by `tempflow cost`", partial(estimated, told, name, here.device)


def tools(here: Machine) -> Iterator[Part]:
    """Training passes, each beside the plain one. torch.compile comes last: it takes long, and stays."""
    from tempflow.models.tools import Tools

    def measured(model: Any, shape: Shape, tool: Tools, first: bool = False) -> Facts:
        try:
            model.equip(tool)
        except ValueError as error:
            raise LackError(str(error)) from error
        work, began = training_pass(model, shape), time.perf_counter()
        if first:
            work()
            wait(here.device)
        began = time.perf_counter() - began
        peak_reset(here.device)
        seconds = timed(work, here.device)
        return {
            "ms a row": 1000 * seconds / shape.rows[1],
            "peak GiB": peak_gib(here.device),
            **({"first pass, s": began} if first else {}),
        }

    shape = sd35(here.tiny)
    model = built(shape, here.device)
    yield f"{shape.title}: plain", lambda: measured(model, shape, Tools())
    yield "checkpointing", lambda: measured(model, shape, Tools(checkpointing=True))
    model.network.disable_gradient_checkpointing()
    other = flux(here.tiny)  # SD 3's attention in diffusers knows no backends
    second = built(other, here.device)
    yield f"{other.title}: plain", lambda: measured(second, other, Tools())
    for backend in ATTENTION:
        second.network.reset_attention_backend()
        yield f"attention {backend}", lambda backend=backend: measured(second, other, Tools(attention=backend))

    def compiled() -> Facts:
        here.needs_cuda("torch.compile takes long on a CPU; this line")
        return measured(model, shape, Tools(compile=True), first=True)

    yield f"{shape.title}: compile", compiled


def drafts(here: Machine) -> Iterator[Part]:
    """The network in each precision at a rollout's rows, its velocity beside the full one's."""
    from tempflow.models.precision import cheap_copy, check_precision

    shape = sd35(here.tiny)
    model = built(shape, here.device)
    rows, exact = shape.rows[0], list[Tensor]()

    @torch.no_grad()
    def measured(precision: Any) -> Facts:
        network = None
        if precision != "full":
            try:
                check_precision(precision, here.device)
            except (ValueError, ImportError) as error:
                raise LackError(str(error)) from error
            network = cheap_copy(model.network, model.blocks(model.network), precision)
        predict, x, sigma, at = asked(model, shape, rows, network)
        velocity = predict(x, sigma, at).float()
        exact[1:] = []
        exact.append(velocity)
        seconds = timed(lambda: predict(x, sigma, at), here.device)
        away = (velocity - exact[0]).square().mean().sqrt() / exact[0].square().mean().sqrt()
        return {"rows/s": rows / seconds, "velocity's error, share": float(away)}

    for precision in PRECISIONS:
        yield precision, partial(measured, precision)
        freed()


def determinism(here: Machine) -> Iterator[Part]:
    """One iteration of two updates, twice from the same seed."""
    shape = sd35(here.tiny, blocks=6)

    def compared() -> Facts:
        runs = [iteration(built(shape, here.device), shape, "tempflow_grpo", updates=2) for _ in range(2)]
        (first, one), (second, two) = runs
        alike = all(torch.equal(one[name], two[name]) for name in one)
        return {
            "weights": "bitwise equal" if alike else "not bitwise equal",
            "largest difference": max(float((one[name] - two[name]).abs().max()) for name in one),
            "largest weight": max(float(weight.abs().max()) for weight in one.values()),
            "losses": f"{first['loss']!r}, {second['loss']!r}",
        }

    yield shape.title, compared


@dataclass(frozen=True)
class Section:
    """share: of the time that is left, beside those of the sections after it."""

    title: str
    share: float
    parts: Callable[[Machine], Iterator[Part]]


SECTIONS = (
    Section("Environment", 1, environment),
    Section("The GPU tests", 5, gpu_tests),
    Section("An iteration on SD 3.5 Medium's shape, 512²", 14, partial(family, sd35)),
    Section("An iteration on FLUX.1's shape, 512²", 7, partial(family, flux)),
    Section("Checkpointing, attention and compile: a training pass", 10, tools),
    Section("Drafts in few bits", 5, drafts),
    Section("Two runs of one seed", 5, determinism),
)


# -------------------------------------------------------------------------------------------------------------- the run
@dataclass
class Told:
    """state: "not run", "running", "done", "failed" (wholly or in a line) or "cut short"."""

    title: str
    state: str = "not run"
    seconds: float = 0.0
    fault: str = ""
    lines: list[Facts] = field(default_factory=list)


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError inside after so many seconds, as soon as Python runs again."""

    def up(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line_of(what: str, work: Callable[[], Facts], told: Told) -> Facts:
    try:
        return {"what": what, **work()}
    except LackError as error:
        return {"what": what, "not here": str(error)}
    except Exception as error:
        told.state = "failed"
        return {"what": what, "fault": short(error)}


def run_section(section: Section, told: Told, here: Machine, seconds: float, keep: Callable[[], None]) -> None:
    """Fills in `told`, and calls `keep` before and after each line."""
    started, told.state = time.perf_counter(), "running"
    keep()
    try:
        with limited(seconds):
            for what, work in section.parts(here):
                told.lines.append(line_of(what, work, told))
                told.seconds = time.perf_counter() - started
                keep()
        told.state = "done" if told.state == "running" else told.state
    except OutOfTimeError:
        told.state, told.fault = "cut short", f"its {seconds:.0f} s were up; the lines above are whole"
    except Exception as error:
        told.state, told.fault = "failed", short(error)
    told.seconds = time.perf_counter() - started


def check(sections: Sequence[Section], here: Machine, minutes: float, output: Path) -> bool:
    """Runs the sections and writes `output` and its JSON; whether all was done."""
    started = time.monotonic()
    report = [Told(section.title) for section in sections]

    def keep() -> None:
        written(report, here, minutes, output)

    for n, (section, told) in enumerate(zip(sections, report, strict=True)):
        left = 60 * minutes - (time.monotonic() - started)
        if left <= 0:
            told.fault = f"the {minutes:g} minutes were up"
            continue
        run_section(section, told, here, left * section.share / sum(s.share for s in sections[n:]), keep)
        freed()
        keep()
        print(f"{told.title}: {told.state} in {told.seconds:.1f} s {told.fault}", flush=True)
    keep()
    return all(told.state == "done" for told in report)


# ------------------------------------------------------------------------------------------------------------- the page
INTRO = """# GPU check

Written by `scripts/gpu_check.py`; docs/gpu_check.md says what it does. Networks have the released ones' configurations
and **random weights**, text embeddings are noise, the reward is brightness: speed, memory and rounding, no quality.
"""


def page(report: Sequence[Told], here: Machine, minutes: float) -> str:
    """The report in Markdown."""
    where = f"Tiny networks on {here.device.type}" if here.tiny else f"On {here.device}"
    parts = [INTRO, f"{where}, at most {minutes:g} minutes."]
    for told in report:
        parts.append(f"\n## {told.title}\n{told.state}, {told.seconds:.1f} s")
        if told.lines:
            parts.append("\n" + table(told.lines))
        if told.fault:
            parts.append(f"\n{told.state}: {told.fault}")
    return "\n".join(parts) + "\n"


def table(lines: Sequence[Facts]) -> str:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    rows = [map(shown, columns), ["---"] * len(columns), *([shown(line.get(n, "")) for n in columns] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def written(report: Sequence[Told], here: Machine, minutes: float, output: Path) -> None:
    """Both files, each put in place whole."""
    told = {"device": str(here.device), "tiny": here.tiny, "minutes": minutes, "sections": [asdict(t) for t in report]}
    plain = json.dumps(finite(told), indent=1, allow_nan=False) + "\n"
    for file, text in ((output, page(report, here, minutes)), (output.with_suffix(".json"), plain)):
        part = file.with_name(file.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: these are told by name."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new file NAME.md; NAME.json is written beside it")
    parser.add_argument("--minutes", type=float, default=8.0, help="sections that come later are not run")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on a CPU: shows that it runs")
    a = parser.parse_args()
    if a.output.suffix != ".md":
        parser.error(f"--output: {str(a.output)!r} is no page; nearest valid: {str(a.output.with_suffix('.md'))!r}")
    for file in (a.output, a.output.with_suffix(".json")):
        if file.exists():
            parser.error(f"--output: {str(file)!r} is there already; nearest valid: a new file")
    if not a.minutes > 0 or math.isinf(a.minutes):
        parser.error(f"--minutes: {a.minutes:g} must be above 0; nearest valid: 1")
    if not a.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; nearest valid: --tiny, which runs tiny networks on the CPU")
    a.output.parent.mkdir(parents=True, exist_ok=True)
    here = Machine(torch.device("cpu" if a.tiny else "cuda"), a.tiny)
    sys.exit(0 if check(SECTIONS, here, a.minutes, a.output) else 1)


if __name__ == "__main__":
    main()
