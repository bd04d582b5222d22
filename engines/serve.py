"""python -m engines.serve: an engine behind OpenAI's HTTP API.

    python -m engines.serve --engine out/engines/ort/sparse
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

/v1/chat/completions and /v1/completions (streaming or not), /v1/models, /health. Requests that run at the same time
share the engine's calls (continuous batching). Ctrl-C or SIGTERM lets running requests finish for --grace seconds, or
until the second Ctrl-C; then they end with an error.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence

from dsa_export.cli import UserError, console, not_negative, positive, run
from engines.generate import add_engine_arguments
from engines.memory import MIB
from engines.prefix_cache import SHORTEST
from engines.session import open_runner, slots_of
from engines.text import Text

MAX_BODY_BYTES = 8 * 2**20


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        from engines.app import Server, create_app
        from engines.scheduler import Scheduler
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install 'dsa-toolchain[serve]'") from None
    address = listen(args.host, args.port)
    runner = open_runner(args.engine, threads=args.threads)
    engine = runner.engine
    slots = args.slots or engine.limits.max_batch
    if slots > engine.limits.max_batch:
        raise UserError(
            f"--slots {slots}: {engine.folder} was built for {engine.limits.max_batch} rows (engines.build --max-batch)"
        )
    prefix_cache = engine.limits.max_context if args.prefix_cache is None else args.prefix_cache
    if 0 < prefix_cache < (least := slots_of(engine, SHORTEST)):
        raise UserError(f"--prefix-cache {prefix_cache} would keep nothing: the least that is kept is {least} tokens")
    scheduler = Scheduler(runner, slots=slots, queue=args.queue, prefix_cache=prefix_cache)
    model = args.model_name or f"{engine.folder.resolve().name}-{engine.precision}"
    app = create_app(scheduler, Text(engine), model=model, max_body=args.max_body_bytes)
    host, port = address.getsockname()[:2]

    def size(tokens: int) -> str:
        return f"{tokens * engine.cache_bytes_per_token() / MIB:,.0f} MiB"

    console.print(
        f"Serving {engine.folder} at http://{f'[{host}]' if ':' in host else host}:{port}/v1: {slots} requests at a "
        f"time, {engine.limits.max_context} tokens each, {args.queue} more may wait; caches take "
        f"up to {size(scheduler.most_cache_slots)}, those of ended requests {size(prefix_cache)}. Ctrl-C stops"
    )
    try:
        Server(app, scheduler, args.grace).run(sockets=[address])
    except KeyboardInterrupt:  # uvicorn has finished its graceful stop and passes the signal on
        console.print("Stopped")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m engines.serve", description=summary.partition(": ")[2], epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_engine_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; there is no authentication (default: %(default)s)")
    add("--port", type=not_negative, default=8000, help="0 chooses a free one (default: %(default)s)")
    add(
        "--slots",
        type=positive,
        metavar="N",
        help="requests that run at the same time (default: the engine's rows)",
    )
    add(
        "--queue",
        type=not_negative,
        default=32,
        metavar="N",
        help="requests that may wait; more get 429 (default: %(default)s)",
    )
    add(
        "--prefix-cache",
        type=not_negative,
        metavar="TOKENS",
        help="tokens of ended requests whose caches are kept beside those of running ones: a prompt that begins like "
        "one of them, as every turn of a conversation does, is computed from where it differs. Answers may differ by "
        "rounding (with --dense-slots also because a shorter request attended to everything), and usage tells any "
        "client what others have sent. 0: compute every prompt anew (default: the engine's context)",
    )
    add(
        "--grace",
        type=not_negative,
        default=30,
        metavar="SECONDS",
        help="for running requests at a stop (default: %(default)s)",
    )
    add("--model-name", metavar="NAME", help="what /v1/models says (default: the engine folder's name and precision)")
    add("--max-body-bytes", type=positive, default=MAX_BODY_BYTES, metavar="N", help="(default: %(default)s)")
    return parser.parse_args(argv)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the engine is loaded. Raises UserError if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that is no host's
        raise UserError(f"cannot listen on {host}:{port}: {error}") from None


if __name__ == "__main__":
    run(main)
