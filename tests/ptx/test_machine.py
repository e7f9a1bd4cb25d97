"""The interpreter itself, on PTX written by hand: what instructions compute, and what it notices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from . import fragments
from .machine import Machine
from .memory import Fault, Memory
from .opcodes import bf16_of_float, find_opcode
from .program import PtxError, read_kernel

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n.extern .shared .align 1024 .b8 buffer[];\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>; .reg .f64 %e<9>;"
START = """
ld.param.u64 %d0, [out]; cvta.to.global.u64 %d1, %d0; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %ntid.x; mad.lo.s32 %r3, %r1, %r2, %r0; mul.wide.u32 %d2, %r3, 4; add.s64 %d3, %d1, %d2;
ld.param.u64 %d4, [in]; add.s64 %d5, %d4, %d2; shl.b32 %r4, %r0, 2; mov.u32 %r5, buffer; add.s32 %r6, %r5, %r4;
"""
"""%r0: thread, %r1: block, %r3: thread of the grid; its word is at %d3 in the output, %d5 in the input, %r6 shared."""

Run = Callable[..., np.ndarray]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs instructions after START; returns the output, a word for each thread."""

    def run_body(
        body: str, *, threads: int = 32, blocks: int = 1, shared: int = 4096, together: int = 2, checked: bool = True,
        words: int | None = None, data: np.ndarray | None = None, machines: list[Machine] | None = None,
        count: bool = False,
    ) -> np.ndarray:  # fmt: skip
        text = (
            HEAD
            + f".visible .entry kernel(\n.param .u64 out,\n.param .u64 in\n)\n{{\n{REGISTERS}{START}{body}\nret;\n}}\n"
        )
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ptx"
        path.write_text(text)
        memory = Memory(1 << 20)
        number = threads * blocks if words is None else words
        out = memory.reserve("out", 4 * number, output=True)
        source = memory.put("in", np.arange(number, dtype=np.uint32) * 3 if data is None else data)
        machine = Machine(read_kernel(str(path), "kernel"), threads, min(together, blocks), shared, memory, count=count)
        if machines is not None:
            machines.append(machine)
        machine.run([out.to_bytes(8, "little"), source.to_bytes(8, "little")], blocks, range(blocks))
        if checked:
            memory.check_written()
        return memory.get("out").view(np.uint32)

    return run_body


STORE = "st.global.u32 [%d3], %r9;"


