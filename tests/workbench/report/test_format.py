"""Numbers in words."""

from workbench.report.format import count, duration, metric, percent, size, times


def test_numbers_in_words():
    assert [size(v) for v in (None, 0, 999, 1000, 104_488, 2.5e6, 3e9)] == [
        "—", "0 B", "999 B", "1.0 kB", "104.5 kB", "2.5 MB", "3.0 GB",
    ]  # fmt: skip
    assert [duration(v) for v in (None, 0, 59.94, 59.96, 125, 3600, 7199.9)] == [
        "—", "0.0 s", "59.9 s", "1 min 00 s", "2 min 05 s", "1 h 00 min", "2 h 00 min",
    ]  # fmt: skip
    assert [percent(v) for v in (None, 1, 0.343, 0.00678)] == ["—", "100%", "34.3%", "0.678%"]
    assert (count(None), count(26122), times(None), times(7)) == (
        "—",
        "26,122",
        "—",
        "7.0\N{MULTIPLICATION SIGN}",
    )


def test_a_share_is_called_one_and_lies_in_the_unit_interval():
    share = metric("accuracy", "max", [0.5, 1.0, None, float("nan")])
    assert share.share
    assert (share.show(0.98061), share.change(-0.0028), share.change(0.00001)) == (
        "98.06%",
        "\N{MINUS SIGN}0.28",
        "0.00",
    )
    assert not metric("accuracy", "max", [0.5, 98.0]).share, "already in percent"
    assert not metric("cosine", "max", [0.5]).share
    assert not metric("accuracy", "min", [0.5]).share
    cosine = metric("cosine", "max", [0.5])
    assert (cosine.show(-0.5), cosine.change(0.25), cosine.unit) == ("\N{MINUS SIGN}0.5", "+0.25", "")
