"""Serve a web page that draws pictures from an exported model, on this machine unless told otherwise."""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.errors import ConfigError
from megarq.inference.generator import BATCH, ImageGenerator
from megarq.inference.options import DRAWING_DTYPES
from megarq.page.access import Passwords, check_host
from megarq.page.page import Page

EXAMPLE = """examples:
  python tools/demo_app.py runs/demo/model
  python tools/demo_app.py models/cc3m --device cuda --dtype bf16 --host 0.0.0.0 --password-file passwords.txt"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folder", metavar="FOLDER", type=Path, help="an exported model")
    arguments.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    arguments.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    arguments.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="lines of user:password, or one password for any user; needed where others can reach the host",
    )
    arguments.add_argument(
        "--max-count", type=int, default=16, metavar="N", help="pictures of one drawing, at most (default: %(default)s)"
    )
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: cpu)")
    arguments.add_argument(
        "--dtype", choices=DRAWING_DTYPES, default="fp32", help="of the RQ-Transformer (default: fp32)"
    )
    return arguments


def serve(page: Page, folder: Path, options: argparse.Namespace, passwords: Passwords | None) -> None:
    """Serve until this process is interrupted or terminated; files are kept in `folder`."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}  # before gradio is imported
    try:
        from megarq.page import layout
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the web page needs {error.name}, which is missing. Run `pip install megarq[app]`."
        ) from None
    blocks = layout.build(page, folder, f"MegaRQ: {options.folder.resolve().name}")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        layout.launch(blocks, page, options.host, options.port, passwords)
    except OSError:
        raise ConfigError(f"--port {options.port} of {options.host} cannot be used. Give another --port.") from None
    print(f"http://{options.host}:{options.port}", flush=True)
    ended.wait()
    page.close()
    blocks.close(verbose=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(argv)
    check_host(options.host, options.password_file)
    if not 1 <= options.max_count <= BATCH:
        raise ConfigError(f"--max-count {options.max_count}: give 1 to {BATCH}.")
    passwords = None if options.password_file is None else Passwords(options.password_file)
    generator = ImageGenerator.from_pretrained(options.folder, options.device, DRAWING_DTYPES[options.dtype])
    with tempfile.TemporaryDirectory(prefix="megarq-page-") as folder:
        serve(Page(generator, options.max_count), Path(folder), options, passwords)


if __name__ == "__main__":
    sys.exit(cli.run(main))
