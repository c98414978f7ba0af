"""The routes of the page: a few static files and four questions, all of them GET."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Depends, HTTPException, Response
from fastapi.responses import JSONResponse

from prefixstore.dashboard import views
from prefixstore.dashboard.prefix_tree import PrefixTree
from prefixstore.dashboard.sampler import Sampler
from prefixstore.engine import Engine

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The page is served with what it may load: its own files and answers, nothing from elsewhere, no
# script or style inside the document. So a hostile name that became markup could do nothing.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def dashboard_router(engine: Engine, *, show_text: bool = False) -> APIRouter:
    """Routes of a page that shows what an engine and its cache are doing.

    The page is at `/`, what it needs below `/dashboard/`. Everything is read-only. Once the
    application starts, a thread samples the engine's counters once a second until it stops; in an
    application that is mounted into another, from the first page on.

    Args:
        engine: Whom to watch; it stays the caller's to close.
        show_text: Whether the page shows how each cached prefix begins, in words. Prompts are
            private: leave it off wherever others than the prompts' owners can open the page.
    """
    sampler = Sampler(engine)
    tree = PrefixTree(engine.cache, engine.tokenizer.decode if show_text else None)
    page_files = _read_page()

    def serve(name: str) -> Response:
        content, media_type = page_files[name]
        return Response(content, media_type=media_type, headers=HEADERS)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        sampler.start()
        try:
            yield
        finally:
            # It may be waiting for a tier that does not answer.
            await anyio.to_thread.run_sync(sampler.stop)

    # Of a mounted application no lifespan is run.
    starting = Depends(sampler.start)
    router = APIRouter(lifespan=lifespan, dependencies=[starting], include_in_schema=False)

    @router.get("/")
    def index() -> Response:
        return serve("index.html")

    # The questions are plain functions: FastAPI answers them on threads, beside its event loop.
    @router.get("/dashboard/overview")
    def overview() -> Response:
        return JSONResponse(views.overview(engine, sampler), headers=HEADERS)

    @router.get("/dashboard/history")
    def history() -> Response:
        return JSONResponse(views.history(sampler.history()), headers=HEADERS)

    @router.get("/dashboard/requests")
    def requests() -> Response:
        return JSONResponse(views.requests(engine.recent()), headers=HEADERS)

    @router.get("/dashboard/tree")
    def prefix_tree() -> Response:
        return JSONResponse(tree.as_json(), headers=HEADERS)

    @router.get("/dashboard/{name}")
    def static_file(name: str) -> Response:
        if name not in page_files:
            raise HTTPException(404, f"expected one of the dashboard's files, got {name[:64]!r}")
        return serve(name)

    return router


def _read_page() -> dict[str, tuple[bytes, str]]:
    """Content and media type of the page's files; nothing else can be asked for by name."""
    return {
        file.name: (file.read_bytes(), MEDIA_TYPES[file.name[file.name.rindex(".") :]])
        for file in (files(__package__) / "page").iterdir()
    }
