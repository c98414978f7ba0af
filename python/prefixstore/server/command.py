"""`kvkernels serve`: its options, and the parts it puts together."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefixstore.errors import ConfigError

if TYPE_CHECKING:
    from prefixstore.server.config import ServeConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Command-line options and the fields they set, by part of the configuration.
_SERVER = {
    "host": "host",
    "port": "port",
    "model_name": "model_name",
    "api_keys": "api_keys_file",
    "allow_anonymous": "allow_anonymous",
    "drain_timeout": "drain_timeout_s",
}
_ENGINE = {
    "max_running": "max_running",
    "max_queued": "max_queued",
    "max_batch_tokens": "max_batch_tokens",
    "max_model_len": "max_model_len",
    "cuda_graphs": "cuda_graphs",
}
_CACHE = {
    "codec": "codec",
    "pool_tokens": "pool_tokens",
    "window_pool_tokens": "window_pool_tokens",
    "block_size": "block_size",
}


@click.command()
@click.argument("model")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A TOML file with the tables [server], [engine] and [cache]; options come before it.",
)
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="0 for any that is free.  [default: 8000]")
@click.option("--model-name", help="What requests call the model.  [default: its folder's name]")
@click.option(
    "--api-keys",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file with the keys of those who may ask, see docs/server.md.",
)
@click.option("--allow-anonymous", is_flag=True, default=None, help="Answer anyone on any address.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="Such as cpu or cuda:0.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="URL",
    help="Such as memory://4GiB or disk:///var/kv; several, fastest first.",
)
@click.option("--codec", help="How blocks are written into the tiers.  [default: raw]")
@click.option("--pool-tokens", type=int, help="Tokens that the device pool holds.")
@click.option(
    "--window-pool-tokens", type=int, help="Those that it holds of layers with a sliding window."
)
@click.option("--block-size", type=int, help="Tokens of a block.  [default: 64]")
@click.option("--max-running", type=int, help="Requests in one batch.")
@click.option("--max-queued", type=int, help="Requests that wait; beyond them clients get 429.")
@click.option("--max-batch-tokens", type=int, help="Tokens of one forward pass.")
@click.option("--max-model-len", type=int, help="Tokens of a prompt and its answer.")
@click.option(
    "--no-cuda-graphs",
    "cuda_graphs",
    is_flag=True,
    flag_value=False,
    default=None,
    help="Run the model in every step, and replay none.",
)
@click.option(
    "--drain-timeout",
    type=float,
    help="Seconds for accepted requests after SIGTERM.  [default: 60]",
)
@click.option("--no-cache", is_flag=True, help="Reuse nothing and keep nothing, for comparison.")
def serve(model: str, config_path: Path | None, dtype: str, device: str, **options: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI's API.

    MODEL is the folder of a transformers model, or "smollm2" or "gemma3" for one that comes as a
    Python package. Once it listens, a line of JSON on the standard output says where.
    """
    config = make_config(config_path, **options)
    run_server(model, dtype, device, config)


def make_config(
    config_path: Path | None, tiers: tuple[str, ...] = (), no_cache: bool = False, **options: Any
) -> ServeConfig:
    """The file, and the options in place of what it says.

    Raises:
        ConfigError: If either is wrong.
    """
    from prefixstore.server.config import ServeConfig

    config = ServeConfig() if config_path is None else ServeConfig.from_toml(config_path)
    cache = replace(config.cache, **_given(_CACHE, options))
    engine = replace(config.engine, **_given(_ENGINE, options))
    if tiers:
        if no_cache:
            raise ConfigError("--tier: expected none with --no-cache")
        cache = replace(cache, tiers=tiers, memory_bytes=None, disk_path=None, disk_bytes=None)
    if no_cache:
        cache = replace(cache, tiers=(), memory_bytes=None, disk_path=None, disk_bytes=None)
        engine = replace(engine, reuses_prefixes=False)
    return ServeConfig(replace(config.server, **_given(_SERVER, options)), engine, cache)


def run_server(model: str, dtype: str, device: str, config: ServeConfig) -> None:
    """Load the model and serve it until a signal."""
    from prefixstore.dashboard import dashboard_router
    from prefixstore.demo.machine import choose_dtype
    from prefixstore.engine import Engine
    from prefixstore.models import find_model, load_model, load_tokenizer
    from prefixstore.server.app import create_app
    from prefixstore.server.keys import ApiKeys
    from prefixstore.server.request_log import log_json_lines
    from prefixstore.server.run import bind_address, serve_until_signal
    from prefixstore.tier_urls import check_tiers

    # Check these before the model is loaded, which takes long.
    if config.server.api_keys_file is not None:
        ApiKeys.from_file(config.server.api_keys_file)
    check_tiers(config.cache.tier_urls)
    device = choose_device(device)
    listener = bind_address(config.server)
    path = find_model(model)
    log_json_lines()
    loaded = load_model(path, choose_dtype(dtype)).to(device)
    server = replace(config.server, model_name=config.server.model_name or path.resolve().name)
    engine = Engine.open(loaded, load_tokenizer(path), config.engine, config.cache)
    app = create_app(engine, server, dashboard=dashboard_router(engine))
    # All objects so far stay for good. Without this, each full collection would walk through all of
    # PyTorch while every request waits.
    gc.collect()
    gc.freeze()
    try:
        serve_until_signal(app, engine, server, listener)
    finally:
        gc.unfreeze()  # otherwise extensions report leaked objects at exit


def choose_device(name: str) -> str:
    """The device called `name`; "auto" is a CUDA device where there is one.

    Raises:
        ConfigError: If this machine or this PyTorch has no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device: expected one of this machine, got {name!r}: {reason}"
        ) from error
    return name


def _given(names: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that the command line sets."""
    return {field: options[name] for name, field in names.items() if options[name] is not None}
