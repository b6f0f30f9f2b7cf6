"""What is saved of a weight."""

import pytest
import torch

from tasks.jobs import reload
from tasks.jobs.reload import rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_becomes_one_of_its_two_neighbours_and_is_right_on_average(dtype: torch.dtype) -> None:
    weight = torch.full((100_000,), 0.3)
    low, high = sorted({value.item() for value in rounded(weight, dtype).float().unique()})
    assert low < 0.3 < high and torch.nextafter(torch.tensor(low).to(dtype), torch.tensor(1).to(dtype)) == high
    assert abs(rounded(weight, dtype).double().mean() - 0.3) < 0.01 * (high - low)
    assert abs(rounded(-weight, dtype).double().mean() + 0.3) < 0.01 * (high - low)


def test_what_a_type_holds_stays_as_it_is() -> None:
    weight = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(rounded(weight.float(), torch.bfloat16), weight)
    fine = torch.randn(1000)
    assert torch.equal(rounded(fine, torch.float32), fine)
    assert torch.equal(rounded(weight, torch.float32), weight.float())  # as DeepSpeed gives what is not trained
    assert torch.equal(rounded(weight, torch.float16), rounded(weight.float(), torch.float16))


def test_a_large_weight_is_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "PART", 7)
    weight = torch.randn(10, 5).t()
    made = rounded(weight, torch.bfloat16)
    assert made.shape == weight.shape and (made - weight).abs().max() < 0.05


def test_the_same_weight_is_rounded_the_same() -> None:
    weight = torch.randn(1000)
    assert torch.equal(rounded(weight, torch.bfloat16), rounded(weight.clone(), torch.bfloat16))
