"""Tasks: what identifies one, and lm-eval's task objects made from it.

`task_spec` is called while planning: it imports neither torch nor lm-eval. `load_tasks` is for the worker.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, StepFailed, StopError
from ..settings import PromptSettings, TaskSettings
from .catalogue import closure, lm_eval_folder, lm_eval_tasks, metric_names, our_folder
from .task_files import FUNCTION, file_hash, foreign_metrics, functions, localise, read_yaml, yaml_files

FEWSHOT_SEED = 1234  # lm-eval's own default
FOLDER = "${folder}"  # in a key, the user's task folder: the same files have the same key wherever they lie


def task_spec(task: TaskSettings, name: str, base: Path, allow_code: bool = False) -> dict[str, Any]:
    """All that identifies a task, as JSON: enough to load it again, and hashed into keys.

    Args:
        task, name: the task's settings and lm-eval's name of it. base: the folder that `include` is relative to.
        allow_code: whether task files of the user may name Python functions.

    Returns:
        name, origin (`folder`, `cpet_tasks`, `lm_eval`), split, and by origin: the configurations of the tasks and groups
        that it needs, content hashes of data and code files, the user's folder, names taken from lm-eval.

    Raises InputError for an unknown name, an unreadable file, data that is missing, or code that is not allowed.
    """
    spec: dict[str, Any] = {"name": name, "split": task.split}
    folders = [("cpet_tasks", our_folder())]
    if task.include:
        folder = (Path(base) / task.include).resolve()
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}", key="task.include")
        folders.insert(0, ("folder", folder))
    known: list[str] = []
    for origin, folder in folders:
        table = _table(folder)
        if name in table:
            return spec | _describe(origin, folder, table, name, allow_code or origin == "cpet_tasks")
        known += table
    own = lm_eval_tasks()
    if name in own:
        return spec | {"origin": "lm_eval", "external": [name]}
    raise InputError(f"There is no task {name!r}.", key="task", given=name, allowed=[*known, *own])


def portable(spec: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A spec in which FOLDER stands for the user's task folder, and that folder; `placed` is the way back."""
    folder = spec.get("folder")
    return (_moved(spec, folder, FOLDER), folder) if folder else (spec, None)


def placed(spec: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """The spec of a portable one, whose task folder is `folder` on this machine."""
    return _moved(spec, FOLDER, folder) if folder else spec


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_moved(k, old, new): _moved(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, old, new) for v in value]
    inside = isinstance(value, str) and (value == old or value.startswith(old + "/"))
    return new + value[len(old) :] if inside else value


def _table(folder: Path) -> dict[str, dict[str, Any]]:
    """Tasks, groups and tags of a folder of task files: name → kind, file, config, members."""
    table: dict[str, dict[str, Any]] = {}
    for file in yaml_files(folder):
        config = read_yaml(file)
        kind = "py_task" if "class" in config else "group" if "group" in config else "task"
        name = config.get("group" if kind == "group" else "task")
        if not isinstance(name, str) or name in table:
            continue
        members = _members(config.get("task")) if kind == "group" else []
        table[name] = {"kind": kind, "file": file, "config": config, "members": members}
    for name, entry in list(table.items()):
        if entry["kind"] != "group":
            tags = entry["config"].get("tag") or []
            for tag in tags if isinstance(tags, list) else [tags]:
                table.setdefault(tag, {"kind": "tag", "members": []})["members"].append(name)
    return table


