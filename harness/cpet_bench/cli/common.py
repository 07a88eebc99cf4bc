"""Options that several verbs share."""

from __future__ import annotations

import argparse


def matrix_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("matrix", metavar="MATRIX", help="the matrix file (YAML)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="AXIS=NAME", help="only these cells; repeat, lists and globs work"
    )
    parser.add_argument("--name", help="name of the run (default: the matrix's)")
    parser.add_argument("--devices", help="devices, as in cuda:0,cuda:1 or cpu (default: the matrix's)")
    folders(parser)


def folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="where artifacts are kept: a folder or an fsspec URL (default: the user's cache)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")


def prepared(args: argparse.Namespace):
    """The matrix of the command line, read, checked and planned."""
    from ..runner import prepare

    devices = args.devices.split(",") if args.devices else None
    return prepare(
        args.matrix, only=tuple(args.only), store=args.store, runs=args.runs, name=args.name, device=devices
    )
