"""Which problems run in the interpreter: together they launch every kernel (test_kernels.py), each class of layout,
alignment, window and chunk at least once. A new kernel needs rows here."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from .launches import strategies
from .problems import Problem

PASSES = ("forward", "grad_input", "grad_weight")
HALVES = ("float16", "bfloat16")
WINDOWS = (3, 5, 7)


def mma() -> Iterator[Problem]:
    # Every template: dtype, window, stride, width and layout. Five groups are a whole chunk and a part of one.
    sizes = {
        ("forward", 1): ((9, 7), (9, 18)), ("forward", 2): ((11, 18),),
        ("grad_input", 1): ((10, 8), (9, 18)), ("grad_input", 2): ((9, 16), (9, 19)),
        ("grad_weight", 1): ((9, 11),), ("grad_weight", 2): ((11, 18),),
    }  # fmt: skip
    for (pass_, stride), shapes in sizes.items():
        for dtype, kernel, layout, size in product(HALVES, WINDOWS, ("nhwc", "nchw", "mixed"), shapes):
            yield Problem("mma", pass_, dtype, layout, 1, 80, *size, 5, kernel, stride)
    for pass_, layout, stride in product(PASSES, ("nhwc", "nchw"), (1, 2)):
        one = partial(Problem, "mma", pass_, "bfloat16", layout)
        yield one(2, 64, 16, 16, 4, 7, stride)  # whole tiles, several images
        yield one(1, 48, 9, 18, 3, 7, stride, offset=1)  # moved element by element
        yield one(1, 32, 12, 20, 2, 5, stride, offset=2)
        yield one(1, 16, 11, 13, 1, 7, stride, padding=0)
        yield one(1, 16, 6, 9, 1, 3, stride, padding=4)
        yield one(1, 32, 10, 17, 2, 7, stride, spoil=True)
    for dtype in HALVES:
        yield Problem("mma", "forward", dtype, "nhwc", 1, 16, 9, 12, 1, 7, spoil=True)
        yield Problem("mma", "forward", dtype, "nchw", 1, 16, 9, 12, 1, 7, 2, spoil=True)


def tiled() -> Iterator[Problem]:
    sizes = {
        ("forward", 1): ((9, 7), (9, 18)), ("forward", 2): ((11, 18),),
        ("grad_input", 1): ((9, 8), (9, 18)), ("grad_input", 2): ((9, 16), (9, 19)),
        ("grad_weight", 1): ((9, 8), (9, 18)), ("grad_weight", 2): ((11, 18),),
    }  # fmt: skip
    for (pass_, stride), shapes in sizes.items():
        for dtype, kernel, size in product(("float32", *HALVES), WINDOWS, shapes):
            for layout, channels in (("nhwc", 32), ("nchw", 16)):
                yield Problem("tiled", pass_, dtype, layout, 1, channels, *size, 2, kernel, stride)
    for pass_, layout, stride in product(PASSES, ("nhwc", "nchw", "mixed"), (1, 2)):
        one = partial(Problem, "tiled", pass_, "float32", layout)
        yield one(2, 24, 9, 17, 1, 3, stride)
        yield one(1, 32, 9, 12, 1, 7, stride, offset=1)
        yield one(1, 16, 11, 13, 1, 5, stride, padding=0)
        yield one(1, 8, 6, 9, 1, 3, stride, padding=4)
        yield one(1, 16, 9, 10, 2, 7, stride, spoil=True)
    # Weights in pieces of 16 bytes; those of three groups begin anywhere in a piece.
    for pass_, dtype, layout, stride in product(PASSES, ("float32", *HALVES), ("nhwc", "nchw"), (1, 2)):
        yield Problem("tiled", pass_, dtype, layout, 2, 24, 8, 24, 3, 5, stride)
    for dtype, kernel in product(("float32", *HALVES), WINDOWS):
        yield Problem("tiled", "forward", dtype, "nhwc", 2, 64, 8, 20, 4, kernel)
    for stride in (1, 2):
        yield Problem("tiled", "forward", "float32", "nchw", 1, 16, 9, 10, 2, 7, stride, expanded=True)


def generic() -> Iterator[Problem]:
    for pass_, dtype in product(PASSES, ("float32", "float64", *HALVES)):
        one = partial(Problem, "generic", pass_, dtype)
        yield one("nchw", 2, 6, 7, 9, 2, 3)
        yield one("nhwc", 1, 6, 11, 8, 2, 3, 3, padding=2, dilation=2)
        yield one("mixed", 1, 3, 6, 7, 3, 4, 2, padding=0, offset=1)
        # Only the tap in the middle is inside; numbers of rows beyond 32 bits.
        far = 1 << 30
        yield one("nchw", 1, 4, 5, 6, 2, 3, padding=far, dilation=far)
        yield one("nhwc", 1, 4, 9, 11, 2, 3, 2, dilation=2, shift=True)
        yield one("nchw", 1, 4, 4, 5, 2, 4, upsample=2, shift=True)
        yield one("mixed", 1, 3, 3, 4, 1, 3, upsample=3)
        # Row numbers times the upsampling are beyond 32 bits.
        yield one("nchw", 1, 2, 3, 4, 1, 3, padding=far, dilation=far, upsample=2)
    for pass_ in PASSES:
        yield Problem("generic", pass_, "float32", "nchw", 1, 6, 7, 8, 2, 5, spoil=True)
    yield Problem("generic", "forward", "float32", "nchw", 1, 6, 7, 8, 2, 5, expanded=True)


def fused() -> Iterator[Problem]:
    sizes: tuple[tuple[int, int, int], ...] = ((9, 18, 1), (10, 7, 1), (15, 18, 2))
    for dtype, reduced, (height, width, stride) in product(HALVES, (16, 32, 48, 64, 80, 128), sizes):
        if reduced > 96 and stride == 2:
            continue  # too little shared memory
        yield Problem("fused", "forward", dtype, "nhwc", 1, 80, height, width, 5, 7, stride, reduced=reduced)
        yield Problem("fused", "backward", dtype, "nhwc", 1, 80, height, width, 5, 7, stride, reduced=reduced)
    for pass_, stride in product(("forward", "backward"), (1, 2)):
        one = partial(Problem, "fused", pass_, "bfloat16", "nhwc")
        yield one(2, 64, 16, 16, 4, 7, stride, reduced=16)
        yield one(1, 48, 9, 18, 3, 7, stride, reduced=48, offset=1)
        yield one(1, 16, 17, 21, 1, 7, stride, reduced=112 if stride == 1 else 96)
        yield one(1, 16, 19, 13, 1, 7, stride, padding=0, reduced=32)
        yield one(1, 32, 10, 17, 2, 7, stride, reduced=16, spoil=True)
    for dtype, stride, reduced in product(HALVES, (1, 2), (16, 32, 48, 64, 96)):
        two = (1, 32, 16, 17, 2, 7, stride)
        yield Problem("fused", "forward", dtype, "nhwc", *two, reduced=reduced, epilogue=True)
        if reduced < 48:
            yield Problem("fused", "backward", dtype, "nhwc", *two, reduced=reduced, offset=1)
        if reduced in (48, 96):
            yield Problem("fused", "forward", dtype, "nhwc", *two, reduced=reduced)
            yield Problem("fused", "backward", dtype, "nhwc", *two, reduced=reduced)
            if dtype == "float16":  # moved element by element
                for pass_ in ("forward", "backward"):
                    yield Problem("fused", pass_, dtype, "nhwc", *two, reduced=reduced, offset=1)


def sliding() -> Iterator[Problem]:
    for pass_, dtype, layout in product(PASSES, ("float32", "float64", *HALVES), ("nhwc", "nchw")):
        one = partial(Problem, "sliding", pass_, dtype, layout)
        yield one(1, 16, 9, 17, 2, 3)
        yield one(1, 6, 11, 13, 2, 5, 2)
        yield one(2, 3, 7, 9, 3, 3, 3, padding=2, dilation=2)
        yield one(1, 40, 5, 21, 1, 7, offset=1)
        for channels, kernel in product((1, 2), (3, 7)):
            yield one(1, 2 * channels, 9, 17, 2, kernel)
    for pass_, layout in product(PASSES, ("nhwc", "nchw", "mixed")):
        one = partial(Problem, "sliding", pass_, "float32", layout)
        yield one(9, 8, 6, 5, 2, 3)
        yield one(1, 4, 12, 34, 1, 9)
        yield one(1, 8, 9, 10, 2, 7, spoil=True)
        yield one(2, 16, 13, 21, 1, 5, padding=5, dilation=3)  # classes by dilation where taps are dense
        yield one(1, 8, 9, 10, 2, 3, padding=19, dilation=16)  # everywhere, some without pixels
        yield one(1, 40, 17, 15, 1, 7, padding=6, dilation=2, offset=1)
        shifted = partial(one, shift=True)
        yield shifted(2, 32, 14, 14, 2, 7)  # small images
        yield shifted(1, 16, 10, 38, 1, 5)  # tiles
        yield shifted(1, 24, 9, 11, 1, 4, offset=1)
        yield shifted(1, 8, 16, 9, 2, 3, dilation=3)
        yield shifted(1, 8, 9, 10, 2, 7, spoil=True)
    for pass_, dtype, kernel in product(PASSES, ("float64", *HALVES), (3, 7)):
        yield Problem("sliding", pass_, dtype, "nhwc", 1, 16, 9, 17, 2, kernel, shift=True)
        yield Problem("sliding", pass_, dtype, "nchw", 1, 3, 8, 9, 1, kernel, shift=True)
    for pass_ in ("forward", "grad_weight"):
        yield Problem("sliding", pass_, "float32", "nhwc", 1, 8, 11, 13, 1, 3, 2, shift=True)


def whole_layers() -> Iterator[Problem]:
    for dtype, reduced, size in product(HALVES, (16, 32, 48, 64), ((9, 18), (10, 7))):
        yield Problem("fused", "layer", dtype, "nhwc", 1, 48, *size, 3, 7, reduced=reduced)
    one = partial(Problem, "fused", "layer", "bfloat16", "nhwc")
    yield one(2, 64, 16, 16, 4, 7, reduced=16, epilogue=True)
    yield one(2, 64, 17, 21, 4, 7, reduced=32, offset=8)
    for dtype in HALVES:  # moved element by element
        yield Problem("fused", "layer", dtype, "nhwc", 1, 48, 9, 18, 3, 7, reduced=48, offset=1)
    yield one(1, 16, 11, 13, 1, 7, padding=0, reduced=32)
    yield one(1, 16, 11, 13, 1, 7, padding=4, reduced=96)
    for reduced in (16, 64):
        yield one(1, 32, 10, 17, 2, 7, reduced=reduced, spoil=True)


def cases() -> Iterator[Problem]:
    declared = strategies()
    for part in (mma, tiled, generic, fused, sliding):
        if part.__name__ in declared:
            yield from part()
    if "fused" in declared:
        yield from whole_layers()
