"""What a program compiled for TPU costs, read from its text: time, collectives, the costliest operations.

The TPU compiler writes `estimated_cycles` beside most operations and lists the operations in the order in which they run. The
time is a simulation of that order: an operation takes its cycles, a loop its body's time once a trip, a choice the time of its
costliest branch. What is asynchronous, a copy or a collective, begins at its start in the queue of its kind, and the program
waits at its end when it is not over.
`jax.stages.Compiled.cost_analysis` is of no use here: it counts a loop's body once.

Limits. The cycles are the compiler's own model, not a measurement. An operation without cycles is taken to move its operands
and results once through the memory (`Cost.guessed_cycles` says how much of the time is of this kind). Copies and operations
that run at the same time do not slow each other down; collectives reach the bandwidth of their links at once.
"""
from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
import re

import numpy as np

# Of the bytes of a device's operand, how many it sends when n devices take part, as a ring does it.
_SENT: dict[str, Callable[[int], float]] = {
    'all-gather': lambda n: n - 1,
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'reduce-scatter': lambda n: (n - 1) / n,
    'all-to-all': lambda n: (n - 1) / n,
    'ragged-all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1,
    'collective-broadcast': lambda n: 1,
}
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'iota',
         'opt-barrier', 'add-dependency')
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')
_ARRAY = re.compile(r'\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]')
# What slices send each other: the runtime's, by send and recv of one rendezvous. Groups: that, the slices, the collective.
_BETWEEN_SLICES = re.compile(r'rendezvous="([^"]*)".*_xla_megascale_target="\{([\d,:]+)\}.*megascale_transfer_type="(\w+)"')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program: `name` = `shape` `opcode`(`inside`), `attributes`; `root` marks a computation's result."""
    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r'%([\w.\-]+)', self.inside)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found[1]) if found else None

    @property
    def source(self) -> str:
        """The JAX operation that it came from: 'jit(f)/while/body/…/dot_general', or ''."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ''

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that the attribute names."""
        found = re.search(rf'\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))', self.attributes)
        return [name.strip().lstrip('%') for name in (found[1] or found[2]).split(',')] if found else []


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each in the order in which it runs; the name of the first; over how many devices."""
    computations: Mapping[str, list[Operation]]
    entry: str
    devices: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: how many bytes a device gives to it and sends in one run, the first group of devices, and its runs.

    One between slices, of each device with those of its place in the others, has the kind 'between slices' and no group.
    """
    kind: str
    given: float
    bytes: float
    group: tuple[int, ...]
    runs: int
    source: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program costs on one device.

    Attributes:
      cycles: all; the sum of the next three.
      compute_cycles: of operations, whatever runs beside them.
      collective_cycles: spent waiting for collectives.
      copy_cycles: spent waiting for copies between the memories.
      guessed_cycles: the part of compute_cycles that is operations without the compiler's estimate.
      operations: (operation, cycles in all its runs), the costliest first.
      collectives: every collective.
      unknown_loops: loops whose trips could not be read; they count once.
    """
    cycles: float
    compute_cycles: float
    collective_cycles: float
    copy_cycles: float
    guessed_cycles: float
    operations: list[tuple[Operation, float]]
    collectives: list[Collective]
    unknown_loops: list[str]

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes that a device sends, by kind of collective."""
        kinds = sorted({collective.kind for collective in self.collectives})
        return {kind: sum(c.bytes * c.runs for c in self.collectives if c.kind == kind) for kind in kinds}


def parse(text: str) -> Program:
    """The program of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Operation]] = {}
    entry = ''
    current: list[Operation] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif (found := _LINE.match(line)) and computations:
            current.append(_operation(found[2], found[3], bool(found[1])))
    if not entry:
        raise ValueError('the text of the compiled program has no ENTRY computation; is it that of an executable?')
    devices = re.search(r'\bnum_partitions=(\d+)', text)
    return Program(computations, entry, int(devices[1]) if devices else 1)


def _operation(name: str, rest: str, root: bool) -> Operation:
    end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.index('(')
    closing = _closing(rest, opening)
    return Operation(name, shape, rest[:opening], rest[opening + 1:closing - 1], rest[closing:], root)


def _closing(text: str, opening: int) -> int:
    """The place after the bracket that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r'[()]').finditer(text, opening):
        depth += 1 if found[0] == '(' else -1
        if not depth:
            return found.end()
    raise ValueError(f'unbalanced brackets in the compiled program: {text[:80]}')


def shape_bytes(shape: str) -> float:
    """Bytes of 'bf16[8,128]{1,0}', or of all arrays of a tuple, without the padding of tiles."""
    arrays = _ARRAY.findall(shape)
    return float(sum(_BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(',') if n) for dtype, sizes in arrays))


