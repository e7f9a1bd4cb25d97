"""Runs one problem in the interpreter: `python -m tests.ptx.run mma forward bfloat16 nhwc 1 64 12 18 --groups 4`."""

import argparse
import json
import time

from .machine import Counts
from .problems import PASSES, Problem, check_problem, prepare, run_launch


def averages(counts: Counts) -> dict[str, float]:
    """Per block."""
    return {
        name: round(number / counts.blocks, 1)
        for name, number in sorted((counts.instructions + counts.traffic).items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy")
    parser.add_argument("pass_", metavar="pass", choices=[*PASSES, "backward", "layer"])
    parser.add_argument("dtype", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("layout", choices=["nhwc", "nchw", "mixed"])
    for name in ("batch", "channels", "height", "width"):
        parser.add_argument(name, type=int)
    parser.add_argument("--groups", type=int, default=0, help="default: 16 channels each")
    for name, default in (
        ("kernel", 7),
        ("stride", 1),
        ("padding", -1),
        ("reduced", 0),
        ("dilation", 1),
        ("offset", 0),
        ("upsample", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("epilogue", "spoil", "expanded", "shift"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--multiprocessors", type=int, default=2)
    parser.add_argument("--count", action="store_true", help="only count, without checks and with zeros as data")
    parser.add_argument("--blocks", type=int, nargs="*", help="which blocks to count; default: all of the first image")
    given = vars(parser.parse_args())
    count, blocks = given.pop("count"), given.pop("blocks")
    given["groups"] = given["groups"] or given["channels"] // 16
    problem = Problem(**given)
    begin = time.perf_counter()
    if not count:
        counts = check_problem(problem)
        print(f"{problem}: right, {time.perf_counter() - begin:.2f} s")
        print(json.dumps(averages(counts), indent=1))
        return
    prepared = prepare(problem, None, count_writes=False)
    for launch in prepared.launches:
        one_image = launch.blocks // problem.batch if launch.blocks % problem.batch == 0 else launch.blocks
        chosen = blocks or range(one_image)
        machine = run_launch(launch, prepared.memory, chosen, check=False, count=True)
        print(f"{launch.kernel.name}: {launch.blocks} blocks of {launch.threads}, {launch.shared_bytes} bytes")
        print(json.dumps({"blocks": len(chosen), **averages(machine.counts)}, indent=1))


if __name__ == "__main__":
    main()
