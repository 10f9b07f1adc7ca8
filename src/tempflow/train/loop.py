"""A run from its configuration: what it needs is looked up and checked, then the session does the work."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.config import OWN_REWARD, Config, to_yaml
from tempflow.core.follow import Frozen
from tempflow.data.pictures import Pictures
from tempflow.data.prompts import Prompt, as_prompts, load_prompts, shared_out
from tempflow.evaluate.suite import fixed_prompts
from tempflow.models import load, resolved_device, resolved_dtype
from tempflow.models.lora import ranks_of
from tempflow.models.protocol import Conditioning, Model
from tempflow.rewards import Patient, build, from_function, patient
from tempflow.rewards.protocol import Reward
from tempflow.train.borrow import borrowed
from tempflow.train.display import Display
from tempflow.train.dist import SINGLE, World, join, leave
from tempflow.train.drafter import Drafter, check_draft
from tempflow.train.followers import Followers
from tempflow.train.identity import Identity, identity
from tempflow.train.interrupt import Interrupted
from tempflow.train.kept import Looks
from tempflow.train.records import Records
from tempflow.train.resume import check_new, check_resumable, resumable
from tempflow.train.run import Run
from tempflow.train.session import Session
from tempflow.train.setting import Judge, Setting
from tempflow.train.signals import asked
from tempflow.train.start import check_kind, given, started, summary
from tempflow.train.track import open_trackers
from tempflow.train.weightsets import Trainable, WeightSet, frozen_copy

if TYPE_CHECKING:
    from tempflow.train.shard import Shards

__all__ = ["Run", "prepare_model", "train"]

Given = Sequence[str | Prompt | Mapping[str, object]]
"""Prompts as objects: `data.prompts.as_prompts` reads them."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    config: Config,
    *,
    model: Model | None = None,
    reward: Reward | Callable | Sequence[Reward | Callable] | None = None,
    prompts: Given | None = None,
    test_prompts: Given | None = None,
    algorithm: Algorithm | None = None,
    quiet: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
) -> Run:
    """Trains as `config` says; objects given here take the place of what it names.

    `reward`: a `Reward`, a function of (images, prompts) or (images, prompts, metadata) → scores, or several; their sum
    is then what the best weights are chosen and reported by, unless `evaluation.metric` names one of them. `prompts`:
    texts, `Prompt`s or mappings with a "prompt"; they are also used for validation, and for the held-out test unless
    `test_prompts` is given. Where the algorithm takes given samples, the pictures that the training prompts name are
    looked for beside `config.data.train`; those of `prompts`, in the working directory.

    `resume`: go on with the run in `config.output` from its newest whole checkpoint (from the start, if it died before
    the first); `allow_changes`: with another configuration than it was started with. A resumed run ends as the
    uninterrupted one would have, bitwise on a CPU. Under torchrun every process calls this alike.

    A run owns its folder: `config.output` must be new, empty, or that of the run that is gone on with. It also records
    what it depends on (`train.identity`), and is gone on with by nothing else: what differs is named.

    Everything is checked before the first forward. Raises ValueError for bad input, CheckpointError where there is
    nothing to resume, GuardError when a guard stops the run (the best weights so far are saved), and Interrupted after
    SIGTERM, SIGHUP or Ctrl-C, when the run's state has been kept. Interrupted is a SystemExit: a script that does not
    catch it ends without a traceback, with status 143, 129 or 130.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    world = join(resolved_device(config.device))
    objects = {"model": model, "reward": reward, "prompts": prompts, "test_prompts": test_prompts}
    given = {name: item for name, item in {**objects, "algorithm": algorithm}.items() if item is not None}
    try:
        config = _settled(config)
        display = Display(config.name, config.iterations, quiet or not world.first)
        folder = Path(config.output)
        check_resumable(folder, config, [*given]) if resume else check_new(folder, world.first)
        algorithm = algorithm or config.algorithm.build()
        config.guards.check(algorithm.name, algorithm.objective.weight_sets)
        rewards = _rewards(config, reward)
        if reward is not None and config.evaluation.metric not in {r.name for r in rewards}:
            config = config.replace(evaluation=config.evaluation.model_copy(update={"metric": OWN_REWARD}))
        if reward is None:
            algorithm = replace(algorithm, credit=algorithm.credit.weighted(config.reward_weights))
        sources = _sources(config, prompts, test_prompts, algorithm.reads)
        sets = _prompt_sets(config, sources, display.say)
        pictures = _pictures(config, algorithm, sets["train"], own=prompts is not None)
        own = identity(config, algorithm, sources, given)
        saved = resumable(folder, config, own, allow_changes, display.say) if resume else None
        looks = _borrowed(config, own, display.say) if saved is None else None
        extra = {config.evaluation.metric, *config.evaluation.gold} - {OWN_REWARD, *(r.name for r in rewards)}
        judges = rewards + [patient(build(name)) for name in sorted(extra)]
        _check_ranks(config, world, display.say)
        _warn_of_warmup(config, display.say)
        _say_old(config, algorithm, display.say)
        check_draft(algorithm, _device(config, model, world), sharded(config, world))
        setting, trainable, followers = _setting(
            config, model or prepare_model(config, world), algorithm, rewards, pictures, world, display.say
        )
        world.wait()  # all have read what the records will write over
        with closing(Records(folder, to_yaml(config), own, resumed=resume, write=world.first)) as records:
            dumped = config.model_dump(mode="json")
            trackers = open_trackers(config.track, config.name, folder, dumped) if world.first else []
            session = Session(config, setting, trainable, followers, judges, sets, records, display, trackers, looks)
            if saved is not None:
                session.restore(saved)
            elif resume:
                records.cut({})
            return session.run()
    except KeyboardInterrupt:  # before the run could keep anything, or a second Ctrl-C: at once
        print("tempflow: interrupted", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None
    finally:
        leave(world)


def _settled(config: Config) -> Config:
    """With the dtype that "auto" means here, so that the run's records name it and it is resumed in it."""
    dtype = resolved_dtype(config.model.dtype, resolved_device(config.device))
    return config.replace(model=config.model.model_copy(update={"dtype": dtype}))


