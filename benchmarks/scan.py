"""How long `portable-amp check` takes for 1,000 files of 300 lines, most of which need parsing.

python benchmarks/scan.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

FILES, LINES = 1000, 300
FUNCTION = '''
def train_{n}(model, batches, optimizer, device):
    """One epoch."""
    total = 0.0
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {{step}}: {{total / (step + 1):.4f}}")
    return total
'''
STARTS = (
    "model.cuda()\ntorch.cuda.empty_cache()\n",
    'device = "cuda" if torch.cuda.is_available() else "cpu"\n',
    "state = torch.load(path)\n",
    "print('nothing to find')\n",
)


def program(number: int) -> str:
    """A file of about that many lines; three of four have something to find."""
    count = LINES // FUNCTION.count("\n")
    return f"import torch\n{STARTS[number % 4]}" + "".join(
        FUNCTION.format(n=n) for n in range(count)
    )


def main() -> None:
    """Time the command three times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            (Path(folder) / f"m{number}.py").write_text(program(number), "utf-8")
        command = [sys.executable, "-m", "portable_amp", "check", "--format", "json", folder]
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
            seconds.append(time.perf_counter() - start)
            assert done.returncode == 1, "it ran, and found what is there"
            found = len(json.loads(done.stdout))
    result = {
        "files": FILES,
        "lines": FILES * LINES,
        "findings": found,
        "seconds": [round(one, 2) for one in seconds],
        "median": round(statistics.median(seconds), 2),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
