"""Every kernel compiled ahead of time, without a GPU: registers, shared memory and spills.

The variants are those that the engine launches on representative problems: their launches are
recorded on tensors without memory, and compiled as Triton would compile them on a device.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hvpfast.backends.probes.triton import draw_by_triton
from hvpfast.backends.triton.activations import JETS
from hvpfast.backends.triton.linearization import Linearization
from hvpfast.backends.triton.penalty import Penalty
from hvpfast.backends.triton.state import MOST_CLASSES
from hvpfast.backends.triton.tangents import hvp, quadratic
from hvpfast.backends.triton.third_order import hvp_vjp
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.triton_launch import Launch, recording

CAPABILITIES = (80, 90)
DTYPES = (torch.float32, torch.float64)
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64"}


@dataclass(frozen=True)
class KernelRecord:
    """One variant of a kernel on one architecture, as its binary says."""

    kernel: str
    variant: str  # the terms that are absent, and the compile-time arguments
    dtype: str
    capability: int
    num_warps: int
    registers: int  # per thread
    shared_bytes: int  # per program
    spill_stores: int  # instructions that write registers to local memory, and read them back
    spill_loads: int


@dataclass(frozen=True)
class Problem:
    """A shape whose launches are compiled: M models, N samples, K tangents."""

    spec: MLPSpec
    M: int
    N: int
    K: int
    ggn: bool = False  # products of the ggn too, beside those of the Hessian
    precision: str = "ieee"  # of float32 products


def problems(dtype: torch.dtype) -> list[Problem]:
    """Shapes that meet every kernel, every activation, small and large tiles, and torch's GEMMs."""
    tiles = [
        Problem(MLPSpec((40, 32, 10), "tanh"), 451, 64, 4, ggn=True),
        Problem(MLPSpec((3072, 256, 100), "tanh"), 1, 64, 3),
        Problem(MLPSpec((128, 128, 128, 10), "relu"), 8, 256, 2, ggn=True),
        Problem(MLPSpec((784, 1024, 512, 10), "tanh"), 1, 512, 1),
    ]
    if dtype is torch.float32:
        tiles += [replace(problem, precision="tf32x3") for problem in tiles]
    return [
        *tiles,
        *(Problem(MLPSpec((40, 32, 10), a), 451, 64, 4, ggn=a == "relu") for a in JETS),
        Problem(MLPSpec((128, 128, 10), "gelu", "mse", bias=False), 64, 256, 2),
        Problem(MLPSpec((40, 32, 10), reduction="sum"), 451, 64, 4),
        Problem(MLPSpec((20, 1000), class_weights=(1.0,) * 1000, label_smoothing=0.1), 1, 512, 2),
        Problem(MLPSpec((8, MOST_CLASSES[dtype])), 1, 64, 2),
    ]


def launches(problem: Problem, dtype: torch.dtype) -> list[Launch]:
    """What every operation of the contract launches on a problem; nothing is run."""
    spec, M, N, K = problem.spec, problem.M, problem.N, problem.K

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    y = meta(M, N, spec.sizes[-1])
    if spec.loss == "cross_entropy":
        y = torch.empty(M, N, dtype=torch.int64, device="meta")
    tangents = meta(M, K, spec.num_params)
    with recording() as recorded:
        params, x = meta(M, spec.num_params), meta(M, N, spec.sizes[0])
        lin = Linearization(spec, params, x, y, 3, problem.precision)
        lin.gradient()
        for ggn in (False, True)[: 1 + problem.ggn]:
            hvp(lin, tangents, ggn)
            quadratic(lin, tangents, ggn)
            hvp_vjp(lin, tangents, tangents, ggn)
            Penalty(lin, tangents, ggn).gradient(1.0, 1.0)
        for distribution in ("rademacher", "normal"):
            for first in (0, torch.empty((), dtype=torch.int64, device="meta")):
                draw_by_triton(tangents, distribution, 0, first)
    return recorded


