"""What a conversion costs: time and peak memory, as ratios to floors measured in the same run.

    python benchmarks/cost.py [--model resnet50] [--repeats 5]

Time: whole processes, alternating, the median of each: ``normsurgeon convert MODEL --random-init --to gn``, its check
included, against a process that imports timm and creates the model. In one process: trace + plan + rewrite; and reading
a converted checkpoint, against timm's ``create_model`` and ``load_state_dict``. Memory: the
process's peak above its level before, over the bytes of the model's tensors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from functools import partial

from measuring import in_a_process, medians, parser

FLOOR = "import timm; timm.create_model({model!r})"


def stages(name: str, balance: bool) -> tuple[float, float, float]:
    """Seconds of trace, plan and rewrite."""
    import timm

    import normsurgeon as ns
    from normsurgeon.graph.trace import trace

    found = (0.0, 0.0, 0.0)
    for _ in range(2):  # the second is free of first imports
        model = timm.create_model(name).eval()
        start = time.perf_counter()
        traced = trace(model)
        a = time.perf_counter()
        plan = ns.plan(model, "gn", traced=traced, balance=balance)
        b = time.perf_counter()
        ns.convert_(model, plan, verdict=balance)
        found = (a - start, b - a, time.perf_counter() - b)
    return found


def peak(name: str, options: dict[str, bool]) -> tuple[float, float]:
    """The process's peak above its level before, over the bytes of the model's tensors; their MiB."""
    import timm
    import torch

    import normsurgeon as ns

    torch.set_num_threads(1)
    ns.convert(timm.create_model("test_resnet"), to="gn")  # imports and warm-up
    before = resident()
    model = timm.create_model(name).eval()
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = ns.convert(model, to="gn", **options)
    done.set()
    watcher.join()
    del result
    return (seen[0] - before) / size, size / 2**20


def reading(name: str, repeats: int) -> tuple[float, float]:
    """Seconds that timm takes to create a model and load a state dict, and that reading its checkpoint takes."""
    import timm
    from safetensors.torch import load_file

    import normsurgeon as ns

    with tempfile.TemporaryDirectory() as folder:
        path = ns.save(
            ns.convert(timm.create_model(name), to="gn", check=False, verdict=False), f"{folder}/a.safetensors"
        )
        original = ns.save(timm.create_model(name), f"{folder}/b.safetensors")
        found = medians(
            repeats,
            {
                "timm": lambda: timm.create_model(name).load_state_dict(load_file(original)),
                "load": lambda: ns.load(path),
            },
        )
    return found["timm"], found["load"]


def resident() -> int:
    """The bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="resnet50")
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    model = options.model
    run = partial(subprocess.run, check=True, capture_output=True)
    floor = [sys.executable, "-c", FLOOR.format(model=model)]
    convert = [sys.executable, "-m", "normsurgeon_cli", "convert", model, "--random-init", "--to", "gn"]
    a, b = medians(options.repeats, {"floor": partial(run, floor), "convert": partial(run, convert)}).values()
    print(f"{'import timm and create ' + model:44} {a:6.2f} s")
    print(f"{'normsurgeon convert ' + model + ' --random-init':44} {b:6.2f} s   ratio {b / a:.2f} (target 1.25)")
    for balance in (False, True):
        label = "with" if balance else "without"  # and the verdict
        times = in_a_process(stages, model, balance)
        parts = " + ".join(f"{each:.2f}" for each in times)
        print(f"{f'trace + plan + rewrite, {label} balancing':44} {sum(times):6.2f} s   ({parts}; target 1 s)")
    a, b = in_a_process(reading, model, options.repeats)
    print(f"{'timm creates, reads and loads ' + model:44} {a:6.2f} s")
    print(f"{'normsurgeon.load of its conversion':44} {b:6.2f} s   ratio {b / a:.2f} (target 1.3)")
    for label, settings, target in (
        ("alone", {"balance": False, "check": False, "verdict": False}, 2.2),
        ("with the check", {"balance": False, "verdict": False}, 2.5),
        ("with check, balancing and verdict", {}, 2.5),
    ):
        ratio, size = in_a_process(peak, model, settings)
        print(f"{'peak memory, ' + label:44} {ratio:6.2f} × the model's {size:.0f} MiB (target {target})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
