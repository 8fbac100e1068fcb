"""What compiled GPU code holds: registers, spills, and the instructions of the main loop. Read from its disassembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from triton import knobs
from triton.compiler import CompiledKernel

MATRIX = re.compile(r"(HMMA|HGMMA|UTCHMMA|IMMA|v_s?mfma)\w*", re.IGNORECASE)
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
_AMD_LABEL = re.compile(r"^(\.L\w+):")
_AMD_LINE = re.compile(r"^\s+([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)\s*(.*)")


@dataclass(frozen=True)
class Loop:
    """Matrix instructions and all others in one turn of the innermost loop that holds matrix instructions."""

    matrix: int
    others: int
    tiles: int = 0  # of the others, those that load a tile by a descriptor


@dataclass(frozen=True)
class Code:
    registers: int  # per thread
    stack: int  # bytes of local memory per thread: spilled registers, or arrays
    spills: int  # instructions that store to it
    matrix: str  # name of the matrix instruction, empty without one
    loop: Loop


def read(kernel: CompiledKernel, target: str) -> Code:
    return _read_nvidia(kernel) if target.startswith("sm_") else _read_amd(kernel.asm["amdgcn"])


def _read_nvidia(kernel: CompiledKernel) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump told no register count:\n{text[:2000]}")
    lines = [(int(address, 16), name, rest) for address, name, rest in _SASS_LINE.findall(text)]
    names = [name for _, name, _ in lines]
    place = {address: n for n, (address, _, _) in enumerate(lines)}
    jumps = []
    for n, (_, name, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and place.get(int(target[1], 16), n) < n:
            jumps.append((place[int(target[1], 16)], n))
    spills = sum(name.startswith("STL") for name in names)
    return Code(int(usage[1]), int(usage[2]), spills, _matrix_name(names), main_loop(names, jumps))


def _read_amd(text: str) -> Code:
    fields = {name: int(n) for name, n in re.findall(r"\.(\w+_count|\w+_segment_fixed_size):\s+(\d+)", text)}
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps = []
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _AMD_LINE.match(line):
            if found[1].startswith(("s_cbranch", "s_branch")) and (target := found[2].split()[0]) in labels:
                jumps.append((labels[target], len(names)))
            names.append(found[1])
    return Code(
        registers=fields["vgpr_count"],  # with the accumulation registers, from gfx90a on
        stack=fields["private_segment_fixed_size"],
        spills=fields["vgpr_spill_count"] + fields["sgpr_spill_count"],
        matrix=_matrix_name(names),
        loop=main_loop(names, jumps),
    )


def _matrix_name(names: list[str]) -> str:
    found = [m[1].upper() for name in names if (m := MATRIX.match(name))]
    return max(set(found), key=found.count) if found else ""


def main_loop(names: list[str], jumps: list[tuple[int, int]]) -> Loop:
    """The shortest stretch between a jump back and its target that holds matrix instructions.

    Args:
        names: instructions in order.
        jumps: (target, jump) as indices into ``names``, the target before the jump.
    """
    bodies = [names[start : end + 1] for start, end in jumps]
    bodies = [body for body in bodies if any(MATRIX.match(name) for name in body)]
    if not bodies:
        return Loop(0, 0)
    body = min(bodies, key=len)
    matrix = sum(MATRIX.match(name) is not None for name in body)
    return Loop(matrix, len(body) - matrix, sum(name.startswith("UTMALDG") for name in body))
