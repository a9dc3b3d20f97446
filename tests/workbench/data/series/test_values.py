import math

import numpy as np
import pytest

from workbench.data.series.values import fit_scale, parse_number


def test_numbers():
    assert [parse_number(value) for value in ("1.5", " -2 ", 3, np.float32(0.5), "1e3")] == [1.5, -2, 3, 0.5, 1000]
    assert all(math.isnan(parse_number(value)) for value in (None, "", " ? ", "NaN", "na", float("nan")))
    for beyond in ("1e39", -1e308, "inf"):
        with pytest.raises(ValueError, match="no finite number"):
            parse_number(beyond)


def test_a_constant_channel_is_not_blown_up():
    scale = fit_scale([np.full((7, 1), 0.1), np.full((3, 1), 0.1)], "x")
    assert scale.std.tolist() == [1]
    assert np.abs(scale(np.full((2, 1), 0.1))).max() < 1e-12
