"""`cpet-bench init [FILE]`."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from ..errors import InputError, StopError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="matrix.yaml", help="where to write it (default: matrix.yaml)")


def run(args: argparse.Namespace) -> int:
    target = Path(args.file)
    text = files("cpet_bench.cli").joinpath("first.yaml").read_text()
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise InputError(f"{target} is there already; nothing was written.", key="FILE") from None
    except OSError as error:
        raise StopError(f"Cannot write {target}: {error.strerror or error}.") from error
    print(f"Wrote {target}. See what it takes with: cpet-bench plan {target}")
    return 0
