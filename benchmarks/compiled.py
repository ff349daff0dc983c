"""Compiles a step and reads what the compiler says of it: memory, arithmetic, collectives with their bytes.

Used by benchmarks/aot.py.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_OPERATION = re.compile(
    r"""^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>[^"]*?) (?P<kind>""" + "|".join(KINDS) + r""")(?P<start>-start)?\("""
)
_ROOT = re.compile(r"^\s*ROOT %?[\w.-]+ = (.*?) [\w-]+\(")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .*)?\{$")
_ARRAY = re.compile(r"\b(?P<type>[a-z]+\d*\w*)\[(?P<sizes>[\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
# What calls computations that run kernels of their own; a fusion is one kernel.
_SEQUENCES = re.compile(
    r"(?:\b(?:body|branch_computations|called_computations|true_computation|false_computation)| call\(.*\), to_apply)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>[a-z][\w-]*)\((?P<rest>.*)")
_NO_KERNELS = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")
_TURNS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CHAIN = re.compile(r'chain_id="?(\w+)')
_GROUPS = re.compile(r"replica_groups=(?:\{\{(?P<first>[\d,]*)\}|\[(?P<groups>\d+),(?P<size>\d+)\])")
_MESH = re.compile(r"replica_groups=@?mesh\w*\[(?P<axes>[^\]]*)\] ?\{(?P<named>[^}]*)\}")


class Collective(NamedTuple):
    """An exchange between devices.

    Attributes:
      kind: one of ``KINDS``.
      shape: types and sizes of its results on one device.
      bytes: of its results on one device.
      group: number of devices that exchange.
      count: how often it runs in one run of the program.
    """

    kind: str
    shape: str
    bytes: int
    group: int
    count: int

    @property
    def received(self) -> float:
        """Bytes that a device has to receive, all runs together, by the best algorithm (a ring)."""
        rest = (self.group - 1) / self.group
        share = {"all-reduce": 2 * rest, "reduce-scatter": self.group - 1, "collective-permute": 1.0}
        return self.count * self.bytes * share.get(self.kind, rest)


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a compiled program, equal ones as one entry; the most bytes first.

    Args:
      text: the program as the compiler prints it.
      devices: number of devices, the group of a collective that names none.
    """
    bodies, entry = _computations(text)
    found: Counter[tuple[str, str, int, int]] = Counter()
    chains: set[tuple[str, str, str]] = set()
    for name, times in _runs(bodies, entry).items():
        for line in bodies[name]:
            if (match := _OPERATION.match(line)) is None:
                continue
            kind, arrays = match["kind"], _ARRAY.findall(match["type"])
            nested = match["type"].startswith("((")  # the all-reduce-start of jax 0.11 names operands, too
            if match["start"] and (nested or kind != "all-reduce"):
                # (operands, results, and for some kinds two or more numbers of the runtime's)
                while len(arrays) > 2 and arrays[-1] in (("u32", ""), ("s32", "")):
                    arrays.pop()
                arrays = arrays[len(arrays) // 2 :]
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                # The TPU compiler's form of a reduce-scatter: a fusion whose root is this device's part of the sum.
                kind, arrays = "reduce-scatter", _ARRAY.findall(_type_of_root(bodies[name]))
            shape = " ".join(f"{t}[{sizes}]" for t, sizes in arrays)
            if chain := _CHAIN.search(line):
                # The TPU compiler writes one collective into every fusion during which a part of it is under way.
                if (part := (chain[1], kind, shape)) in chains:
                    continue
                chains.add(part)
            found[kind, shape, sum(_bytes(*array) for array in arrays), _group(line, devices)] += times
    every = [Collective(*what, count) for what, count in found.items()]
    return sorted(every, key=lambda c: (-c.received, c))


def moved(text: str) -> int:
    """Bytes that the kernels of a GPU's program read and write: operands and results of each, loops in all their turns.

    A kernel is an instruction outside of a fusion. What one writes the next reads from memory, so this is what the
    program moves but for caches; the GPU's compiler has no such number of its own. Of an array of which a kernel reads
    or replaces a slice, the slice counts.
    """
    bodies, entry = _computations(text)
    total = 0
    for name, times in _runs(bodies, entry, _SEQUENCES).items():
        sizes: dict[str, int] = {}
        for one in _instructions(bodies[name]):
            sizes[one.name] = one.bytes
            if one.kind in _NO_KERNELS or one.kind.endswith("-done"):
                continue
            inner = bodies.get(one.fused, []) if one.kind == "fusion" else None
            total += times * _moved_by(one, [sizes.get(operand, 0) for operand in one.operands], inner)
    return total


class _Instruction(NamedTuple):
    """An instruction of a computation: its operands by name, the bytes of its result, and what it fuses."""

    name: str
    kind: str
    operands: list[str]
    bytes: int
    root: bool
    fused: str
    number: int  # of a parameter


def _instructions(body: list[str]) -> Iterator[_Instruction]:
    for line in body:
        if (match := _INSTRUCTION.match(line)) is None:
            continue
        arrays = _ARRAY.findall(match["type"])
        if match["kind"] == "custom-call" and len(arrays) > 1 and arrays[-1][0] in ("u8", "s8"):
            arrays.pop()  # room for the library to work in
        inside = match["rest"].split(")")[0]
        fused = re.search(r"\bcalls=%?([\w.-]+)", line)
        yield _Instruction(
            match["name"],
            match["kind"],
            re.findall(r"%([\w.-]+)", inside),
            sum(_bytes(*array) for array in arrays),
            line.lstrip().startswith("ROOT "),
            fused[1] if fused else "",
            int(inside) if match["kind"] == "parameter" and inside.isdigit() else -1,
        )


def _moved_by(one: _Instruction, operands: list[int], inner: list[str] | None) -> int:
    """Bytes that a kernel reads and writes; ``inner`` is the body of a fusion."""
    if one.kind == "dynamic-slice":
        return 2 * one.bytes
    if one.kind == "dynamic-update-slice":
        return 2 * operands[1] if len(operands) > 1 else 0
    written, read = one.bytes, list(operands)
    body = list(_instructions(inner or []))
    sizes = {part.name: part.bytes for part in body}
    for part in body:
        users = [user for user in body if part.name in user.operands]
        if part.kind != "parameter" or not users or part.number >= len(read):
            continue
        if all(user.kind == "dynamic-slice" and user.operands[0] == part.name for user in users):
            read[part.number] = sum(user.bytes for user in users)
        elif all(user.kind == "dynamic-update-slice" and user.operands[0] == part.name for user in users):
            update = sum(sizes.get(user.operands[1], 0) for user in users)
            read[part.number] = 0
            written += update - sum(user.bytes for user in users) if users[0].root else 0
    return max(written, 0) + sum(read)


def totals(every: list[Collective]) -> dict[str, tuple[int, float]]:
    """Number of collectives and bytes received, by kind."""
    return {
        kind: (sum(c.count for c in every if c.kind == kind), sum(c.received for c in every if c.kind == kind))
        for kind in KINDS
        if any(c.kind == kind for c in every)
    }


def largest_matrix(every: list[Collective]) -> int:
    """Number of entries of the largest array that a collective returns."""
    return max((_entries(sizes) for c in every for _, sizes in _ARRAY.findall(c.shape)), default=0)


class DoesNotFit(Exception):
    """The compiler found no way to fit a program into a chip's memory; the message says how much it wants."""


class Program(NamedTuple):
    """What the compiler says of a step on one chip, in bytes.

    Attributes:
      arguments: images, weights, state of the optimizer, which stay.
      temporaries: activations and other intermediate arrays.
      outputs: results that are not written over the arguments.
      code: the program itself.
      operations: arithmetic; the body of a loop counts once; 0: the compiler does not say (that of GPUs).
      read: bytes read and written; as the arithmetic, but for GPUs see ``moved``.
      exchanges: collectives.
      seconds: time to compile it.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int
    operations: float
    read: float
    exchanges: list[Collective]
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of the chip's memory that it needs."""
        return self.arguments + self.temporaries + self.outputs + self.code


def wanted(message: str) -> str:
    """How much memory the TPU's compiler wants, from its message."""
    sizes = re.findall(r"\b(\d[\d.]*[KMGT])\b", message)
    return f"it needs {sizes[0]}iB of {sizes[1]}iB" if len(sizes) > 1 else message.strip().splitlines()[0]


def compile_step(what, devices: int, keep: str = "") -> Program:
    """Compiles a traced step.

    Args:
      what: the traced step.
      devices: number of devices.
      keep: file for the compiled text; empty: none.

    Raises:
      DoesNotFit: if the compiler says that memory does not suffice.
    """
    start = time.perf_counter()
    try:
        program = what.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            raise DoesNotFit(wanted(str(error))) from None
        raise
    seconds = time.perf_counter() - start
    text, memory, cost = program.as_text(), program.memory_analysis(), program.cost_analysis() or {}
    if keep:
        Path(keep).write_text(text)
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        float(cost.get("flops", 0.0)),
        float(cost.get("bytes accessed", 0.0)) or float(moved(text)),
        collectives(text, devices),
        seconds,
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the one that runs first."""
    bodies: dict[str, list[str]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if line and not line[0].isspace() and (match := _HEADER.match(line)):
            body = bodies.setdefault(match["name"], [])
            entry = match["name"] if match["entry"] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None:
            body.append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str, calls: re.Pattern[str] = _CALLED) -> dict[str, int]:
    """How often each computation runs; a loop whose number of turns the compiler does not know counts once."""
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies[name]:
            if "-done(" in line or "-update(" in line:
                continue
            turns = _TURNS.search(line) if " while(" in line else None
            for called in calls.findall(line):
                for inner in re.findall(r"[\w.-]+", called):
                    if inner in bodies:
                        visit(inner, times * (int(turns[1]) if turns else 1))

    visit(entry, 1)
    return dict(runs)


def _type_of_root(body: list[str]) -> str:
    return next(match[1] for line in body if (match := _ROOT.match(line)))


def _entries(sizes: str) -> int:
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return count


def _bytes(kind: str, sizes: str) -> int:
    bits = BITS.get(kind) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind))
    return _entries(sizes) * bits // 8


def _group(line: str, devices: int) -> int:
    if match := _MESH.search(line):  # jax 0.11: the axes of the mesh, and those along which devices exchange
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match["axes"]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match["named"]))
    if (match := _GROUPS.search(line)) is None:
        return devices
    if match["size"]:
        return int(match["size"])
    return len(match["first"].split(",")) if match["first"] else devices
