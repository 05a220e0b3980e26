"""Whether a CUDA graph can hold a decode step: one in which the host waits for nothing that the device finds out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from harness.execution.decode_loop import DecodeLoop
from harness.model.view import View

# Operators whose result's size or value the host has to know.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "repeat_interleave")
_COPIES = ("_to_copy", "copy_")
_BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")


class HostReadError(RuntimeError):
    """A step in which the host waits for the device."""


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and (what := _read(name, args, kwargs or {})):
            raise HostReadError(f"the host {what} ({name})")
        return func(*args, **(kwargs or {}))


def _read(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What an operator needs the host for, in words, or None."""
    if name in _READS:
        return "waits for what the device finds"
    if name in _COPIES:
        there = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        there |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
        return "and the device copy to each other" if len(there) > 1 else None
    if name in _BY_INDEX and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] or ()):
        return "waits for how many a mask chooses"
    return None


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Raises `HostReadError` where an operator inside makes the host wait for the device; on a CPU, where it would."""
    with _NoHostReads():
        yield


@torch.no_grad()
def not_captured(view: View, attach: Callable[[], AbstractContextManager[Any]], prompt: Tensor) -> str | None:
    """Why a step that is attached can't be held in a CUDA graph, or None: tried with the last token of a prompt.

    prompt: int64 [batch, tokens], on the GPU.
    """
    with attach():
        cache = StaticCache(config=view.model.config, max_cache_len=prompt.shape[1] + 1)
        view.model(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        tried = DecodeLoop(view, cache, prompt[:, -1:], graph=False)
        try:
            with no_host_reads():
                tried.step()
            DecodeLoop(view, cache, prompt[:, -1:], graph=True)
        except RuntimeError as error:  # HostReadError, or what CUDA says of it
            return str(error).splitlines()[0]
    return None
