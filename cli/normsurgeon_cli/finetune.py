"""normsurgeon finetune: recover a converted model by training, from a teacher, from labels, or from both."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normsurgeon._util.progress import Progress
from normsurgeon.data.augmentation import AUGMENTATION
from normsurgeon.data.label_ways import check_way
from normsurgeon.distributed import is_main_process
from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import LENGTH, LOSS, OPTIMIZER, RUN, FinetuneConfig
from normsurgeon.render.document import Column, Table
from normsurgeon.render.formatting import percent
from normsurgeon_cli import options
from normsurgeon_cli.console import out, print_json, print_message, print_table, program, progress, score_rows, status
from normsurgeon_cli.network import Network, load, takes_network
from normsurgeon_cli.schema import with_settings

if TYPE_CHECKING:
    from normsurgeon.finetuning.record import FinetuneRecord

EXAMPLES = (
    "normsurgeon finetune resnet50 --to gn --data FOLDER --val FOLDER -o run",
    "normsurgeon finetune resnet50-gn.safetensors --data FOLDER --teacher resnet50 -o run",
)


@takes_network
@with_settings(
    FinetuneConfig,
    names={"train_what": "--train", "trackers": "--tracker"},
    types={"scale": float},
    panels=(LENGTH, OPTIMIZER, LOSS, AUGMENTATION, RUN),
)
def finetune(
    *,
    network: Network,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Images to train on: a folder of class folders, digits, fashion-mnist, or a timm data set (torch/…).",
        ),
    ],
    val: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to validate on; the same name gives its held-out split."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Convert MODEL first (gn, ln, …); MODEL is then the teacher."),
    ] = None,
    groups: Annotated[str, typer.Option(metavar="N|auto", help="Groups of gn, with --to.")] = "auto",
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="Distil from this model.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="The run's folder: state, best and last network, history."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, if there is one.")] = False,
    force: options.Force = False,
    num_classes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Give the network a new head.")] = None,
    labels: options.Labels = "by-name",
    settings: dict[str, Any],
    workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Processes that read images.", rich_help_panel=RUN)
    ] = 0,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Fine-tune MODEL on images, and recover what a conversion cost.

    With --to, MODEL is converted first and the original is the teacher: labels are then welcome and not needed. Stopped
    by Ctrl-C, SIGTERM or a crash, the same command with --resume goes on. Also under torchrun and accelerate launch.
    """
    if to is None and groups != "auto":
        raise UsageError("--groups belongs to --to, which is not there")
    for path in _written(output) if is_main_process() else ():
        options.check_output(path, force or resume, (*network.inputs, teacher))
    with warnings.catch_warnings():
        if not is_main_process():  # its warnings would be repetitions
            warnings.simplefilter("ignore")
        from normsurgeon.finetuning.finetune import finetune as run

        way = check_way(labels)
        FinetuneConfig(**settings)  # raises before minutes of download
        model = network.model
        made: Any = network.load()
        master: Any = load(teacher) if teacher is not None else "original"
        if to is not None:
            made = _converted(made, model, to, groups, network.random_init)
        with progress("fine-tuning", Figures()) as on_progress:
            tuned = run(
                made,
                data,
                val,
                teacher=master,
                output=output,
                resume=resume,
                num_classes=num_classes,
                labels=way,
                device=device,
                workers=workers,
                on_message=print_message,
                on_progress=on_progress,
                **settings,
            )
    record: Any = tuned.history[-1]
    if json:
        print_json(_document(record, model))
    else:
        _show(record, model)


def _written(output: Path | None) -> list[Path]:
    """What stands already in the run's folder where a network is to be written, unless a run is there."""
    if output is None or (output / "state.pt").exists():
        return []  # a run itself says that it is to be resumed
    return [path for path in (output / "best.safetensors", output / "last.safetensors") if path.exists()]


def _converted(network: Any, model: str, to: str, groups: str, random_init: bool) -> Any:
    import normsurgeon as ns

    number = options.number_of_groups(groups)
    with status("converting …"):
        plan = ns.plan(network, to, name=model, groups=number, balance=not random_init)
        return ns.convert(network, plan)


def _document(record: FinetuneRecord, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "before": record.before.to_dict() if record.before else None,
        "after": record.after.to_dict() if record.after else None,
        "best": record.best,
        "steps": record.steps,
        "images": record.images,
        "seconds": record.seconds,
        "skipped": len(record.skipped),
        "output": str(record.path) if record.path else None,
        "settings": record.config.to_dict(),
        "history": record.curves.to_dict(),
    }


def _show(record: FinetuneRecord, model: str) -> None:
    if record.before is not None and record.after is not None:
        columns = (Column(f"{record.after.images} images"), Column("before", "number"), Column("after", "number"))
        print_table(Table(columns, tuple(score_rows("teacher", record.before, record.after))))
    rate = record.images / max(record.seconds, 1e-9)
    line = f"{model}: {record.steps} updates, {record.images} images in {record.seconds:.0f} s ({rate:.0f} a second)"
    out().print(line, markup=False, soft_wrap=True)
    if record.skipped:
        print_message(f"{len(record.skipped)} images could not be read, and others took their place")
    if record.path is not None:
        out().print(f"wrote {record.path}", markup=False, soft_wrap=True)
        evaluate = f"{program()} evaluate {record.path} --data DATA"
        print_message(f"next: {evaluate}   or   {program()} analyze {record.path}")
    else:
        print_message("nothing was written: -o DIR keeps the network, and lets a stopped run go on")


class Figures:
    """The figures next to the bar: loss, accuracy on the validation images, images a second."""

    def __init__(self) -> None:
        self.accuracy = ""
        self.loss: float | None = None
        self.last: float | None = None
        self.rate: float | None = None

    def __call__(self, step: Progress) -> str:
        """Take in one update, or one validation."""
        if step.stage == "validating":
            names = (("top1", "top-1"), ("agreement", "agreement"))
            shown = [f"{title} {percent(step.details[name])}" for name, title in names if name in step.details]
            self.accuracy = ", ".join(shown)
        else:
            now, loss = time.perf_counter(), step.details["loss"]
            if self.last is not None:
                rate = step.details["images"] / max(now - self.last, 1e-9)
                self.rate = rate if self.rate is None else 0.9 * self.rate + 0.1 * rate
            self.last = now
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        parts = [
            f"loss {self.loss:.4f}" if self.loss is not None else "",
            self.accuracy,
            f"{self.rate:.0f} images/s" if self.rate is not None else "",
        ]
        return "  ".join(part for part in parts if part)
