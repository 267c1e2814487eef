"""The data sets as facts: sensor, classes and the paper's settings for each."""

from dataclasses import dataclass

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
GESTURES = (
    *("hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter clockwise"),
    *("left arm clockwise", "left arm counter clockwise", "arm roll", "air drums", "air guitar", "other gestures"),
)
ASL_LETTERS = "abcdefghiklmnopqrstuvwxy"  # j and z are gestures, not poses


@dataclass(frozen=True)
class DatasetFacts:
    """What the networks and the configuration need to know about a data set before any of it is read."""

    shape: tuple[int, int, int]  # height, width, channels of one image or one frame
    classes: int
    samples: tuple[int, int]  # of the whole set: for training, for testing
    T: int  # the paper's number of timesteps
    channels: int | None = None  # width of the convolutions; None where the network fixes it
    number_layer: int | None = None  # number of convolutions; None likewise
    names: tuple[str, ...] | None = None  # of the classes, in the order of their labels; None: digits

    @property
    def class_names(self) -> tuple[str, ...]:
        """What people call the classes, in the order of their labels."""
        return self.names or tuple(map(str, range(self.classes)))

    @property
    def events(self) -> bool:
        """Whether the samples are event frames [T, H, W, 2] rather than images [H, W, C]."""
        return self.channels is not None

    @property
    def max_number_layer(self) -> int:
        """How often the sensor can be halved before nothing is left of its shorter side."""
        return min(self.shape[:2]).bit_length() - 1


DATASETS = {
    "MNIST": DatasetFacts((28, 28, 1), 10, (60000, 10000), T=8),
    "FashionMNIST": DatasetFacts((28, 28, 1), 10, (60000, 10000), T=8, names=FASHION_CLASSES),
    "CIFAR10": DatasetFacts((32, 32, 3), 10, (50000, 10000), T=8, names=CIFAR10_CLASSES),
    "NMNIST": DatasetFacts((34, 34, 2), 10, (60000, 10000), T=10, channels=128, number_layer=2),
    "CIFAR10DVS": DatasetFacts(
        (128, 128, 2), 10, (9000, 1000), T=20, channels=128, number_layer=4, names=CIFAR10_CLASSES
    ),
    "DVS128Gesture": DatasetFacts((128, 128, 2), 11, (1176, 288), T=20, channels=128, number_layer=5, names=GESTURES),
    # Not in the paper. Its authors began ASL-DVS and left the network a stub; the settings here are ours.
    "ASLDVS": DatasetFacts(
        (180, 240, 2), 24, (80640, 20160), T=20, channels=128, number_layer=5, names=tuple(ASL_LETTERS)
    ),
    # Not in the paper. scikit-learn's digits seen by a simulated event camera: the data set that needs no download.
    "Digits": DatasetFacts((34, 34, 2), 10, (1442, 355), T=10, channels=16, number_layer=2),
}