def _borrowed(config: Config, own: Identity, say: Callable[[str], None]) -> Looks | None:
    """The untrained model's test from another run, if one is named. `own`: what this run depends on."""
    if not config.evaluation.before:
        return None
    if own.objects.keys() - {"algorithm"}:
        raise ValueError(
            f"evaluation.before: {config.evaluation.before!r}, but a model, reward or prompts given as objects cannot "
            "be compared with a run's; nearest valid: ''"
        )
    say(f"before: taken over from {config.evaluation.before}")
    return borrowed(config, own)


def prepare_model(config: Config, world: World = SINGLE) -> Model:
    """Loads the model and marks what is trained: where `model.start` is a LoRA, a LoRA on the layers of that.

    A sharded one is loaded in float32: its shards are the masters. Raises ValueError for a start that does not fit.
    """
    m = config.model
    begun = given(m.start, "model.start") if m.start else None  # before gigabytes are loaded
    if begun is not None:
        check_kind(begun, m.training)
    dtype = "float32" if sharded(config, world) else m.dtype
    model = load(m.path, revision=m.revision, dtype=dtype, device=str(_device(config, None, world)))
    if m.training == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # LoRA's initial weights are a function of the run's seed
            lora = None if begun is None else begun.lora_for(model)
            if lora is None:
                model.add_lora(m.lora_rank, m.lora_alpha)
            else:
                model.add_lora_on(ranks_of(lora), m.lora_alpha / m.lora_rank)
    else:
        model.train_fully()
    return model


def _device(config: Config, model: Model | None, world: World) -> torch.device:
    """Where the model is, or will be loaded to."""
    if model is not None:
        return model.device
    return torch.device(world.device if world.size > 1 else resolved_device(config.device))


def sharded(config: Config, world: World) -> bool:
    return world.size > 1 and config.parallel.mode == "fsdp"


