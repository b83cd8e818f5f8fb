"""Counts what a compiled program computes and moves on one device. Bodies of loops count once per iteration.

The counts come from the text of the optimised HLO (`jax.stages.Compiled.as_text`), whose shapes are those of one
device. The compiler's own count (`Compiled.cost_analysis`) takes the body of a loop once, however often it runs.
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

# The targets of custom calls that compute.
KERNELS = ("tpu_custom_call",)
# How many payloads a device sends in a ring of n devices; it receives as many. An all-reduce is a reduce-scatter and
# then an all-gather. Source: Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005.
_PAYLOADS_MOVED = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
# These instructions cost nothing, or their cost is counted at the instruction that starts the work.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id", "domain", "get-dimension-size", "iota"),
}

_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over groups of one size.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: the number of devices in a group.
      count: how many collectives run.
      payload: the bytes on one device, summed over all runs; of operand and result, the larger one counts.
    """

    kind: str
    group: int
    count: float
    payload: float

    @property
    def moved(self) -> float:
        """The bytes that one device sends if the group is a ring; it receives as many."""
        return self.payload * _PAYLOADS_MOVED[self.kind](self.group)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one run of a program on one device.

    Attributes:
      flops: the FLOPs of matrix products and convolutions, and those that kernels state; a multiplication and an
        addition count as two.
      main_bytes: the bytes that instructions read from and write to main memory; instructions inside a fusion do not
        count.
      traffic: the traffic of the collectives.
      open_loops: the number of loops whose trip count is not in the program.
      silent_kernels: the name of each kernel whose FLOPs are not known -> how often it runs.
    """

    flops: float
    main_bytes: float
    traffic: tuple[Traffic, ...]
    open_loops: int
    silent_kernels: dict[str, float]

    @property
    def moved_bytes(self) -> float:
        """The bytes that one device sends in all collectives, see `Traffic.moved`."""
        return sum(each.moved for each in self.traffic)


def program_costs(text: str, *, open_trips: int = 1, kernels: Mapping[str, KernelFlops] | None = None) -> Costs:
    """Counts what a compiled program does.

    Elementwise work, reductions and sorts count as memory traffic, not as FLOPs. A conditional costs as much as its
    branch with the most FLOPs.

    Args:
      text: the text of the optimised HLO.
      open_trips: the assumed trip count of loops whose trip count is not in the program.
      kernels: for kernels that do not state their FLOPs, the beginning of a kernel's name -> a function from the shapes
        of its operands to its FLOPs.

    Raises:
      ValueError: the text has no entry computation.

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
    silent: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))

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
    ) -> None:
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
        """The costs of one run of a computation."""
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
        """The trip count of a loop that counts up by one from a constant to another constant; None for other loops."""
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
        """The value of a number if the program states it and it is the same in every run of its computation."""
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
        source = tuple_element(root_of(body).name, element_index(one), body)
        kept = None if source is None else body.get(source)
        if kept is None or kept.opcode != "get-tuple-element" or element_index(kept) != element_index(one):
            return None  # the loop changes it
        return self._constant(tuple_element(loop.operands[0], element_index(one), outer), outer)

    def _collective(self, kind: str, one: Instruction, computation: Computation) -> _Sum:
        operands = sum(shape.bytes for shape in operand_shapes(one, computation))
        # The result of a start also holds the operand, and the result of a permutation also holds flags.
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
            # The compiler adds calls of its own, which reserve memory or give hints.
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
        """The bytes that a fusion reads and writes. If it only slices or updates an array, only that part counts."""
        read = sum(
            self._read(number, inner, computation[name].bytes)
            for number, name in enumerate(one.operands)
            if computation[name].main_bytes
        )
        return float(read + sum(_written(made, shape, inner) for made, shape in _results(one, inner)))

    def _read(self, number: int, inner: Computation, whole: int) -> int:
        """The bytes that a fusion reads from one of its operands."""
        names = {each.name for each in inner.values() if each.opcode == "parameter" and int(each.literal) == number}
        total = 0
        for user in inner.values():  # operands come before their users
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
        """The costs of the instructions in a fusion. Their results in between do not go through main memory."""
        total = _Sum()
        for instruction in inner.values():
            if instruction.opcode not in _FREE:
                total.add(self._cost(instruction, inner))
        return total


def _moved(one: Instruction, computation: Computation) -> float:
    """The bytes that an instruction outside a fusion reads from and writes to main memory."""
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
    """The results of a fusion: the instruction that makes each, and the array that it is written to."""
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
