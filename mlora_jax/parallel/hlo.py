"""What a compiled program computes and moves on one device, the bodies of loops times their trip count.

Read from the text of the optimised HLO (`jax.stages.Compiled.as_text`): its shapes are those of one device. The
compiler's own count (`Compiled.cost_analysis`) takes the body of a loop once, however often it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

from mlora_jax.parallel.hlo_products import PRODUCTS
from mlora_jax.parallel.hlo_text import (
    Computation,
    Instruction,
    Shape,
    branches_of,
    called_by,
    element_index,
    group_size,
    operand_shapes,
    parse_program,
    role,
    root_of,
    tuple_element,
)

KernelFlops = Callable[[Sequence[Shape]], float]

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

# Custom calls that compute.
KERNELS = ("tpu_custom_call",)
# What a device sends, and receives, around a ring of n, in payloads; an all-reduce is a reduce-scatter and then an
# all-gather. Source: Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005.
_PAYLOADS_MOVED = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
# Nothing happens in these, or what happens is counted where it begins.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id", "domain", "get-dimension-size", "iota"),
}

_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over groups of one size.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: devices that take part together.
      count: how often they run.
      payload: bytes on one device over all runs: the larger of operand and result.
    """

    kind: str
    group: int
    count: float
    payload: float

    @property
    def moved(self) -> float:
        """Bytes that one device sends, and receives, if the group is a ring."""
        return self.payload * _PAYLOADS_MOVED[self.kind](self.group)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in one run of a program.

    Attributes:
      flops: of matrix products and convolutions, and what kernels state of themselves; a multiplication and an addition
        are two.
      main_bytes: read from and written to main memory by the instructions that are not inside a fusion.
      traffic: of collectives.
      open_loops: loops whose trip count is not in the program.
      silent_kernels: kernels whose FLOPs are not known, by name: how often each runs.
    """

    flops: float
    main_bytes: float
    traffic: tuple[Traffic, ...]
    open_loops: int
    silent_kernels: dict[str, float]

    @property
    def moved_bytes(self) -> float:
        """Of all collectives, see `Traffic.moved`."""
        return sum(each.moved for each in self.traffic)


def program_costs(text: str, *, open_trips: int = 1, kernels: Mapping[str, KernelFlops] | None = None) -> Costs:
    """Counts what a compiled program does.

    Elementwise work, reductions and sorts count as memory traffic, not as FLOPs. Of a conditional the branch with the
    most FLOPs counts.

    Args:
      text: of the optimised HLO.
      open_trips: how often the body of a loop runs whose trip count is not in the program.
      kernels: FLOPs of those that state none, by the beginning of their names: a function of their operands.

    Raises:
      ValueError: a text without an entry computation.

    >>> text = '''HloModule tiny
    ... ENTRY %main (a: f32[2,3], b: f32[3,4]) -> f32[2,4] {
    ...   %a = f32[2,3]{1,0} parameter(0)
    ...   %b = f32[3,4]{1,0} parameter(1)
    ...   ROOT %dot = f32[2,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }'''
    >>> costs = program_costs(text)
    >>> costs.flops, costs.main_bytes
    (48.0, 104.0)
    """
    computations, entry = parse_program(text)
    everyone = math.prod(
        int(size) for size in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    )
    counter = _Counter(computations, open_trips, kernels or {}, everyone)
    total = counter.costs(entry)
    traffic = tuple(
        Traffic(kind, group, count, payload) for (kind, group), (count, payload) in sorted(total.traffic.items())
    )
    return Costs(total.flops, total.main_bytes, traffic, len(counter.open_loops), dict(total.silent))


@dataclasses.dataclass
class _Sum:
    flops: float = 0.0
    main_bytes: float = 0.0
    traffic: dict[tuple[str, int], tuple[float, float]] = dataclasses.field(default_factory=dict)
    silent: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: _Sum, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.main_bytes += times * other.main_bytes
        for key, (count, payload) in other.traffic.items():
            before = self.traffic.get(key, (0.0, 0.0))
            self.traffic[key] = before[0] + times * count, before[1] + times * payload
        for target, count in other.silent.items():
            self.silent[target] += times * count


class _Counter:
    def __init__(
        self,
        computations: Mapping[str, Computation],
        open_trips: int,
        kernels: Mapping[str, KernelFlops],
        everyone: int,
    ):
        self._computations, self._open_trips, self._kernels = computations, open_trips, kernels
        self._everyone = everyone
        self._loops = {
            id(computations[role(one, part)]): (one, computation)
            for computation in computations.values()
            for one in computation.values()
            if one.opcode == "while"
            for part in ("body", "condition")
        }
        self.open_loops: set[str] = set()
        self.costs = functools.cache(self._costs)

    def _costs(self, name: str) -> _Sum:
        """Of one run of a computation."""
        total = _Sum()
        computation = self._computations[name]
        for instruction in computation.values():
            if instruction.opcode not in _FREE:
                total.add(self._cost(instruction, computation))
        return total

    def _cost(self, one: Instruction, computation: Computation) -> _Sum:
        kind = one.opcode.removesuffix("-start")
        if one.opcode.endswith(("-done", "-update")) and kind != "dynamic-update":
            return _Sum()
        if kind in COLLECTIVES:
            return self._collective(kind, one, computation)
        if one.opcode == "while":
            return self._loop(one, computation)
        if one.opcode in ("call", "async-start"):
            return self._sum_of(one.rest)
        if one.opcode == "conditional":
            branches = [self.costs(name) for name in branches_of(one.rest)]
            return max(branches, key=lambda branch: branch.flops)
        if one.opcode == "custom-call":
            return self._kernel(one, computation)
        if one.opcode == "fusion":
            return self._fusion(one, computation)
        found = _Sum(main_bytes=_moved(one, computation))
        if one.opcode in PRODUCTS:
            found.flops = PRODUCTS[one.opcode](one, operand_shapes(one, computation))
        return found

    def _sum_of(self, rest: str) -> _Sum:
        total = _Sum()
        for name in called_by(rest):
            total.add(self.costs(name))
        return total

    def _loop(self, one: Instruction, computation: Computation) -> _Sum:
        body, condition = role(one, "body"), role(one, "condition")
        stated = _TRIPS.search(one.rest)
        trips = int(stated[1]) if stated else self._trips(one, computation, self._computations[condition])
        if trips is None:
            self.open_loops.add(one.name)
            trips = self._open_trips
        total = _Sum()
        total.add(self.costs(body), trips)
        return total

    def _trips(self, one: Instruction, computation: Computation, condition: Computation) -> int | None:
        """Of a loop that counts up by one from a constant while it is less than another one."""
        compare = root_of(condition)
        names = compare.operands
        if compare.opcode == "fusion":
            inner = self._computations[called_by(compare.rest)[0]]
            compare = root_of(inner)
            if any(inner[name].opcode != "parameter" for name in compare.operands):
                return None
            names = [names[int(inner[name].literal)] for name in compare.operands]
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            return None
        counter = condition[names[0]]
        if counter.opcode != "get-tuple-element":
            return None
        start = self._constant(tuple_element(one.operands[0], element_index(counter), computation), computation)
        limit = self._constant(names[1], condition)
        return None if start is None or limit is None else max(limit - start, 0)

    def _constant(self, name: str | None, computation: Computation) -> int | None:
        """The value of a number that is the same in every run of its computation, if the program says it."""
        if name is None or name not in computation:
            return None
        one = computation[name]
        if one.opcode == "constant":
            return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None
        if one.opcode in ("copy", "bitcast", "convert"):
            return self._constant(one.operands[0], computation)
        if one.opcode != "get-tuple-element":
            return None
        of = computation[one.operands[0]]
        if of.opcode == "tuple":
            return self._constant(of.operands[element_index(one)], computation)
        loop = self._loops.get(id(computation)) if of.opcode == "parameter" else None
        if loop is None:
            return None
        loop, outer = loop
        body = self._computations[role(loop, "body")]
        kept = body.get(tuple_element(root_of(body).name, element_index(one), body))
        if kept is None or kept.opcode != "get-tuple-element" or element_index(kept) != element_index(one):
            return None  # the loop changes it
        return self._constant(tuple_element(loop.operands[0], element_index(one), outer), outer)

    def _collective(self, kind: str, one: Instruction, computation: Computation) -> _Sum:
        operands = sum(shape.bytes for shape in operand_shapes(one, computation))
        # The result of a start holds the operand too, and that of a permutation its flags.
        result = max(one.bytes - operands, 0) if one.opcode.endswith("-start") and len(one.shapes) > 1 else one.bytes
        payload = operands if kind == "collective-permute" else max(operands, result)
        group = group_size(one.rest, self._everyone)
        found = _Sum(main_bytes=_moved(one, computation))
        if group > 1:
            found.traffic[kind, group] = 1.0, float(payload)
        return found

    def _kernel(self, one: Instruction, computation: Computation) -> _Sum:
        target = re.search(r'custom_call_target="([^"]*)"', one.rest)
        if target is None or target[1] not in KERNELS:
            # Of the compiler itself: a place in memory, or a hint.
            return _Sum()
        found = _Sum(main_bytes=_moved(one, computation))
        estimate = re.search(r'"cost_estimate":(\{[^{}]*\})', one.rest)
        known = next((flops for name, flops in self._kernels.items() if one.name.startswith(name)), None)
        if estimate:
            found.flops = float(json.loads(estimate[1]).get("flops", 0))
        elif known:
            found.flops = known(operand_shapes(one, computation))
        else:
            found.silent[re.sub(r"[.\d]+$", "", one.name)] += 1
        return found

    def _fusion(self, one: Instruction, computation: Computation) -> _Sum:
        inner = self._computations[called_by(one.rest)[0]]
        found = _Sum()
        inside = self._inside(inner)
        found.flops, found.traffic, found.silent = inside.flops, dict(inside.traffic), inside.silent
        found.main_bytes = self._fusion_bytes(one, computation, inner)
        return found

    def _fusion_bytes(self, one: Instruction, computation: Computation, inner: Computation) -> float:
        """Bytes that a fusion reads and writes: of an array that it only slices or updates the part."""
        read = sum(
            self._read(number, inner, computation[name].bytes)
            for number, name in enumerate(one.operands)
            if computation[name].main_bytes
        )
        return float(read + sum(_written(made, shape, inner) for made, shape in _results(one, inner)))

    def _read(self, number: int, inner: Computation, whole: int) -> int:
        """Bytes that a fusion reads of one of its operands."""
        names = {each.name for each in inner.values() if each.opcode == "parameter" and int(each.literal) == number}
        total = 0
        for user in inner.values():  # in an order in which operands come before their users
            places = [place for place, name in enumerate(user.operands) if name in names]
            if not places:
                continue
            if user.opcode == "bitcast":
                names.add(user.name)
            elif user.opcode == "fusion":
                nested = self._computations[called_by(user.rest)[0]]
                if all(each.opcode in ("parameter", "bitcast") for each in nested.values()):
                    names.add(user.name)
                else:
                    total += sum(self._read(place, nested, whole) for place in places)
            elif user.opcode in _PARTIAL and places == [0]:
                total += _PARTIAL[user.opcode](user)
            else:
                return whole
        return min(total, whole)

    def _inside(self, inner: Computation) -> _Sum:
        """Of the instructions of a fusion, which keep what is between them to themselves."""
        total = _Sum()
        for instruction in inner.values():
            if instruction.opcode not in _FREE:
                total.add(self._cost(instruction, inner))
        return total


def _moved(one: Instruction, computation: Computation) -> float:
    """Bytes that an instruction on its own reads from and writes to main memory."""
    operands = [computation[name] for name in one.operands if name in computation]
    kind = one.opcode.removesuffix("-start")
    if kind in ("dynamic-slice", "slice", "gather"):
        read = 0 if operands and not operands[0].main_bytes else one.bytes
        return float(read + (0 if one.opcode.endswith("-start") else one.main_bytes))
    if kind in ("dynamic-update-slice", "scatter"):
        update = operands[1] if kind == "dynamic-update-slice" else operands[-1]
        return float(update.main_bytes + (update.bytes if one.main_bytes else 0))
    if kind == "copy" and one.opcode.endswith("-start"):
        return float(operands[0].main_bytes + one.shapes[0].main_bytes)
    if kind in COLLECTIVES and one.opcode.endswith("-start") and len(one.shapes) > 1:
        return float(one.main_bytes)
    return float(one.main_bytes + sum(operand.main_bytes for operand in operands))


_PARTIAL = {
    "dynamic-slice": lambda one: one.bytes,
    "slice": lambda one: one.bytes,
    "gather": lambda one: one.bytes,
    "dynamic-update-slice": lambda one: 0,
}


def _results(one: Instruction, inner: Computation) -> list[tuple[Instruction, Shape]]:
    """Of a fusion: the instructions that make them, and where they go."""
    root = root_of(inner)
    made = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(made) != len(one.shapes):
        return [(root, shape) for shape in one.shapes]
    return list(zip(made, one.shapes, strict=True))


def _written(made: Instruction, shape: Shape, inner: Computation) -> int:
    while made.opcode == "bitcast" and made.operands:
        made = inner[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        return 0 if shape.on_chip else inner[made.operands[1]].bytes
    return shape.main_bytes
