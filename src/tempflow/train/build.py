"""From a configuration to what a run works with: model, prompts, rewards, weights; all looked up and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.lesson import POLICY, Role
from tempflow.config import Config, ScorerConfig
from tempflow.core.credit import PerStream, normalised
from tempflow.core.ema import Frozen
from tempflow.data.pictures import Pictures
from tempflow.data.prompts import as_prompts, load_prompts, shared_out, unused_negatives, with_sources
from tempflow.evaluate.suite import fixed_prompts
from tempflow.models import EMBEDDED_MODELS, Family, adapter_of, load, local_folder, resolved_device, resolved_dtype
from tempflow.models.conditions import check_encodes
from tempflow.models.experts import Experts
from tempflow.models.family import check_asked, check_size
from tempflow.models.finite import encoded
from tempflow.models.guidance import Guidance, guidance_of
from tempflow.models.lora import ranks_of
from tempflow.models.lora_files import TakesLora
from tempflow.models.pipeline_folder import licence_of, settings_in
from tempflow.models.precision import check_precision
from tempflow.models.protocol import Model, jump_of, layout_of
from tempflow.models.tools import ASKED, TakesTools, Tools
from tempflow.request import Prompt
from tempflow.rewards import SafeReward, build, check_takes, from_function, safe
from tempflow.rewards.compose import COLUMN
from tempflow.rewards.protocol import Reward, check_prompts
from tempflow.strict import nearest, shown
from tempflow.train.context import Context
from tempflow.train.grids import on_grid
from tempflow.train.identity import Identity
from tempflow.train.judged import LatentJudge, by_pictures
from tempflow.train.parallel import SINGLE, Shards, World
from tempflow.train.signals import asked
from tempflow.train.state import (
    Baseline,
    average_of,
    check_start,
    check_teacher,
    optimizer_of,
    read_starts,
    run_baseline,
    start_summary,
    starting_state,
)
from tempflow.train.weights import Drafter, Learner, Trainable, WeightSet, WeightSets, own_copy

PromptsLike = Sequence[str | Prompt | Mapping[str, object]]
"""Prompts as objects: `data.prompts.as_prompts` reads them."""


def settled(config: Config) -> Config:
    """With the dtype that "auto" means here, so that the run's records name it and it is resumed in it."""
    dtype = resolved_dtype(config.model.dtype, resolved_device(config.device))
    return config.with_model(dtype=dtype)


def borrowed_baseline(config: Config, own: Identity, say: Callable[[str], None]) -> Baseline | None:
    """The untrained model's test from another run, if one is named. `own`: what this run depends on."""
    if not config.evaluation.before:
        return None
    if own.objects.keys() - {"algorithm"}:
        raise ValueError(
            f"evaluation.before: {config.evaluation.before!r}, but a model, reward or prompts given as objects cannot "
            "be compared with a run's; nearest valid: ''"
        )
    say(f"before: taken over from {config.evaluation.before}")
    return run_baseline(config, own)


def prepare_model(config: Config, world: World = SINGLE, say: Callable[[str], None] = lambda line: None) -> Model:
    """Loads the model and marks what is trained: where `model.start` is a LoRA, a LoRA on the layers of that.

    Says its licence, and what a user should know of its weights.

    Raises ValueError for a start that does not fit.
    """
    m = config.model
    begun = read_starts(m.starts, "model.start") if m.start else None  # before gigabytes are loaded
    if begun is not None:
        check_start(begun, m.training)
    check_model(config, say)
    device, tools = device_of(config, None, world), _tools(config)
    tools.check(m.training, str(device), sharded(config, world))
    model = load(m.path, revision=m.revision, dtype=m.dtype, device=str(device), tools=tools)
    if m.training == "lora":
        if not isinstance(model, TakesLora):
            raise ValueError(f"model.training: 'lora', but {m.path!r} takes no LoRA; nearest valid: 'full'")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # LoRA's initial weights are a function of the run's seed
            lora = None if begun is None else begun.lora_for(model)
            if lora is None:
                model.add_lora(m.lora_rank, m.lora_alpha, m.lora_targets or None)
            else:
                model.add_lora_on(ranks_of(lora), m.lora_alpha / m.lora_rank)
    else:
        model.train_fully()
    on_grid(config, model, loaded=True)
    if isinstance(model, TakesTools):
        for note in model.notes():
            say(f"model: {note}")
        for lack in model.equip(tools):
            say(lack)
        if m.cache:
            folder, most = Path(m.cache).expanduser(), int(m.cache_gib * 2**30)
            model.keep_embeddings(folder, most, local_folder(m.path, m.revision))
    elif m.cache:
        raise ValueError(f"model.cache: {m.path!r} keeps no embeddings; nearest valid: ''")
    return model


