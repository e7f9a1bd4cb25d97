"""The targets on a GPU, judged by the measured rows."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.roofline import SHAPES, Limits, Work, batched, multiply_adds

Row = dict[str, Any]
Judge = Callable[[Row], float | None]
LIBRARY = "library span + involution2d"
VERDICTS = {None: "", True: "met", False: "missed"}
K7 = [shape for shape in SHAPES if "K3" not in shape and "x" not in shape]


@dataclass(frozen=True)
class Verdict:
    """``value`` is that of the worst row; ``met`` is None where nothing or not everything was measured."""

    target: str
    wanted: str
    value: float | None
    where: str
    met: bool | None

    def cells(self) -> str:
        found = "not measured yet" if self.value is None else f"{self.value:.2f} ({self.where})"
        if self.met is None and self.value is not None:
            found += ", not everything measured"
        return f"| {self.target} | {self.wanted} | {found} | {VERDICTS[self.met]} |"


def judge(
    target: str, bound: float, rows: Iterable[Row], value: Judge, expected: int, *, least: bool = True, unit: str = "x"
) -> Verdict:
    """The worst of all rows against a bound: at least, or at most; ``expected`` rows make it complete."""
    found = [(v, row) for row in rows if (v := value(row)) is not None]
    wanted = f"{'>=' if least else '<='} {bound:g} {unit}".strip()
    if not found:
        return Verdict(target, wanted, None, "", None)
    worst, row = (min if least else max)(found, key=lambda pair: pair[0])
    reached = worst >= bound if least else worst <= bound
    names = ("shape", "dtype", "layout") if "shape" in row else ("mode",)
    where = "worst: " + " ".join(str(row[n]) for n in names) if len(found) > 1 else " ".join(str(row[n]) for n in names)
    # One row that misses decides; all have to be there for the target to be met.
    return Verdict(target, wanted, worst, where, False if not reached else None if len(found) < expected else True)


def evaluate(rows: list[Row], limits: Limits) -> list[Verdict]:
    """Every target of the operators and models."""

    def operators(what: str, layout: str, dtypes: Iterable[str]) -> list[Row]:
        return [
            r for r in rows
            if r["what"] == what and r["batch"] == 256 and r["layout"] == layout and r["dtype"] in dtypes
            and r["shape"] in K7
        ]  # fmt: skip

    def models(what: str, batch: int, mode: str) -> list[Row]:
        return [
            r for r in rows
            if r["what"] == what and r["batch"] == batch and r["mode"] == mode and r["model"] == "RedNet-50"
        ]  # fmt: skip

    def ratio(other: str) -> Judge:
        return lambda row: row.get(f"{other}: ratio")

    def fused(what: str) -> list[Row]:
        """The shapes for which the plan has a fused kernel, in every pass."""
        found = operators(what, "channels_last", ["bfloat16"])
        return [r for r in found if "composed" not in r["variant"]]

    def left_out(what: str) -> str:
        found = operators(what, "channels_last", ["bfloat16"])
        names = [r["shape"] for r in found if "composed" in r["variant"]]
        return f" (the plan composes {', '.join(names)})" if names else ""

    def times_floor(row: Row) -> float:
        return row["ms"] / row["floor_ms"]

    def times_applied_floor(row: Row) -> float:
        case = batched(SHAPES[row["shape"]], row["batch"])
        bytes_ms = limits.floor(Work.of(row["what"], case, row["dtype"]), row["dtype"]).bytes_ms
        return row["ms"] / max(bytes_ms, multiply_adds(case) / limits.gfma["float32"] / 1e6)

    def share(row: Row) -> float:
        return row["copy_share"]

    every, span = ("float32", "float16", "bfloat16"), "span_involution2d"
    both = f"{span} forward + backward"
    complete = len(K7)
    verdicts = [
        judge(f"unfused forward, {layout}, N=256, share of the copy bandwidth", bound,
              operators("involution2d", layout, every), share, 3 * complete, unit="")
        for layout, bound in (("channels_last", 0.8), ("NCHW", 0.7))
    ]  # fmt: skip
    verdicts += [
        judge("unfused backward, channels_last, N=256, share of the copy bandwidth", 0.7,
              operators("involution2d backward", "channels_last", every), share, 3 * complete, unit=""),
        judge(f"fused forward, bfloat16, over its floor of bytes or FMA on CUDA cores{left_out(span)}", 1.3,
              fused(span), times_applied_floor, 1, least=False),
        judge(f"fused forward, bfloat16, over the floor of bytes or FMA on tensor cores{left_out(span)}", 1.3,
              fused(span), times_floor, 1, least=False),
        judge(f"fused forward, bfloat16, against library span + unfused{left_out(span)}", 1.7,
              fused(span), ratio(LIBRARY), 1),
        judge(f"fused forward + backward, bfloat16, against unfused{left_out(both)}", 1.0,
              fused(both), ratio(LIBRARY), 1),
    ]  # fmt: skip
    training = [r for r in rows if r["what"] == "training step" and r["mode"] == "eager" and "peak_mb" in r]
    peaks = {r["model"]: r["peak_mb"] for r in training if r["peak_mb"] is not None}
    verdicts.append(
        judge("training memory of RedNet-50 over ResNet-50's, eager", 1.0,
              [r for r in training if r["model"] == "RedNet-50" and {"RedNet-50", "ResNet-50"} <= set(peaks)],
              lambda row: peaks["RedNet-50"] / peaks["ResNet-50"], 1, least=False)
    )  # fmt: skip
    for what, batch, mode, bound in (
        *(("inference", 256, mode, 1.2) for mode in ("eager", "CUDA graph", "torch.compile")),
        ("inference", 1, "CUDA graph", 1.0),
        *(("training step", 128, mode, 1.0) for mode in ("eager", "CUDA graph", "torch.compile")),
    ):
        title = f"RedNet-50 against ResNet-50, {what}, N={batch}, {mode}"
        verdicts.append(judge(title, bound, models(what, batch, mode), ratio("ResNet-50"), 1))
    return verdicts


def as_dicts(verdicts: Iterable[Verdict]) -> list[Row]:
    return [asdict(verdict) for verdict in verdicts]


def table(verdicts: Iterable[Verdict]) -> str:
    """Markdown."""
    lines = ["| target | wanted | measured | |", "| --- | --- | --- | --- |", *(v.cells() for v in verdicts)]
    return "\n".join(lines) + "\n"
