"""Published numbers and the recipe of the paper, as data. Errors in %, None where the paper prints none."""

# Table 6: test error of the residual nets on CIFAR-10 (option A; 110 layers: the best of five, 6.61 +- 0.16).
CIFAR10_TEST_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}
FIVE_OF_110 = (6.61, 0.16)

# Each table: what a row's net is called here, the paper's top-1 and top-5 error. Published rows of others: `OTHERS`.
TABLES: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "table 2": {
        "plain-18": (27.94, None),
        "resnet-18-A": (27.88, None),
        "plain-34": (28.54, None),
        "resnet-34-A": (25.03, None),
    },
    "table 3": {
        "plain-34": (28.54, 10.02),
        "resnet-34-A": (25.03, 7.76),
        "resnet-34-B": (24.52, 7.46),
        "resnet-34-C": (24.19, 7.40),
        "resnet-50-B": (22.85, 6.71),
        "resnet-101-B": (21.75, 6.05),
        "resnet-152-B": (21.43, 5.71),
    },
    "table 4": {
        "resnet-34-B": (21.84, 5.71),
        "resnet-34-C": (21.53, 5.60),
        "resnet-50-B": (20.74, 5.25),
        "resnet-101-B": (19.87, 4.60),
        "resnet-152-B": (19.38, 4.49),
    },
    "table 5": {"ensemble of 6": (None, 3.57)},
    "table 6": {
        "plain-20": (None, None),
        "plain-32": (None, None),
        "plain-44": (None, None),
        "plain-56": (None, None),
        **{f"resnet-{depth}-A": (error, None) for depth, error in CIFAR10_TEST_ERROR.items()},
    },
}
OTHERS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "table 3": {"VGG-16": (28.07, 9.33), "GoogLeNet": (None, 9.15), "PReLU-net": (24.27, 7.38)},
    "table 4": {"VGG (v5)": (24.4, 7.1), "PReLU-net": (21.59, 5.71), "BN-Inception": (21.99, 5.81)},
    "table 5": {
        "VGG": (None, 7.32),
        "VGG (v5)": (None, 6.8),
        "GoogLeNet": (None, 6.66),
        "PReLU-net": (None, 4.94),
        "BN-Inception": (None, 4.82),
    },
    "table 6": {
        "Maxout": (9.38, None),
        "NIN": (8.81, None),
        "DSN": (8.22, None),
        "FitNet-19": (8.39, None),
        "Highway-19": (7.54, None),
        "Highway-32": (8.80, None),
    },
}

# Tables 7 and 8: Faster R-CNN's mAP in % with each backbone: on VOC 2007 test and VOC 2012 test; on COCO val at an
# overlap of 0.5 and averaged over those from 0.5 to 0.95. With their schedules' iterations (appendix A).
DETECTION = {
    "voc": {"vgg-16": (73.2, 70.4), "resnet-101": (76.4, 73.8)},
    "coco": {"vgg-16": (41.5, 21.2), "resnet-101": (48.4, 27.2)},
}
DETECTION_ITERATIONS = {"voc": 80_000, "coco": 320_000}
# By kind the classes, and how many images the tests have, from - to: VOC 2007 and 2012 test, COCO val and minival, half
# of ImageNet DET's validation images, more or less. Up to a hundredth may be unreadable and left out.
DETECTION_TESTS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "voc": (20, ((4_903, 4_952), (10_882, 10_991))),
    "coco": (80, ((40_099, 40_504), (4_950, 5_000))),
    "det": (200, ((9_800, 10_250),)),
}
# Tables 9 to 12: ResNet-101's mAP in % with the improvements of appendix B, each of which stands on those before it: by
# the list of the test, the first figure an overlap of 0.5, the second COCO's mean.
IMPROVED: dict[str, dict[tuple[str, ...], tuple[float, float | None]]] = {
    "val2014": {
        (): (48.4, 27.2),
        ("box refinement",): (49.9, 29.9),
        ("box refinement", "context"): (51.1, 30.0),
        ("box refinement", "context", "multi-scale testing"): (53.8, 32.5),
    },
    "2007_test": {(): (76.4, None), ("box refinement", "context", "multi-scale testing"): (85.6, None)},
    "2012_test": {(): (73.8, None), ("box refinement", "context", "multi-scale testing"): (83.8, None)},
    "val2": {("box refinement", "context", "multi-scale testing"): (60.5, None)},
}

