"""`gpt2train serve`: a local page with live text, and POST /v1/completions in OpenAI's form.

Flows in: a model and requests. Flows out: text, as server-sent events where `stream` is asked for. One thread computes,
one request at a time; up to `max_waiting` wait their turn, the next is told 429. Who goes away stops his sampling.

It listens on 127.0.0.1 unless told otherwise, and takes no request that another site could have made a browser send:
the Host must be an address, localhost or a name in `allow_hosts` (DNS rebinding), and a body must be application/json,
which a browser does not send across sites without asking first. Prompts and texts are not logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from aiohttp import web

from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.errors import ConfigError, GPT2TrainError, NonFiniteError
from gpt2train.generation.completion import Completion, RequestError, read_request
from gpt2train.generation.config import ServeConfig, check_serve
from gpt2train.generation.decoding import Decoding
from gpt2train.generation.generate import refuse_fewer_tokens
from gpt2train.generation.products import lay_for_decoding
from gpt2train.generation.text import TextStream
from gpt2train.generation.watermark import Watermark, read_key
from gpt2train.model import GPT
from gpt2train.release.hf import choose_device, load_model

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
SHUTDOWN_S = 2.0


def serve(config: ServeConfig) -> int:
    """Serves until SIGINT or SIGTERM."""
    faults = check_serve(config)
    if faults:
        raise ConfigError(faults)
    key = read_key(config.watermark.key_file) if config.watermark.key_file else b""
    watermark = Watermark(key, config.watermark.green_fraction, config.watermark.bias) if key else None
    listener = _listen(config)
    with listener:
        model = lay_for_decoding(load_model(config.run, choose_device(config.device)))
        refuse_fewer_tokens(model, config.run)
        asyncio.run(_serve(Server(config, model, watermark), listener))
    return 0


def _listen(config: ServeConfig) -> socket.socket:
    """The socket, taken before the model is loaded. Raises GPT2TrainError where it is not to be had."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise GPT2TrainError(
            f"host={config.host} port={config.port}: cannot listen there ({error.strerror}); give another port"
        ) from error


