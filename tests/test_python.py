"""What `import resnet_train` offers: networks, and trained nets with what belongs to them."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

import resnet_train
from resnet_train import load
from resnet_train.classification.load import load_model
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.source import load as load_images
from resnet_train.data.streaming import StreamingDataset
from resnet_train.engine.compute import compute_logits
from resnet_train.errors import UserError
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.weights import source

PUBLISHED = ROOT / "results" / "cifar10" / "weights" / "resnet-20-A-seed-0.safetensors"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A tree of ten classes with a picture of 32 px and a larger one in each."""
    root, draw = tmp_path_factory.mktemp("pictures") / "tree", torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for number in range(20):
            folder = root / part / f"class-{number % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            size = (32, 32, 3) if number < 10 else (40, 61, 3)
            pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return root


def evaluated(path, dataset, count):
    """The logits of the first test images, as evaluation computes them."""
    state = source.load(path)
    config = resnet_train.load(path).config
    net, mean, precision, _ = load_model(path, config, state, state["classes"], torch.device("cpu"))
    images, _ = next(dataset.eval_batches("test", mean, torch.device("cpu"), count))
    with torch.no_grad():
        return compute_logits(net.eval(), images, precision)


def test_published_weights_give_the_logits_of_evaluation_and_of_resnet_classify(
    photographs, tmp_path, command_here, monkeypatch
):
    pytest.importorskip("safetensors")
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path))
    dataset = MemoryDataset(name="imagefolder", root=str(photographs), size=32, validation=0)
    files = sorted(photographs.glob("test/*/*.png"))
    model = load(PUBLISHED)
    assert (len(model.classes), model.classes[3], model.precision, model.iteration) == (10, "cat", "bf16", 64000)
    assert repr(model) == "<Classifier resnet-20-A on cifar10: 10 classes, iteration 64000, bf16 on cpu>"
    batch = torch.stack([model.transform(file) for file in files])
    assert (batch.shape, batch.dtype) == ((20, 3, 32, 32), torch.float32)
    logits = model.logits(batch)
    assert torch.equal(logits, evaluated(PUBLISHED, dataset, len(files)))
    command_here("classify", *files, f"checkpoint={PUBLISHED}", "device=cpu", "out=found.json")
    told = json.loads((tmp_path / "found.json").read_text())["images"]
    top, which = logits.double().softmax(1).topk(5)
    assert [[row["probability"] for row in image["top"]] for image in told] == top.tolist()
    names = [[row["class"] for row in image["top"]] for image in told]
    assert names == [[model.classes[number] for number in row] for row in which.tolist()]


def test_a_net_in_float32_computes_itself_what_its_evaluation_does(trained):
    model = load(str(trained))
    images = load_images("digits", None, 32).test.images[:50]
    batch = torch.stack([model.transform(Image.fromarray(image.numpy())) for image in images])
    dataset = MemoryDataset(name="digits", root=None, size=32, validation=0)
    with torch.no_grad():
        assert torch.equal(model.net(batch), evaluated(trained, dataset, 50))
    assert torch.equal(model.net(batch), model.logits(batch))
    assert not model.net.training
    assert model.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(("shape", "advice"), [((3, 32, 32), "; of one image give image[None]"), ((2, 1, 32, 32), "")])
def test_images_of_another_shape_are_one_line(trained, shape, advice):
    with pytest.raises(UserError) as told:
        load(trained).logits(torch.zeros(shape))
    assert str(told.value) == f"logits: images are (N, 3, S, S), and these are {shape}{advice}"


def test_images_of_another_type_are_one_line(trained):
    model = load(trained)
    images = torch.stack([model.transform(Image.new("RGB", (32, 32))), torch.randn(3, 32, 32)])
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(UserError) as error:
            model.logits(images.to(dtype))
        name = str(dtype).removeprefix("torch.")
        assert (
            str(error.value)
            == f"logits: images are float32, as transform and normalise make them, and these are {name}"
        )
    for dtype in (torch.float64, torch.bfloat16):
        values = images.to(dtype)
        assert torch.equal(model.logits(values), model.logits(values.float()))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "torch sees no GPU here ("),
        (torch.device("cuda", 1), "torch sees no GPU here ("),
        ("gpu", "is not a device of torch here (Expected one of cpu, cuda"),
        ("mps", "is not a device of torch here ("),
    ],
)
def test_a_device_that_is_not_there_is_named_and_not_the_checkpoint(device, message, trained):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as error:
        load(trained, device=device)
    assert str(error.value).startswith(f"device={device}: {message}")
    assert "\n" not in str(error.value)


def test_an_imagenet_net_sees_the_center(photographs, tmp_path, monkeypatch):
    from test_classify import configured, saved

    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path))
    classes = [f"class-{number}" for number in range(10)]
    saved(tmp_path / "net.pt", imagenet_resnet(18, num_classes=10), configured("imagenet", 32), classes)
    dataset = StreamingDataset(root=str(photographs), size=32, validation=0, workers=0)
    model, files = load(tmp_path / "net.pt"), sorted(photographs.glob("test/*/*.png"))
    batch = torch.stack([model.transform(file) for file in files])
    assert torch.equal(model.logits(batch), evaluated(tmp_path / "net.pt", dataset, 20))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_an_image_of_pillow_is_what_its_file_is(trained, tmp_path, mode):
    pixels = torch.randint(0, 256, (41, 37, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = Image.fromarray(pixels.numpy())
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    path = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    image.save(path)
    model = load(trained)
    with Image.open(path) as opened:
        assert torch.equal(model.transform(opened), model.transform(path))
    assert torch.equal(model.transform(image), model.transform(str(path)))


def test_what_is_no_net_or_no_image_is_said_in_one_line(trained, tmp_path):
    (tmp_path / "text.pt").write_text("no net")
    for path, told in (("nosuch.pt", "there is no such file"), ("text.pt", "is cut short or not a checkpoint")):
        with pytest.raises(UserError, match=told) as raised:
            load(tmp_path / path)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"text\.pt: is not an image that can be read"):
        load(trained).transform(tmp_path / "text.pt")


def test_importing_the_package_imports_no_torch():
    code = "import resnet_train, sys; assert {'torch', 'numpy', 'hydra'}.isdisjoint(sys.modules); print(resnet_train)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_all_that_the_package_says_it_has_is_there():
    assert {*resnet_train.__all__} <= {*dir(resnet_train)}
    assert resnet_train.cifar_resnet is cifar_resnet
    assert resnet_train.imagenet_resnet is imagenet_resnet
    assert all(getattr(resnet_train, name) for name in resnet_train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = resnet_train.nosuch
    assert (ROOT / "resnet_train" / "py.typed").is_file()


def test_torch_hub_finds_the_nets_and_loads_a_trained_one(trained):
    def hub(name, *arguments, **options):
        return torch.hub.load(str(ROOT), name, *arguments, source="local", **options)

    assert sum(p.numel() for p in hub("cifar_resnet", 20).parameters()) == 269_722
    assert hub("imagenet_resnet", 18, num_classes=3).fc.out_features == 3
    model, ours = hub("load", str(trained)), load(trained)
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), ours.net.parameters(), strict=True))


def test_what_is_cited_and_what_changed_are_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == resnet_train.__version__
    assert f"\n## {resnet_train.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_an_image_of_pillows_that_is_cut_short_is_one_line(tmp_path):
    """Pillow opens a file lazily, so that it is found out only here."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(UserError, match=r"cut.png: is not a whole image"):
        load(PUBLISHED).transform(image)