def encode_ahead(config: Config, model: Model, prompts: Sequence[Prompt], world: World) -> None:
    """Where `model.drop_encoders` asks for it: encodes all prompts into the cache, each rank its share, and frees the
    text encoders."""
    if not (config.model.drop_encoders and isinstance(model, TakesTools)):
        return
    for prompt in list(prompts)[world.rank :: world.size]:
        encoded(model, [prompt], config.size)
    world.wait()
    model.drop_encoders()


def _tools(config: Config) -> Tools:
    """The tools that a configuration asks for. Row counts are those of full batches, and of guidance's two branches."""
    counts = {config.rollout_rows, config.train_rows, 2 * config.rollout_rows} if config.model.compile else ()
    return Tools(**{name: getattr(config.model, name) for name in ASKED}, compile_rows=tuple(sorted(counts)))


NON_COMMERCIAL = re.compile(r"non-?commercial|(^|[-_. ])nc([-_. ]|$)|nscl|research-?only", re.IGNORECASE)
"""In the name of a licence."""

FEW_STEPS = re.compile(r"turbo|schnell|lightning|hyper|distill|(^|[-_])(lcm|dmd)([-_]|$)|few-?step", re.IGNORECASE)
"""In the name of a checkpoint: what its files often do not say."""


def check_model(config: Config, say: Callable[[str], None] = lambda line: None) -> Guidance:
    """What the configuration asks of its model, before that is loaded; `say` is told its licence, and what
    looks like a few-step distillation. Raises ValueError, naming the field."""
    m = config.model
    folder = local_folder(m.path, m.revision)
    family, settings = adapter_of(m.path, folder).family, partial(settings_in, folder)
    licence = licence_of(folder)
    if NON_COMMERCIAL.search(licence) and m.accept_licence != licence:
        raise ValueError(
            f"model.accept_licence: {m.accept_licence[:40]!r}, and {m.path[:60]!r} is under {licence!r}, which is "
            f"non-commercial; nearest valid, where you accept it: {licence!r}"
        )
    if m.path not in EMBEDDED_MODELS:
        say(f"model: {m.path}, {family.title}, licence {licence}")
    name = FEW_STEPS.search(Path(m.path).name)
    why = family.distilled(settings) or (f"its name says {name[0]!r}" if name else "")
    if why:
        say(
            f"warn: model.path: {m.path} looks like a few-step distillation ({why}): such weights are made for the few "
            "steps of their own grid, and training undoes that; nearest valid: the checkpoint that it was made of"
        )
    with config.naming("model"):
        return check_asked(family, m.path, settings, config.size, m.guidance, m.guidance_options)


def device_of(config: Config, model: Model | None, world: World) -> torch.device:
    """Where the model is, or will be loaded to."""
    if model is not None:
        return model.device
    return torch.device(world.device if world.size > 1 else resolved_device(config.device))


def sharded(config: Config, world: World) -> bool:
    return world.size > 1 and config.parallel.mode == "fsdp"


