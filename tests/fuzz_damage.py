"""Damage for whole files: bytes flipped, cut out or put in, other nodes, other columns; and words of command lines."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hypothesis import strategies as st

WORDS = [
    "_target_",
    "os.system",
    "methods.teal.Teal",
    "../../x",
    "/etc/passwd",
    "done",
    "failed",
    "running",
    "teal",
    "\ud800",
]

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([2**70, -1, 1e308, *WORDS])
    | st.text(max_size=8)
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def altered_bytes(draw: Any, whole: bytes) -> bytes:
    """The bytes with one to three changes; most of them small, some of them cuts."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "put", "repeat", "zeros", "tail"]))
        length = draw(st.integers(1, 64))
        if kind == "flip" and content:
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "put":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif kind == "zeros":
            content[at : at + length] = bytes(length)
        elif content:  # where Parquet keeps its facts
            place = max(0, len(content) - 1 - at % 2000)
            content[place] ^= draw(st.integers(1, 255))
    return bytes(content)


@st.composite
def altered_tree(draw: Any, whole: Any) -> Any:
    """The tree with one to three nodes replaced, renamed or gone."""
    tree = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        tree = _alter(draw, tree, draw(st.integers(0, 4)))
    return tree


def _alter(draw: Any, node: Any, depth: int) -> Any:
    if not depth or not isinstance(node, dict | list) or not node:
        return draw(trees)
    if isinstance(node, list):
        at = draw(st.integers(0, len(node) - 1))
        return [_alter(draw, inner, depth - 1) if place == at else inner for place, inner in enumerate(node)]
    key = draw(st.sampled_from(sorted(node)))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "gone", "renamed", "more"]))
    if kind == "inside":
        return node | {key: _alter(draw, node[key], depth - 1)}
    rest = {name: inner for name, inner in node.items() if name != key} if kind != "more" else node
    return rest if kind == "gone" else rest | {draw(st.sampled_from(WORDS) | st.text(max_size=6)): node[key]}


@st.composite
def altered_table(draw: Any, whole: pd.DataFrame) -> pd.DataFrame:
    """Some rows of the table, with one to three columns gone, renamed, doubled, retyped or filled anew."""
    count = draw(st.integers(0, min(6, len(whole))))
    frame = whole.head(count).copy()
    for _ in range(draw(st.integers(1, 3))):
        if not len(frame.columns):
            break
        name = draw(st.sampled_from(list(frame.columns)))
        kind = draw(st.sampled_from(["gone", "renamed", "filled", "filled", "one", "order", "text"]))
        if kind == "gone":
            frame = frame.drop(columns=name)
        elif kind == "renamed":
            frame = frame.rename(columns={name: f"{name}_"})
        elif kind == "order":
            frame = frame[list(frame.columns)[::-1]]
        elif kind == "text":
            frame[name] = frame[name].astype("string")
        elif kind == "one" and len(frame):
            values = frame[name].astype(object).tolist()
            values[draw(st.integers(0, len(values) - 1))] = draw(_values)
            frame[name] = values
        else:
            frame[name] = [draw(_values)] * len(frame)
    return frame


_texts = st.sampled_from([word for word in WORDS if word.isascii()]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)
_values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | _texts


def parquet(frame: pd.DataFrame) -> bytes:
    """The table as a file; as texts where its values are of several types."""
    try:
        return _parquet(frame)
    except (TypeError, ValueError):  # pyarrow's ArrowInvalid is one
        return _parquet(frame.astype("string"))


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def files(whole: bytes, path: Path) -> st.SearchStrategy[bytes]:
    """Damaged contents of a file of this kind."""
    damage = altered_bytes(whole)
    if path.suffix == ".json":
        damage |= altered_tree(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
    elif path.suffix == ".yaml":
        told = functools.partial(yaml.safe_dump, allow_unicode=False)
        damage |= altered_tree(yaml.safe_load(whole)).map(lambda tree: told(tree).encode("utf-8", "surrogatepass"))
    elif path.suffix == ".parquet":
        damage |= altered_table(pd.read_parquet(path)).map(parquet)
    elif path.suffix == ".csv":
        frame = pd.read_csv(path, nrows=40)
        damage |= altered_table(frame).map(lambda frame: frame.to_csv(index=False).encode("utf-8", "surrogatepass"))
    return damage


KEYS = """
method model tasks probe sparsity scope phase seed dtype device batch_size dense_prefix tasks.limit tasks.names workers
tasks.num_fewshot calibration.tokens calibration.window calibration.path calibration.text probe.names on_error x
probe.latency.batch probe.perplexity.windows method.teal.sparsity method.teal.weighted method.teal._target_
model.source model.adapter experiment size sweeps archived results +method.mine._target_ ~tasks model.path
""".split()
VALUES = """
teal dense random cats [relu,teal] [dense,dense] 0.5 1.5 -1 nan inf null true [] {} [1,2] {a:1} a,b 0.1,0.2
../../etc os.system antigravity.x methods.teal.Teal methods.nothing.X search quality [quality] [piqa,sciq] none cpu
range(1,3) piqa cuda:99 bfloat16 '' '[' ${sparsity} ${nothing} ${grid.models} ??? 1e400 glob(*) choice(1,2) embedded
hub shape local
""".split()
words = st.lists(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=8))
    | st.text(max_size=12),
    max_size=5,
)
