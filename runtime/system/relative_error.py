"""The error of one array relative to another, as one number."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def relative_l2(got: ArrayLike, want: ArrayLike) -> float:
    """Return ||got - want|| / ||want||, computed in float64.

    The result is NaN if a value is NaN. If `want` is all zeros, it is 0 for equal arrays and infinite
    otherwise. ValueError is raised if the shapes differ.
    """
    got64, want64 = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got64.shape != want64.shape:
        raise ValueError(f"shapes {got64.shape} and {want64.shape} differ")
    error, scale = float(np.linalg.norm(got64 - want64)), float(np.linalg.norm(want64))
    if scale:
        return error / scale
    return error if error == 0 or math.isnan(error) else math.inf
