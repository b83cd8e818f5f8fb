"""Parses the text of a compiled program (HLO) into instructions.

The text comes from `jax.stages.Compiled.as_text`; its shapes are those of one device.
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
      dtype: the dtype as HLO writes it, such as bf16.
      sizes: the sizes of the axes.
      on_chip: whether the array lies in memory other than the main one (a TPU's vector memory).
    """

    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """The size in bytes, without padding."""
        return -(-math.prod(self.sizes) * _bits(self.dtype) // 8)

    @property
    def main_bytes(self) -> int:
        """The size in the device's main memory, in bytes."""
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: the name of the result.
      opcode: the operation as HLO writes it, such as dot.
      shapes: the shapes of the result; a tuple has several.
      operands: the names of the operands, which are instructions of the same computation.
      rest: the text after the operands, which holds the attributes.
      literal: the text between the parentheses.
      root: whether the instruction is the result of its computation.
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
        """The size of the result, in bytes."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def main_bytes(self) -> int:
        """The size of the result in main memory, in bytes."""
        return sum(shape.main_bytes for shape in self.shapes)


# The instructions by name, in the order of the text: operands come before their users.
Computation = dict[str, Instruction]


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of an HLO text by name, and the name of the entry computation.

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
    """Returns the index after the parenthesis that closes the one at `start`."""
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


def find_attribute(pattern: str, rest: str) -> re.Match[str]:
    """Finds an attribute that an instruction must have.

    Args:
      pattern: a regular expression for the attribute.
      rest: the attributes of the instruction.

    Raises:
      ValueError: the instruction does not have the attribute.
    """
    found = re.search(pattern, rest)
    if found is None:
        raise ValueError(f"an instruction of the HLO has no attribute of the form {pattern}: {rest[:120]!r}")
    return found


def role(loop: Instruction, part: str) -> str:
    """Returns the name of one of the two computations of a loop.

    Args:
      loop: a while instruction.
      part: "body" or "condition".
    """
    return find_attribute(rf"\b{part}=%?([\w.\-]+)", loop.rest)[1]


def root_of(computation: Computation) -> Instruction:
    """Returns the instruction that makes the result of a computation."""
    return next(each for each in computation.values() if each.root)


def element_index(element: Instruction) -> int:
    """Returns the index of the element that a get-tuple-element takes from a tuple."""
    return int(find_attribute(r"index=(\d+)", element.rest)[1])


def tuple_element(name: str, index: int, computation: Computation) -> str | None:
    """Returns the name of an element of a tuple, or None if the computation does not itself make the tuple."""
    made = computation[name]
    return made.operands[index] if made.opcode == "tuple" else None


def branches_of(rest: str) -> list[str]:
    """Returns the names of the computations that a conditional chooses from."""
    return [name for several, one in _BRANCHES.findall(rest) for name in (_NAME.findall(several) or [one]) if name]


def operand_shapes(one: Instruction, computation: Computation) -> list[Shape]:
    """Returns the shapes of all operands in order; a tuple counts as its elements."""
    return [shape for name in one.operands if name in computation for shape in computation[name].shapes]


def group_size(rest: str, everyone: int) -> int:
    """Returns the number of devices in each group of a collective; 2 for a permutation.

    Args:
      rest: the attributes of the collective.
      everyone: the number of all devices, the size of a group that the text does not state.

    Raises:
      ValueError: the groups have an unknown form.
    """
    found = _GROUPS.search(rest)
    if found:
        _, size, listed, mesh, axes = found.groups()
        if mesh is None:
            return int(size) if size else max(len(listed.split(",")), 1)
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        # An entry is an axis, 'name', or a part of one, 'name':(devices before the part)devices in the part.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if re.search(r"replica_groups=(?!\{\})", rest):
        raise ValueError(f"replica groups in a form that is not known: {rest[rest.index('replica_groups=') :][:120]}")
    return 2 if "source_target_pairs=" in rest else everyone


def called_by(rest: str) -> list[str]:
    """Returns the names of the computations that a call or a fusion runs."""
    return _CALLED.findall(rest) or branches_of(rest)