def test_threads_blocks_and_memory(run):
    out = run("ld.global.nc.u32 %r8, [%d5]; add.s32 %r9, %r8, %r1;" + STORE, threads=40, blocks=5)
    assert out.tolist() == [3 * i + i // 40 for i in range(200)]


def test_loops_and_divergence(run):
    body = """
    mov.u32 %r9, 0; mov.u32 %r8, 0;
    $loop: setp.ge.u32 %p1, %r8, %r0; @%p1 bra $done;
    add.s32 %r9, %r9, %r8; add.s32 %r8, %r8, 1; bra.uni $loop;
    $done: @!%p1 bra $loop; setp.eq.u32 %p2, %r0, 7; @%p2 add.s32 %r9, %r9, 100;
    """
    assert run(body + STORE, threads=64).tolist() == [i * (i - 1) // 2 + 100 * (i == 7) for i in range(64)]


def signed(value: int) -> int:
    return value & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mul.hi.s32 %r9, -7, 0x40000000;", signed(-7 * 0x40000000 >> 32)),
        ("mul.hi.u32 %r9, 0xfffffff9, 0x40000000;", 0xFFFFFFF9 * 0x40000000 >> 32),
        ("div.s32 %r9, -7, 2;", signed(-3)),
        ("rem.s32 %r9, -7, 2;", signed(-1)),
        ("div.u32 %r9, 0xfffffff9, 10;", 0xFFFFFFF9 // 10),
        ("shl.b32 %r9, 5, 32;", 0),
        ("shr.s32 %r9, -5, 40;", signed(-1)),
        ("shr.u32 %r9, 0x80000000, 31;", 1),
        ("shr.s32 %r9, -8, 1;", signed(-4)),
        ("prmt.b32 %r9, 0x33221180, 0x77665544, 0x7198;", 0x771100FF),
        ("prmt.b32 %r9, 0x33221100, 0x77665544, 0x5410;", 0x55441100),
        ("lop3.b32 %r9, 0xF0F0, 0xCCCC, 0xAAAA, 0x96;", 0xF0F0 ^ 0xCCCC ^ 0xAAAA),
        ("lop3.b32 %r9, 0xF0, 0xCC, 0xAA, 0xCA;", (0xF0 & 0xCC) | (~0xF0 & 0xAA)),
        ("bfi.b32 %r9, 0x5, 0xFFFFFFFF, 4, 8;", 0xFFFFF05F),
        ("bfe.u32 %r9, 0xABCD1234, 8, 12;", 0xD12),
        ("bfe.s32 %r9, 0xF00, 8, 4;", signed(-1)),
        ("shf.l.wrap.b32 %r9, 0x80000001, 0x00000002, 4;", 0x28),
        ("shf.r.clamp.b32 %r9, 0x00000010, 0x00000001, 4;", 0x10000001),
        ("popc.b32 %r9, 0xF0F1;", 9),
        ("clz.b32 %r9, 0x00010000;", 15),
        ("min.s32 %r9, -1, 1;", signed(-1)),
        ("max.u32 %r9, 0xffffffff, 1;", signed(-1)),
        ("mov.f32 %f1, 0fC0700000; cvt.rpi.s32.f32 %r9, %f1;", signed(-3)),
        ("mov.f32 %f1, 0fC0700000; cvt.rmi.f32.f32 %f2, %f1; mov.b32 %r9, %f2;", 0xC0800000),
        ("mul.wide.s32 %d8, -3, 5; cvt.u32.u64 %r9, %d8;", signed(-15)),
        ("cvt.s64.s32 %d8, -3; shr.u64 %d8, %d8, 32; cvt.u32.u64 %r9, %d8;", signed(-1)),
        ("mov.u16 %h1, 0xffff; cvt.s32.s16 %r9, %h1;", signed(-1)),
        ("mov.b32 {%h1, %h2}, 0x00050007; mov.b32 %r9, {%h2, %h1};", 0x00070005),
        ("mov.f32 %f1, 0f7FC00000; setp.neu.f32 %p1, %f1, 0f00000000; selp.b32 %r9, 1, 2, %p1;", 1),
        ("mov.f32 %f1, 0f7FC00000; setp.ne.f32 %p1, %f1, 0f00000000; selp.b32 %r9, 1, 2, %p1;", 2),
        ("mov.f32 %f1, 0f7FC00000; setp.geu.f32 %p1, %f1, 0f00000000; selp.b32 %r9, 1, 2, %p1;", 1),
        ("setp.lt.and.s32 %p1, 1, 2, %p2; selp.b32 %r9, 1, 2, %p1;", 2),
        ("mov.f32 %f1, 0f3F810000; cvt.rn.bf16.f32 %h1, %f1; mov.u16 %h2, 0; mov.b32 %r9, {%h1, %h2};", 0x3F81),
        ("mov.f32 %f1, 0f3F808000; cvt.rn.bf16.f32 %h1, %f1; mov.u16 %h2, 0; mov.b32 %r9, {%h1, %h2};", 0x3F80),
        ("mov.f32 %f1, 0f3F818000; cvt.rn.bf16.f32 %h1, %f1; mov.u16 %h2, 0; mov.b32 %r9, {%h1, %h2};", 0x3F82),
        ("mov.f32 %f1, 0f3FC00000; mov.f32 %f2, 0f40000000; cvt.rn.bf16x2.f32 %r9, %f1, %f2;", 0x3FC04000),
        ("mov.f32 %f1, 0f3FC00000; mov.f32 %f2, 0f40000000; cvt.rn.f16x2.f32 %r9, %f1, %f2;", 0x3E004000),
        ("mov.f32 %f1, 0fC0700000; cvt.rzi.s32.f32 %r9, %f1;", signed(-3)),
        ("mov.f32 %f1, 0f3F800003; fma.rn.f32 %f2, %f1, %f1, 0fBF800000; mov.b32 %r9, %f2;", 0x35400002),
        ("mov.u32 %r8, %nctaid.x; mov.u32 %r7, %ntid.x; mad.lo.s32 %r9, %r8, 100, %r7;", 132),
    ],
)  # fmt: skip
def test_arithmetic(run, instruction, expected):
    assert set(run(instruction + STORE).tolist()) == {expected}


LANES = range(32)


@pytest.mark.parametrize(
    ("mode", "by", "limit", "source"),
    [
        ("idx", 5, 31, lambda i: 5),
        ("idx", 1, 0x181F, lambda i: i // 8 * 8 + 1),
        ("bfly", 3, 31, lambda i: i ^ 3),
        ("up", 2, 0, lambda i: i - 2 if i >= 2 else i),
        ("down", 4, 31, lambda i: i + 4 if i + 4 < 32 else i),
        ("down", 4, 0x181F, lambda i: i + 4 if i % 8 < 4 else i),
    ],
)
def test_shuffles(run, mode, by, limit, source):
    out = run(f"mul.lo.u32 %r8, %r0, 7; shfl.sync.{mode}.b32 %r9|%p1, %r8, {by}, {limit}, -1;" + STORE)
    assert out.tolist() == [7 * source(i) for i in LANES]


def test_votes(run):
    body = "setp.eq.u32 %p1, %r0, 40; vote.sync.any.pred %p2, %p1, -1; vote.sync.ballot.b32 %r8, %p1, -1;"
    body += "selp.b32 %r7, 1, 0, %p2; add.s32 %r9, %r7, %r8;"
    assert run(body + STORE, threads=64).tolist() == [0] * 32 + [257] * 32


# --- matrices


@pytest.mark.parametrize("instruction", ["m16n8k16", "m16n8k8"])
def test_table_names_each_element_once(instruction):
    columns = {"a": 16 if instruction == "m16n8k16" else 8, "b": 8, "d": 8}
    for operand, number in columns.items():
        assert sorted(fragments.gather(instruction, operand, number).tolist()) == list(
            range(fragments.gather(instruction, operand, number).size)
        )


def in_registers(matrix: np.ndarray, instruction: str, operand: str) -> np.ndarray:
    """[register, lane]: a matrix as the table says, two elements of 16 bits or one of 32 in a register."""
    at = fragments.positions(instruction, operand)
    values = matrix[at[..., 0], at[..., 1]]  # [register, half, lane]
    if values.shape[1] == 1:
        return np.ascontiguousarray(values[:, 0])
    return np.ascontiguousarray(values.transpose(0, 2, 1)).view(np.uint32)[..., 0]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("depth", [16, 8])
def test_mma(run, dtype, depth):
    rng = np.random.default_rng(depth)
    a, b, c = (rng.integers(-8, 9, s).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8)))
    name = f"m16n8k{depth}"

    def encode(x: np.ndarray) -> np.ndarray:
        return bf16_of_float(x) if dtype == "bf16" else x.astype(np.float16).view(np.uint16)

    words = [*in_registers(encode(a), name, "a"), *in_registers(encode(b), name, "b")]
    words += list(in_registers(c.view(np.uint32), name, "d"))
    data = np.stack(words).astype(np.uint32).reshape(-1)
    body = "".join(f"ld.global.u32 %r{10 + i}, [%d5+{128 * i}];" for i in range(len(words)))
    n_a = len(in_registers(encode(a), name, "a"))
    names = [f"%r{10 + i}" for i in range(len(words))]
    floats = "".join(f"mov.b32 %f{i}, {names[len(words) - 4 + i]};" for i in range(4))
    d = "{%f0, %f1, %f2, %f3}"
    body += floats + f"mma.sync.aligned.{name}.row.col.f32.{dtype}.{dtype}.f32 {d}, {{{', '.join(names[:n_a])}}}, "
    body += f"{{{', '.join(names[n_a:-4])}}}, {d};" + "".join(
        f"st.global.f32 [%d3+{128 * i}], %f{i};" for i in range(4)
    )
    out = run(body, words=max(128, data.size), data=data, checked=False).view(np.float32)[:128].reshape(4, 32)
    assert (out == in_registers(a @ b + c, name, "d")).all()


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(run, number, trans):
    # Matrix m has the elements 64 * m + 8 * row + column; its rows lie in shared memory in reverse.
    body = "".join(
        f"add.s32 %r7, %r4, {128 * i}; xor.b32 %r8, %r7, 0x70; xor.b32 %r8, %r8, 0; shr.u32 %r9, %r8, 1;"
        "add.s32 %r10, %r9, 1; shl.b32 %r10, %r10, 16; or.b32 %r9, %r9, %r10;"
        f"add.s32 %r11, %r5, %r7; st.shared.u32 [%r11], %r9;"
        for i in range(4)
    )
    targets = ", ".join(f"%r{20 + i}" for i in range(number))
    body += "bar.sync 0; shl.b32 %r12, %r0, 4; xor.b32 %r12, %r12, 0x70; add.s32 %r12, %r5, %r12;"
    body += f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{targets}}}, [%r12];"
    body += "".join(f"st.global.u32 [%d3+{128 * i}], %r{20 + i};" for i in range(number))
    out = run(body, words=32 * number).reshape(number, 32)
    name = "ldmatrix_trans" if trans else "ldmatrix"
    for m in range(number):
        matrix = (64 * m + np.arange(64)).reshape(8, 8).astype(np.uint16)
        assert (out[m] == in_registers(matrix, name, "d")[0]).all()