def context_of(
    config: Config,
    model: Model,
    algorithm: Algorithm,
    rewards: Sequence[Reward],
    given: bool,
    pictures: Pictures,
    world: World,
    say: Callable[[str], None],
) -> tuple[Context, dict[str, Learner]]:
    """What stays the same over the run, and the roles as training starts, by name. `given`: the rewards were given as
    objects."""
    guidance, algorithm = asked_of(config, algorithm, model)
    check_takes(rewards, model.makes, model.name)
    if sharded(config, world):
        model.network.cpu()  # until it is in parts
    trainable, shards = Trainable(model.network), None
    base = _start(config, model, trainable, say) if config.model.start else None  # without, a set copies the policy
    kept = None
    if algorithm.starts_from_reference:
        say(f"reference: {config.model.reference}")
        kept = _reference(config.model.reference, model, trainable, base)
    if sharded(config, world):
        begun = trainable.state() if base is not None else {}
        trainable = None  # whole weights give way to their parts
        shards = _shards(model, world)
        trainable = Trainable(model.network, begun)
    weight_sets = WeightSets.of(algorithm, trainable)
    sets = dict(weight_sets.sets)
    if "reference" in algorithm.sets and "reference" not in sets:
        sets["reference"] = WeightSet(trainable, Frozen(), kept)
    networks: dict[str, nn.Module] = {n: weights.network(shards and shards.turn_of) for n, weights in sets.items()}
    learners = {POLICY: Learner(trainable, optimizer_of(config, trainable), weight_sets, average_of(config, trainable))}
    learners |= {role.name: _learner(config, model, role, kept) for role in algorithm.roles}
    networks |= {name: net for role in algorithm.roles for name, net in learners[role.name].networks(role.name).items()}
    context = Context(
        model=model,
        algorithm=algorithm.unweighted(),
        schedule=model.schedule(algorithm.steps, config.size),
        size=config.size,
        guidance=guidance,
        rewards=rewards,
        seed=config.seed,
        rollout_rows=config.rollout_rows,
        rollout_leaves=config.rollout_leaves,
        overlap=config.overlap,
        train_rows=config.train_rows,
        updates=config.optimizer.updates_per_iteration,
        max_grad_norm=config.optimizer.max_grad_norm,
        sets=networks,
        world=world,
        shards=shards,
        latent_reward=next((_latent(f, model, config.rollout_rows) for f in algorithm.latent_rewards), by_pictures),
        figures=asked(config.guards),
        norms=config.guards.velocity_norm.action != "off",
        drafter=Drafter.of(algorithm, model, trainable, sets),
        pictures=pictures,
        reward_weights=None if given else config.reward_weights,
        compose=config.compose([reward.name for reward in rewards] if given else None),
        scheduled=None if given else config.scheduled,
    )
    return context, learners


def _learner(config: Config, model: Model, role: Role, reference: Mapping[str, Tensor] | None) -> Learner:
    """A role beside the policy, which starts as the policy is, or as the reference (None: the two are one)."""
    own = Trainable(own_copy(model.network))
    if role.start == "reference" and reference is not None:
        own.load(reference)
    return Learner(own, optimizer_of(config, own, role), WeightSets.of_role(role, own))


def asked_of(config: Config, algorithm: Algorithm, model: Model) -> tuple[Guidance, Algorithm]:
    """What is asked of a model that is loaded: its size, guidance, grids; and the algorithm on its states. Raises
    ValueError, naming the field."""
    size = config.size
    with config.naming("model"):
        check_size(size, model.makes, model.name)
        model.noise_shape(size)
        guidance = guidance_of(model.guidance, config.model.guidance, config.model.guidance_options)
    with config.naming("evaluation"):
        model.schedule(config.evaluation.steps, size)
    with config.naming("algorithm"):
        algorithm.schedule(0, model.schedule(algorithm.steps, size))
        algorithm.sampled.sampler(lambda: None, lambda several: check_encodes(model))
        return guidance, algorithm.on(jump_of(model), model.name)


def check_guided(config: Config, algorithm: Algorithm, guidance: Guidance, model: Model, prompt: Prompt) -> None:
    """Whether the model's conditions have what guidance leads away from, where any is asked for; `prompt`: any of the
    run's. Raises ValueError, naming the field."""
    e = config.evaluation
    asked = [("model.guidance", guidance.guidance), ("evaluation.guidance", e.guidance)]
    asked += [("evaluation.yardstick", number) for number in e.yardstick]
    asked += [("algorithm", number) for phase in algorithm.phases for number in phase.guidance.values()]
    field, number = next(((f, n) for f, n in asked if guidance.at(n).rows > 1), ("", 1.0))
    if field and encoded(model, [prompt], config.size).negative is None:
        raise ValueError(
            f"{field}: guidance {number:g}, and {model.name[:60]!r} has no negative prompts to lead away from, not "
            "even the empty one; nearest valid: 1"
        )


def _start(config: Config, model: Model, trainable: Trainable, say: Callable[[str], None]) -> Mapping[str, Tensor]:
    """Loads the weights that `model.start` names; returns what the parameters were without them."""
    base = trainable.state()
    begun = read_starts(config.model.starts, "model.start")
    check_start(begun, config.model.training)
    lora = begun.lora_for(model)
    trainable.load(starting_state(begun, trainable, base, lora))
    say(f"start: {start_summary(begun, lora, config.model.training)}")
    return base


