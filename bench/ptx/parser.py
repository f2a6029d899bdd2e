"""PTX text into instructions: one kernel of a module, as ``triton.compile(...).asm["ptx"]`` gives it."""

from __future__ import annotations

import re

from bench.ptx.program import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Pair,
    Parameter,
    Program,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

REGISTER_BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8,
    "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip

_ENTRY = re.compile(
    r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{"
)
_GUARD = re.compile(r"@(?P<negated>!?)(?P<guard>[%\w$]+)\s+")
_OPCODE = re.compile(r"(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)$", re.S)
_LABEL = re.compile(r"(?P<name>[$\w.%]+)\s*:(?!:)")
_REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.+)$", re.S)
_SPECIALS = {
    "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
    "%ntid.x", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid",
}  # fmt: skip
_LINE_DIRECTIVES = (".loc", ".file", ".section")


def parse(text: str) -> Program:
    """The only kernel of a module."""
    text = re.sub(
        r"//[^\n]*", "", text
    )  # no block comments in LLVM's output but in strings of debug sections
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} kernels in the module, not one")
    entry = entries[0]
    head = text[: entry.start()]
    required = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1\s*,\s*1)?\s*$", entry["directives"].strip(), re.M)
    if required is None:
        raise PtxError(f"no .reqntid among {entry['directives'].split()}")
    program = Program(
        name=entry["name"],
        target=_directive(head, "target"),
        version=_directive(head, "version"),
        parameters=_parameters(entry["parameters"]),
        threads=int(required[1]),
        shared=re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", head),
    )
    first_line = text[: entry.end()].count("\n") + 1
    _Body(program).read(_until_brace(text[entry.end() :]), first_line)
    return program


def _directive(head: str, name: str) -> str:
    found = re.search(rf"^\s*\.{name}\s+([^\n]+)$", head, re.M)
    if found is None:
        raise PtxError(f"no .{name}")
    return found[1].strip()


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(
            r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)", declaration
        )
        if found is None:
            raise PtxError(f"parameter not understood: {declaration}")
        bits = REGISTER_BITS[found[1]]
        offset = -(-offset // (bits // 8)) * (bits // 8)
        parameters.append(Parameter(found[2], bits, offset))
        offset += bits // 8
    return parameters


def _until_brace(text: str) -> str:
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:at]
    raise PtxError("the kernel's body does not end")


class _Body:
    """Reads statements into a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._scopes: list[dict[str, tuple[int, int]]] = [{}]
        """Declared by each open block: name or prefix -> (bits, how many; 0: a plain name)."""
        self._known: list[dict[str, Register]] = [{}]

    def read(self, body: str, line: int) -> None:
        statement, begun = "", line
        for number, text in enumerate(body.split("\n"), line):
            stripped = text.strip()
            if not statement and stripped.startswith(_LINE_DIRECTIVES):
                continue
            for piece in re.split(r"(;)", stripped):
                if piece == ";":
                    self._statement(statement.strip(), begun)
                    statement = ""
                elif piece.strip():
                    if not statement:
                        begun = number
                    statement += piece + " "
                    statement = self._leading(statement)
        if statement.strip():
            raise PtxError(f"line {begun}: no end of: {statement}")
        if len(self._scopes) != 1:
            raise PtxError("blocks are left open")

    def _leading(self, statement: str) -> str:
        """Labels and braces that come before a statement."""
        while True:
            statement = statement.lstrip()
            label = _LABEL.match(statement)
            if label:
                if label["name"] in self._program.labels:
                    raise PtxError(f"label {label['name']} twice")
                self._program.labels[label["name"]] = len(self._program.instructions)
                statement = statement[label.end() :]
            elif statement.startswith("{"):
                self._scopes.append({})
                self._known.append({})
                statement = statement[1:]
            elif statement.startswith("}"):
                self._scopes.pop()
                self._known.pop()
                statement = statement[1:]
            else:
                return statement

    def _statement(self, statement: str, line: int) -> None:
        if not statement or statement.startswith(".pragma"):
            return
        declared = _REGISTERS.match(statement)
        if declared:
            bits = REGISTER_BITS[declared["type"]]
            for name in map(str.strip, declared["names"].split(",")):
                several = re.fullmatch(r"(.+)<(\d+)>", name)
                self._scopes[-1][several[1] if several else name] = (bits, int(several[2]) if several else 0)
            return
        if statement.startswith("."):
            raise PtxError(f"line {line}: directive not understood: {statement}")
        guard, negated, rest = None, False, statement
        guarded = _GUARD.match(statement)
        if guarded:
            guard, negated = self._register(guarded["guard"], line), bool(guarded["negated"])
            rest = statement[guarded.end() :]
        parts = _OPCODE.match(rest)
        if parts is None:
            raise PtxError(f"line {line}: not understood: {statement}")
        operands = tuple(self._operand(text, line) for text in _split(parts["operands"]))
        text = re.sub(r"\s+", " ", statement)
        self._program.instructions.append(Instruction(parts["opcode"], operands, guard, negated, text, line))

    def _operand(self, text: str, line: int) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(item, line) for item in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), line)
        if text in _SPECIALS:
            return Special(text)
        if "|" in text:
            first, second = (self._operand(part, line) for part in text.split("|"))
            return Pair(first, second)
        number = _number(text)
        if number is not None:
            return number
        if text.startswith("%") or self._declared(text):
            return self._register(text, line)
        if re.fullmatch(r"[$\w.]+", text):
            return Symbol(text)
        raise PtxError(f"line {line}: operand not understood: {text}")

    def _address(self, text: str, line: int) -> Address:
        found = re.fullmatch(r"([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?", text)
        if found is None:
            raise PtxError(f"line {line}: address not understood: [{text}]")
        base = self._operand(found[1], line)
        offset = 0 if found[3] is None else int(found[3], 0) * (-1 if found[2] == "-" else 1)
        if not isinstance(base, Register | Symbol | Immediate):
            raise PtxError(f"line {line}: address not understood: [{text}]")
        return Address(base, offset)

    def _declared(self, name: str) -> tuple[int, int] | None:
        """Which open block declares it, and its bits."""
        prefix = re.match(r"(.*?)(\d*)$", name)
        for depth in range(len(self._scopes) - 1, -1, -1):
            scope = self._scopes[depth]
            if name in scope and scope[name][1] == 0:
                return depth, scope[name][0]
            if prefix and prefix[2] and prefix[1] in scope and int(prefix[2]) < scope[prefix[1]][1]:
                return depth, scope[prefix[1]][0]
        return None

    def _register(self, name: str, line: int) -> Register:
        declared = self._declared(name)
        if declared is None:
            raise PtxError(f"line {line}: register {name} is not declared")
        depth, bits = declared
        known = self._known[depth]
        if name not in known:
            known[name] = Register(len(self._program.registers), bits, name)
            self._program.registers.append(known[name])
        return known[name]


def _number(text: str) -> Immediate | None:
    found = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text)
    if found:
        return Immediate(int(found[1], 16), 32)
    found = re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text)
    if found:
        return Immediate(int(found[1], 16), 64)
    found = re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text)
    return Immediate(int(found[1], 0)) if found else None


def _split(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    items, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            items.append(text[begin:at])
            begin = at + 1
    items.append(text[begin:])
    return [item for item in items if item.strip()]