# Table 13: method, net, test, error in % with the true class given, top-5 error with the classes that a net names, that
# net and its own top-5 error.
LOCALIZATION = (
    ("VGG's", "VGG-16", "center crop", 33.1, None, None, None),
    ("RPN", "ResNet-101", "center crop", 13.3, None, None, None),
    ("RPN", "ResNet-101", "dense", 11.7, None, None, None),
    ("RPN", "ResNet-101", "dense", None, 14.4, "ResNet-101", 4.6),
    ("RPN + R-CNN", "ResNet-101", "dense", None, 10.6, "ResNet-101", 4.6),
    ("RPN + R-CNN", "ensemble", "dense", None, 8.9, "ensemble", None),
)
LOCALIZATION_METHODS = {"rpn": "RPN", "rcnn": "RPN + R-CNN"}  # by the stage of resnet-localize
IMAGENET_TEST = range(49_500, 50_001)  # ILSVRC's validation images, but for those that are unreadable or have no box
# Table 14: top-5 localization error in % on ILSVRC's validation and test images.
LOCALIZATION_SYSTEMS: dict[str, tuple[float | None, float]] = {
    "OverFeat (2013)": (30.0, 29.9),
    "GoogLeNet (2014)": (None, 26.7),
    "VGG (2014)": (26.9, 25.3),
    "ResNet (2015)": (8.9, 9.0),
}

# Table 1 and section 4.1: multiply-adds for one image of 224x224. Table 6: parameters.
MULTIPLY_ADDS = {
    "resnet-18-B": 1.8e9,
    "plain-34": 3.6e9,
    "resnet-34-B": 3.6e9,
    "resnet-50-B": 3.8e9,
    "resnet-101-B": 7.6e9,
    "resnet-152-B": 11.3e9,
    "vgg-16": 15.3e9,
    "vgg-19": 19.6e9,
}
PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6, 1202: 19.4e6}

# The recipes (section 3.4 and 4.2), in this program's keys, as far as they enter the mathematics of the family's nets.
_BOTH = {
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "decay": "all",
    "init": "fan_in",
    "zero_gamma": False,
    "precision": "fp32",
    "schedule.lr": 0.1,
    "schedule.factor": 0.1,
    "schedule.watch": "train",
    "warmup.lr": 0.01,
    "warmup.error": 80.0,
    "warmup.iterations": 400,
    "augment.flip": True,
    "data.validation": 0,
    "init_from": None,
    "freeze": None,
}
RECIPES = {
    "cifar": {
        **_BOTH,
        "iterations": 64_000,
        "batch_size": 128,
        "bn_images": 64,
        "schedule.name": "step",
        "schedule.drops": [0.5, 0.75],
        "schedule.patience": 1.0,
        "schedule.threshold": 0.0,
        "warmup.depth": 110,
        "augment.pad": 4,
        "data.size": 32,
    },
    "imagenet": {
        **_BOTH,
        "iterations": 600_000,
        "batch_size": 256,
        "bn_images": 32,
        "schedule.name": "plateau",
        "schedule.drops": [],
        "schedule.patience": 0.03,
        "schedule.threshold": 0.1,
        "warmup.depth": 0,
        "augment.shorter_side": [256, 480],
        "augment.area": None,
        "augment.colour_jitter": 0.0,
        "augment.colour_noise": 0.1,
        "normalise": "image",
        "bottleneck_stride": "1x1",
        "data.size": 224,
    },
}


def is_detection_test(kind: str, images: int, classes: int | None) -> bool:
    """Whether a test on so many images and classes, None where that is not known, is one of the paper's."""
    theirs, sizes = DETECTION_TESTS[kind]
    return classes in (None, theirs) and any(least <= images <= most for least, most in sizes)


# The data sets that those recipes are for: the label in a run's record, and the family of its nets.
DATA = {"cifar10": "cifar", "imagenet": "imagenet"}


def shortened(data: str, family: str, iterations: int) -> str:
    """`SHORTENED: …`, to stand over everything that a run on the paper's data and shorter than the paper's has made.

    Nothing for other runs: on data that the paper does not have there is no length to fall short of.
    """
    whole = RECIPES[family]["iterations"] if DATA.get(data) == family else 0
    assert isinstance(whole, int)
    if iterations >= whole:
        return ""
    return f"SHORTENED: {iterations:,} of the paper's {whole:,} iterations ({100 * iterations / whole:.2g} %)"
