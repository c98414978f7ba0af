"""Real traffic on SmolLM2 behind the dashboard, until it is stopped or its picture is taken.

    python tests/prefixstore/show_dashboard.py  # prints the address; Ctrl-C ends it
    python tests/prefixstore/show_dashboard.py --png docs/dashboard.png --requests 60

Agents with different documents take turns. The pool holds the prefixes of some; the others' are
restored from memory and disk.
"""

from __future__ import annotations

import argparse
import random
import socket
import tempfile
import threading
import time
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from prefixstore.dashboard import dashboard_router
from prefixstore.demo.prompts import build_agent_loop
from prefixstore.engine import Engine, SamplingParams
from prefixstore.models import load_model, load_tokenizer, prepare_smollm2

NUM_AGENTS = 7
NUM_CLIENTS = 3
PREFIX_TOKENS = 1500
POOL_TOKENS = 6144  # not enough for the prefixes of all


def make_prompts(tokenizer, num_requests: int) -> list[tuple[str, list[int]]]:
    """Tenants and prompts: agents in turn, the popular ones more often."""
    rng = random.Random(0)
    per_agent = min(100, 2 * num_requests // NUM_AGENTS + 10)
    loops = [
        list(
            build_agent_loop(
                tokenizer, num_requests=per_agent, prefix_tokens=PREFIX_TOKENS, seed=seed
            ).requests
        )
        for seed in range(NUM_AGENTS)
    ]
    weights = [4, 3, 2, 2, 1, 1, 1]
    prompts = []
    for _ in range(num_requests):
        (agent,) = rng.choices(range(NUM_AGENTS), weights)
        prompts.append((f"agent-{agent + 1}", loops[agent].pop(0).token_ids))
    return prompts


def send(engine: Engine, prompts: list[tuple[str, list[int]]]) -> None:
    """Have a few clients send one prompt after another, with human pauses."""
    lock = threading.Lock()

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with lock:
                if not prompts:
                    return
                tenant, token_ids = prompts.pop(0)
            sampling = SamplingParams(max_tokens=rng.randint(8, 40), temperature=0)
            engine.submit(token_ids, sampling, tenant=tenant).result()
            time.sleep(rng.uniform(0.0, 2.0))

    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def take_picture(address: str, png: Path, scheme: str) -> None:
    """Save the page as a browser shows it, with few colours, to keep the file small."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page.goto(address)
        page.locator("#request-list .request").first.wait_for()
        page.locator("#tree-plot rect").first.wait_for()
        page.locator("#tree-plot rect.run").first.hover()
        page.wait_for_timeout(1000)
        page.screenshot(path=png, full_page=True)
        browser.close()
    # This method keeps rare colours: the tiers' colours cover few pixels.
    picture = Image.open(png).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    picture.save(png, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--png", type=Path, help="take a picture when all are answered, and end")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    path = prepare_smollm2()
    model, tokenizer = load_model(path, torch.bfloat16), load_tokenizer(path)
    prompts = make_prompts(tokenizer, arguments.requests)
    with (
        tempfile.TemporaryDirectory() as disk,
        Engine.open(
            *(model, tokenizer),
            pool_tokens=POOL_TOKENS,
            tiers=["memory://64MiB", f"disk://{disk}?max_bytes=1GiB"],
        ) as engine,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        app = FastAPI()
        app.include_router(dashboard_router(engine, show_text=True))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        print(address, flush=True)
        try:
            send(engine, prompts)
            if arguments.png:
                take_picture(address, arguments.png, arguments.scheme)
            else:
                thread.join()
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