def _setting(
    config: Config,
    model: Model,
    algorithm: Algorithm,
    rewards: Sequence[Reward],
    pictures: Pictures | None,
    world: World,
    say: Callable[[str], None],
) -> tuple[Setting, Trainable, Followers]:
    """What stays the same over the run, the policy's parameters with the weights that training starts from, and what
    follows them."""
    size = (config.model.height, config.model.width)
    model.noise_shape(size)
    trainable = Trainable(model.network)
    base = None  # where training starts from the base, a set copies that
    if config.model.start:
        base = trainable.state()
        begun = given(config.model.start, "model.start")
        check_kind(begun, config.model.training)
        lora = begun.lora_for(model)
        trainable.load(started(begun, trainable, base, lora))
        say(f"start: {summary(begun, lora, config.model.training)}")
    followers = Followers.of(algorithm, trainable)
    sets, reference, shards = dict(followers.sets), None, None
    if "reference" in algorithm.sets and "reference" not in sets:
        say(f"reference: {config.model.reference}")
        sets["reference"] = reference = _reference(config.model.reference, model, trainable, base)
    networks: dict[str, nn.Module] = {name: weights.network() for name, weights in sets.items()}
    if sharded(config, world):
        if followers.sets:
            raise ValueError(
                f"parallel.mode: 'fsdp' cannot shard the weight set {next(iter(followers.sets))!r} of "
                f"{algorithm.name}; nearest valid: 'ddp'"
            )
        if reference is not None:
            with reference.applied():
                networks["reference"] = frozen_copy(model.network)
        shards = _shards(model, networks.get("reference"), config, world)
        trainable = Trainable(model.network)
    setting = Setting(
        model=model,
        algorithm=algorithm if algorithm.given is None else _unweighted(algorithm),
        schedule=model.schedule(algorithm.steps, size),
        size=size,
        guidance=config.model.guidance,
        rewards=rewards,
        seed=config.seed,
        rollout_rows=config.rollout_rows,
        train_rows=config.train_rows,
        updates=config.optimizer.updates_per_iteration,
        max_grad_norm=config.optimizer.max_grad_norm,
        sets=networks,
        world=world,
        shards=shards,
        judge=None if algorithm.judge is None else _judge(algorithm.judge, model, config.rollout_rows),
        figures=asked(config.guards),
        norms=config.guards.velocity_norm.action != "off",
        drafter=Drafter.of(algorithm, model, trainable, sets),
        pictures=pictures,
        total=algorithm.credit.reward_weights,
    )
    return setting, trainable, followers


def _shards(model: Model, reference: nn.Module | None, config: Config, world: World) -> Shards:
    from tempflow.train.shard import Shards, shard

    whole = frozen_copy(model.network).cpu() if world.first else None
    networks = [model.network] if reference is None else [model.network, reference]
    dtype = DTYPES[config.model.dtype]
    return Shards(tuple(shard(network, model.blocks(network), dtype, world) for network in networks), whole, dtype)


def _judge(folder: str, model: Model, rows: int) -> Callable[[Conditioning], Judge]:
    """A latent reward from disk, to be given the prompts' conditions. Raises ValueError where none fits."""
    from tempflow.latent_reward import EMBEDDED, LatentJudge, LatentReward, bind

    if folder != EMBEDDED and not Path(folder).is_dir():
        raise ValueError(
            f"algorithm.reward: {folder!r} is no folder with a latent reward; "
            f"python scripts/train_latent_reward.py --out FOLDER makes one, and {EMBEDDED!r} comes with the package"
        )
    reward = LatentReward.load(folder, device=str(model.device)).requires_grad_(False).eval()
    try:
        reward.check_fits(model.network)
    except ValueError as error:
        raise ValueError(f"algorithm.reward: {folder!r}: {error}") from error
    return lambda condition: LatentJudge(bind(model, reward, condition), rows=rows)


def _reference(which: str, model: Model, trainable: Trainable, base: Mapping[str, Tensor] | None) -> WeightSet:
    if which == "base":
        return WeightSet(trainable, Frozen(), base)
    if which == "start":
        return WeightSet(trainable, Frozen())
    held = given(which, "model.reference")
    untrained = trainable.state() if base is None else base  # nothing was started from
    return WeightSet(trainable, Frozen(), started(held, trainable, untrained, held.lora_for(model)))


def _rewards(config: Config, given: Reward | Callable | Sequence[Reward | Callable] | None) -> list[Patient]:
    if given is None:
        return [patient(build(r.name), r.timeout) for r in config.rewards]
    items = given if isinstance(given, Sequence) else [given]
    return [patient(item) if isinstance(item, Reward) else from_function(item) for item in items]


def _sources(
    config: Config,
    prompts: Given | None,
    test_prompts: Given | None,
    reads: Sequence[str],
) -> dict[str, Sequence[Prompt]]:
    """All prompts, by the field or the argument that they come from.

    `reads`: keys of a prompt that the algorithm takes samples from.
    """
    sources = dict[str, Sequence[Prompt]]()
    for name in () if prompts is not None else ("train", "validation", "test"):
        try:
            sources[f"data.{name}"] = load_prompts(dict(config.data)[name], uses=reads)
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error
    for name, listed in (("prompts", prompts), ("test_prompts", test_prompts)):
        if listed is not None:
            sources[name] = as_prompts(listed, reads)
    return sources