def test_movmatrix(run):
    matrix = np.arange(64).reshape(8, 8).astype(np.uint16)
    data = in_registers(matrix, "movmatrix", "a")[0]
    out = run("ld.global.u32 %r8, [%d5]; movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r8;" + STORE, data=data)
    assert (out == in_registers(matrix, "movmatrix", "d")[0]).all()
    assert (out == in_registers(np.ascontiguousarray(matrix.T), "movmatrix", "a")[0]).all()


# --- what kernels do wrong

OTHER = "xor.b32 %r7, %r4, 4; add.s32 %r7, %r5, %r7;"  # the neighbour's word
COPY = "cp.async.ca.shared.global [%r6], [%d5], 4, 4; cp.async.commit_group;"


def fails(run: Run, part: str, body: str, **options) -> None:
    with pytest.raises((Fault, PtxError), match=part):
        run(body, **options)


def test_unknown_opcode_is_named(run):
    fails(run, r"unknown opcode tanh\.approx\.f32", "tanh.approx.f32 %f1, %f1;")
    with pytest.raises(PtxError, match=r"unknown opcode add\.sat\.s32"):
        find_opcode("add.sat.s32")


@pytest.mark.parametrize(
    ("access", "race"),
    [
        ("st.shared.u32 [%r6], %r0; SYNC ld.shared.u32 %r9, [%r7];", "reads what was written"),
        ("st.shared.u32 [%r6], %r0; BAR ld.shared.u32 %r9, [%r7]; SYNC st.shared.u32 [%r6], %r0;", "what was read"),
        ("st.shared.u32 [%r6], %r0; SYNC st.shared.u32 [%r7], %r0; mov.u32 %r9, 0;", "writes over what was written"),
        ("st.shared.u32 [%r6], %r0; BAR ld.shared.u32 %r9, [%r5]; SYNC st.shared.u32 [%r6], %r0;", "several threads"),
    ],
)
def test_races(run, access, race):
    body = OTHER + access.replace("BAR", "bar.sync 0;") + STORE
    run(body.replace("SYNC", "bar.sync 0;"), threads=64, blocks=3)
    run(body.replace("SYNC", "bar.warp.sync -1;"), threads=32)
    fails(run, race, body.replace("SYNC", ""), threads=64)


