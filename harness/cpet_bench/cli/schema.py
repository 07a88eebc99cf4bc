"""`cpet-bench schema [matrix|record]`."""

from __future__ import annotations

import argparse
import json


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=["matrix", "record"], default="matrix", help="default: matrix")


def run(args: argparse.Namespace) -> int:
    if args.what == "matrix":
        from ..schema import matrix_schema as schema
    else:
        from ..records import record_schema as schema
    print(json.dumps(schema(), indent=1))
    return 0
