"""`tempflow serve-reward`: a reward behind HTTP, for runs in other processes, machines or environments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from tempflow.cli.judge import scorer_of
from tempflow.cli.options import POSITIONAL, parse
from tempflow.media import Kind
from tempflow.strict import Place, Strict, shown

EXAMPLE = "tempflow serve-reward jpeg_compressibility"


class ServeOptions(Strict):
    """Serve a reward over HTTP (docs/reward_server.md). A run asks it by the reward `remote`. It imports neither
    diffusers nor transformers unless the reward does, so it runs in the environment that a scorer needs."""

    name: Annotated[str, POSITIONAL] = Field(
        default="", description="which reward (`tempflow rewards`); its options as NAME:option=value,option=value"
    )
    options: dict[str, Any] = Field(default={}, description="more of them, as {name: value}")
    frames: int | None = Field(
        default=None, ge=1, le=10_000, description="for clips: the mean over so many frames, by a reward of pictures"
    )
    function: Place = Field(
        default="", description="FILE.py:NAME in place of a reward's name: your function or reward object; it is run"
    )
    groupwise: bool = Field(default=False, description="the function compares all pictures of a prompt")
    takes: Kind = Field(default="picture", description="what the function is given")
    host: str = Field(default="127.0.0.1", description="address to listen at")
    port: int = Field(default=0, ge=0, le=65_535, description="0: one that is free")
    expose: bool = Field(default=False, description="allow an address that other machines reach; needs a token")
    token_file: Place = Field(
        default="", description="file with the token, made where it isn't there (TEMPFLOW_REWARD_TOKEN, or a new one)"
    )
    batch: int = Field(default=16, ge=1, le=65_536, description="most rows of a call that joins requests; 1 joins none")
    latency: float = Field(default=0.005, ge=0, le=60, description="seconds that a request waits for others")
    timeout: float = Field(default=600.0, gt=0, le=86_400, description="seconds that a call of the reward may take")
    upload: float = Field(default=60.0, gt=0, le=86_400, description="seconds that a request's body may take to arrive")
    max_rows: int = Field(default=1024, ge=1, le=65_536, description="media of a request")
    max_bytes: int = Field(default=256 << 20, ge=1024, le=1 << 32, description="bytes of a request")
    max_pixels: int = Field(default=1 << 27, ge=1, le=1 << 32, description="pixels of all frames of a request")
    requests: int = Field(default=64, ge=1, le=100_000, description="most requests at a time; more are answered 429")
    memory: int = Field(default=2 << 30, ge=1 << 20, le=1 << 40, description="most bytes that requests hold at a time")


def serve_reward_verb(args: Sequence[str]) -> int:
    options = parse(ServeOptions, "serve-reward", args)
    try:
        from tempflow.serve.run import find_token, is_loopback, load_function, serve
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "starlette", "h11"):
            raise
        raise ImportError(f"serve-reward needs {error.name}: pip install 'tempflow[serve]'", name=error.name) from error
    from tempflow.rewards import build
    from tempflow.rewards.wire import Limits
    from tempflow.serve.app import Settings

    if bool(options.name) == bool(options.function):
        raise ValueError(f"name: exactly one of a reward's name and --function is needed; nearest valid: {EXAMPLE}")
    if options.function and (options.options or options.frames is not None):
        raise ValueError("options, frames: are a named reward's, and --function is none; nearest valid: without them")
    if options.name and (options.groupwise or options.takes != "picture"):
        raise ValueError(
            "groupwise, takes: are a --function's; a named reward says itself; nearest valid: without them"
        )
    far = not is_loopback(options.host)
    if far and not options.expose:
        raise ValueError(f"host: other machines reach {shown(options.host)}; nearest valid: 127.0.0.1, or --expose")
    token, source = find_token(options.token_file)
    if far and not source:
        raise ValueError("token_file: --expose needs a token that is given; nearest valid: --token-file token.txt")
    if options.function:
        reward = load_function(options.function, options.groupwise, options.takes)
    else:
        scorer = scorer_of(options.name, {}, "name")
        reward = build(scorer.name, scorer.kind, {**scorer.options, **options.options}, options.frames)
    settings = Settings(
        limits=Limits(rows=options.max_rows, bytes=options.max_bytes, pixels=options.max_pixels),
        batch=options.batch,
        latency=options.latency,
        timeout=options.timeout,
        upload=options.upload,
        requests=options.requests,
        memory=options.memory,
    )

    def ready(url: str) -> None:
        print(url, flush=True)
        known = f"the token is in {source}" if source else f"the token: {token}"
        print(f"reward {reward.name!r}; {known}", file=sys.stderr, flush=True)

    serve(reward, settings, options.host, options.port, token, ready)
    return 0
