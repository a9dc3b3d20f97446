"""Helpers of the tests in tests/workbench/data/series."""

PARTS = ("train", "val", "test")
HEADER = "# a comment\n@problemName Made\n@missing true\n@univariate false\n@dimensions 2\n@equalLength false\n"
START = "@classLabel true up down\n@data\n"
PARALLEL = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def line(values, label):
    """A series [L, F], None where a value is missing, as a line of a .ts file."""
    return ":".join([*(",".join("?" if v is None else repr(v) for v in channel) for channel in zip(*values)), label])


def write_ts(path, rows, header=HEADER):
    path.write_text(header + START + "".join(f"{line(values, label)}\n" for values, label in rows))
    return path


def steps(count, begin=0):
    """Numbers that tell which step they are of."""
    return [[float(i), i + 0.5] for i in range(begin, begin + count)]