def trip_count(program: Program, loop: Operation) -> int | None:
    """How often the loop's body runs, for a loop that counts from 0; None when its condition does not show it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    operations = {op.name: op for op in program.computations[loop.called('condition')[0]]}
    root = next(op for op in operations.values() if op.root)
    if root.opcode == 'fusion':  # the compare is in a computation of its own; the bound is a constant of either
        operations |= {op.name: op for op in program.computations[root.called('calls')[0]]}
        root = next(op for op in program.computations[root.called('calls')[0]] if op.root)
    if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
        return None
    bounds = [op for op in operations.values() if op.opcode == 'constant' and op.shape.startswith(('s32[]', 'u32[]'))]
    return int(bounds[0].inside) if len(bounds) == 1 else None


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Places of the first group of devices of a collective; all when its attributes name none.

    The compiler writes groups as lists {{0,1},{2,3}}, as a reshaped and transposed count [2,4]<=[4,2]T(1,0), or as axes of a
    mesh, mesh['a'=2,'b'=4] {'b'}, also parts of axes, {'b':(2)2}: after the first 2 parts of b, the next 2. The devices of a
    mesh are in their order, or in that of a transposed count, mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}",
                         attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        used = {name: (int(before or 1), int(size or sizes[name]))
                for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[4])}
        places = np.arange(math.prod(sizes.values()))
        if mesh[2]:
            places = places.reshape(_numbers(mesh[2])).transpose(_numbers(mesh[3]) if mesh[3] else None)
        places = places.reshape(tuple(sizes.values()))
        for axis, (name, size) in enumerate(sizes.items()):
            before, count = used.get(name, (size, 1))
            places = places.take(np.arange(count) * (size // (before * count)), axis)
        return tuple(places.ravel().tolist())
    if lists := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
        return tuple(int(place) for place in lists[1].split(','))
    if counted := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
        shape, sizes_, order = (_numbers(part) if part else [] for part in counted.groups())
        places = np.arange(math.prod(sizes_)).reshape(sizes_)
        return tuple(places.transpose(order).reshape(shape)[0].tolist() if order else places.reshape(shape)[0].tolist())
    if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', attributes):
        return int(pairs[1]), int(pairs[2])
    return tuple(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]


def cost(program: Program, memory_bytes_per_cycle: float, collective_cycles: Callable[[Collective], float]) -> Cost:
    """The cost of one run.

    Args:
      program: from parse.
      memory_bytes_per_cycle: bandwidth of a device's main memory.
      collective_cycles: what one run of a collective takes by itself.
    """
    simulation = _Simulation(program, memory_bytes_per_cycle, collective_cycles)
    cycles = simulation.run(program.entry, 1)
    return Cost(cycles=cycles,
                compute_cycles=simulation.compute,
                collective_cycles=simulation.waits['link'] + simulation.waits['network'],
                copy_cycles=simulation.waits['copy'],
                guessed_cycles=simulation.guessed,
                operations=sorted(simulation.operations.values(), key=lambda item: -item[1]),
                collectives=simulation.collectives,
                unknown_loops=simulation.unknown_loops)


def _between_slices(found: re.Match, given: float, runs: int, source: str) -> Collective:
    slices = sum(int(part.split(':')[-1]) - int(part.split(':')[0]) + 1 for part in found[2].split(','))
    sent = _SENT.get(found[3].lower().replace('_', '-'), _SENT['collective-permute'])
    return Collective('between slices', given, given * sent(slices), (), runs, source)


class _Clock:
    """The time in one run of a computation: the program's own, and that of what it started beside itself."""

    def __init__(self):
        self.now = 0.0
        self._free = {'link': 0.0, 'network': 0.0, 'copy': 0.0}  # when each queue will be empty
        self._ends: dict[str, tuple[str, float]] = {}

    def start(self, queue: str, name: str, cycles: float) -> None:
        """Puts something that takes `cycles` into a queue."""
        self._free[queue] = max(self.now, self._free[queue]) + cycles
        self._ends[name] = (queue, self._free[queue])

    def wait(self, name: str) -> tuple[str, float]:
        """Goes on to the end of what was started under that name; its queue and the cycles that this takes."""
        queue, end = self._ends.pop(name, ('copy', 0.0))
        before, self.now = self.now, max(self.now, end)
        return queue, self.now - before

    def runs(self, name: str) -> bool:
        """Whether something of that name was started and not waited for."""
        return name in self._ends


