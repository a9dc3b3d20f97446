"""What a report shows of exports."""

from tests.helpers.report_records import cells, exported, page_of, realistic


def test_exports_say_whether_they_were_verified(tmp_path):
    records = realistic()[:1]
    records.append(exported("small", "teacher", 5, compact=1000, onnx=2000))
    records[1]["exports"][1].update(same_predictions=False, largest_difference=0.25)
    page = page_of(tmp_path, records)
    assert cells(page, "exports") == [
        ["small", "compact", "teacher", "1.0 kB", "1,340.5\N{MULTIPLICATION SIGN}", "0", "yes, verified"],
        ["small", "onnx", "teacher", "2.0 kB", "670.2\N{MULTIPLICATION SIGN}", "0.25", "NO"],
    ]
    assert cells(page, "stages")[1][5] == "—", "a stage with one export that differs is not called the same"
