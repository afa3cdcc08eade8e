"""What `make bench-flux` measures, the most important first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dirotq.benchmarks.forward_rows import (
    ATTENTION,
    COMPILED,
    EAGER,
    FLOOR,
    FP8,
    FUSED,
    UNFUSED,
    W4A8,
)
from dirotq.benchmarks.model_inputs import Case
from dirotq.benchmarks.session import MAIN, Session

LARGE = Case("flux", 2048)
SIZES = (Case("flux", 1024, 2), Case("flux", 1024, 4), Case("flux", 512), LARGE)
OTHERS = ("pixart_sigma", "sana")


@dataclass(frozen=True, slots=True)
class Job:
    """``seconds`` it takes at the most where models are prepared: with less left it isn't begun.

    ``cases`` and ``contestants`` are what it is about, for the rows of a job that was not run.
    """

    run: Callable[[Session], None]
    seconds: float
    cases: tuple[str, ...]
    contestants: tuple[str, ...]
    section: str = "forward"


def each(
    *contestants: str, cases: Sequence[Case] = (MAIN,), profiled: Sequence[str] = ()
) -> Callable[[Session], None]:
    """Return what times every contestant in every case; kernels too of those ``profiled``, at one
    image."""

    def run(session: Session) -> None:
        for who in contestants:
            for case in cases:
                session.forward(who, case)
                if who in profiled and case.batch == 1:
                    session.profile(who, case)

    return run


def floor(session: Session) -> None:
    """Measure the least that a forward takes on this chip."""
    from dirotq.benchmarks import flux_floor

    session.drop()
    work = flux_floor.work(MAIN.side, MAIN.batch)
    session.add_all("floor", str(MAIN), FLOOR, flux_floor.floors(work, str(MAIN)))


def quality(session: Session) -> None:
    """Compare images of the embedded model."""
    from dirotq.benchmarks import flux_quality

    session.drop()
    found = flux_quality.compared(session.places.store)
    session.add_all("quality", "tiny_flux", FUSED, found)


MAINS = (str(MAIN),)
NAMES = tuple(map(str, SIZES))
JOBS: Mapping[str, Job] = {
    "forward": Job(each(FUSED, EAGER, profiled=(FUSED, EAGER)), 45, MAINS, (FUSED, EAGER)),
    # As it was: the plain modules, one operator after the other.
    "unfused": Job(each(UNFUSED, profiled=(UNFUSED,)), 25, MAINS, (UNFUSED,)),
    "compiled": Job(each(FUSED, COMPILED), 75, MAINS, (COMPILED,)),
    "quality": Job(quality, 45, ("tiny_flux",), (FUSED,), "quality"),
    "floor": Job(floor, 20, MAINS, (FLOOR,), "floor"),
    "sizes": Job(each(FUSED, EAGER, cases=SIZES), 50, NAMES, (FUSED, EAGER)),
    # The option: 8-bit queries, keys, probabilities and values.
    "attention": Job(
        each(FUSED, ATTENTION, cases=(MAIN, LARGE)), 45, (str(MAIN), str(LARGE)), (ATTENTION,)
    ),
    # Another model at 1024²: one image, and two (a step with guidance).
    **{
        model: Job(
            each(
                FUSED, EAGER, COMPILED, UNFUSED,
                cases=[Case(model, 1024, batch) for batch in (1, 2)], profiled=(FUSED, UNFUSED),
            ),
            60, (f"{model} 1024x1",), (FUSED, EAGER, COMPILED),
        )
        for model in OTHERS
    },
    "compiled_sizes": Job(each(FUSED, COMPILED, cases=SIZES), 150, NAMES, (COMPILED,)),
    "w4a8": Job(each(FUSED, W4A8), 180, MAINS, (W4A8,)),
    # Last: with torchao 0.18 its first call took more than six minutes.
    "fp8": Job(each(FUSED, FP8), 90, MAINS, (FP8,)),
}  # fmt: skip
