"""The code of docs/python.md, run as its readers would run it."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text("utf-8")
CODE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))


def test_the_page_runs(tmp_path):
    (tmp_path / "page.py").write_text(CODE, "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:bytelm", "page.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    one, other = next(line.split() for line in shown if re.fullmatch(r"\d\.\d+ \d\.\d+", line))
    assert abs(float(one) - float(other)) < 2
    assert any(line.startswith("[b'def f(', b'x)'") for line in shown)