async def _serve(server: Server, listener: socket.socket) -> None:
    runner = web.AppRunner(
        server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/  and  POST http://{shown}:{port}/v1/completions", file=sys.stderr, flush=True)
        if not ipaddress.ip_address(host).is_loopback:
            print(f"host={host}: whoever reaches this address may use the model", file=sys.stderr, flush=True)
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
    finally:
        server.close()
        await runner.cleanup()


@dataclass(eq=False)
class _Job:
    """A completion under way: what the computing thread says of it, and whether anybody still listens."""

    wanted: Completion
    loop: asyncio.AbstractEventLoop
    said: asyncio.Queue[tuple[int, str, str | None] | Exception | None] = field(default_factory=asyncio.Queue)
    """(row, piece of text, why it ended), then None; or what went wrong."""
    gone: threading.Event = field(default_factory=threading.Event)
    new_tokens: int = 0

    def say(self, what: tuple[int, str, str | None] | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.said.put_nowait, what)


class Server:
    """The application around one model."""

    def __init__(self, config: ServeConfig, model: GPT, watermark: Watermark | None = None) -> None:
        self.config, self.model, self.watermark = config, model, watermark
        self.name = Path(config.run).name or "gpt2"
        self._tokenizer = load_tokenizer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._waiting = 0
        self._jobs: set[_Job] = set()
        self._started = int(time.time())

    def application(self) -> web.Application:
        application = web.Application(client_max_size=self.config.max_request_bytes, middlewares=[self._guard])
        for path in PAGE:
            application.router.add_get(path, self._page)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/health", self._health)
        application.router.add_post("/v1/completions", self._completions)
        return application

    def close(self) -> None:
        """Ends what is being sampled."""
        for job in self._jobs:
            job.gone.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            if not self._known_host(request.host):
                raise RequestError(
                    f"Host: {request.host[:200]}: is not served; start with allow_hosts=[NAME] to allow a name",
                    status=403,
                )
            return await handler(request)
        except RequestError as error:
            return web.json_response(error.body(), status=error.status, headers=HEADERS)
        except web.HTTPRequestEntityTooLarge:
            large = RequestError(f"the body has more than {self.config.max_request_bytes} bytes", status=413)
            return web.json_response(large.body(), status=413, headers=HEADERS)
        except web.HTTPException as problem:
            other = RequestError(f"{request.method} {request.path[:200]}: {problem.reason}", status=problem.status)
            headers = {**HEADERS, **({"Allow": problem.headers["Allow"]} if "Allow" in problem.headers else {})}
            return web.json_response(other.body(), status=problem.status, headers=headers)

    def _known_host(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").rstrip(".").lower()
        if name == "localhost" or name in {n.lower() for n in self.config.allow_hosts}:
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return False

    async def _page(self, request: web.Request) -> web.Response:
        name, kind = PAGE[request.path]
        text = (files("gpt2train.generation") / "page" / name).read_text(encoding="utf-8")
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _models(self, _: web.Request) -> web.Response:
        entry = {"id": self.name, "object": "model", "created": self._started, "owned_by": "gpt2train"}
        return web.json_response({"object": "list", "data": [entry]}, headers=HEADERS)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "waiting": self._waiting}, headers=HEADERS)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":
            raise RequestError(f"Content-Type: {request.content_type}: must be application/json", status=415)
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            raise RequestError("the body is no JSON") from None
        wanted = read_request(
            body, self.config, model=self.name, context=self.model.config.context, tokenizer=self._tokenizer,
            watermark=self.watermark,
        )  # fmt: skip
        if self._waiting > self.config.max_waiting:
            raise RequestError(f"{self._waiting} requests are before yours (max_waiting); try again", status=429)
        job = _Job(wanted, asyncio.get_running_loop())
        self._waiting += 1
        self._jobs.add(job)
        started = time.monotonic()
        computed = self._thread.submit(self._compute, job)
        try:
            return await (self._stream(request, job) if wanted.stream else self._whole(job))
        finally:
            job.gone.set()
            computed.cancel()
            self._jobs.discard(job)
            self._waiting -= 1
            took = time.monotonic() - started
            print(
                f"{request.remote} {len(wanted.ids)} samples, {job.new_tokens} tokens, {took:.1f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    async def _whole(self, job: _Job) -> web.Response:
        wanted = job.wanted
        texts = [wanted.prompt_of(row) if wanted.echo else "" for row in range(len(wanted.ids))]
        reasons = ["" for _ in texts]
        async for row, text, reason in _events(job):
            texts[row] += text
            reasons[row] = reason or reasons[row]
        return web.json_response(wanted.whole(texts, reasons, job.new_tokens), headers=HEADERS)

    async def _stream(self, request: web.Request, job: _Job) -> web.StreamResponse:
        wanted = job.wanted
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)

        async def send(what: Any) -> None:
            await response.write(f"data: {what if isinstance(what, str) else json.dumps(what)}\n\n".encode())

        try:
            if wanted.echo:
                for row in range(len(wanted.ids)):
                    await send(wanted.piece(row, wanted.prompt_of(row), None))
            try:
                async for row, text, reason in _events(job):
                    if text or reason:
                        await send(wanted.piece(row, text, reason))
            except RequestError as error:  # the status is sent already
                await send(error.body())
            if wanted.include_usage:
                await send(wanted.usage_event(job.new_tokens))
            await send("[DONE]")
            await response.write_eof()
        except ConnectionResetError:
            pass  # nobody listens any more
        return response

    def _compute(self, job: _Job) -> None:
        """In the computing thread: samples, and says each piece."""
        wanted = job.wanted
        try:
            rows = Decoding(
                self.model, wanted.ids, wanted.sampling, max_new_tokens=wanted.max_new_tokens,
                seeds=[wanted.seed + row for row in range(len(wanted.ids))],
            )  # fmt: skip
            streams = [TextStream(self._tokenizer, wanted.stop) for _ in wanted.ids]
            ended: set[int] = set()
            for row, token in rows:
                if job.gone.is_set():
                    return
                job.new_tokens += 1
                piece = streams[row].add(token)
                if streams[row].stopped:
                    rows.finish(row)
                if row in rows.reasons:
                    piece += streams[row].end()
                    ended.add(row)
                job.say((row, piece, rows.reasons.get(row)))
            for row in sorted(set(rows.reasons) - ended):
                job.say((row, streams[row].end(), rows.reasons[row]))
            job.say(None)
        except Exception as error:
            job.say(error)
            if not isinstance(error, NonFiniteError):
                raise


async def _events(job: _Job) -> AsyncIterator[tuple[int, str, str | None]]:
    """What the computing thread says, until it is through. Raises RequestError (500) for what went wrong there."""
    while (said := await job.said.get()) is not None:
        if isinstance(said, NonFiniteError):
            raise RequestError(str(said), status=500)
        if isinstance(said, Exception):
            raise RequestError(f"the model failed: {type(said).__name__}", status=500)
        yield said