def kernel_records(
    chosen: Iterable[Problem] | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
    capabilities: Iterable[int] = CAPABILITIES,
    largest_only: bool = False,
) -> list[dict[str, Any]]:
    """Compile every variant that the problems launch; one record each, see :class:`KernelRecord`.

    Args:
        chosen: what is launched; None: :func:`problems`.
        dtypes: of the tensors.
        capabilities: 80 for sm_80, and so on.
        largest_only: of each kernel only the variant with the most terms and the largest tile.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels cannot be compiled.
        triton.CompilationError: a kernel does not compile.
    """
    capabilities = tuple(capabilities)
    records = []
    for dtype in dtypes:
        variants: dict[tuple[str, str, int], Launch] = {}
        for problem in problems(dtype) if chosen is None else chosen:
            for launch in launches(problem, dtype):
                variants.setdefault(
                    (launch.kernel.__name__, _variant(launch), _num_warps(launch)), launch
                )
        if largest_only:
            variants = {(key[0], "", 0): variants[key] for key in sorted(variants, key=_size)}
        for launch in variants.values():
            records += [asdict(record(launch, dtype, c)) for c in capabilities]
    return records


def _num_warps(launch: Launch) -> int:
    return int(launch.constants.get("num_warps", 4))


def _parameters(launch: Launch) -> Iterator[tuple[str, Any, bool]]:
    """(name, value, whether it is a compile-time argument) of each parameter in order."""
    names = launch.kernel.arg_names
    yield from ((n, v, v is None) for n, v in zip(names, launch.arguments, strict=False))
    for name in names[len(launch.arguments) :]:
        yield name, launch.constants[name], True


def _size(key: tuple[str, str, int]) -> tuple[int, int]:
    """The order of variants: terms that are there, then entries of a tile."""
    absent = re.match(r"without (\S+)", key[1])
    entries = math.prod(int(n) for n in re.findall(r"(?:ROWS|COLUMNS|CLASSES)=(\d+)", key[1]))
    return -(absent[1].count(",") + 1) if absent else 0, entries


def _variant(launch: Launch) -> str:
    absent = [name for name, value, _ in _parameters(launch) if value is None]
    constants = [
        f"{name}={getattr(value, '__name__', value)}"
        for name, value, constant in _parameters(launch)
        if constant and value is not None
    ]
    return " ".join([*(["without " + ",".join(absent)] if absent else []), *constants])


def compiled(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel of a launch, with its ``asm`` and ``metadata``.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
        triton.CompilationError: it does not compile.
    """
    kernel = launch.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    signature, constants, attributes = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, (name, value, constant) in enumerate(_parameters(launch)):
        specialised = kernel.params[i].do_not_specialize is False
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                attributes[(i,)] = aligned
        elif constant or (value == 1 and specialised):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(i,)] = aligned
    options = {k: v for k, v in launch.constants.items() if k not in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


def record(launch: Launch, dtype: torch.dtype, capability: int) -> KernelRecord:
    """What the binary of a launch says; the errors are those of :func:`compiled`."""
    binary = compiled(launch, capability)
    registers, code = _disassembled(binary.asm["cubin"])
    return KernelRecord(
        launch.kernel.__name__,
        _variant(launch),
        _TYPES[dtype],
        capability,
        _num_warps(launch),
        registers,
        binary.metadata.shared,
        len(re.findall(r"\bSTL\b", code)),
        len(re.findall(r"\bLDL\b", code)),
    )


def _disassembled(cubin: bytes) -> tuple[int, str]:
    """Registers of the one kernel of a binary, and its code where it has local memory.

    Without local memory there are no instructions that access it, and disassembling takes half of
    the time of compiling.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        found = re.search(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump does not show the kernel: {usage}")
        registers, *local_bytes = map(int, found.groups())
        if not any(local_bytes):
            return registers, ""
        code = _cuobjdump("--dump-sass", file.name)
    if "EXIT" not in code:
        raise RuntimeError(f"cuobjdump does not show the kernel: {code}")
    return registers, code


def _cuobjdump(*words: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
