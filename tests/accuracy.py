"""The one tolerance rule of the tests."""

import torch


def assert_as_accurate(
    actual: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor, what: str = "output"
) -> None:
    """Assert that `actual` errs at most twice as much as `rounded` does, both against `exact`.

    Args:
        actual: Output of the implementation under test.
        rounded: Output of the reference in the same precision.
        exact: Output of the reference in float64.
        what: Name for the error message.

    NaNs and infinities must be in the same places. A term of two units in the last
    place of the largest value covers the case that the reference happens to be exact.
    """
    actual64, rounded64, exact64 = (t.double().cpu() for t in (actual, rounded, exact))
    finite = torch.isfinite(exact64)
    assert torch.equal(torch.isfinite(actual64), finite), f"{what}: non-finite in other places"
    assert torch.equal(actual64[~finite], exact64[~finite]), f"{what}: other non-finite values"
    if not finite.any():
        return
    error = (actual64 - exact64)[finite].abs().max().item()
    allowed = 2 * (rounded64 - exact64)[finite].abs().max().item()
    allowed += 2 * torch.finfo(actual.dtype).eps * exact64[finite].abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
