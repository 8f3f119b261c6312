"""Direct and interaction effects."""

import numpy as np


def natural_direct_effect(te: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """NDE = TE - TIE; te [pair] against tie [pair, ...]."""
    return te.reshape(-1, *[1] * (tie.ndim - 1)) - tie


def interaction(nie: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """INT = TIE - NIE: 0 only where the model is locally additive."""
    return tie - nie
