import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.time_series import HEADER, START, write_ts
from workbench.data.series.ts import read_ts

FINITE = st.floats(-1e6, 1e6)


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_what_was_written_is_read(tmp_path_factory, data):
    channels = data.draw(st.integers(1, 3))
    step = st.lists(st.none() | FINITE, min_size=channels, max_size=channels)
    rows = data.draw(
        st.lists(st.tuples(st.lists(step, min_size=1, max_size=4), st.sampled_from(["up", "down"])), min_size=1)
    )
    path = tmp_path_factory.mktemp("ts") / "x.ts"
    said = data.draw(st.booleans())
    write_ts(path, rows, f"@dimensions {channels}\n" if said else "")
    found = read_ts(path)
    assert found.classes == ("up", "down")
    for (values, label), (series, name) in zip(rows, found.rows, strict=True):
        expected = [[math.nan if v is None else v for v in step] for step in values]
        assert name == label
        np.testing.assert_array_equal(series, np.array(expected))


def test_lines_between_windows_ends_and_comments(tmp_path):
    path = tmp_path / "x.ts"
    path.write_bytes(
        b"\xef\xbb\xbf#c\r\n@univariate TRUE\r\n\r\n@CLASSLABEL true a b\r\n@Data\r\n# c\r\n 1, NaN ,2.5e1 : a \r\n"
    )
    (values, label) = read_ts(path).rows[0]
    assert (values[0].tolist(), values[2].tolist(), label) == ([1.0], [25.0], "a")
    assert math.isnan(values[1, 0])


OK = "1,2:3,4:up\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + START, "has no series after @data"),
        (HEADER, "has no line @data"),
        ("1,2:up\n", "line 1: '1,2:up' is before @data"),
        (HEADER + "@data\n" + OK, "has no classes"),
        (HEADER + "@classLabel false\n@data\n" + OK, "has no classes"),
        (HEADER + "@classLabel true up up\n@data\n" + OK, "names up up: two classes or more"),
        (HEADER + "@classLabel true\n@data\n" + OK, "names none: two classes or more"),
        (HEADER + "@classLabel maybe\n@data\n" + OK, "has @classlabel maybe, expected true or false"),
        (HEADER + "@colour red\n" + START + OK, "line 7: the header has @colour, which is none of"),
        (HEADER + "@missing true\n" + START + OK, "line 7: the header has @missing, a second time"),
        (HEADER + "@seriesLength\n" + START + OK, "line 7: the header has @seriesLength without a value"),
        ("@timeStamps true\n" + START + OK, "has time stamps"),
        ("@dimensions 0\n" + START + OK, "has @dimensions 0, expected a number of at least 1"),
        (f"@dimensions {'9' * 5000}\n" + START + OK, "has @dimensions 99999999"),
        ("@dimensions ²\n" + START + OK, "has @dimensions ², expected a number"),
        ("@univariate true\n@dimensions 2\n" + START + OK, "has @univariate true and @dimensions 2"),
        ("@univariate true\n" + START + OK, "line 4: has 2 dimensions before the class, expected 1"),
        (START + OK + "1,2:up\n", "line 4: has 1 dimensions before the class, expected 2"),
        (HEADER + START + "up\n", "line 9: has 0 dimensions before the class, expected 2"),
        (START + "up\n", "line 3: has 0 dimensions before the class, expected 1"),
        (HEADER + START + OK + "1:2:left\n", "line 10: the class is 'left', and @classLabel names up down"),
        (HEADER + START + "1,2:3:up\n", "line 9: its dimensions have 1 to 2 numbers"),
        ("@equalLength true\n" + START + OK + "1:2:up\n", "line 5: has 1 steps, and by the header all have 2"),
        ("@equalLength true\n@seriesLength 3\n" + START + OK, "line 5: has 2 steps, and by the header all have 3"),
        (HEADER + START + "1,x:3,4:up\n", "line 9: 'x' is no finite number; mend that line"),
        (HEADER + START + "1,1e999:3,4:up\n", "line 9: '1e999' is no finite number"),
        (HEADER + START + "1,1_0:3,4:up\n", "line 9: '1_0' is no finite number"),
        (HEADER + START + "1,:3,4:up\n", "line 9: nothing is between two commas or colons"),
        (HEADER + START + "1,2::up\n", "line 9: nothing is between"),
        ("@missing false\n" + START + "1,?:3,4:up\n", "line 4: a value is missing, and the header has @missing false"),
        ("", "is empty"),
        ("\0", "has zero bytes"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.ts"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"x.ts.*{message.replace('?', '[?]')}"):
        read_ts(path)


def test_a_boastful_header_allocates_nothing(tmp_path):
    path = tmp_path / "x.ts"
    path.write_text(f"@dimensions {10**15}\n@equalLength true\n@seriesLength {10**15}\n" + START + OK)
    with pytest.raises(ValueError, match="line 6: has 2 dimensions before the class, expected 1000000000000000"):
        read_ts(path)
