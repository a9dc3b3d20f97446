"""What a report shows of a cache."""

import pytest

from distill.cache.section import SECTION
from workbench.records import CacheResult, Stage


@pytest.mark.parametrize(
    ("result", "remarks"),
    [
        (CacheResult(bytes=2000, samples=1500), ["2.0 kB", "1,500 samples"]),
        (CacheResult(samples=7), ["", "7 samples"]),
        (CacheResult(), ["", ""]),
        (None, []),
    ],
)
def test_the_remark_is_bytes_and_samples(result: CacheResult | None, remarks: list[str]) -> None:
    assert SECTION.remark is not None
    assert SECTION.remark(Stage(result=result)) == remarks
