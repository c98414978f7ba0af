"""The application: routes over an engine, to be served or mounted."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from prefixstore.engine import Engine
from prefixstore.server.bodies import body_schema, read_body
from prefixstore.server.config import ServerConfig
from prefixstore.server.errors import install_handlers
from prefixstore.server.gate import Gate
from prefixstore.server.generation import Job, unless_disconnected
from prefixstore.server.keys import ApiKeys, Caller
from prefixstore.server.lifecycle import Lifecycle
from prefixstore.server.logprobs import TokenTexts
from prefixstore.server.metrics import EngineCollector, Latencies
from prefixstore.server.prompts import Prompt, PromptReader
from prefixstore.server.responses import ChatForm, CompletionForm
from prefixstore.server.schema import ChatRequest, CompletionRequest
from prefixstore.server.service import Service
from prefixstore.server.worker import Worker

DEFAULT_MODEL_NAME = "default"
API = "/v1"
CHAT_PATH = f"{API}/chat/completions"
TEXT_PATH = f"{API}/completions"


def create_app(
    engine: Engine,
    config: ServerConfig | None = None,
    *,
    dashboard: APIRouter | None = None,
) -> FastAPI:
    """OpenAI's HTTP interface to `engine`, with health and metrics, for any ASGI server.

    Bounds on connections (timeouts of headers and of writing, their number) are those of whatever
    serves it; `kvkernels serve` sets them from `config`. The engine is the caller's to close.

    Args:
        engine: What answers.
        config: Bounds, API keys, the model's name.
        dashboard: Pages to serve from `/` on; with API keys only to operators.

    Raises:
        ConfigError: If the file with the API keys is refused.
    """
    config = config or ServerConfig()
    keys = None if config.api_keys_file is None else ApiKeys.from_file(config.api_keys_file)
    registry = CollectorRegistry()
    lifecycle = Lifecycle()
    # As many requests may be on their way to the engine as it takes at once.
    num_places = engine.config.max_queued + engine.config.max_running
    reading = Worker("kvkernels-reading", num_places, config.retry_after_s)
    service = Service(
        engine=engine,
        config=config,
        model_name=config.model_name or DEFAULT_MODEL_NAME,
        max_choices=min(config.max_choices, num_places),
        reading=reading,
        prompts=PromptReader(engine.tokenizer, engine.vocab_size, engine.max_model_len, reading),
        texts=TokenTexts(engine.tokenizer),
        latencies=Latencies(registry),
        lifecycle=lifecycle,
    )
    registry.register(EngineCollector(engine, reading))
    app = FastAPI(title="kvkernels", docs_url=None, redoc_url=None)
    app.state.lifecycle = lifecycle
    app.add_middleware(Gate, config=config, keys=keys, lifecycle=lifecycle)
    install_handlers(app)
    app.include_router(_answer_routes(service))
    app.include_router(_model_routes(service))
    app.include_router(_operations_routes(engine, lifecycle, registry))
    if dashboard is not None:
        app.include_router(dashboard)
    return app


def _answer_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(CHAT_PATH, openapi_extra=body_schema(CHAT_PATH, ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        caller: Caller = request.state.caller
        content = await request.body()

        async def read() -> tuple[ChatRequest, Prompt]:
            body = await read_body(ChatRequest, content, service.reading, caller.tenant)
            service.check_model(body.model)
            return body, await service.prompts.read_chat(body.messages, len(content), caller)

        body, prompt = await unless_disconnected(request.receive, read())
        jobs = service.plan(body, [prompt])
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        form = ChatForm(answer_id, service.model_name, bool(body.stream))
        return await service.answer(request, body, jobs, form, answer_id, [""] * len(jobs))

    @router.post(TEXT_PATH, openapi_extra=body_schema(TEXT_PATH, CompletionRequest))
    async def create_completion(request: Request) -> Response:
        tenant: str = request.state.caller.tenant
        content = await request.body()
        reader, most = service.prompts, service.max_choices + 1

        async def read() -> tuple[CompletionRequest, list[Job], list[str]]:
            body = await read_body(CompletionRequest, content, service.reading, tenant)
            service.check_model(body.model)
            given = body.prompts
            prompts = [
                await reader.read_text(one, tenant)
                if isinstance(one, str)
                else reader.read_ids(one)
                for one in given[:most]
            ]
            jobs = service.plan(body, prompts)
            if not body.echo:
                return body, jobs, [""] * len(jobs)
            texts = [
                one if isinstance(one, str) else await reader.decode(one, tenant) for one in given
            ]
            return body, jobs, [text for text in texts for _ in range(body.num_answers)]

        body, jobs, echoes = await unless_disconnected(request.receive, read())
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        form = CompletionForm(answer_id, service.model_name)
        return await service.answer(request, body, jobs, form, answer_id, echoes)

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    model: dict[str, Any] = {"id": service.model_name, "object": "model", "owned_by": "kvkernels"}
    model |= {"created": int(time.time()), "max_model_len": service.engine.max_model_len}

    @router.get(f"{API}/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get(f"{API}/models/{{name:path}}")
    async def get_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    return router


def _operations_routes(
    engine: Engine, lifecycle: Lifecycle, registry: CollectorRegistry
) -> APIRouter:
    router = APIRouter()
    scraping = asyncio.Lock()  # one scrape at a time: a distant tier may take long to answer

    @router.get("/health/live")
    async def is_live() -> JSONResponse:
        # An engine that has failed does not come back: whoever watches is to start another process.
        if engine.has_failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @router.get("/health")
    @router.get("/health/ready")
    async def is_ready() -> JSONResponse:
        if lifecycle.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        if engine.has_changed_model:
            return JSONResponse({"status": "model changed"}, 503)
        return await is_live()

    @router.get("/metrics")
    async def metrics() -> Response:
        async with scraping:
            content = await asyncio.to_thread(generate_latest, registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return router