def _shards(model: Model, world: World) -> Shards:
    """Shares out the model's network. Raises ValueError for one whose ranks may gather different blocks."""
    if any(isinstance(module, Experts) for module in model.network.modules()):
        raise ValueError(
            "parallel.mode: 'fsdp' needs ranks that gather the same blocks, and each row's σ chooses its expert; "
            "nearest valid: 'ddp'"
        )
    return Shards(model.network, model.blocks(model.network), world)


def _latent(folder: str, model: Model, rows: int) -> LatentJudge:
    """A latent reward from disk. Raises ValueError for one that does not fit."""
    from tempflow.latent_reward import EMBEDDED, LatentReward, LatentScorer, bind

    if folder != EMBEDDED and not Path(folder).is_dir():
        raise ValueError(
            f"algorithm.reward: {folder!r} is no folder with a latent reward; "
            f"python scripts/train_latent_reward.py --output FOLDER makes one, and {EMBEDDED!r} comes with the package"
        )
    reward = LatentReward.load(folder, device=str(model.device)).requires_grad_(False).eval()
    try:
        reward.check_fits(model.network)
    except ValueError as error:
        raise ValueError(f"algorithm.reward: {folder!r}: {error}") from error
    return LatentJudge(lambda condition: LatentScorer(bind(model, reward, condition), rows=rows))


