"""What a conversion costs: time and peak memory, as ratios to floors measured in the same run.

    python benchmarks/cost.py [--model resnet50] [--repeats 5]

Time: whole processes, alternating, the median of each: ``normsurgeon convert MODEL --random-init --to gn``, its check
included, against a process that imports timm and creates the model. In one process: trace + plan + rewrite. Memory: the
process's peak above its level before, over the bytes of the model's tensors.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

FLOOR = "import timm; timm.create_model({model!r})"

INSIDE = """
import time, timm
import normsurgeon as ns
from normsurgeon.graph.trace import trace
model = timm.create_model({model!r}).eval()
ns.plan, ns.convert_
for _ in range(2):  # the second is free of first imports
    twin = timm.create_model({model!r}).eval()
    start = time.perf_counter(); traced = trace(twin)
    a = time.perf_counter(); plan = ns.plan(twin, "gn", traced=traced, balance={balance})
    b = time.perf_counter(); ns.convert_(twin, plan, verdict={balance})
    c = time.perf_counter()
print(a - start, b - a, c - b)
"""

MEMORY = """
import threading, time, timm, torch
import normsurgeon as ns
torch.set_num_threads(1)
ns.convert(timm.create_model("test_resnet"), to="gn")  # imports and warm-up

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
model = timm.create_model({model!r}).eval()
size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
peak, running = before, True
def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
result = ns.convert(model, to="gn", {options})
running = False; watcher.join()
print((peak - before) / size, size / 2**20)
"""


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def inside(code: str) -> list[float]:
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return [float(number) for number in printed.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = options.model
    floor = [sys.executable, "-c", FLOOR.format(model=model)]
    convert = [sys.executable, "-m", "normsurgeon_cli", "convert", model, "--random-init", "--to", "gn"]
    floors, converts = [], []
    for _ in range(options.repeats):
        floors.append(seconds(floor))
        converts.append(seconds(convert))
    a, b = statistics.median(floors), statistics.median(converts)
    print(f"{'import timm and create ' + model:44} {a:6.2f} s")
    print(f"{'normsurgeon convert ' + model + ' --random-init':44} {b:6.2f} s   ratio {b / a:.2f} (target 1.25)")
    for balance in (False, True):
        label = "with" if balance else "without"  # and the verdict
        traced, planned, rewritten = inside(INSIDE.format(model=model, balance=balance))
        total = traced + planned + rewritten
        print(
            f"{'trace + plan + rewrite, ' + label + ' balancing':44} {total:6.2f} s   "
            f"({traced:.2f} + {planned:.2f} + {rewritten:.2f}; target 1 s)"
        )
    for label, options_of_convert, target in (
        ("alone", "balance=False, check=False, verdict=False", 2.2),
        ("with the check", "balance=False, verdict=False", 2.5),
        ("with check, balancing and verdict", "", 2.5),
    ):
        ratio, size = inside(MEMORY.format(model=model, options=options_of_convert))
        print(f"{'peak memory, ' + label:44} {ratio:6.2f} × the model's {size:.0f} MiB (target {target})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