def test_a_warp_barrier_does_not_order_other_warps(run):
    across = "xor.b32 %r7, %r4, 128; add.s32 %r7, %r5, %r7; st.shared.u32 [%r6], %r0;"
    fails(run, "reads what was written", across + "bar.warp.sync -1; ld.shared.u32 %r9, [%r7];" + STORE, threads=64)


def test_one_place_written_by_two_lanes(run):
    fails(run, "same place in one instruction", "st.shared.u32 [%r5], %r0;")


def test_copies(run):
    assert (run(COPY + "cp.async.wait_group 0; ld.shared.u32 %r9, [%r6];" + STORE) == np.arange(32) * 3).all()
    zeros = "cp.async.ca.shared.global [%r6], [%d5], 4, 0; cp.async.wait_all; ld.shared.u32 %r9, [%r6];"
    assert (run(zeros + STORE) == 0).all()
    fails(run, "asynchronous copy", COPY + "ld.shared.u32 %r9, [%r6]; cp.async.wait_group 0;" + STORE)
    fails(run, "reads what was written", COPY + OTHER + "cp.async.wait_group 0; ld.shared.u32 %r9, [%r7];" + STORE)
    fails(run, "nobody waited for", COPY)
    fails(run, "asynchronous copy", COPY + "st.shared.u32 [%r6], %r0; cp.async.wait_group 0;")
    uncommitted = COPY.replace("cp.async.commit_group;", "")
    fails(run, "asynchronous copy", uncommitted + "cp.async.wait_group 0; ld.shared.u32 %r9, [%r6];" + STORE)


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("read", [0, 1, 2])
def test_wait_group_leaves_the_newest_groups(run, left, read):
    copies = "".join(
        f"cp.async.ca.shared.global [%r6+{128 * i}], [%d5], 4, 4; cp.async.commit_group;" for i in range(3)
    )
    body = copies + f"cp.async.wait_group {left}; ld.shared.u32 %r9, [%r6+{128 * read}]; cp.async.wait_group 0;" + STORE
    if read < 3 - left:
        assert (run(body) == np.arange(32) * 3).all()
    else:
        fails(run, "asynchronous copy", body)


