"""The count of machine instructions, on kernels whose cost is known.

Compiling needs Triton's compiler, and the main session runs under its interpreter: this file, run as
a script without TRITON_INTERPRET, compiles the kernels below and prints what was counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl

from bench.machine_code.account import TARGETS, Compiled, account, compile_for, histogram
from bench.machine_code.control_flow import Graph, Instruction
from bench.machine_code.disassembly import DIALECTS, _gcn_items, _sass_items

ROOT = Path(__file__).parents[2]
TILE = 1024
WARPS = 4


@triton.jit
def _copy(source, target, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at))


@triton.jit
def _roots(source, target, n, ROOTS: tl.constexpr, TILE: tl.constexpr):
    """ROOTS square roots of each element, one machine instruction each; the tail takes one more."""
    for start in range(tl.program_id(0) * TILE, n, tl.num_programs(0) * TILE):
        at = start + tl.arange(0, TILE)
        if start + TILE <= n:
            x = tl.load(source + at)
            for _ in tl.static_range(ROOTS):
                x = tl.sqrt(x)
            tl.store(target + at, x)
        else:
            x = tl.load(source + at, at < n)
            for _ in tl.static_range(ROOTS + 1):
                x = tl.sqrt(x)
            tl.store(target + at, x, at < n)


@triton.jit
def _exact_division(source, target, TILE: tl.constexpr):
    """A division that calls a subroutine for denormal numbers."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(source + at)
    tl.store(target + at, tl.div_rn(x, x + 3))


