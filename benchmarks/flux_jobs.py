"""What `make bench-flux` measures, the most important first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dirotq.benchmarks.forward_rows import COMPILED, EAGER, FLOOR, FP8, FUSED, W4A8
from dirotq.benchmarks.session import MAIN, Session


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


def each(*contestants: str, profiled: bool = False) -> Callable[[Session], None]:
    """Return what times every contestant; its kernels too if ``profiled``."""

    def run(session: Session) -> None:
        for who in contestants:
            session.forward(who)
            if profiled:
                session.profile(who)

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
JOBS: Mapping[str, Job] = {
    "forward": Job(each(FUSED, EAGER, profiled=True), 45, MAINS, (FUSED, EAGER)),
    "compiled": Job(each(FUSED, COMPILED), 75, MAINS, (COMPILED,)),
    "quality": Job(quality, 45, ("tiny_flux",), (FUSED,), "quality"),
    "floor": Job(floor, 20, MAINS, (FLOOR,), "floor"),
    "w4a8": Job(each(FUSED, W4A8), 180, MAINS, (W4A8,)),
    # Last: with torchao 0.18 its first call took more than six minutes.
    "fp8": Job(each(FUSED, FP8), 90, MAINS, (FP8,)),
}
