"""Statistic names: groups, parameters in names, near matches; every name is defined."""

from __future__ import annotations

import pytest
import torch

from headscope import UserError
from headscope.kernels.call import AttentionCall
from headscope.kernels.visibility import Visibility
from headscope.names import DEFAULT, DEFINITIONS, Wanted, expand


def test_groups_are_written_out_once() -> None:
    """``default`` and ``mass`` overlap."""
    assert expand(["default", "mass", "entropy"]) == DEFAULT
    assert set(DEFAULT) <= set(DEFINITIONS)


@pytest.mark.parametrize("name", ["clipped_distance_20", "mass_first16", "mass_recent8", "future_1_end", "future_5_9"])
def test_parameters_in_names(name: str) -> None:
    """Such names pass as they are."""
    assert expand(name) == (name,)


@pytest.mark.parametrize("name", ["entrop", "mass_last4", "future_1", "clipped_distance_x", ""])
def test_unknown_names(name: str) -> None:
    """The message lists what there is, nearest first."""
    with pytest.raises(UserError, match="Unknown statistic"):
        expand([name])


def test_near_match_is_offered() -> None:
    """A typing slip is answered with the right name."""
    with pytest.raises(UserError, match="Did you mean: entropy"):
        expand(["entrpy"])


def test_cross_attention_has_no_positional_statistics() -> None:
    """Queries and keys are different sequences there, so i - j means nothing."""
    call = AttentionCall(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), 0.5, Visibility())
    request = Wanted(expand(["default", "received", "future"])).request(call, "cross", None)
    assert request.rows == {"entropy", "sum_sq", "top1_mass"}
    assert set(request.masses) == {"mass_first", "mass_first4"}
    assert set(request.columns) == {"received"} and not request.targets and not request.clipped


def test_layers_that_lie_alike_share_their_matches() -> None:
    """Equal tokens are looked up once per forward; other ids, another padding or another offset are another matter."""
    ids = torch.tensor([[3, 1, 3, 1, 3]])
    tensor = torch.randn(1, 2, 5, 4)
    wanted, known = Wanted(expand("duplicate_token_score")), {}

    def match(ids: torch.Tensor, visible: Visibility) -> object:
        call = AttentionCall(tensor, tensor, tensor, 0.5, visible)
        return wanted.request(call, "self", ids, known=known).matches["duplicate_token_score"]

    first = match(ids, Visibility(right=0))
    assert match(ids, Visibility(right=0, left=2)) is first
    keys = torch.tensor([[False, True, True, True, True]])
    others = [match(ids.clone(), Visibility(right=0)), match(ids, Visibility(right=0, keys=keys))]
    others.append(match(ids, Visibility(right=0, q_offset=1)))
    assert all(x is not first for x in others)
    assert others[1].key_labels.tolist() == [[-1, 1, 3, 1, 3]]
    assert others[2].query_labels.tolist() == [[1, 3, 1, 3, -1]]