class _Simulation:
    """Runs a program's operations in their order and adds up what they cost; see the module."""

    def __init__(self, program: Program, memory_bytes_per_cycle: float, collective_cycles: Callable[[Collective], float]):
        self.program = program
        self.memory_bytes_per_cycle = memory_bytes_per_cycle
        self.collective_cycles = collective_cycles
        self.compute = self.guessed = 0.0
        self.waits = {'link': 0.0, 'network': 0.0, 'copy': 0.0}
        self.operations: dict[tuple[str, str], tuple[Operation, float]] = {}
        self.collectives: list[Collective] = []
        self.unknown_loops: list[str] = []

    def run(self, computation: str, runs: int) -> float:
        """Cycles of one run of the computation, which runs `runs` times in all."""
        clock = _Clock()
        operations = self.program.computations[computation]
        shapes = {op.name: op.shape for op in operations}
        copied = {op.operands[0]: op.shape for op in operations if op.opcode.endswith('-done')}
        between = {op.name: found for op in operations if (found := _BETWEEN_SLICES.search(op.attributes))}
        for op in operations:
            if op.name in between:
                if op.opcode == 'send':
                    sent = _between_slices(between[op.name], shape_bytes(shapes[op.operands[0]]), runs, op.source)
                    self.collectives.append(sent)
                    clock.start('network', between[op.name][1], self.collective_cycles(sent))
                continue
            around, collective = self._collective(op, shapes)
            channel = re.search(r'channel_id=(\d+)', around.attributes) if around else None
            name = f'channel {channel[1]}' if channel and op.opcode == 'fusion' else op.name
            if collective and not clock.runs(name):
                self.collectives.append(dataclasses.replace(collective, runs=runs))
                clock.start('link', name, self.collective_cycles(collective))
                if not self._is_start(op):
                    self._wait(clock, name, runs)
            elif collective and self._inside(op, 'AsyncCollectiveDone'):
                self._wait(clock, name, runs)
            elif op.opcode.endswith('-done'):
                begun = op.operands[0]
                self._wait(clock, between[begun][1] if begun in between else begun, runs)
            elif op.opcode.endswith('-start'):
                clock.start('copy', op.name, shape_bytes(copied.get(op.name, '')) / self.memory_bytes_per_cycle)
            elif op.opcode == 'while':
                clock.now += self._loop(op, runs)
            elif op.opcode == 'conditional':
                branches = [name for attribute in ('branch_computations', 'true_computation', 'false_computation')
                            for name in op.called(attribute)]
                clock.now += self.run(max(branches, key=self._alone), runs)
            elif op.opcode == 'call':
                clock.now += self.run(op.called('to_apply')[0], runs)
            else:
                clock.now += self._compute(op, computation, shapes, runs)
        return clock.now

    def _alone(self, computation: str) -> float:
        """Cycles of one run of the computation, counted nowhere."""
        return _Simulation(self.program, self.memory_bytes_per_cycle, self.collective_cycles).run(computation, 1)

    def _wait(self, clock: _Clock, name: str, runs: int) -> None:
        queue, cycles = clock.wait(name)
        self.waits[queue] += cycles * runs

    def _loop(self, op: Operation, runs: int) -> float:
        trips = trip_count(self.program, op)
        if trips is None:
            self.unknown_loops.append(op.name)
            trips = 1
        return trips * self.run(op.called('body')[0], runs * trips)

    def _compute(self, op: Operation, computation: str, shapes: Mapping[str, str], runs: int) -> float:
        """Cycles of an operation that is neither a loop nor a collective."""
        cycles: float | None = op.cycles
        if cycles is None:
            if op.opcode in _FREE or _FREE_CALLS.search(op.attributes):
                return 0.0
            moved = shape_bytes(op.shape) + sum(shape_bytes(shapes.get(name, '')) for name in op.operands)
            cycles = moved / self.memory_bytes_per_cycle
            self.guessed += cycles * runs
        self.compute += cycles * runs
        key = (computation, op.name)
        self.operations[key] = (op, self.operations.get(key, (op, 0.0))[1] + cycles * runs)
        return cycles

    def _called(self, op: Operation) -> list[Operation]:
        """The operations inside a fusion or an asynchronous operation."""
        names = op.called('to_apply' if op.opcode == 'call-start' else 'calls')
        return [inner for name in names for inner in self.program.computations.get(name, [])]

    def _inside(self, op: Operation, target: str) -> bool:
        return any(f'custom_call_target="{target}"' in inner.attributes for inner in self._called(op))

    def _is_start(self, op: Operation) -> bool:
        return op.opcode.endswith('-start') or op.opcode == 'fusion' and self._inside(op, 'AsyncCollectiveStart')

    def _collective(self, op: Operation, shapes: Mapping[str, str]) -> tuple[Operation | None, Collective | None]:
        """The collective that the operation is, or is a fusion around: its operation and what it sends; or None, None."""
        inner, around = op, [op]
        if op.opcode in ('fusion', 'async-start', 'call-start'):
            around = self._called(op)
            inner = next((o for o in around if o.opcode in _SENT), op)
            shapes = {o.name: o.shape for o in around}
        kind = inner.opcode.removesuffix('-start')
        if kind not in _SENT:
            return None, None
        if kind == 'all-reduce' and any(o.opcode == 'dynamic-slice' for o in around):
            kind = 'reduce-scatter'  # how the compiler writes one, or several together
        members = first_group(inner.attributes, self.program.devices)
        operands = sum(shape_bytes(shapes.get(name, '')) for name in inner.operands)
        return inner, Collective(kind, operands, operands * _SENT[kind](len(members)), members, 1, inner.source or op.source)
