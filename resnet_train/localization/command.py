"""The command `resnet-localize test`: the localization error of an RPN, or of R-CNN on its proposals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.classification.predict import load as load_classifier
from resnet_train.classification.predict import view
from resnet_train.config.boxes import name_elsewhere
from resnet_train.config.localization import TEST_RESULT, LocalizeConfig, LocalizeTestConfig, with_test_data
from resnet_train.config.run_dir import mark, plain_word
from resnet_train.data.crops import scaled_view
from resnet_train.engine import checkpoint
from resnet_train.engine.boxes import fault_lines
from resnet_train.engine.compute import pick_device
from resnet_train.engine.distributed import is_main, on_rank_zero, process_group, raise_on_all_ranks
from resnet_train.engine.limits import most_workers
from resnet_train.files import check_replaceable, expand, write_result
from resnet_train.localization.build import KIND, load_predictor
from resnet_train.localization.evaluate import Names, evaluate
from resnet_train.localization.predict import Predictor, dense_sides
from resnet_train.localization.tree import check_classes, read_tree
from resnet_train.paper import LOCALIZATION_METHODS
from resnet_train.terminal import say


def evaluate_checkpoint(args: LocalizeTestConfig) -> None:
    """Print and write the localization error of a checkpoint, by ILSVRC's rule. Raises UserError.

    On a center crop with the true class given it equals the error that training logged.
    """
    device = pick_device(args.device)
    with process_group(device, args.timeout):
        _evaluate(args, device)


def _evaluate(args: LocalizeTestConfig, device: torch.device) -> None:
    path = expand(args.checkpoint)
    state = on_rank_zero(lambda: checkpoint.load_without_momentum(path, kind=KIND))
    rpn, backbone, trained_as = raise_on_all_ranks(lambda: load_predictor(state, "rpn", device))
    config = raise_on_all_ranks(lambda: with_test_data(trained_as, args.data))
    classes, data, root = state["classes"], config.data, Path(config.data.root or "")
    sides = dense_sides(rpn.crop, args.scales) if args.dense else None
    rcnn, of_rcnn = _open_rcnn(args.rcnn, classes, device) if args.rcnn else (None, {})
    classify, of_names = _open_names(args.classifier, classes, sides, device) if args.classifier else (None, {})
    photos = raise_on_all_ranks(lambda: read_tree(root, broken=data.broken, classes=classes))
    out = expand(args.out) if args.out else _default_out(path, args, config, trained_as)
    raise_on_all_ranks(lambda: check_replaceable(out, TEST_RESULT))
    start = time.perf_counter()
    measured = evaluate(
        rpn,
        rcnn,
        photos.test,
        device=device,
        workers=min(data.workers, most_workers()),
        skip=data.broken == "skip",
        sides=sides,
        classify=classify,
    )
    result = {
        "task": "localization",
        "method": LOCALIZATION_METHODS["rcnn" if rcnn else "rpn"],
        **checkpoint.describe(path, backbone.net, config, state),
        **of_rcnn,
        **of_names,
        "data": config.data_label,
        "classes": len(classes),
        "root": str(expand(root).resolve()),
        "split": "val",
        "boxes": len(photos.test.boxes),
        "faults": photos.faults,
        "protocol": _protocol(rpn.crop, sides, named=classify is not None),
        "crop": rpn.crop,
        "scales": sides,
        **measured,
        "precision": " and ".join(sorted({rpn.precision, *([rcnn.precision] if rcnn else [])})),
        "device": str(device),
        "seconds": time.perf_counter() - start,
    }
    if is_main():
        write_result(out, result)
        say(_line(result, out))
        for line in fault_lines(photos):
            say(f"note: {line}")


def _open_rcnn(name: str, classes: list[str], device: torch.device) -> tuple[Predictor, dict[str, Any]]:
    """R-CNN, and its entries of the result. Raises UserError."""
    path = expand(name)
    state = on_rank_zero(lambda: checkpoint.load_without_momentum(path, kind=KIND))
    rcnn, backbone, config = raise_on_all_ranks(lambda: load_predictor(state, "rcnn", device))
    raise_on_all_ranks(lambda: check_classes(f"rcnn={name}", state["classes"], classes, "the RPN"))
    return rcnn, {"rcnn": checkpoint.describe(path, backbone.net, config, state) | {"proposals": config.proposals}}


def _open_names(
    name: str, classes: list[str], sides: Sequence[int] | None, device: torch.device
) -> tuple[Names, dict[str, Any]]:
    """A function that gives the five likeliest classes of an image (3, H, W) uint8, and its entries of the result.

    It classifies the view of the net's own test or, with `sides`, averages over the whole image at each shorter side.
    Raises UserError.
    """
    classifier = raise_on_all_ranks(lambda: load_classifier(name, device))
    raise_on_all_ranks(lambda: check_classes(f"classifier={name}", classifier.classes, classes, "the RPN"))

    def classify(image: Tensor) -> Tensor:
        inputs = [view(image, classifier.config)]
        if sides is not None:
            inputs = [scaled_view(image, side).permute(1, 2, 0) for side in sides]
        probabilities = [classifier.logits(classifier.normalise(pixels[None])).softmax(1) for pixels in inputs]
        return torch.stack(probabilities).mean(0)[0].topk(min(5, len(classes))).indices

    return classify, {"classifier": {"checkpoint": str(expand(name).absolute()), "net": classifier.config.net}}


def _protocol(crop: int, sides: Sequence[int] | None, *, named: bool) -> str:
    """The views of the images, in words."""
    if sides is None:
        return f"center crop of {crop}"
    return f"dense, shorter side at {', '.join(map(str, sides))}" + ("; classes without mirror images" if named else "")


def _default_out(path: Path, args: LocalizeTestConfig, tested: LocalizeConfig, trained: LocalizeConfig) -> Path:
    """The default path of the result: beside the checkpoint, named after data, R-CNN and classifier."""
    words = [path.stem, *name_elsewhere(tested, trained)]
    words += ["dense" if args.dense else "center", *map(str, args.scales or [])]
    for word, name in (("rcnn", args.rcnn), ("top5", args.classifier)):
        words += [f"{word}-{_run_of(expand(name))}-{mark(name)}"] if name else []
    return path.with_name("-".join([*words, "test"]) + ".json")


def _run_of(path: Path) -> str:
    """The name of a checkpoint's run or, outside a run, of its file."""
    folder = path.resolve().parent
    return plain_word(folder.parent.name if folder.name == "checkpoints" else path.stem)


def _line(result: dict[str, Any], out: Path) -> str:
    named = ""
    if "error5" in result:

        def errors(kind: str) -> str:  # of five classes or fewer one of five is always the true one
            five = f" (top-5: {result[f'{kind}5']:.2f} %)" if result["classes"] > 5 else ""
            return f"{result[f'{kind}1']:.2f} %{five}"

        named = (
            f", {errors('error')} with the class that {result['classifier']['net']} names, whose own classification"
            f" error is {errors('class_error')}"
        )
    return (
        f"{result['method']}, {result['net']} on {result['data']}, {result['protocol']}: localization error"
        f" {result['error']:.2f} % with the true class{named}; on {result['images']} images; {out}"
    )