def _prompt_sets(
    config: Config, sources: Mapping[str, Sequence[Prompt]], say: Callable[[str], None]
) -> dict[str, Sequence[Prompt]]:
    """To train on, to choose the best weights by, and to report. Says how often prompts come, where it isn't once."""
    names = {name: "prompts" if "prompts" in sources else f"data.{name}" for name in ("train", "validation", "test")}
    if "test_prompts" in sources:
        names["test"] = "test_prompts"
    sets: dict[str, Sequence[Prompt]] = {"train": sources[names["train"]]}
    e = config.evaluation
    for name, count in (("validation", e.validation_prompts), ("test", e.test_prompts)):
        pool = sources[names[name]]
        sets[name] = fixed_prompts(pool, count)
        shares = shared_out(sets[name], pool)
        if shares:
            say(f"data.{name}: {shares}")
    _say_of_training(sets["train"], config, say)
    return sets


def _say_of_training(prompts: Sequence[Prompt], config: Config, say: Callable[[str], None]) -> None:
    """What an iteration repeats, what the run doesn't come to, and why draws are not balanced."""
    count, size, kinds = config.data.prompts_per_iteration, len(prompts), [p.kind for p in prompts]
    if count > size:
        low, high = count // size, -(-count // size)
        often = f"{low} times" if low == high else f"{low} to {high} times"
        say(f"data.train: {count} prompts an iteration of {size} prompts: each comes {often}")
    if count * config.iterations < size:
        say(f"data.train: {config.iterations} iterations draw {count * config.iterations} of {size} prompts")
    if any(kinds) and not all(kinds):
        say(f"data.train: {kinds.count('')} of {size} prompts have no kind, so draws are not balanced by it")


def _pictures(config: Config, algorithm: Algorithm, prompts: Sequence[Prompt], own: bool) -> Pictures | None:
    """The pictures of the training prompts, where the algorithm takes such; every one has been looked at.

    `own`: the prompts were given as objects. Raises ValueError for the first picture that will not do.
    """
    if algorithm.given is None:
        return None
    keys, source = algorithm.given.keys, config.data.train
    found = Pictures(Path(), keys, config.size) if own else Pictures.beside(source, keys, config.size)
    try:
        found.check(prompts)
    except ValueError as error:
        raise ValueError(f"{'prompts' if own else f'data.train: {source}'}: {error}") from error
    return found


def _unweighted(algorithm: Algorithm) -> Algorithm:
    """Given samples bear scores of their own: the rewards' weights are of no use to their credit."""
    return replace(algorithm, credit=algorithm.credit.weighted(None))


def _warn_of_warmup(config: Config, say: Callable[[str], None]) -> None:
    """A recipe's warm-up may outlast a run that was cut short: allowed, but said."""
    warmup, given = config.optimizer.warmup_iterations, config.optimizer.learning_rate
    if warmup >= config.iterations:
        reached = given * config.iterations / (warmup + 1)
        say(
            f"warn: optimizer.warmup_iterations {warmup} outlasts the run's {config.iterations}: the learning rate "
            f"ends at {reached:.2g}, not {given:g}; nearest that reaches it: {max(0, config.iterations - 1)}"
        )


def _say_old(config: Config, algorithm: Algorithm, say: Callable[[str], None]) -> None:
    """What old log-probs cost, where they do not come with the training forward."""
    updates, trained = config.optimizer.updates_per_iteration, algorithm.cost(0, config.data.prompts_per_iteration)
    old = algorithm.old_forwards(trained.trained_edges, updates)
    if old:
        say(f"old log-probs: at most {old} forwards an iteration, for {trained.trained_edges} trained edges")


def _check_ranks(config: Config, world: World, say: Callable[[str], None]) -> None:
    """Every rank needs a prompt of its own, always. Says what each gets."""
    for field, count in (
        ("data.prompts_per_iteration", config.data.prompts_per_iteration),
        ("evaluation.validation_prompts", config.evaluation.validation_prompts),
        ("evaluation.test_prompts", config.evaluation.test_prompts),
    ):
        if count < world.size:
            raise ValueError(f"{field}: {count} for {world.size} ranks; nearest valid: {world.size}")
    if world.size > 1:
        blocks = [len(world.block(config.data.prompts_per_iteration, rank)) for rank in range(world.size)]
        say(f"{world.size} ranks by {config.parallel.mode}; prompts an iteration by rank: {blocks}")