@triton.jit
def _peak(source, target, TILE: tl.constexpr):
    """A maximum over all warps: they meet at barriers."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(source + at)
    tl.store(target + at, x - tl.max(x))


_POINTERS = {"source": "*fp32", "target": "*fp32"}
_STRAIGHT = {**_POINTERS, "TILE": "constexpr"}
_LOOP = {**_POINTERS, "n": "i32", "ROOTS": "constexpr", "TILE": "constexpr"}


def _measure(
    fn: Any, signature: dict[str, str], target: str, roots: int = 0, aligned: int = 2, **options: Any
) -> dict[str, Any]:
    """The first `aligned` arguments are said to be multiples of 16."""
    constexprs = {"TILE": TILE, "ROOTS": roots}
    chosen = {name: constexprs[name] for name, kind in signature.items() if kind == "constexpr"}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {(i,): [["tt.divisibility", 16]] for i in range(aligned)}
    compiled = compile_for(fn, signature, chosen, attrs, target, WARPS, **options)
    counted = account(compiled, TILE)
    return {
        "instructions": counted.instructions,
        "whole kernel": sum(not line.padding for line in compiled.everything),
        "per element": counted.per_element,
        "accesses": {f"{kind}{width}": count for (kind, width), count in counted.accesses.items()},
        "bytes": counted.bytes_per_element,
        "barriers": counted.barriers,
        "registers": counted.registers,
        "spilled": counted.spill_bytes,
        "stack": counted.stack_bytes,
        "flags": counted.flags,
        "roots": sum(count for name, count in histogram(compiled).items() if "sqrt" in name.lower()),
        "ends": [line.opcode for line in compiled.hot_path if line.ends],
        "line": str(counted),
    }


def _measure_all() -> dict[str, dict[str, Any]]:
    return {
        f"{name} {target}": _measure(fn, signature, target, **arguments)
        for target in ("sm_75", "sm_90", "sm_100", "gfx942", "gfx1100")
        for name, fn, signature, arguments in (
            ("copy", _copy, _STRAIGHT, {}),
            ("3 roots", _roots, _LOOP, {"roots": 3}),
            ("9 roots", _roots, _LOOP, {"roots": 9}),
            ("wide tail", _roots, _LOOP, {"roots": 9, "aligned": 3}),
            ("division", _exact_division, _STRAIGHT, {}),
            ("peak", _peak, _STRAIGHT, {}),
        )
    } | {"squeezed sm_90": _measure(_exact_division, _STRAIGHT, "sm_90", maxnreg=16)}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


THREADS = {"sm_75": 128, "sm_90": 128, "sm_100": 128, "gfx942": 256, "gfx1100": 128}
targets = pytest.mark.parametrize("target", THREADS)


@pytest.mark.slow
@targets
def test_a_copy_moves_each_element_once_in_the_widest_accesses(measured, target):
    copy = measured[f"copy {target}"]
    each = TILE * 32 // THREADS[target] // 128
    assert copy["accesses"] == {"load128": each, "store128": each}
    assert copy["bytes"] == {"load": 4, "store": 4}
    assert copy["barriers"] == copy["stack"] == 0
    assert copy["spilled"] == {"load": 0, "store": 0}


@targets
def test_straight_line_code_is_counted_from_entry_to_exit(measured, target):
    copy = measured[f"copy {target}"]
    assert copy["ends"] == ["s_endpgm" if target.startswith("gfx") else "EXIT"]
    # All of it but the jump to itself with which ptxas pads a kernel, and AMD's branch over its preamble.
    assert copy["whole kernel"] - copy["instructions"] in (0, 1)
    assert copy["per element"] == copy["instructions"] * THREADS[target] / TILE


@targets
def test_six_more_instructions_per_element_count_as_six(measured, target):
    three, nine = measured[f"3 roots {target}"], measured[f"9 roots {target}"]
    per_thread = TILE // THREADS[target]
    assert three["roots"] == 3 * per_thread  # the tail's four are not among them
    assert nine["roots"] == 9 * per_thread
    if target.startswith("sm_"):  # AMD's compiler also inserts waits
        assert nine["per element"] - three["per element"] == 6


@targets
@pytest.mark.parametrize("name", ["9 roots", "wide tail"])  # "wide": its accesses are as wide, but masked
def test_the_hot_path_of_a_loop_is_one_trip_without_the_masked_tail(measured, target, name):
    loop = measured[f"{name} {target}"]
    each = TILE * 32 // THREADS[target] // 128
    assert loop["accesses"] == {"load128": each, "store128": each}
    assert loop["bytes"] == {"load": 4, "store": 4}
    assert loop["ends"] in ([], ["EXIT"])  # a trip passes the exit at most, if it hangs on a predicate
    assert loop["roots"] == 9 * TILE // THREADS[target]
    assert loop["instructions"] < loop["whole kernel"] / 2


@targets
def test_the_slow_path_of_a_division_is_not_on_the_hot_path(measured, target):
    division = measured[f"division {target}"]
    assert division["flags"] == []
    assert division["bytes"] == {"load": 4, "store": 4}
    assert division["instructions"] < division["whole kernel"] - 1 or target.startswith("gfx")


@targets
def test_warps_that_meet_show_as_barriers(measured, target):
    assert measured[f"peak {target}"]["barriers"] > 0


def test_too_few_registers_show_as_spills(measured):
    squeezed = measured["squeezed sm_90"]
    assert squeezed["registers"] <= 24
    assert squeezed["spilled"]["load"] > 0
    assert squeezed["spilled"]["store"] > 0
    assert "spills" in squeezed["line"]


# --- Reading text: no compiler ---------------------------------------------------------------------------


def _work(count: int, **flow: Any) -> list[Instruction]:
    return [*[Instruction("WORK", "work")] * (count - 1), Instruction("WORK", "work", **flow)]


def _sizes(graph: Graph, *anchors: int) -> list[int]:
    return [block.size for block in graph.route([graph.blocks[anchor] for anchor in anchors])]


def test_the_shorter_of_two_ways_round_a_loop_is_taken():
    graph = Graph(
        [
            *_work(5),
            "loop",
            *_work(7, jump="tail"),
            *_work(30, jump="fast"),
            *_work(100),
            "fast",
            *_work(11, jump="next", falls=False),
            "tail",
            *_work(500),
            "next",
            *_work(2, jump="loop"),
            *_work(1, ends=True, falls=False),
        ]
    )
    assert sorted(_sizes(graph, 2)) == [2, 7, 11, 30]
    assert sorted(_sizes(graph, 2, 4)) == [2, 7, 11, 30]
    assert sorted(_sizes(graph, 5)) == [2, 7, 500]


def test_without_a_loop_the_path_runs_from_entry_to_exit():
    graph = Graph([*_work(3, jump="end"), *_work(4), "end", *_work(5, ends=True, falls=False), *_work(9)])
    assert _sizes(graph, 1) == [3, 4, 5]
    assert _sizes(graph, 2) == [3, 5]
    assert [block.size for block in graph.reachable()] == [3, 4, 5]


def _loads(count: int, opcode: str, guarded: bool = False) -> list[Instruction]:
    return [Instruction(opcode, opcode, guarded)] * count


@pytest.mark.parametrize(
    "tail",
    [_loads(12, "LDG.E"), _loads(3, "LDG.E.128", guarded=True)],
    ids=["narrow though it moves more", "masked though it moves more"],
)
def test_wide_and_unmasked_accesses_mark_the_full_tile(tail):
    listing = [
        "loop", *_work(1, jump="tail"), *_loads(2, "LDG.E.128"), *_work(50, jump="loop"),
        *_work(1, ends=True, falls=False), "tail", *tail, *_work(1, jump="loop", falls=False),
    ]  # fmt: skip
    compiled = Compiled("k", TARGETS["sm_90"], 128, 0, 0, 0, 0, Graph(listing))
    assert account(compiled, 1024).accesses == {("load", 128): 2}
    assert account(compiled, 1024).instructions == 53


def test_a_jump_to_nowhere_is_an_error():
    with pytest.raises(ValueError, match="unknown label"):
        Graph(_work(1, jump="nowhere"))


def _sass(*lines: str) -> list[Any]:
    text = "".join(f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    return list(
        _sass_items(f'\t.section\t.text.k,"ax",@progbits\n{text}\t.section\t.text.other,"ax"\n{text}', "k")
    )


@pytest.mark.parametrize(
    ("line", "jump", "falls", "ends"),
    [
        ("BRA `(.L_x_1)", ".L_x_1", False, False),
        ("@!P0 BRA `(.L_x_1)", ".L_x_1", True, False),
        ("BRA.U UP0, `(.L_x_1)", ".L_x_1", True, False),
        ("BRA.DIV ~URZ, `(.L_x_1)", ".L_x_1", True, False),
        ("EXIT", None, False, True),
        ("@P0 EXIT", None, True, True),
        ("@P1 CALL.REL.NOINC `(.L_x_1)", ".L_x_1", True, False),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath)", None, True, False),
        ("RET.REL.NODEC R4 `(k)", None, False, True),
        ("@P0 FADD R1, R2, R3", None, True, False),
    ],
)
def test_where_control_goes_after_nvidia_instructions(line, jump, falls, ends):
    (found,) = _sass(line)
    assert (found.jump, found.falls, found.ends) == (jump, falls, ends)


def test_an_indirect_jump_is_refused():
    with pytest.raises(ValueError, match="not followed"):
        _sass("BRX R2 -0x40")


@pytest.mark.parametrize(
    ("vendor", "opcode", "access"),
    [
        ("cuda", "LDG.E.128.SYS", ("load", 128)),
        ("cuda", "LDG.E.EF.U16", ("load", 16)),
        ("cuda", "LDG.E.ENL2.256", ("load", 256)),
        ("cuda", "STG.E", ("store", 32)),
        ("cuda", "STG.E.U8", ("store", 8)),
        ("cuda", "REDG.E.ADD.F32", ("atomic", 32)),
        ("cuda", "LDS.128", None),
        ("cuda", "LDL.64", None),
        ("hip", "global_load_dwordx4", ("load", 128)),
        ("hip", "global_load_b128", ("load", 128)),
        ("hip", "buffer_load_ushort", ("load", 16)),
        ("hip", "global_load_d16_hi_b16", ("load", 16)),
        ("hip", "global_load_d16_u8", ("load", 8)),
        ("hip", "global_store_byte", ("store", 8)),
        ("hip", "buffer_store_dword", ("store", 32)),
        ("hip", "global_store_short_d16_hi", ("store", 16)),
        ("hip", "global_atomic_add_f32", ("atomic", 32)),
        ("hip", "scratch_load_dword", None),
        ("hip", "ds_read_b128", None),
    ],
)
def test_the_width_of_global_accesses(vendor, opcode, access):
    assert DIALECTS[vendor].access(opcode) == access


def test_the_width_of_spills():
    assert DIALECTS["cuda"].local("STL.64") == ("store", 64)
    assert DIALECTS["hip"].local("scratch_load_dwordx2") == ("load", 64)


def test_an_access_under_a_narrowed_mask_of_amd_is_guarded():
    lines = [
        "k:", "\tglobal_load_dword v0, v1, off", "\ts_and_saveexec_b64 s[0:1], vcc",
        "\ts_cbranch_execz .LBB0_2", "; %bb.1:", "\tglobal_store_dword v1, v0, off", ".LBB0_2:",
        "\ts_or_b64 exec, exec, s[0:1]", "\tglobal_store_dword v2, v0, off", "\ts_endpgm", "\t.section\tx",
    ]  # fmt: skip
    items = [item for item in _gcn_items("\n" + "\n".join(lines), "k") if isinstance(item, Instruction)]
    accesses = [line.guarded for line in items if line.opcode.startswith("global_")]
    assert accesses == [False, True, False]
    assert [
        line.opcode for line in items if line.jump
    ] == []  # execz: on the hot path some lane wants the work


def test_an_interpreted_kernel_is_refused():
    with pytest.raises(TypeError, match="TRITON_INTERPRET"):
        compile_for(lambda: None, {}, {}, {}, "sm_90")  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps(_measure_all()))