def _members(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        own = [value[k] for k in ("task", "group") if isinstance(value.get(k), str)]
        return own + (_members(value["task"]) if isinstance(value.get("task"), list) else [])
    return [n for v in value for n in _members(v)] if isinstance(value, list) else []


def _describe(origin: str, folder: Path, table: dict, name: str, allow_code: bool) -> dict[str, Any]:
    """The part of a spec that says what files of a folder define a task or group."""
    names = closure({k: [v["kind"], None, v["members"]] for k, v in table.items()}, name)
    configs, files, code = {}, {}, {}
    for at in names:
        entry = table[at]
        if entry["kind"] == "tag":
            continue
        file = entry["file"]
        config, data = localise(entry["config"], file.parent, file)
        used = functions(config)
        if used and not allow_code:
            raise InputError(
                f"this task file names Python code ({FUNCTION} {used[0]}); it runs only where the matrix says "
                "allow_code: true",
                file=file,
            )
        if (config.get("dataset_kwargs") or {}).get("trust_remote_code") and not allow_code:
            raise InputError("trust_remote_code needs allow_code: true in the matrix", file=file)
        foreign = foreign_metrics(config, metric_names())
        if foreign and not allow_code:  # lm-eval hands them to `evaluate`, which runs the script of that name
            message = f"{foreign[0]!r} is no metric of lm-eval itself; its code needs allow_code: true in the matrix"
            raise InputError(message, file=file, key="metric_list", given=foreign[0], allowed=metric_names())
        if ".yaml" in str(config.get("use_prompt")):
            raise InputError("prompts out of another file are not followed: write doc_to_text", file=file, key="use_prompt")
        configs[at] = config
        if used or origin == "folder" and allow_code:
            code |= {p.resolve(): file_hash(p) for p in sorted(file.parent.glob("*.py"))}
        files |= {str(p.resolve()): file_hash(p) for p in data}
    external = sorted({m for at in names for m in table[at]["members"]} - set(table))
    found: dict[str, Any] = {"origin": origin, "tasks": configs, "code": bool(code) and origin == "folder"}
    if origin == "folder":
        found |= {"folder": str(folder), "files": files | {str(p): h for p, h in code.items()}}
    else:  # part of this package: no place on this machine may enter the key
        found["files"] = {p.name: h for p, h in code.items()}
    if external:
        inline = {m for at in names for m in _inline(configs.get(at, {}))}
        own = lm_eval_tasks() if set(external) - inline else {}
        for member in external:
            if member not in own and member not in inline:
                allowed = [*table, *own]
                raise InputError(f"{name} needs the task {member!r}, which there is not", given=member, allowed=allowed)
        found["external"] = [m for m in external if m in own]
    return found


def _inline(config: dict[str, Any]) -> list[str]:
    """Tasks and groups that a group defines inside itself."""
    found: list[str] = []
    for item in config.get("task") if isinstance(config.get("task"), list) else []:
        if isinstance(item, dict):
            if isinstance(item.get("task"), str) and set(item) & {"dataset_path", "output_type", "doc_to_text"}:
                found.append(item["task"])
            if "group" in item and isinstance(item.get("task"), list):
                found += [item["group"], *_inline(item)]
    return found


# -- in the worker ---------------------------------------------------------------------------------------------------
def load_task(spec: dict[str, Any], prompt: PromptSettings, tokenizer=None) -> dict[str, Any]:
    """lm-eval's Task objects by name; see load_tasks."""
    return load_tasks(spec, prompt)["tasks"]


def load_tasks(spec: dict[str, Any], prompt: PromptSettings, split: str | None = None) -> dict[str, Any]:
    """lm-eval's `{"tasks": …, "groups": …, "group_map": …}` for a spec, ready for `evaluate()`.

    Few-shot counts and seeds are set as lm-eval's `simple_evaluate` sets them (a task that says 0 keeps 0).

    Args:
        split: which split stands in for the scored one: None takes the spec's; `train` for making training examples.

    Raises InputError where the split is not there, StopError where data cannot be reached, StepFailed where files changed.
    """
    from lm_eval.tasks import TaskManager

    folder = our_folder() if spec["origin"] == "cpet_tasks" else Path(spec["folder"]) if "folder" in spec else None
    _unchanged(spec, folder)
    places = _top([lm_eval_folder() / p for p in _paths(spec.get("external", []))])
    manager = TaskManager(include_path=[*places, folder] if folder else places, include_defaults=False)
    for name, config in spec.get("tasks", {}).items():
        entry = manager.task_index.get(name)
        if entry is None:
            raise StepFailed(f"the task {name} is no longer in {folder}")
        if not functions(config):
            entry.cfg, entry.yaml_path = config, None
        elif localise(read_yaml(entry.yaml_path), entry.yaml_path.parent, entry.yaml_path)[0] != config:
            raise StepFailed(f"{entry.yaml_path} is not what it was when the run was planned")
        elif spec["origin"] == "folder":
            from lm_eval.tasks._yaml_loader import load_yaml

            resolved = load_yaml(entry.yaml_path, resolve_func=True)
            places_of_data = {k: config[k] for k in ("dataset_kwargs", "dataset_path") if k in config}
            entry.cfg, entry.yaml_path = {**resolved, **places_of_data}, None
    if spec["origin"] == "folder" and not spec.get("code"):
        _sandbox_templates()
    with _seeded(), _reachable(spec["name"]):
        loaded = manager.load([spec["name"]])
    for task in loaded["tasks"].values():
        _set_fewshot(task, prompt.fewshot)
        _set_split(task, split or spec["split"])
    return loaded


def _paths(names: list[str]) -> list[Path]:
    """Folders of lm-eval's own that hold the named tasks and their members."""
    if not names:
        return []
    table = lm_eval_tasks()
    return [Path(table[n][1]).parent for name in names for n in closure(table, name) if table[n][1]]


def _top(folders: list[Path]) -> list[Path]:
    """Without folders that lie inside others."""
    unique = sorted(set(folders))
    return [f for f in unique if not any(o in f.parents for o in unique)]


def _unchanged(spec: dict[str, Any], folder: Path | None) -> None:
    for name, expected in spec.get("files", {}).items():
        path = Path(name) if Path(name).is_absolute() else folder / name
        if not path.is_file() or file_hash(path) != expected:
            raise StepFailed(f"{path} is not what it was when the run was planned")


def _sandbox_templates() -> None:
    """Templates of a user's task files are rendered without access to Python's internals, as they may not run code."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        safe = SandboxedEnvironment(loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True)
        safe.filters |= utils.env.filters
        utils.env = safe


@contextmanager
def _seeded():
    """lm-eval's own seeds for tasks that draw while they load, and the state before afterwards."""
    import numpy as np

    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def _reachable(name: str):
    """No network becomes a StopError, a data set that does not exist an InputError."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"the data of task {name} was not found: {_last(error)}", key="task") from error
    except ConnectionError as error:
        raise StopError(f"the data of task {name} could not be fetched (is there a network?): {_last(error)}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _last(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _set_fewshot(task, count: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (count is not None and own != 0):
        task.set_config(key="num_fewshot", value=count or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _set_split(task, split: str) -> None:
    """Make `split` what lm-eval scores; `test` leaves the task as it is (validation, where it has no test split)."""
    if split == "test":
        return
    key = {"train": "training_split", "validation": "validation_split"}.get(split)
    named = task.get_config(key) if key else split
    if named is None or (not key and named not in (getattr(task, "dataset", None) or {})):
        has = [s for s in ("training", "validation", "test") if task.get_config(f"{s}_split")]
        raise InputError(f"task {task.task_name} has no {split} split (it has: {', '.join(has) or 'none'})", key="task.split")
    task.set_config(key="test_split", value=named)
    shots = getattr(task, "fewshot_cfg", None)
    if split == "train" and shots is not None and shots.split is None:
        shots.split = named  # so that lm-eval never shows a document its own answer
