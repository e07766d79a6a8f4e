# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One comparator for all tests."""

import torch

# Largest relative error (norm) that rounding to the dtype explains.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None
) -> None:
    """Compare NaN positions, then ``|actual - expected| / |expected|``.

    Raises:
        AssertionError: naming the error and the worst coordinate.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if tolerance is None:
        tolerance = TOLERANCE[actual.dtype]
    actual, expected = actual.double(), expected.double()
    finite = actual.isfinite() == expected.isfinite()
    assert finite.all(), f"NaN or Inf differ first at {(~finite).nonzero()[0].tolist()}"
    difference = (actual - expected).abs().nan_to_num()
    error = difference.norm() / expected.nan_to_num().norm().clamp(min=1e-30)
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    at = [int(i) for i in worst]
    assert error <= tolerance, (
        f"relative error {error:.3g} > {tolerance:.3g}; worst at {at}: "
        f"{actual[tuple(at)]:.6g} instead of {expected[tuple(at)]:.6g}"
    )
