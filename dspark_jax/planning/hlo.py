"""What a compiled TPU program does in one call, read from its HLO text: cycles, memory traffic, collectives.

Loops are multiplied out by their trip counts. Cycles are the estimates that the TPU compiler itself writes beside every
operation; traffic is what operations read and write in HBM (what the compiler keeps on the chip is marked in the text).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "while", "conditional"}
_VIEWS = ("bitcast", "reshape")
_SLICES = ("dynamic-slice", "slice")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
"""Operations that change their first operand in place -> which operand holds the new values."""

_MOVES = {"copy-start": 0, "slice-start": 1}
"""Operations that begin to move an array, or a part of one, onto the chip or off it -> which of the first two arrays in
their result is what arrives; the other one is where it comes from."""

_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "c64": 8}
_SHAPE = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(condition|body|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """How often a collective runs, and how many bytes it gives each chip."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How often a Pallas kernel runs, and the operations and the bytes of HBM that it states for one time."""

    count: float
    flops: float
    bytes: float

    @classmethod
    def stated(cls, instruction: "_Instruction", count: float) -> "Kernel | None":
        """That of an instruction, if it is a kernel that states anything."""
        found = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.rest)
        if found is None:
            return None
        numbers = dict(re.findall(r'"(\w+)":"(\d+)"', found[1]))
        return cls(count, float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0)))

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Time for all at a chip's full rates: computing and moving overlap in a kernel."""
        return self.count * max(self.flops / flops, self.bytes / bandwidth)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one chip does in one call.

    Attributes:
      cycles: the compiler's estimates, added up; collectives have none.
      hbm_bytes: read and written.
      collectives: by kind.
      unknown_loops: loops whose trip count could not be read; their bodies count once.
      kernels: what Pallas kernels state; the compiler gives no cycles for those.
    """

    cycles: float
    hbm_bytes: float
    collectives: dict[str, Traffic]
    unknown_loops: int
    kernels: tuple["Kernel", ...] = ()

    @property
    def sent_bytes(self) -> float:
        """Bytes that each chip sends for its collectives: an all-reduce moves everything twice."""
        return sum((2 if kind == "all-reduce" else 1) * traffic.bytes for kind, traffic in self.collectives.items())


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self, key: str) -> list[str]:
        """Computations that an attribute names."""
        found = [value for name, value in _CALLED.findall(self.rest) if name == key]
        return [name.strip().lstrip("%") for value in found for name in value.strip("{}").split(",")]


_Program = dict[str, dict[str, _Instruction]]


def program_cost(text: str) -> Cost:
    """Cost of one call of the compiled program whose `as_text()` this is."""
    entry, program = _parse(text)
    cycles = traffic = 0.0
    kernels: list[Kernel] = []
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    unknown = 0

    def visit(name: str, times: float) -> None:
        nonlocal cycles, traffic, unknown
        for instruction in program[name].values():
            operation = instruction.operation
            if operation == "while":
                trips = _trips(program, instruction.called("condition")[0])
                unknown += trips is None
                visit(instruction.called("body")[0], times * (1 if trips is None else trips))
                continue
            if operation == "conditional":
                for branch in instruction.called("branch_computations") or instruction.called("called_computations"):
                    visit(branch, times)
                continue
            if operation in ("call", "async-start"):
                for called in instruction.called("to_apply") + instruction.called("calls"):
                    visit(called, times)
                continue
            for kind, size in _collectives(program, instruction):
                counts[kind] += int(times)
                sizes[kind] += times * size  # pyright: ignore[reportArgumentType]  (a counter adds floats too)
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            cycles += times * int(estimate[1]) if estimate else 0
            kernel = Kernel.stated(instruction, times)
            kernels.extend([kernel] if kernel else [])
            traffic += times * (kernel.bytes if kernel else _bytes(program, name, instruction))

    visit(entry, 1)
    kinds = {kind: Traffic(counts[kind], float(sizes[kind])) for kind in COLLECTIVES if counts[kind]}
    return Cost(cycles, traffic, kinds, unknown, tuple(kernels))


def total_cost(calls: Sequence[tuple[Cost, int]]) -> Cost:
    """Cost of several programs, each called so often."""
    kinds = {
        kind: Traffic(
            sum(times * cost.collectives[kind].count for cost, times in calls if kind in cost.collectives),
            sum(times * cost.collectives[kind].bytes for cost, times in calls if kind in cost.collectives),
        )
        for kind in COLLECTIVES
        if any(kind in cost.collectives for cost, _ in calls)
    }
    return Cost(
        sum(times * cost.cycles for cost, times in calls),
        sum(times * cost.hbm_bytes for cost, times in calls),
        kinds,
        sum(cost.unknown_loops for cost, _ in calls),
        tuple(dataclasses.replace(k, count=times * k.count) for cost, times in calls for k in cost.kernels),
    )


def _parse(text: str) -> tuple[str, _Program]:
    """(entry computation, instructions by computation and name)."""
    program: _Program = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = program.setdefault(match[1], {})
            entry = match[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    return entry, program


def _instruction(line: str) -> _Instruction:
    head, _, body = line.partition(" = ")
    type_end = _matching(body) if body.startswith("(") else body.index(" ")
    kind, body = body[:type_end], body[type_end:].lstrip()
    operation, _, _ = body.partition("(")
    arguments_end = len(operation) + _matching(body[len(operation) :])
    operands = tuple(re.findall(r"%([\w.\-]+)", body[len(operation) : arguments_end]))
    name = head.removeprefix("ROOT ").lstrip("%")
    if operation in ("constant", "parameter"):
        operands = (body[len(operation) + 1 : arguments_end - 1],)
    return _Instruction(name, kind, operation, operands, body[arguments_end:], head.startswith("ROOT "))


def _matching(text: str) -> int:
    """Index after the parenthesis that closes the one at the beginning of the text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index + 1
    return len(text)


