"""The verbs app (the web page) and settings (prints the settings stored in a drawn picture)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bagel_compress.cli import add_json, add_trust, add_verb, emit, say, trusts

LOCAL = ("127.0.0.1", "localhost", "::1")


def register(verbs: Any) -> None:
    """Adds the parsers of app and settings."""
    app = add_verb(
        verbs, "app", "a web page to draw, edit, ask and compare two builds",
        "bagel-compress app out/nf4 --target 12gb-resident\n"
        "  bagel-compress app BAGEL-7B-MoT out/nf4 --device cuda:0,cuda:1\n"
        "  bagel-compress app out/nf4 --zh --host 0.0.0.0 --password SECRET",
    )  # fmt: skip
    app.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="checkpoint, artifact or ONNX export, or a Hub id of one; without it the page recommends one",
    )  # fmt: skip
    app.add_argument("second", metavar="MODEL2", nargs="?", help="another build, to compare with the first")
    app.add_argument("--zh", action="store_true", help="start in Chinese; the page can switch the language")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: only this machine)")
    app.add_argument("--port", type=int, default=7860, help="port (%(default)s)")
    app.add_argument("--share", action="store_true", help="a public address through Gradio's servers; needs --password")
    app.add_argument("--password", metavar="WORD", help="password that visitors have to enter, with any user name")
    app.add_argument("--device", default="auto", help="as for `generate` (%(default)s)")
    app.add_argument("--target", metavar="T", help="keep parts of the model in host memory, as this target defines")
    app.add_argument(
        "--builds", nargs="+", default=(), metavar="DIR|REPO", help="finished builds to rank on the first screen too"
    )
    add_trust(app)
    app.set_defaults(verb=_app)

    settings = add_verb(
        verbs, "settings", "print the settings stored in a drawn picture", "bagel-compress settings cat.png --json"
    )
    settings.add_argument("picture", metavar="PICTURE", type=Path, help="PNG that generate, edit or the page wrote")
    add_json(settings)
    settings.set_defaults(verb=_settings)


def _app(args: argparse.Namespace) -> int:
    import os
    import tempfile

    from bagel_compress.errors import InputError

    if (args.share or args.host not in LOCAL) and not args.password:
        how = "--share gives everybody who has the address" if args.share else f"--host {args.host} lets the network"
        raise InputError(f"{how} use this machine's model and disk; protect the page with --password WORD.")
    with tempfile.TemporaryDirectory(prefix="bagel-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads and pictures; the folder is deleted at exit
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        return _serve(args, Path(folder))


def _serve(args: argparse.Namespace, folder: Path) -> int:
    import hmac
    import signal
    import threading

    from bagel_compress.app.advice import Advisor
    from bagel_compress.app.controls import CSS, theme
    from bagel_compress.app.page import build_page
    from bagel_compress.app.session import open_models
    from bagel_compress.app.uploads import MAX_BYTES
    from bagel_compress.budgets.known_builds import known_builds

    names = [name for name in (args.model, args.second) if name is not None]
    advisor = Advisor(known_builds(args.builds, say))
    models = open_models(names, args.device, args.target, bool(names) and trusts(args, " and ".join(names)))
    page = build_page(models, folder, "zh" if args.zh else "en", advisor)
    word = args.password
    auth = None if word is None else lambda user, given: hmac.compare_digest(given.encode(), word.encode())
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    _, address, shared = page.launch(
        server_name=args.host, server_port=args.port, share=args.share, auth=auth, prevent_thread_lock=True,
        quiet=True, show_error=True, footer_links=[], max_file_size=MAX_BYTES, ssr_mode=False, theme=theme(), css=CSS,
        enable_monitoring=False, mcp_server=False, pwa=False,
    )  # fmt: skip
    say(f"{', '.join(model.name for model in models) or 'no model'}: {address}" + (f" and {shared}" if shared else ""))
    say("uploads and pictures are deleted at exit (Ctrl-C); download those that you want to keep")
    try:
        while not ended.wait(1):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)
    return 0


def _settings(args: argparse.Namespace) -> int:
    from bagel_compress.run.picture_settings import read_settings

    found = read_settings(args.picture)
    flow = found.get("flow") or {}
    lines = [f"{key:<18}{value}" for key, value in found.items() if key not in ("flow", "thinking")]
    lines += [f"{key:<18}{value}" for part in (flow, found.get("thinking") or {}) for key, value in part.items()]
    emit(args, found, "\n".join(lines))
    return 0
