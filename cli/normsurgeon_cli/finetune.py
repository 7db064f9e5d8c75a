"""normsurgeon finetune: recover a converted model by training, from a teacher, from labels, or from both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from normsurgeon.distributed import is_main_process
from normsurgeon.errors import UsageError
from normsurgeon_cli import options
from normsurgeon_cli.console import err, out, print_json, print_message, print_table, program, status

if TYPE_CHECKING:
    from normsurgeon.finetuning.finetune import Finetuned

HOW_LONG, OPTIMIZER, LEARN, AUGMENT, RUN = (
    "How long",
    "Optimizer",
    "What it learns from",
    "Augmentation and regularisation",
    "The run",
)


def _option(help: str, panel: str, name: str | None = None, metavar: str | None = None, **limits: Any) -> Any:
    names = [name] if name else []
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False, **limits)


def finetune(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Images to train on: a folder of class folders, digits, fashion-mnist, or a timm data set (torch/…).",
            show_default=False,
        ),
    ],
    val: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to judge on; the same name gives its held-out split."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Convert MODEL first (gn, ln, …); MODEL is then the teacher."),
    ] = None,
    groups: Annotated[str, typer.Option(metavar="N|auto", help="Groups of gn, with --to.")] = "auto",
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Distil from this model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="The run's folder: state, best and last network, history."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, if there is one.")] = False,
    num_classes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Give the network a new head.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, _option("Passes over the images. Default: 5.", HOW_LONG)] = None,
    steps: Annotated[int | None, _option("Updates, instead of passes.", HOW_LONG)] = None,
    batch_size: Annotated[
        int | None, _option("Images an update, over all processes together. Default: 64.", HOW_LONG)
    ] = None,
    grad_accum: Annotated[
        int | None, _option("Micro-batches that it goes through in. Doubled when memory runs out.", HOW_LONG)
    ] = None,
    opt: Annotated[str | None, _option("timm's optimizer. Default: adamw.", OPTIMIZER)] = None,
    lr: Annotated[float | None, _option("Learning rate. Default: 5e-5, for pretrained weights.", OPTIMIZER)] = None,
    momentum: Annotated[float | None, _option("Of optimizers that have one.", OPTIMIZER)] = None,
    weight_decay: Annotated[float | None, _option("Not of norms and biases. Default: 0.02.", OPTIMIZER)] = None,
    layer_decay: Annotated[
        float | None, _option("The learning rate's factor from a layer to the one before.", OPTIMIZER)
    ] = None,
    sched: Annotated[str | None, _option("cosine (default), tanh, poly, step or constant.", OPTIMIZER)] = None,
    warmup_epochs: Annotated[float | None, _option("Default: 0.2.", OPTIMIZER)] = None,
    min_lr: Annotated[float | None, _option("Where the learning rate ends.", OPTIMIZER)] = None,
    clip_grad: Annotated[float | None, _option("Largest norm of the gradient. Default: 1.", OPTIMIZER)] = None,
    train: Annotated[
        str | None,
        _option("What trains: all (default), norms, norms+biases, or a glob.", OPTIMIZER, metavar="WHAT"),
    ] = None,
    ema: Annotated[float | None, _option("Keep a moving average of the weights: its decay.", OPTIMIZER)] = None,
    ce: Annotated[float | None, _option("Weight of the cross-entropy. Default: 1 with labels.", LEARN)] = None,
    kl: Annotated[float | None, _option("Weight of the teacher's logits. Default: 1 with a teacher.", LEARN)] = None,
    temperature: Annotated[float | None, _option("Of the distillation. Default: 1.", LEARN)] = None,
    features: Annotated[
        float | None, _option("Weight of the teacher's block outputs. Default: 1 with a teacher.", LEARN)
    ] = None,
    distance: Annotated[
        float | None, _option("Weight that moves the layers' features apart. Default: 0.", LEARN)
    ] = None,
    distance_layers: Annotated[str | None, _option("Which layers.", LEARN, metavar="GLOB")] = None,
    progressive: Annotated[
        float | None, _option("Share of the run in which the norms are blended in. Default: 0.", LEARN)
    ] = None,
    progressive_order: Annotated[str | None, _option("together (default) or sites.", LEARN)] = None,
    augment: Annotated[
        bool | None, _option("Crop, flip and so on at random. Default: yes.", AUGMENT, "--augment/--no-augment")
    ] = None,
    scale: Annotated[
        float | None, _option("Smallest share of an image that a crop keeps. Default: 0.35.", AUGMENT)
    ] = None,
    hflip: Annotated[float | None, _option("Default: 0.5, and 0 for grey drawings.", AUGMENT)] = None,
    color_jitter: Annotated[float | None, _option("Default: 0.2.", AUGMENT)] = None,
    aa: Annotated[str | None, _option("timm's AutoAugment policy, as in rand-m7.", AUGMENT)] = None,
    reprob: Annotated[float | None, _option("Probability of random erasing.", AUGMENT)] = None,
    smoothing: Annotated[float | None, _option("Label smoothing.", AUGMENT)] = None,
    mixup: Annotated[float | None, _option("Mixup's alpha.", AUGMENT)] = None,
    cutmix: Annotated[float | None, _option("CutMix's alpha.", AUGMENT)] = None,
    drop: Annotated[float | None, _option("Dropout before the classifier.", AUGMENT)] = None,
    drop_path: Annotated[float | None, _option("Stochastic depth.", AUGMENT)] = None,
    seed: Annotated[int | None, _option("Default: 0.", RUN)] = None,
    precision: Annotated[str | None, _option("no (default), bf16 or fp16.", RUN)] = None,
    compile: Annotated[bool | None, _option("torch.compile.", RUN, "--compile")] = None,
    channels_last: Annotated[bool | None, _option("Memory format.", RUN, "--channels-last")] = None,
    keep: Annotated[
        str | None, _option("The network that the run gives: best (default) on --val, or last.", RUN)
    ] = None,
    checkpoint_minutes: Annotated[float | None, _option("How often the state is saved. Default: 10.", RUN)] = None,
    tracker: Annotated[list[str] | None, _option("tensorboard, wandb, … Repeatable.", RUN, metavar="NAME")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.", rich_help_panel=RUN)] = 0,
    device: options.Device = None,
    weights: options.Weights = None,
    random_init: options.RandomInit = False,
    json: options.Json = False,
) -> None:
    """Fine-tune MODEL on images, and recover what a conversion cost.

    With --to, MODEL is converted first and the original is the teacher: labels are then welcome and not needed. Stopped
    by Ctrl-C, SIGTERM or a crash, the same command with --resume goes on. Also under torchrun and accelerate launch.
    """
    chosen: dict[str, Any] = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "grad_accum": grad_accum, "opt": opt, "lr": lr,
        "momentum": momentum, "weight_decay": weight_decay, "layer_decay": layer_decay, "sched": sched,
        "warmup_epochs": warmup_epochs, "min_lr": min_lr, "clip_grad": clip_grad, "train_what": train, "ema": ema,
        "ce": ce, "kl": kl, "temperature": temperature, "features": features, "distance": distance,
        "distance_layers": distance_layers, "progressive": progressive, "progressive_order": progressive_order,
        "augment": augment, "scale": None if scale is None else (scale, 1.0), "hflip": hflip,
        "color_jitter": color_jitter, "aa": aa, "reprob": reprob, "smoothing": smoothing, "mixup": mixup,
        "cutmix": cutmix, "drop": drop, "drop_path": drop_path, "seed": seed, "precision": precision,
        "compile": compile, "channels_last": channels_last, "keep": keep, "checkpoint_minutes": checkpoint_minutes,
        "trackers": tuple(tracker) if tracker else None,
    }  # fmt: skip
    if to is None and groups != "auto":
        raise UsageError("--groups belongs to --to, which is not there")
    first = is_main_process()
    with _quiet(not first):
        from normsurgeon.finetuning.config import FinetuneConfig
        from normsurgeon.finetuning.finetune import UNSET
        from normsurgeon.finetuning.finetune import finetune as run

        settings = FinetuneConfig(**{name: value for name, value in chosen.items() if value is not None})
        network: Any = options.load(model, weights, random_init)
        master: Any = options.load(teacher) if teacher is not None else UNSET
        if to is not None:
            network = _converted(network, model, to, groups, random_init)
        with _live(first) as follow:
            tuned = run(
                network,
                data,
                val,
                teacher=master,
                output=output,
                resume=resume,
                num_classes=num_classes,
                settings=settings,
                device=device,
                workers=workers,
                on_message=print_message,
                on_progress=follow,
            )
    _show(tuned, model, json)


def _converted(network: Any, model: str, to: str, groups: str, random_init: bool) -> Any:
    import normsurgeon as ns

    if groups != "auto" and not groups.isdecimal():
        raise UsageError(f"--groups takes a number or auto, not {groups!r}")
    with status("converting …"):
        plan = ns.plan(
            network,
            to,
            name=model,
            groups="auto" if groups == "auto" else int(groups),
            balance=not random_init,
        )
        return ns.convert(network, plan)


def _show(tuned: Finetuned, model: str, json: bool) -> None:
    document = {"model": model, **tuned.to_dict()}
    if json:
        print_json(document)
        return
    if tuned.before is not None and tuned.after is not None:
        rows = [
            (title, _text(getattr(tuned.before, name), share), _text(getattr(tuned.after, name), share))
            for title, name, share in (
                ("top-1", "top1", True),
                ("top-5", "top5", True),
                ("mean loss", "loss", False),
                ("agreement with the teacher", "agreement", True),
                ("KL from the teacher (nats)", "kl", False),
            )
            if getattr(tuned.after, name) is not None
        ]
        print_table((f"{tuned.after.images} images", "before", "after"), rows)
    rate = tuned.images / max(tuned.seconds, 1e-9)
    line = f"{model}: {tuned.steps} updates, {tuned.images} images in {tuned.seconds:.0f} s ({rate:.0f} a second)"
    out().print(line, markup=False, soft_wrap=True)
    if tuned.skipped:
        print_message(f"{len(tuned.skipped)} images could not be read, and others stood in for them")
    if tuned.path is not None:
        out().print(f"wrote {tuned.path}", markup=False, soft_wrap=True)
        print_message(f"next: {program()} evaluate {tuned.path} --data DATA   or   {program()} analyze {tuned.path}")
    else:
        print_message("nothing was written: -o DIR keeps the network, and lets a stopped run go on")


def _text(value: float | None, share: bool) -> str | None:
    if value is None:
        return None
    return f"{100 * value:.1f} %" if share else f"{value:.4f}"


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """For the processes of a launcher other than the first: their messages would be repetitions."""
    if not quiet:
        yield
        return
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _live(first: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A live line on standard error, at a terminal only: loss, accuracy, images a second, time left."""
    console = err()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (first and console.is_terminal),
    )
    with bar:
        task = bar.add_task("fine-tuning", total=None, figures="")
        yield _Follower(lambda done, total, figures: bar.update(task, completed=done, total=total, figures=figures))


class _Follower:
    """Turns a run's rows into the figures of the live line."""

    def __init__(self, show: Callable[[int, int, str], None]) -> None:
        self.show = show
        self.judged = ""
        self.loss: float | None = None
        self.last: tuple[int, float] | None = None
        self.rate: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        """Take in one update, or one validation."""
        if row.get("validation"):
            names = (("top1", "top-1"), ("agreement", "agreement"))
            self.judged = ", ".join(f"{title} {100 * row[name]:.1f} %" for name, title in names if name in row)
        else:
            now = time.perf_counter()
            if self.last is not None:
                rate = row["images"] / max(now - self.last[1], 1e-9)
                self.rate = rate if self.rate is None else 0.9 * self.rate + 0.1 * rate
            self.last = row["step"], now
            self.loss = row["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * row["loss"]
        parts = [
            f"loss {self.loss:.4f}" if self.loss is not None else "",
            self.judged,
            f"{self.rate:.0f} images/s" if self.rate is not None else "",
        ]
        self.show(row["step"], row["steps"], "  ".join(part for part in parts if part))