def _trips(program: _Program, condition: str) -> int | None:
    """Turns of a loop that counts from 0: the constant that its condition compares with."""
    found = [
        int(instruction.operands[0])
        for instruction in program[condition].values()
        if instruction.operation == "constant" and re.fullmatch(r"\d+", instruction.operands[0])
    ]
    return max(found, default=None)


def _collectives(program: _Program, instruction: _Instruction) -> Iterator[tuple[str, float]]:
    """(kind, bytes of the result) of an instruction that is a collective, or of a fusion that holds one."""
    kind = instruction.operation.removesuffix("-start")
    if kind in COLLECTIVES:
        shapes = list(_shapes(instruction.type))
        # The start of an asynchronous one gives (operands, results, ...).
        size = max((size for size, _ in shapes), default=0.0) if kind != instruction.operation else _size(shapes)
        yield kind, size
    elif instruction.operation == "fusion":
        for name in instruction.called("calls"):
            for inner in program[name].values():
                yield from _collectives(program, inner)


def _bytes(program: _Program, computation: str, instruction: _Instruction) -> float:
    """HBM bytes that one instruction reads and writes."""
    operation = instruction.operation
    if operation in _FREE or operation.endswith("-done") or operation.startswith("async-"):
        return 0.0
    if operation in _MOVES:
        ends = list(_shapes(instruction.type))[:2]
        return ends[_MOVES[operation]][0] * sum(in_hbm for _, in_hbm in ends)
    local = program[computation]
    types = [local[name].type if name in local else "" for name in instruction.operands]
    written = _size(_shapes(instruction.type), hbm=True)
    if operation in _SLICES:
        return 2 * written
    if operation in _UPDATES:
        return 2 * _size(_shapes(types[_UPDATES[operation]]), hbm=True)
    if operation != "fusion":
        return written + sum(_size(_shapes(kind), hbm=True) for kind in types)
    inner = program[instruction.called("calls")[0]]
    read = sum(_read(program, inner, i) for i in inner.values() if i.operation == "parameter")
    return read + _written(inner, written)


def _users(program: _Program, inner: dict[str, _Instruction], name: str) -> list[tuple[_Instruction, str]]:
    """(user, name that it uses) of a value of a fusion, looking through changes of shape and type."""
    found = []
    for user in inner.values():
        if name in user.operands:
            view = user.operation in (*_VIEWS, "convert") or (
                user.operation == "fusion" and _is_view(program, user, name)
            )
            found += _users(program, inner, user.name) if view else [(user, name)]
    return found


def _parameters(program: _Program, fusion: _Instruction, name: str) -> list[_Instruction]:
    """The parameters of a fusion's program that are the operand of this name."""
    numbers = {str(number) for number, operand in enumerate(fusion.operands) if operand == name}
    inner = program[fusion.called("calls")[0]].values()
    return [one for one in inner if one.operation == "parameter" and one.operands[0] in numbers]


def _is_view(program: _Program, fusion: _Instruction, name: str) -> bool:
    """Whether a fusion gives this operand as it is, in another shape."""
    inner = program[fusion.called("calls")[0]]
    root = next(one for one in inner.values() if one.root)
    while root.operation in _VIEWS:
        root = inner[root.operands[0]]
    return root in _parameters(program, fusion, name)


def _read(program: _Program, inner: dict[str, _Instruction], parameter: _Instruction) -> float:
    """HBM bytes that a fusion reads of a parameter: the slices, where it reads slices only; 0 where it updates it."""
    size, total = _size(_shapes(parameter.type), hbm=True), 0.0
    for user, name in _users(program, inner, parameter.name):
        if user.operation in (*_SLICES, "gather") and user.operands[0] == name:
            read, used = (_width(one.type.partition("[")[0]) for one in (parameter, user))
            total += _size(_shapes(user.type)) * read / used
        elif user.operation == "fusion":
            nested = program[user.called("calls")[0]]
            total += sum(_read(program, nested, one) for one in _parameters(program, user, name))
        elif not (user.operation in _UPDATES and user.operands[0] == name):
            total += size
    return min(size, total)


def _written(inner: dict[str, _Instruction], whole: float) -> float:
    """HBM bytes that a fusion with results of `whole` bytes writes: of arrays updated in place only the updates."""
    for instruction in inner.values():
        if instruction.operation in _UPDATES:
            update = instruction.operands[_UPDATES[instruction.operation]]
            whole -= _size(_shapes(instruction.type)) - _size(_shapes(inner[update].type))
    return max(whole, 0.0)


def _width(kind: str) -> float:
    """Bytes of an element: of `bf16`, 2."""
    return _WIDTHS.get(kind) or (int(re.sub(r"\D", "", kind) or 0) / 8)


def _shapes(text: str) -> Iterator[tuple[float, bool]]:
    """(bytes, whether in HBM) of the arrays of a type."""
    for kind, dimensions, layout in _SHAPE.findall(text):
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        yield _width(kind) * count, not re.search(r"S\([1-9]\d*\)", layout or "")


def _size(shapes: Iterator[tuple[float, bool]] | list[tuple[float, bool]], *, hbm: bool = False) -> float:
    return sum(size for size, in_hbm in shapes if in_hbm or not hbm)
