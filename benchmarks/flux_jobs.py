"""What `make bench-flux` measures, the most important first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dirotq.benchmarks.flux_inputs import Case
from dirotq.benchmarks.flux_rows import ATTENTION, COMPILED, EAGER, FLOOR, FP8, FUSED, UNFUSED, W4A8
from dirotq.benchmarks.flux_session import MAIN, Session

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


def forward(session: Session) -> None:
    """Ours against eager bf16, memory and kernels of both."""
    for who in (FUSED, EAGER):
        session.forward(who)
        session.profile(who)


def unfused(session: Session) -> None:
    """Ours as it was: the plain modules, one operator after the other."""
    session.forward(UNFUSED)
    session.profile(UNFUSED)


def floor(session: Session) -> None:
    from dirotq.benchmarks import flux_floor, flux_work

    session.drop()
    work = flux_work.work(MAIN.side, MAIN.batch)
    session.add_all("floor", str(MAIN), FLOOR, flux_floor.floors(work, str(MAIN)))


def compiled(session: Session) -> None:
    session.forward(FUSED)
    session.forward(COMPILED)


def fp8(session: Session) -> None:
    session.forward(FUSED)
    session.forward(FP8)


def sizes(session: Session) -> None:
    for who in (FUSED, EAGER):
        for case in SIZES:
            session.forward(who, case)


def compiled_sizes(session: Session) -> None:
    for who in (FUSED, COMPILED):
        for case in SIZES:
            session.forward(who, case)


def other(model: str) -> Callable[[Session], None]:
    """Another model at 1024², one image and two (a step with guidance)."""

    def run(session: Session) -> None:
        for who in (FUSED, EAGER, COMPILED, UNFUSED):
            for batch in (1, 2):
                session.forward(who, Case(model, 1024, batch))
                if batch == 1 and who in (FUSED, UNFUSED):
                    session.profile(who, Case(model, 1024, batch))

    return run


def w4a8(session: Session) -> None:
    session.forward(FUSED)
    session.forward(W4A8)


def attention(session: Session) -> None:
    """The option: 8-bit queries, keys, probabilities and values."""
    for who in (FUSED, ATTENTION):
        for case in (MAIN, LARGE):
            session.forward(who, case)


def quality(session: Session) -> None:
    from dirotq.benchmarks import flux_quality

    session.drop()
    found = flux_quality.compared(session.places.store)
    session.add_all("quality", "tiny_flux", FUSED, found)


MAINS = (str(MAIN),)
JOBS: Mapping[str, Job] = {
    "forward": Job(forward, 45, MAINS, (FUSED, EAGER)),
    "unfused": Job(unfused, 25, MAINS, (UNFUSED,)),
    "compiled": Job(compiled, 75, MAINS, (COMPILED,)),
    "quality": Job(quality, 45, ("tiny_flux",), (FUSED,), "quality"),
    "floor": Job(floor, 20, MAINS, (FLOOR,), "floor"),
    "sizes": Job(sizes, 50, tuple(map(str, SIZES)), (FUSED, EAGER)),
    "attention": Job(attention, 45, (str(MAIN), str(LARGE)), (ATTENTION,)),
    **{
        model: Job(other(model), 60, (f"{model} 1024x1",), (FUSED, EAGER, COMPILED))
        for model in OTHERS
    },
    "compiled_sizes": Job(compiled_sizes, 150, tuple(map(str, SIZES)), (COMPILED,)),
    "w4a8": Job(w4a8, 180, MAINS, (W4A8,)),
    # Last: with torchao 0.18 its first call took more than six minutes.
    "fp8": Job(fp8, 90, MAINS, (FP8,)),
}
