import pytest
import torch

from dirotq.evaluate.timesteps import COLUMNS, RowErrors, by_timestep


def errors(noise, timesteps):
    noise_T = torch.tensor(noise, dtype=torch.float64)
    return RowErrors(torch.ones_like(noise_T), noise_T, timesteps)


def test_signal_over_noise_of_the_rows_of_each_timestep():
    site = errors([0.1, 0.3, 0.01, 1.0], [0.5, 0.5, 0.9, None])
    timesteps, columns = by_timestep({"a": site})
    assert timesteps == [0.9, 0.5]
    assert columns == {"a": pytest.approx([20.0, 10 * torch.tensor(2 / 0.4).log10().item()])}
    assert site.sqnr_db == pytest.approx(10 * torch.tensor(4 / 1.41).log10().item(), abs=1e-5)


def test_a_site_that_saw_nothing_at_a_timestep():
    _, columns = by_timestep({"a": errors([0.1], [1.0]), "b": errors([0.1], [2.0])})
    assert columns["a"] == [None, pytest.approx(10.0)]
    assert columns["b"] == [pytest.approx(10.0), None]


@pytest.mark.parametrize(
    ("count", "columns"), [(COLUMNS, COLUMNS), (COLUMNS + 1, COLUMNS), (50, COLUMNS), (1, 1)]
)
def test_neighbours_are_taken_together(count, columns):
    timesteps, found = by_timestep({"a": errors([0.1] * count, [float(t) for t in range(count)])})
    assert len(timesteps) == len(found["a"]) == columns
    assert timesteps == sorted(timesteps, reverse=True)
    assert None not in found["a"]


def test_captures_without_timesteps():
    assert by_timestep({"a": errors([0.1, 0.1], [])}) == ([], {})
    assert by_timestep({"a": errors([0.1], [None])}) == ([], {})


def test_no_error_at_all_is_finite():
    assert by_timestep({"a": errors([0.0], [1.0])})[1]["a"][0] == pytest.approx(300)
