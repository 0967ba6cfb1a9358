"""One figure of all benchmarks: python3 figure.py WORK FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hvpfast.bench import report

if __name__ == "__main__":
    records = sorted(Path(sys.argv[1]).glob("*/bench.json"))
    rows = [row for path in records for row in json.loads(path.read_text("utf-8"))["rows"]]
    report.draw({"rows": rows}, Path(sys.argv[2]))