def test_groups_are_those_of_each_thread(run):
    # Odd threads commit a second, empty group, so that waiting for all but one waits for their copy.
    body = COPY + "and.b32 %r8, %r0, 1; setp.eq.u32 %p1, %r8, 1; @!%p1 bra $on; cp.async.commit_group; $on:"
    body += "cp.async.wait_group 1; mov.u32 %r9, 0; GUARD ld.shared.u32 %r9, [%r6]; cp.async.wait_group 0;" + STORE
    assert (run(body.replace("GUARD", "@%p1")) == np.arange(32) * 3 * (np.arange(32) % 2)).all()
    fails(run, "asynchronous copy", body.replace("GUARD", "@!%p1"))


@pytest.mark.parametrize(
    ("part", "body"),
    [
        ("never written", "ld.shared.u32 %r9, [%r6];" + STORE),
        ("misaligned access of 8 bytes", "ld.global.v2.u32 {%r8, %r9}, [%d5+4];" + STORE),
        ("misaligned access of 4 bytes at", "st.shared.u32 [%r6+2], %r0;"),
        ("outside of all tensors at in", "ld.global.u32 %r9, [%d5+4];" + STORE),
        ("outside of 4096 bytes of shared", "st.shared.u32 [%r6+4000], %r0;"),
        ("write to in, which is only read", "st.global.u32 [%d5], %r0;"),
        ("not written exactly once", "setp.ne.u32 %p1, %r0, 5; @%p1 st.global.u32 [%d3], %r0;"),
        ("written 2 times", STORE + STORE),
        ("misaligned source", "cp.async.ca.shared.global [%r6], [%d5+2], 4, 4; cp.async.wait_all;"),
    ],
)
def test_wrong_accesses(run, part, body):
    fails(run, part, body)


HALF = "setp.lt.u32 %p1, %r0, 16;"