def _reference(
    which: str, model: Model, trainable: Trainable, base: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """The trained parameters of the reference; None: as they are when training starts."""
    if which in ("base", "start"):
        return base if which == "base" else None
    held = read_starts((which,), "model.reference")
    untrained = trainable.state() if base is None else base  # nothing was started from
    return starting_state(held, trainable, untrained, held.lora_for(model))


def check_streams(config: Config, algorithm: Algorithm, names: Sequence[str] | None, model: str) -> None:
    """Whether the streams that the configuration's rewards teach are there, as far as it is known: `names` of those of
    the model so called, none for a single one; None: not yet known. Raises ValueError, naming the field."""
    for number, reward in enumerate(config.rewards):
        if not reward.stream:
            continue
        field = f"rewards.{number}.stream: {shown(reward.stream)} of {shown(reward.name)}"
        if why := _takes_no_streams(algorithm):
            raise ValueError(f"{field}, but {algorithm.name[:40]} {why}; nearest valid: ''")
        if names == ():
            raise ValueError(f"{field}, but {shown(model)} has one stream alone; nearest valid: ''")
        if names and reward.stream not in names:
            near = f"nearest valid: {nearest(reward.stream, names)} of {', '.join(names)}"
            raise ValueError(f"{field} is no stream of {shown(model)}; {near}")


def by_stream(config: Config, algorithm: Algorithm, model: Model, prompt: Prompt) -> Algorithm:
    """The algorithm with an advantage for each of the model's streams, where the configuration says of a reward which
    one it teaches; `prompt`: any of the run's. Raises ValueError as `check_streams`."""
    streams = {reward.name: reward.stream for reward in config.rewards if reward.stream}
    if not streams:
        return algorithm
    check_streams(config, algorithm, None, model.name)
    layout = layout_of(model, encoded(model, [prompt], config.size), config.size)
    check_streams(config, algorithm, layout.names, model.name)
    return replace(algorithm, credit=PerStream(algorithm.credit, layout.names, streams))


def _takes_no_streams(algorithm: Algorithm) -> str:
    """Why rewards cannot teach it by stream; '' where they can."""
    if not algorithm.of_rewards:
        return "is not taught by rewards"
    if not all(phase.by_stream for phase in algorithm.phases):
        return "takes one advantage for all streams together"
    if algorithm.credit.peers:
        return "points to a prompt's best path, which differs by stream"
    return ""


def rewards_of(config: Config, given: Reward | Callable | Sequence[Reward | Callable] | None) -> list[SafeReward]:
    """What is trained on: the configuration's rewards, or those given as objects. No weights are loaded."""
    if given is None:
        return [build_reward(reward) for reward in config.rewards]
    items = given if isinstance(given, Sequence) else [given]
    if not items:
        raise ValueError("reward: [] leaves nothing to learn from, or to choose weights by; nearest valid: None")
    return [safe(item) if isinstance(item, Reward) else from_function(item) for item in items]


def composed(config: Config, algorithm: Algorithm, own: bool, names: Sequence[str]) -> Algorithm:
    """The algorithm, whose credit joins the rewards as the configuration says. Raises ValueError, naming the field."""
    found, credit = config.compose(None if own else names), algorithm.credit
    if config.composition.how == "normalised":
        if not algorithm.rolls_out:
            raise ValueError(
                f"composition.how: 'normalised', but {algorithm.name[:40]} takes no credit from a rollout's rewards; "
                "nearest valid: 'sum'"
            )
        try:
            credit = normalised(credit)
        except ValueError as error:
            raise ValueError(
                f"composition.how: 'normalised', but {algorithm.name[:40]}: {error}; nearest valid: 'sum'"
            ) from error
    if found is not None and found.adds:
        return replace(algorithm, credit=credit.weighted({COLUMN: 1.0}))
    return replace(algorithm, credit=credit.weighted(config.weights_at(0)) if own else credit)


def judges_of(config: Config, rewards: Sequence[SafeReward], sets: Mapping[str, Sequence[Prompt]]) -> list[SafeReward]:
    """All that evaluations score by, the trained rewards first. No weights are loaded.

    Raises ValueError, naming the prompt, where a reward cannot judge what it will be given."""
    trained = {reward.name for reward in rewards}
    judges = [*rewards, *(build_reward(judge) for judge in config.judges if judge.name not in trained)]
    for part, prompts in sets.items():
        texts, metadata = [p.text for p in prompts], [p.told for p in prompts]
        for reward in rewards if part == "train" else judges:
            try:
                check_prompts(reward, texts, metadata)
            except ValueError as error:
                raise ValueError(f"reward {reward.name!r}: {part}: {error}") from error
    return judges


def build_reward(scorer: ScorerConfig) -> SafeReward:
    """The reward that a configuration describes; no weights are loaded. Raises what `rewards.build` does."""
    return safe(build(scorer.name, scorer.kind, scorer.options, scorer.frames), scorer.timeout)


def prompt_sources(
    config: Config,
    prompts: PromptsLike | None,
    test_prompts: PromptsLike | None,
    reads: Sequence[str],
    pictures: Callable[[], bool] = lambda: False,
) -> dict[str, Sequence[Prompt]]:
    """All prompts, by the field or the argument that they come from.

    `reads`: keys of a prompt that the algorithm takes samples from; `pictures`: whether the model draws from some,
    which is asked where a prompt has some.
    """
    sources = dict[str, Sequence[Prompt]]()
    for name in () if prompts is not None else ("train", "validation", "test"):
        try:
            file = dict(config.data)[name]
            sources[f"data.{name}"] = with_sources(lambda s, f=file: load_prompts(f, uses=reads, sources=s), pictures)
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error
    for name, listed in (("prompts", prompts), ("test_prompts", test_prompts)):
        if listed is not None:
            sources[name] = with_sources(lambda s, given=listed: as_prompts(given, reads, s), pictures)
    return sources


def takes_sources(config: Config, model: Model | None) -> bool:
    """Whether the run's model, perhaps given as an object, draws from pictures too."""
    return _family(config).sources if model is None else model.takes_sources


def guidance_kind(config: Config, model: Model | None) -> type[Guidance]:
    """The guidance of the run's model, perhaps given as an object."""
    return _family(config).guidance if model is None else model.guidance


def _family(config: Config) -> Family:
    return adapter_of(config.model.path, local_folder(config.model.path, config.model.revision)).family


def prompt_sets(
    config: Config,
    sources: Mapping[str, Sequence[Prompt]],
    say: Callable[[str], None],
    kind: Callable[[], type[Guidance]] = lambda: Guidance,
) -> dict[str, Sequence[Prompt]]:
    """To train on, to choose the best weights by, and to report. Says how often prompts come, where it isn't once, and
    what becomes of negative prompts, by the kind of the model's guidance."""
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
    for name, prompts in sets.items():
        number = config.model.guidance if name == "train" else e.guidance
        unused = unused_negatives(prompts, partial(_rows, kind, number, config.model.guidance_options))
        if unused:
            say(f"warn: {names[name]}: {unused}")
    return sets


def _rows(kind: Callable[[], type[Guidance]], guidance: float, options: Mapping[str, object]) -> int:
    """Rows of the network that a guidance takes for each."""
    return guidance_of(kind(), guidance, options).rows


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


def pictures_of(config: Config, algorithm: Algorithm, prompts: Sequence[Prompt], own: bool) -> Pictures:
    """The pictures of the training prompts that the algorithm takes; every one has been looked at.

    `own`: the prompts were given as objects. Raises ValueError for the first picture that will not do.
    """
    keys, source = algorithm.takes, config.data.train
    found = Pictures(Path(), keys, config.size) if own else Pictures.beside(source, keys, config.size)
    try:
        found.check(prompts)
    except ValueError as error:
        raise ValueError(f"{'prompts' if own else f'data.train: {source}'}: {error}") from error
    return found


def check_before_loading(
    config: Config, algorithm: Algorithm, model: Model | None, own: bool, world: World, say: Callable[[str], None]
) -> None:
    """What needs no weights. `model`: one given as an object; `own`: the rewards are the configuration's. Raises
    ValueError, naming the field."""
    check_ranks(config, world, say)
    check_optimizer(config, world)
    check_roles(config, algorithm, world)
    check_teacher(config, algorithm)
    warn_of_warmup(config, say)
    warn_of_updates(config, algorithm, say)
    say_old_forwards(config, algorithm, say)
    with config.naming("algorithm"):
        if model is None:
            algorithm.check_states(_family(config).tokens, config.model.path)
        check_precision(algorithm.draft_precision, device_of(config, model, world), sharded(config, world))
    if own:
        check_streams(config, algorithm, _family(config).streams if model is None else None, config.model.path)


def check_optimizer(config: Config, world: World) -> None:
    """Raises ImportError, with the command, where 8 bits lack their library; ValueError where they are sharded."""
    if config.optimizer.kind != "adamw_8bit":
        return
    if sharded(config, world):
        raise ValueError("optimizer.kind: 'adamw_8bit' cannot be sharded; nearest valid: 'adamw'")
    if find_spec("bitsandbytes") is None:
        raise ImportError("optimizer.kind: 'adamw_8bit' needs bitsandbytes: pip install 'tempflow[bits]'")


def check_roles(config: Config, algorithm: Algorithm, world: World) -> None:
    """Raises ValueError where several roles are to be sharded."""
    if algorithm.roles and sharded(config, world):
        several = f"{algorithm.name[:40]} trains {1 + len(algorithm.roles)}"
        raise ValueError(f"parallel.mode: 'fsdp' shares out one network, and {several}; nearest valid: 'ddp'")


def warn_of_updates(config: Config, algorithm: Algorithm, say: Callable[[str], None]) -> None:
    """A number of updates of which no phase asks the run is said to play no part."""
    given = config.optimizer.updates_per_iteration
    if given > 1 and all(phase.updates for phase in algorithm.phases):
        say(
            f"warn: optimizer.updates_per_iteration {given} plays no part: {algorithm.name[:40]} says itself how often "
            "each role is updated; nearest valid: 1"
        )


def warn_of_warmup(config: Config, say: Callable[[str], None]) -> None:
    """A recipe's warm-up may outlast a run that was cut short: allowed, but said."""
    warmup, given = config.optimizer.warmup_iterations, config.optimizer.learning_rate
    if warmup >= config.iterations:
        reached = given * config.iterations / (warmup + 1)
        say(
            f"warn: optimizer.warmup_iterations {warmup} outlasts the run's {config.iterations}: the learning rate "
            f"ends at {reached:.2g}, not {given:g}; nearest that reaches it: {max(0, config.iterations - 1)}"
        )


def say_old_forwards(config: Config, algorithm: Algorithm, say: Callable[[str], None]) -> None:
    """What old log-probs cost, where they do not come with the training forward."""
    updates, trained = config.optimizer.updates_per_iteration, algorithm.cost(0, config.data.prompts_per_iteration)
    if old := algorithm.old_forwards(trained.trained_edges, updates):
        say(f"old log-probs: at most {old} forwards an iteration, for {trained.trained_edges} trained edges")


def check_ranks(config: Config, world: World, say: Callable[[str], None]) -> None:
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
