"""Machine code as cuobjdump prints it: the instructions of a kernel, and the path that a whole chunk takes."""

import re
from typing import NamedTuple

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
WIDE = re.compile(r"(LDG|STG)\.\S*\b128\b")
HASH = re.compile(r"0x7feb352d|-0x7b935975")  # rounding.h's multipliers


class Instruction(NamedTuple):
    """An instruction: where it is, whether under a predicate, what, and its operands as text."""

    address: int
    conditional: bool
    name: str
    operands: str

    @property
    def wide(self):
        """Whether it loads or stores 128 bits."""
        return WIDE.match(self.name) is not None

    @property
    def hash(self):
        """Whether it is a multiplication of the random bits' hash."""
        return HASH.search(self.operands) is not None


def functions(text):
    """The instructions of every kernel, by mangled name."""
    parts = (part.partition("\n") for part in text.split("Function : ")[1:])
    return {name.strip(): [_instruction(*found) for found in LINE.findall(body)] for name, _, body in parts}


def _instruction(address, predicate, name, operands):
    return Instruction(int(address, 16), bool(predicate), name, operands)


def whole_chunk(code):
    """The instructions on the path of a whole chunk.

    Of a loop's paths the one with most wide accesses and hashes, which only whole chunks have, and of these the
    shortest: past the slow ways of divisions, and what is worked out anew for another group. Of the loops the
    shortest, which is over chunks.
    """
    following = _following(code)
    backwards = _backwards(following)
    paths = [_best_path(code, following, backwards, head) for head in {head for _, head in backwards}]
    return max(paths, key=lambda path: _rank(code, path)) if paths else []


def _rank(code, path):
    return sum(code[i].wide + code[i].hash for i in path), -len(path)


def _following(code):
    """The indices of what may come after each instruction. Calls are of slow ways, and come back."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following = []
    for i, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        conditional = instruction.conditional or re.search(r"\bU?P\d", instruction.operands)
        after = []
        if instruction.name.startswith("BRA") and target:
            after.append(index[int(target[1], 16)])
        if not instruction.name.startswith(("BRA", "EXIT", "RET")) or conditional:
            after.append(i + 1)
        following.append([j for j in after if j < len(code)])
    return following


def _backwards(following):
    """The edges (from, to) that close loops."""
    found, on_the_way, done = set(), {0}, set()
    stack = [(0, iter(following[0]))]
    while stack:
        at, others = stack[-1]
        other = next(others, None)
        if other is None:
            stack.pop()
            on_the_way.discard(at)
            done.add(at)
        elif other in on_the_way:
            found.add((at, other))
        elif other not in done:
            on_the_way.add(other)
            stack.append((other, iter(following[other])))
    return found


def _best_path(code, following, backwards, head):
    """The best path from a loop's first instruction back to it."""
    ends = {at for at, to in backwards if to == head}
    best = {}  # of an instruction: how good its best path to an end is, and the next instruction on it
    stack = [head]
    while stack:
        at = stack[-1]
        after = [j for j in following[at] if (at, j) not in backwards]
        missing = [j for j in after if j not in best]
        if missing:
            stack.append(missing[0])
            continue
        stack.pop()
        ways = [(*best[j][:2], j) for j in after if best[j]] + ([(0, 0, None)] if at in ends else [])
        worth, length, then = max(ways, default=(0, 0, None), key=lambda way: way[:2])
        best[at] = (worth + code[at].wide + code[at].hash, length - 1, then) if ways else None
    path = []
    while head is not None:
        path.append(head)
        head = best[head][2]
    return path