def test_whole_warps(run):
    # Lanes that took different ways wait for each other; those that never come are noticed.
    detour = HALF + "@%p1 bra $b; $a: shfl.sync.idx.b32 %r9, %r0, 3, 31, -1; bra.uni $end; $b: bra.uni $a; $end:"
    assert set(run(detour + STORE).tolist()) == {3}
    fails(run, "wait for others that do not come", HALF + "@%p1 bra $end; shfl.sync.idx.b32 %r9, %r0, 3, 31, -1; $end:")
    fails(run, "divides a warp", HALF + "@%p1 shfl.sync.idx.b32 %r9, %r0, 3, 31, -1;")
    fails(run, "mask of some lanes", "shfl.sync.idx.b32 %r9, %r0, 3, 31, 0xffff;")


def test_barriers(run):
    fails(run, "left while others", HALF + "@%p1 ret; bar.sync 0;")
    fails(run, "different barriers", HALF + "@%p1 bra $a; bar.sync 0; bra.uni $b; $a: bar.sync 0; $b:")
    fails(run, "only barrier 0", "bar.sync 1;")
    # A block that goes round a loop more often than another.
    body = "mov.u32 %r8, 0; $loop: bar.sync 0; add.s32 %r8, %r8, 1; setp.le.u32 %p1, %r8, %r1; @%p1 bra $loop;"
    assert run(body + "mov.u32 %r9, %r8;" + STORE, blocks=3, together=3)[::32].tolist() == [1, 2, 3]


# --- counts


def counts_of(run: Run, body: str, *, threads: int = 32) -> Machine:
    machines: list[Machine] = []
    run(body, threads=threads, machines=machines, checked=False, count=True, shared=1 << 14)
    return machines[0]


@pytest.mark.parametrize(
    ("access", "step", "wavefronts", "conflicts"),
    [
        ("u32", 4, 1, 0), ("u32", 8, 2, 1), ("u32", 128, 32, 31), ("u32", 132, 1, 0), ("u16", 2, 1, 0),
        ("v2.u32", 8, 2, 0), ("v2.u32", 16, 4, 2), ("v4.u32", 16, 4, 0), ("v4.u32", 32, 8, 4), ("v4.u32", 48, 4, 0),
    ],
)  # fmt: skip
def test_bank_conflicts(run, access, step, wavefronts, conflicts):
    registers = {"u32": "%r9", "u16": "%h1", "v2.u32": "{%r9, %r8}", "v4.u32": "{%r9, %r8, %r9, %r8}"}[access]
    traffic = counts_of(
        run, f"mad.lo.u32 %r10, %r0, {step}, %r5; st.shared.{access} [%r10], {registers};"
    ).counts.traffic  # fmt: skip
    assert (traffic["shared write wavefronts"], traffic["shared write conflicts"]) == (wavefronts, conflicts)


def test_lanes_that_read_one_word_share_it(run):
    body = "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r5], %r0; bar.sync 0; ld.shared.u32 %r9, [%r5];"
    assert counts_of(run, body).counts.traffic["shared read wavefronts"] == 1


@pytest.mark.parametrize(("pitch", "conflicts"), [(16, 0), (32, 4), (128, 28), (144, 0)])
def test_ldmatrix_conflicts(run, pitch, conflicts):
    fill = "".join(f"st.shared.u32 [%r6+{128 * i}], %r0;" for i in range(40))
    body = fill + f"bar.sync 0; mad.lo.u32 %r10, %r0, {pitch}, %r5;"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r10];"
    assert counts_of(run, body).counts.traffic["ldmatrix conflicts"] == conflicts


def test_instructions_are_counted_once_a_warp(run):
    branch = "setp.lt.u32 %p1, %r0, 40; @%p1 bra $on; add.f32 %f1, %f1, %f1; $on: mul.f32 %f1, %f1, %f1;"
    found = counts_of(run, branch, threads=96).counts.instructions
    assert found["float"] == 2 + 3
    assert found["branch"] == 3 + 3  # with the ret at the end


def test_sectors(run):
    traffic = counts_of(run, "ld.global.u32 %r9, [%d5];").counts.traffic
    assert (traffic["global read bytes"], traffic["global read sectors"]) == (128, 4)
