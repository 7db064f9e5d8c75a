"""``analyze`` as a whole, from Python and from the command line: what it reports, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import timm
import torch
from normsurgeon_cli.app import app
from PIL import Image
from typer.testing import CliRunner

import normsurgeon as ns
from normsurgeon._util.stopping import Terminated
from normsurgeon.errors import AnalysisStopped, DataError, UsageError

STATISTICS = {
    "layer", "kind", "shape", "mean", "var", "min", "max", "abs_mean", "zero_fraction", "dead_channels", "skewness",
    "kurtosis", "effective_rank",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str):
        return CliRunner().invoke(app, ["analyze", *arguments])

    return invoke


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    result = ns.convert(
        timm.create_model("test_resnet").eval(), to="ln", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False
    )
    return str(ns.save(result, tmp_path_factory.mktemp("c") / "ln.safetensors"))


QUICK = ("--only", "statistics,similarity", "--random-init")


def test_json_has_the_documented_keys_and_nothing_else_on_standard_output(run, folder, checkpoint):
    result = run(checkpoint, "--baseline", checkpoint, "--data", str(folder), "--json", "--methods", "taylor")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert {"statistics", "similarity", "sensitivity", "findings", "provenance", "comparison"} <= set(document)
    assert set(document["statistics"][0]) >= STATISTICS
    assert set(document["similarity"]) >= {"layers", "cka", "cosine", "gram_cosine", "samples"}
    (entry,) = document["sensitivity"]
    assert (entry["method"], entry["loss"], set(entry["layers"][0])) == (
        "taylor",
        "prediction",
        {"layer", "score", "stderr"},
    )
    layers = len(document["similarity"]["layers"])
    assert [len(row) for row in document["similarity"]["cka"]] == [layers] * layers
    assert document["provenance"]["images"] == 5
    assert document["comparison"]["agreement"] == 1
    assert document["findings"][0].keys() >= {"kind", "severity", "layer", "text", "metric", "value", "advice"}


def test_only_takes_any_subset(run, folder):
    for part in ("statistics", "similarity", "sensitivity"):
        result = run(
            "test_resnet", "--random-init", "--only", part, "--data", str(folder), "--json", "--methods", "taylor"
        )
        document = json.loads(result.stdout)
        assert [key for key in ("statistics", "similarity", "sensitivity") if document[key] is not None] == [part]


def test_files_are_written_in_addition_to_what_is_printed(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    page, table, document = (out / name for name in ("r.html", "r.csv", "r.json"))
    result = run(
        "test_resnet", *QUICK, "--data", str(folder), "--html", str(page), "--csv", str(table), "--json", str(document)
    )
    assert result.exit_code == 0, result.stderr
    assert "<html" in page.read_text(encoding="utf-8")
    loaded = json.loads(document.read_text(encoding="utf-8"))
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [entry["layer"] for entry in loaded["statistics"]]
    assert "test_resnet" in result.stdout


def test_without_data_the_demo_photographs_are_used_and_the_report_says_so(run):
    pytest.importorskip("skimage")
    result = run("test_resnet", *QUICK, "--layers", "bn1", "--max-images", "4", "--json")
    assert json.loads(result.stdout)["provenance"]["data"] == "demo"
    assert "no --data given: looking at the demo photographs" in result.stderr


def test_the_same_seed_gives_the_same_report():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(6, 3, 64, 64)

    def body(batch):
        found = ns.analyze(
            model, images.split(batch), layers=["bn1", "fc"], methods=["taylor", "noise"], seed=3
        ).to_dict()
        return {key: found[key] for key in ("statistics", "sensitivity", "similarity", "findings")}

    assert body(6) == body(6)


def test_statistics_do_not_depend_on_the_batch_size():
    model = timm.create_model("test_resnet").eval()
    images = torch.randn(12, 3, 96, 96)
    by_batch = [ns.analyze(model, images.split(size), only=["statistics"]).statistics for size in (12, 5, 1)]
    for records in zip(*by_batch, strict=True):
        for other in records[1:]:
            for key, value in vars(records[0]).items():
                if isinstance(value, float):
                    scale = max(
                        abs(value),
                        records[0].var ** 0.5 if key == "mean" else 0,
                        1 if key in ("skewness", "kurtosis") else 0,
                    )
                    assert abs(getattr(other, key) - value) <= 2e-6 * scale, (records[0].layer, key)


def test_labels_are_used_where_the_data_has_them():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4])
    labelled = ns.analyze(model, [(images, labels)], only=["sensitivity"], methods=["taylor"])
    assert labelled.sensitivity[0].loss == "labels"
    assert labelled.provenance.labelled
    assert ns.analyze(model, [images], only=["sensitivity"], methods=["taylor"]).sensitivity[0].loss == "prediction"


def test_a_hyper_parameter_sweep_is_made_on_request():
    network = timm.create_model("test_resnet", num_classes=10).eval()
    model = ns.convert(network, to="gn", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False).model
    report = ns.analyze(
        model, [torch.randn(4, 3, 64, 64)], only=["sensitivity"], methods=["taylor"], layers=["bn1"], sweep=True
    )
    assert {point.layer for point in report.sweep} == {"bn1"}
    assert {point.setting for point in report.sweep} == {"eps", "groups", "scale"}


def test_sensitivity_of_no_images_is_refused_before_any_is_read():
    with pytest.raises(ns.UsageError, match=r"^sensitivity_images=0 must be at least 1$"):
        ns.analyze(timm.create_model("test_resnet"), [], sensitivity_images=0)


def test_sensitivity_alone_runs_no_more_images_than_it_measures():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    read = []

    def batches():
        for number in range(50):
            read.append(number)
            yield torch.randn(4, 3, 64, 64), None

    calls = []
    handle = model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    report = ns.analyze(model, batches(), only=["sensitivity"], methods=["taylor"], sensitivity_images=6)
    handle.remove()
    assert (report.provenance.images, report.sensitivity[0].samples) == (6, 6)
    assert (read, sum(calls)) == ([0, 1], 6)


def test_one_image_is_enough_for_statistics_and_explained_for_the_rest(run, tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "only.png")
    result = run("test_resnet", *QUICK, "--data", str(tmp_path), "--json")
    document = json.loads(result.stdout)
    assert document["provenance"]["notes"] == ["one image: nothing can be said about how images differ"]
    assert document["similarity"]["cka"][0][0] is None
    assert document["similarity"]["notes"][0].startswith(
        "CKA has no value: the unbiased estimator needs at least 4 images"
    )


def test_an_image_that_is_not_finite_stops_the_analysis():
    model = timm.create_model("test_resnet").eval()
    images = torch.randn(5, 3, 64, 64)
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(
        DataError,
        match=r"^image 7 of the batches \(counted from 0\) holds values that are not finite; try leaving it out$",
    ):
        ns.analyze(model, [torch.randn(5, 3, 64, 64), (images, torch.arange(5))], only=["statistics"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--layers", "layer9.*"), 2, "the pattern 'layer9.*' matches no module; there are: conv1.0, conv1.1, "),
        (("--only", "statistic"), 2, "there is no part 'statistic' of an analysis; did you mean statistics?"),
        (("--only", ","), 2, "nothing to analyze: name at least one of statistics, similarity, sensitivity"),
        (("--kinds", "pool"), 2, "there is no kind of layer 'pool'; try norm, convolution, linear, block"),
        (("--methods", "fischer"), 2, "unknown method 'fischer'; did you mean fisher?"),
        (("--html", "report.pdf"), 2, "report.pdf: that file is the report as html, and its name must end in .html"),
        (("--data", "nowhere"), 1, "there is no folder nowhere"),
        (("--html", "/nowhere/r.html"), 1, "/nowhere"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_an_exit_code(run, arguments, code, text):
    result = run("test_resnet", "--random-init", *arguments)
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert text in lines[0]
    assert result.stdout == ""


def test_an_empty_data_set_is_an_error():
    with pytest.raises(
        DataError, match=r"^there are no images to analyze in list of batches; try another --data, or demo$"
    ):
        ns.analyze(timm.create_model("test_resnet"), [])


def test_a_model_without_the_layers_asked_for_says_what_there_is():
    with pytest.raises(UsageError, match=r"^this Sequential has no block layer; name the modules to look at: 0, 1$"):
        ns.analyze(
            torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU()), [torch.zeros(1, 1, 2, 2)], kinds=["block"]
        )


def test_a_report_is_printed_in_words(run, folder):
    text = run("test_resnet", *QUICK, "--data", str(folder)).stdout
    assert re.search(r"Images +5", text)
    assert "Findings" in text


def test_findings_carry_their_number():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    torch.nn.init.constant_(model[1].bias, -100.0)
    report = ns.analyze(model, [torch.randn(4, 1, 4, 4)], only=["statistics"])
    finding = next(f for f in report.findings if f.kind == "dead")
    assert finding.text == "all 8 of 8 channels of 1 never fire on these 4 images (0, 1, 2, 3, 4, 5, …)"
    assert (finding.severity, finding.layer, finding.metric, finding.value) == ("problem", "1", "dead_channels", 8.0)
    assert finding.advice == "look at more images before pruning them"


def test_the_history_of_a_network_is_in_its_report(tmp_path):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    result = ns.convert(model, to="gn", keep=["conv1.1"], example_inputs=torch.zeros(2, 3, 32, 32), verdict=False)
    images = torch.randn(8, 3, 32, 32)
    ns.calibrate_(result, [images])
    batches = [(images, torch.arange(8) % 4)]
    result = ns.finetune(result, batches, batches, steps=2, batch_size=8, device="cpu")
    only = {"only": ["statistics"], "layers": ["conv1*"]}
    report = ns.analyze(result, [images], **only)
    assert [event["event"] for event in report.history] == ["convert", "calibrate", "finetune"]
    assert report.history[0] == {"event": "convert", "to": "gn", **result.counts}
    assert report.history[1:] == tuple(record.to_dict() for record in result.history)
    assert [row["step"] for row in report.history[2]["curves"]["steps"]] == [1, 2]
    loaded = ns.load(ns.save(result, tmp_path / "tuned.safetensors"))
    again = ns.analyze(loaded, [images], **only)
    assert json.dumps(again.to_dict()["history"]) == json.dumps(report.to_dict()["history"])
    assert ns.analyze(model, [images], **only).history == ()


def test_a_network_that_was_trained_before_its_conversion_has_both_events_in_that_order():
    images = torch.randn(8, 3, 32, 32)
    batches = [(images, torch.arange(8) % 4)]
    model = timm.create_model("test_resnet", num_classes=4).eval()
    trained = ns.finetune(model, batches, steps=1, batch_size=8, device="cpu").model
    result = ns.convert(trained, to="ln", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False)
    report = ns.analyze(result, [images], only=["statistics"], layers=["conv1*"])
    assert [event["event"] for event in report.history] == ["finetune", "convert"]


def stop_at(stage: str, done: int, name: str):
    """A callback that sends the process a signal at a certain step."""

    def watch(step) -> None:
        if (step.stage, step.done) == (stage, done):
            os.kill(os.getpid(), signal.Signals[name])

    return watch


NETWORK = timm.create_model("test_resnet").eval()
BATCHES = [torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_among_the_images_an_analysis_gives_the_statistics_of_those_it_saw(name, code):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(AnalysisStopped, match=f"^stopped by {name} after 32 of some images$") as caught:
        ns.analyze(NETWORK, BATCHES, device="cpu", on_progress=stop_at("reading layers", 32, name))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert caught.value.exit_code == code
    report = caught.value.report
    alone = ns.analyze(NETWORK, BATCHES[:2], device="cpu", only=["statistics", "similarity"])
    assert report.statistics == alone.statistics
    assert report.similarity == alone.similarity
    assert (report.sensitivity, report.provenance.images) == (None, 32)
    assert "stopped after 32 of some images" in report.provenance.notes


def test_stopped_in_the_sensitivity_an_analysis_gives_the_measures_that_are_done():
    before = {key: value.clone() for key, value in NETWORK.state_dict().items()}
    whole = ns.analyze(NETWORK, BATCHES, device="cpu", methods=["taylor", "noise", "fisher"])
    with pytest.raises(
        AnalysisStopped, match=r"^stopped by SIGTERM in the sensitivity, of which taylor is done$"
    ) as caught:
        ns.analyze(
            NETWORK, BATCHES, device="cpu", methods=["taylor", "noise", "fisher"],
            on_progress=stop_at("sensitivity: noise", 16, "SIGTERM"),
        )  # fmt: skip
    assert caught.value.report.sensitivity == whole.sensitivity[:1]
    assert caught.value.report.statistics == whole.statistics
    assert all(torch.equal(value, before[key]) for key, value in NETWORK.state_dict().items())


@pytest.mark.parametrize(("name", "kind"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", Terminated)])
def test_stopped_before_anything_is_done_an_analysis_is_interrupted(name, kind):
    with pytest.raises(KeyboardInterrupt, match=r"^$") as caught:
        ns.analyze(
            NETWORK, BATCHES, device="cpu", only=["sensitivity"], methods=["taylor"],
            on_progress=stop_at("sensitivity: taylor", 16, name),
        )  # fmt: skip
    assert caught.type is kind  # SIGINT ends a Python process as Ctrl-C only by an exception of Python's own class


def test_a_stopped_command_writes_what_was_done_and_says_so(run, folder, tmp_path, monkeypatch):
    import normsurgeon_cli.analyze as command

    real = command.progress

    @contextmanager
    def stopping(*arguments):
        with real(*arguments) as show:
            yield lambda step: (show(step), stop_at("sensitivity: fisher", 5, "SIGTERM")(step))

    monkeypatch.setattr(command, "progress", stopping)
    page, file = tmp_path / "r.html", tmp_path / "r.json"
    done = run("test_resnet", "--random-init", "--data", str(folder), "--only", "sensitivity", "--methods",
               "taylor,fisher", "--html", str(page), "--json-file", str(file))  # fmt: skip
    assert done.exit_code == 143
    assert done.stderr.splitlines() == [
        f"wrote {page}",
        f"wrote {file}",
        "error: stopped by SIGTERM in the sensitivity, of which taylor is done; what was done is written",
    ]
    assert [each["method"] for each in json.loads(file.read_text())["sensitivity"]] == ["taylor"]
    assert page.read_text().rstrip().endswith("</html>")


PAGE = """\
import sys, torch, normsurgeon as ns
torch.manual_seed(0)
net = ns.load("test_resnet", pretrained=False).eval()
gn = ns.convert(net, to="gn", example_inputs=torch.zeros(2, 3, 32, 32), verdict=False)
ns.analyze(gn, [torch.rand(6, 3, 32, 32)], baseline=net, sweep=True, device="cpu").save(sys.argv[1])
"""


@pytest.mark.system
def test_a_page_is_the_same_from_run_to_run_apart_from_its_times(tmp_path):
    pages = [tmp_path / "1.html", tmp_path / "2.html"]
    for page in pages:  # whose sets of texts are in different orders
        subprocess.run([sys.executable, "-c", PAGE, page], env={**os.environ, "PYTHONHASHSEED": page.stem}, check=True)
    texts = [
        re.sub(r"<dd>(\d{4}-\d\d-\d\dT[\d:+]+|[\d.]+ s)</dd>", "<dd>some time</dd>", page.read_text()) for page in pages
    ]
    assert texts[0].count("<dd>some time</dd>") == 2
    assert texts[0] == texts[1]
