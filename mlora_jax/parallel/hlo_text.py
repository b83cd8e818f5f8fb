"""The text of a compiled program (HLO) as instructions.

Read from `jax.stages.Compiled.as_text`, whose shapes are those of one device.
"""

from __future__ import annotations

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=\s]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations|called_computations)=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.\-]+)"
)
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program.

    Attributes:
      dtype: as HLO writes it, such as bf16.
      sizes: of its axes.
      on_chip: whether it lies in memory other than the main one (a TPU's vector memory).
    """

    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Without padding."""
        return -(-math.prod(self.sizes) * _bits(self.dtype) // 8)

    @property
    def main_bytes(self) -> int:
        """In the device's main memory."""
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name, opcode: as HLO writes them.
      shapes: of the result, several for a tuple.
      operands: names of instructions in the same computation.
      rest: attributes.
      literal: what stands between the parentheses.
      root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    literal: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def main_bytes(self) -> int:
        """Of the result, in main memory."""
        return sum(shape.main_bytes for shape in self.shapes)


# In the order of the text: operands come before their users.
Computation = dict[str, Instruction]


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an HLO text by name, and the name of the entry.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if found := _COMPUTATION.match(line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif line.strip() == "}":
            current = None
        elif instruction := _parse_instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"this is no HLO program, it has no ENTRY computation: {text[:80]!r}")
    return computations, entry


def _parse_instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(_COMMENT.sub("", line))
    if not found:
        return None
    root, name, body = found.groups()
    end = _closing(body, 0) if body.startswith("(") else (body + " ").index(" ")
    operator = _OPCODE.match(body, end)
    if not operator:
        return None
    closing = _closing(body, operator.end() - 1)
    literal = body[operator.end() : closing - 1]
    return Instruction(
        name=name,
        opcode=operator[1],
        shapes=tuple(_parse_shape(*parts) for parts in _SHAPE.findall(body[:end])),
        operands=tuple(_NAME.findall(literal)),
        rest=body[closing:],
        literal=literal,
        root=bool(root),
    )


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index + 1
    return len(text)


def _parse_shape(dtype: str, sizes: str, layout: str) -> Shape:
    numbers = tuple(int(size.replace("<=", "")) for size in sizes.split(",") if size.strip())
    return Shape(dtype, numbers, bool(re.search(r"S\([1-9]", layout)))


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def role(loop: Instruction, part: str) -> str:
    """The name of the body or the condition of a loop."""
    return re.search(rf"\b{part}=%?([\w.\-]+)", loop.rest)[1]


def root_of(computation: Computation) -> Instruction:
    """The result of a computation."""
    return next(each for each in computation.values() if each.root)


def element_index(element: Instruction) -> int:
    """Which element of a tuple a get-tuple-element takes."""
    return int(re.search(r"index=(\d+)", element.rest)[1])


def tuple_element(name: str, index: int, computation: Computation) -> str | None:
    """The name of what a tuple holds there, if the computation itself makes the tuple."""
    made = computation[name]
    return made.operands[index] if made.opcode == "tuple" else None


def branches_of(rest: str) -> list[str]:
    """The computations that a conditional chooses from."""
    return [name for several, one in _BRANCHES.findall(rest) for name in (_NAME.findall(several) or [one]) if name]


def operand_shapes(one: Instruction, computation: Computation) -> list[Shape]:
    """Of all operands in order, tuples flattened."""
    return [shape for name in one.operands if name in computation for shape in computation[name].shapes]


def group_size(rest: str, everyone: int) -> int:
    """How many devices take part in a collective together, of `everyone`; 2 for a permutation."""
    found = _GROUPS.search(rest)
    if found:
        _, size, listed, mesh, axes = found.groups()
        if mesh is None:
            return int(size) if size else max(len(listed.split(",")), 1)
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        # An axis, or a part of it: 'name':(how many are before)how many.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if re.search(r"replica_groups=(?!\{\})", rest):
        raise ValueError(f"replica groups in a form that is not known: {rest[rest.index('replica_groups=') :][:120]}")
    return 2 if "source_target_pairs=" in rest else everyone


def called_by(rest: str) -> list[str]:
    """The computations that a call or a fusion runs."""
    return _CALLED.findall(rest) or branches_of(rest)
