"""What a program compiled for TPU costs, read from its text: time, collectives, the costliest operations.

The TPU compiler writes `estimated_cycles` beside most operations and lists the operations in the order in which they run. The
time is a simulation of that order: an operation takes its cycles, a loop its body's time once a trip. An asynchronous copy or
collective begins at its `-start`, in a queue of its kind, and the program waits at its `-done` when it is not over by then.
`jax.stages.Compiled.cost_analysis` is of no use here: it counts a loop's body once.

Limits. The cycles are the compiler's own model, not a measurement. An operation without cycles is taken to move its operands
and results once through the memory (`Cost.guessed_cycles` says how much that is). Copies and operations that run at the same
time do not slow each other down, and collectives reach the bandwidth of their links.
"""
from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
               'collective-broadcast')
_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id',
         'opt-barrier', 'add-dependency', 'domain', 'iota'}
_FREE_CALLS = ('AllocateBuffer', 'ConcatBitcast', 'SliceBitcast', 'Sharding', 'AssumeGatherIndicesInBound')
_ARRAY = re.compile(r'\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_OPERATION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of the program: `name` = `shape` `opcode`(`operands`), `attributes`; `root` marks a computation's result."""
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

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

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that these attributes name."""
        pattern = rf'\b(?:{"|".join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))'
        names = [many or one for many, one in re.findall(pattern, self.attributes)]
        return [name.strip().lstrip('%') for group in names for name in group.split(',')]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each in the order in which it runs, and the name of the first."""
    computations: Mapping[str, list[Operation]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of one collective: bytes that a device sends, times it runs, devices that take part."""
    kind: str
    bytes: float
    runs: int
    group: int
    source: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of a program on one device; times in cycles.

    Attributes:
      cycles: all.
      compute_cycles: of operations, whatever runs beside them.
      collective_cycles: spent waiting for collectives.
      copy_cycles: spent waiting for copies.
      guessed_cycles: the part of compute_cycles that is operations without an estimate.
      operations: (operation, cycles in all its runs), the costliest first.
      collectives: every collective of the program.
    """
    cycles: float
    compute_cycles: float
    collective_cycles: float
    copy_cycles: float
    guessed_cycles: float
    operations: list[tuple[Operation, float]]
    collectives: list[Collective]


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
        elif (found := _OPERATION.match(line)) and computations:
            current.append(_operation(found[2], found[3], bool(found[1])))
    if not entry:
        raise ValueError('the text of the compiled program has no ENTRY computation: is it the text of an executable?')
    return Program(computations, entry)


def _operation(name: str, rest: str, root: bool) -> Operation:
    end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.index('(')
    closing = _closing(rest, opening)
    operands = re.findall(r'%([\w.\-]+)', rest[opening:closing])
    return Operation(name, shape, rest[:opening], tuple(operands), rest[closing:], root)


def _closing(text: str, opening: int) -> int:
    """The place after the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == '(') - (text[place] == ')')
        if not depth:
            return place + 1
    raise ValueError(f'unbalanced brackets in the compiled program: {text[:80]}')


def shape_bytes(shape: str) -> float:
    """Bytes of 'bf16[8,128]{1,0}' or of all arrays of a tuple, without the padding of tiles."""
    arrays = _ARRAY.findall(shape)
    return sum(_BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(',') if n) for dtype, sizes in arrays)


def trip_count(program: Program, loop: Operation) -> int | None:
    """How often the loop's body runs, for a loop that counts from 0; None when its condition does not show it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    operations = {op.name: op for op in program.computations[loop.called('condition')[0]]}
    root = next(op for op in operations.values() if op.root)
    if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
        return None
    bound = operations[root.operands[1]]
    return int(bound.operands[0]) if bound.opcode == 'constant' and bound.operands else None


class _Simulation:
    """Runs a program's operations in their order and adds up what they cost."""

    def __init__(self, program: Program, memory_bytes_per_cycle: float, collective_cycles: Callable[[Collective], float]):
        self.program = program
        self.memory_bytes_per_cycle = memory_bytes_per_cycle
        self.collective_cycles = collective_cycles
        self.compute = self.guessed = 0.0
        self.waits = {'collective': 0.0, 'copy': 0.0}
        self.operations: dict[str, tuple[Operation, float]] = {}
        self.collectives: dict[str, Collective] = {}

    def run(self, computation: str, runs: int) -> float:
        """Cycles of one run of the computation, which runs `runs` times in all."""
        now = 0.0
        free = {'collective': 0.0, 'copy': 0.0}  # when each queue is empty
        over: dict[str, tuple[str, float]] = {}  # started operation -> its queue and the time of its end
        for op in self.program.computations[computation]:
            if op.opcode.endswith('-done'):
                queue, end = over.get(op.operands[0], ('copy', 0.0))
                self.waits[queue] += max(0.0, end - now) * runs
                now = max(now, end)
            elif op.opcode.endswith('-update'):
                over[op.name] = over.get(op.operands[0], ('copy', 0.0))
            elif op.opcode.endswith('-start'):
                queue, cycles = self.started(op, runs)
                free[queue] = max(now, free[queue]) + cycles
                over[op.name] = (queue, free[queue])
            elif op.opcode == 'while':
                now += self.loop(op, runs)
            elif op.opcode == 'conditional':
                branches = op.called('branch_computations', 'true_computation', 'false_computation')
                now += max(self.run(branch, runs) for branch in branches)
            elif op.opcode == 'call':
                now += self.run(op.called('to_apply')[0], runs)
            else:
                now = self.plain(op, runs, now, free)
        return now
