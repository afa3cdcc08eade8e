import pytest
import torch
from tiny_spec import tiny_spec
from torch import Tensor

from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.transform_quantize import transform
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.rotation import SEED, Rotation, haar, site_rotation

DIM = 64
SPECS = {
    "hadamard-0": tiny_spec(block=64),
    "hadamard-16": tiny_spec(rank=16, block=16),
    "hadamard-identity": tiny_spec(rank=16),
    "hadamard-all": tiny_spec(rank=64, block=64),
    "regular-16": tiny_spec(rank=16, transform="regular", block=64),
    "smooth-0": tiny_spec(smooth=True),
    "beside-16": tiny_spec(rank=16, branch="beside", block=16),
    "beside-smooth": tiny_spec(rank=16, branch="beside", smooth=True),
    "dense-0": tiny_spec(transform="dense"),
    "dense-16": tiny_spec(transform="dense", rank=16),
    "dense-15-filled": tiny_spec(transform="dense", rank=15, weight_scale="group"),
    "dense-62": tiny_spec(transform="dense", rank=62),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vectors() -> Tensor:
    return torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q


def found() -> dict[str, Tensor]:
    """What `basis` may write for a site: a branch beside the input need not be orthonormal."""
    smooth = torch.linspace(-1, 1, DIM).exp()
    return {"vectors": vectors(), "duals": torch.randn(DIM, DIM), "smooth": smooth}


def through(rotation: Rotation, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return transform(x, rotation.basis_DR, rotation.rotation_DK, rotation.spec, rotation.smooth_D)


@every_spec
def test_exact_although_the_bases_are_rounded(spec: QuantSpec):
    rotation = Rotation.cut(found(), spec)
    for held in (rotation.basis_DR, rotation.rotation_DK):
        assert held is None or held.dtype == torch.bfloat16
    x = torch.randn(30, DIM, dtype=torch.float64)
    w = torch.randn(20, DIM, dtype=torch.float64)
    main, protected = rotation.weights(w)
    assert main.shape == (20, spec.width)
    z, c = through(rotation, x)
    got = z @ main.T if c is None else z @ main.T + c @ protected.T
    assert ((got - x @ w.T).norm() / (x @ w.T).norm()) < 1e-12
    assert (protected is None) == (spec.rank == 0)


@every_spec
def test_rounding_of_the_basis_is_really_there(spec: QuantSpec):
    basis = Rotation.cut(found(), spec).basis_DR
    if basis is not None:
        gram = basis.double().T @ basis.double()
        assert (gram - torch.eye(spec.rank)).abs().max() > 1e-5


@every_spec
def test_moments_are_those_of_the_transformed_rows(spec: QuantSpec):
    rotation = Rotation.cut(found(), spec)
    x = torch.randn(200, DIM, dtype=torch.float64) * torch.logspace(0, -2, DIM)
    got = rotation.moments(x.T @ x / 200)
    z, _ = through(rotation, x)
    torch.testing.assert_close(got, z.T @ z / 200, rtol=1e-9, atol=1e-12)
    assert torch.equal(got, got.T)
    assert got.dtype == torch.float64


def test_a_branch_beside_the_input_leaves_it_whole():
    spec = tiny_spec(rank=16, branch="beside")
    x = torch.randn(5, DIM, dtype=torch.float64)
    z, c = through(Rotation.cut(found(), spec), x)
    assert torch.equal(z, x)
    assert c.shape == (5, 16)


def test_eight_bit_protected_columns_are_codes_and_scales():
    rotation = Rotation.cut(found(), tiny_spec(rank=16, protected_bits=8))
    _, v = rotation.weights(torch.randn(20, DIM))
    stored = rotation.stored(v, None)
    assert stored["wp"].dtype == torch.int8
    step = stored["wpscale"].float()
    assert ((stored["wp"] * step - v).abs() <= 0.51 * step).all()
    assert Rotation.cut({}, tiny_spec()).stored(None, None) == {}


def test_the_last_columns_are_protected():
    basis = vectors()
    for spec in (SPECS["hadamard-16"], SPECS["dense-16"]):
        kept = Rotation.cut({"vectors": basis}, spec).basis_DR
        assert torch.equal(kept, basis[:, -16:].to(torch.bfloat16))


def test_protected_directions_leave_the_main_branch():
    basis, spec = vectors(), SPECS["dense-16"]
    for spec in (SPECS["hadamard-16"], SPECS["dense-16"]):
        leading = 1000 * torch.randn(9, 16, dtype=torch.float64) @ basis[:, -16:].T
        z, c = through(Rotation.cut({"vectors": basis}, spec), leading)
        assert z.norm() < 0.01 * leading.norm()
        torch.testing.assert_close(c.norm(), leading.norm(), rtol=0.01, atol=0)


def test_filling_columns_are_zero_on_both_sides():
    spec = SPECS["dense-15-filled"]
    rotation = Rotation.cut({"vectors": vectors()}, spec)
    main, _ = rotation.weights(torch.randn(20, DIM))
    assert (spec.in_features - spec.rank, spec.width) == (49, 64)
    assert not rotation.rotation_DK[:, 49:].any()
    assert not main[:, 49:].any()
    assert main[:, :49].any(0).all()


def test_the_dense_rotation_spreads_one_direction_over_all_columns():
    basis = vectors()
    z, _ = through(Rotation.cut({"vectors": basis}, SPECS["dense-16"]), basis[:, :1].T.contiguous())
    assert z.abs().max() < 0.6
    torch.testing.assert_close(z.norm(), torch.ones((), dtype=z.dtype), rtol=0.01, atol=0)


@every_spec
def test_cutting_twice_gives_the_same_bits(spec: QuantSpec):
    content = found()
    copy = {name: tensor.clone() for name, tensor in content.items()}
    first, second = Rotation.cut(content, spec), Rotation.cut(copy, spec)
    for a, b in zip(
        (first.basis_DR, first.rotation_DK), (second.basis_DR, second.rotation_DK), strict=True
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("dim", [1, 2, 63])
def test_haar_is_orthogonal_and_seeded(dim):
    q = haar(dim, SEED)
    torch.testing.assert_close(q @ q.T, torch.eye(dim, dtype=q.dtype), rtol=0, atol=1e-12)
    assert torch.equal(q, haar(dim, SEED))
    assert dim == 1 or not torch.equal(q, haar(dim, SEED + 1))


def test_haar_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    want = torch.randn(3)
    torch.manual_seed(5)
    haar(8, 0)
    assert torch.equal(torch.randn(3), want)


def test_haar_is_uniform_and_not_raw_qr():
    # Householder QR alone never gives a positive first entry.
    first = torch.stack([haar(4, seed)[0, 0] for seed in range(60)])
    assert 15 < int((first > 0).sum()) < 45


def test_site_rotation_reads_the_basis_artifact(finished):
    plan = read_plan(finished["rank"].file("plan.json"))
    entry: SitePlan = next(e for e in plan if e.spec.rank)
    cpu = torch.device("cpu")
    rotation = site_rotation(entry, finished["basis"], cpu)
    assert rotation.basis_DR.shape == (entry.site.in_features, entry.spec.rank)
    modulator = next(e for e in plan if e.site.kind == "modulator")
    bare = site_rotation(modulator, finished["basis"], cpu)
    assert bare.basis_DR is None
    assert bare.rotation_DK is None
