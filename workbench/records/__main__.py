"""``python -m workbench.records [JOB ...]``: the JSON Schema of the records of these jobs, or of all, by job."""

import json
import sys

from workbench.records import jobs, json_schema

if __name__ == "__main__":
    names = sys.argv[1:] or jobs()
    try:
        text = json.dumps({name: json_schema(name) for name in names}, indent=2)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{text}\n")
