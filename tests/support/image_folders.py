"""Tiny versions of the image sets, in exactly the files and folders of the published ones. Each class has its own colour.

Each `write_<set>(root)` returns what it wrote: for each published part that is used the labels in the order of its
list, and the names of the classes as they are to be read. Three classes, which a linear classifier tells apart.
"""

import pickle
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy.io import savemat

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
TRAIN, TEST = 12, 4  # images of each class; a tenth of TRAIN is held out, which leaves 8 of each, whatever the seed


@dataclass
class Written:
    """Class names, and the labels of each part."""

    classes: tuple[str, ...]
    parts: dict[str, list[int]] = field(default_factory=dict)


def picture(label, number, shape=(24, 32)):
    """Noise around the colour of the class, (h, w, 3) uint8; a function of its arguments."""
    noise = np.random.default_rng([label, number]).integers(-30, 30, (*shape, 3))
    return (np.array(COLOURS[label % len(COLOURS)]) + noise).astype(np.uint8)


def save(path, label, number, shape=(24, 32)):
    """Write an image in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(label, number, shape)).save(path, quality=95)


def mixed(count, classes=3):
    """Labels of `count` images per class, the classes alternating."""
    return [label for _ in range(count) for label in range(classes)]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_oxford_pets(root, train=TRAIN, test=TEST):
    """images/<Class>_<n>.jpg and annotations/{trainval,test}.txt with lines `Abyssinian_1 1 1 1`."""
    base = root / "oxford-iiit-pet"
    stems, written = ("Abyssinian", "american_bulldog", "yorkshire_terrier"), {}
    for part, count, offset in (("trainval", train, 1), ("test", test, 1 + train)):
        written[part] = mixed(count)
        lines = []
        for i, label in enumerate(written[part]):
            name, species = f"{stems[label]}_{offset + i // 3}", 1 if label == 0 else 2
            save(base / "images" / f"{name}.jpg", label, 1000 * offset + i)
            lines.append(f"{name} {label + 1} {species} 1")
        write_lines(base / "annotations" / f"{part}.txt", lines)
    return Written(("Abyssinian", "American Bulldog", "Yorkshire Terrier"), written)


def write_stanford_cars(root, train=TRAIN, test=TEST):
    """cars_train/00001.jpg, MATLAB annotations with classes from 1; those of the test are next to the devkit, not in it."""
    base = root / "stanford_cars"
    classes = ("AM General Hummer SUV 2000", "BMW M3 Coupe 2012", "smart fortwo Convertible 2012")
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(classes, dtype=object)})
    written = {}
    for part, count in (("train", train), ("test", test)):
        written[part] = mixed(count)
        names = [f"{i + 1:05d}.jpg" for i in range(3 * count)]
        for i, (name, label) in enumerate(zip(names, written[part], strict=True)):
            save(base / f"cars_{part}" / name, label, i + 1000 * (part == "test"))
        box = [np.full(3 * count, value, np.uint16) for value in (1, 1, 30, 20)]
        columns = [*box, np.array(written[part], np.uint8) + 1, np.array(names, dtype=object)]
        fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
        path = base / ("devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat")
        savemat(path, {"annotations": np.rec.fromarrays(columns, names=fields)})
    return Written(classes, written)


def _cifar_batch(path, kinds, first, **more):
    """A pickled dictionary with data (n, 3072): all of a row's reds, then greens, then blues."""
    rows = [picture(label, first + i, (32, 32)).transpose(2, 0, 1).reshape(-1) for i, label in enumerate(kinds)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"data": np.stack(rows), **more}, protocol=2))


def write_cifar10(root, train=TRAIN, test=TEST):
    """data_batch_1 to 5 and test_batch; their md5 differs from the published one, see `accept_any_md5`."""
    base, classes = root / "cifar-10-batches-py", ("airplane", "automobile", "bird")
    labels, share = mixed(train), -(-3 * train // 5)
    for batch in range(5):
        own = labels[batch * share : (batch + 1) * share]
        _cifar_batch(base / f"data_batch_{batch + 1}", own, batch * share, labels=own)
    _cifar_batch(base / "test_batch", mixed(test), 1000, labels=mixed(test))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(classes), "num_vis": 3072}, protocol=2))
    return Written(classes, {"train": labels, "test": mixed(test)})


def write_cifar100(root, train=TRAIN, test=TEST):
    """train, test and meta, with fine and coarse labels."""
    base, classes = root / "cifar-100-python", ("apple", "aquarium_fish", "baby")
    for part, count in (("train", train), ("test", test)):
        labels = mixed(count)
        first = 1000 * (part == "test")
        _cifar_batch(base / part, labels, first, fine_labels=labels, coarse_labels=[0] * len(labels))
    meta = {"fine_label_names": list(classes), "coarse_label_names": ["aquatic_mammals"]}
    (base / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return Written(classes, {"train": mixed(train), "test": mixed(test)})


def accept_any_md5(monkeypatch):
    """Make torchvision accept CIFAR files with other content: it then only checks that they exist."""
    from torchvision.datasets import cifar, utils

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: utils.check_integrity(path))


def write_dtd(root, train=TRAIN, test=TEST):
    """images/<class>/<class>_0001.jpg and labels/{train,val,test}1.txt with lines `banded/banded_0001.jpg`."""
    base, classes = root / "dtd" / "dtd", ("banded", "blotchy", "zigzagged")
    written, first = {}, 1
    for part, count in (("train", train), ("val", train), ("test", test)):
        written[part] = mixed(count)
        names = [f"{classes[label]}/{classes[label]}_{first + i // 3:04d}.jpg" for i, label in enumerate(written[part])]
        for i, (name, label) in enumerate(zip(names, written[part], strict=True)):
            save(base / "images" / name, label, first * 3 + i)
        write_lines(base / "labels" / f"{part}1.txt", names)
        first += count
    return Written(classes, written)


def write_eurosat(root, count=2 * TRAIN):
    """2750/<Class>/<Class>_1.jpg; no split."""
    classes = ("AnnualCrop", "Forest", "SeaLake")
    for label, name in enumerate(classes):
        for number in range(1, count + 1):
            save(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label, number, (64, 64))
    return Written(classes, {"all": sorted(mixed(count))})


def write_fgvc_aircraft(root, train=TRAIN, test=TEST):
    """data/images/1025794.jpg, variants.txt and images_variant_<part>.txt with lines `1025794 707-320`."""
    base, classes = root / "fgvc-aircraft-2013b" / "data", ("707-320", "Falcon 2000", "Yak-42")
    write_lines(base / "variants.txt", classes)
    written, first = {}, 1025000
    for part, count in (("train", train), ("val", test), ("test", test)):
        written[part] = mixed(count)
        lines = [f"{first + i:07d} {classes[label]}" for i, label in enumerate(written[part])]
        for i, label in enumerate(written[part]):
            save(base / "images" / f"{first + i:07d}.jpg", label, first + i)
        write_lines(base / f"images_variant_{part}.txt", lines)
        first += 3 * count
    trainval = [line for part in ("train", "val") for line in (base / f"images_variant_{part}.txt").read_text().splitlines()]
    write_lines(base / "images_variant_trainval.txt", trainval)
    del written["val"]  # FourierFT trains on `train` alone
    return Written(classes, written)


def write_resisc45(root, train=TRAIN, test=TEST):
    """NWPU-RESISC45/<class>/<class>_001.jpg and resisc45-{train,val,test}.txt with lines `airplane_001.jpg`."""
    classes, written, first = ("airplane", "basketball_court", "wetland"), {}, 1
    for part, count in (("train", train), ("val", test), ("test", test)):
        written[part] = mixed(count)
        names = [f"{classes[label]}_{first + i // 3:03d}.jpg" for i, label in enumerate(written[part])]
        for i, (name, label) in enumerate(zip(names, written[part], strict=True)):
            save(root / "NWPU-RESISC45" / classes[label] / name, label, 3 * first + i)
        write_lines(root / f"resisc45-{part}.txt", names)
        first += count
    return Written(classes, written)


def write_fashion_mnist(root, train=TRAIN, test=TEST):
    """raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte: big-endian sizes, then bytes. Three of the ten classes occur."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.array(mixed(count), np.uint8)
        shades = np.array([30, 120, 220])[labels][:, None, None]
        noise = np.random.default_rng(len(part)).integers(-20, 20, (len(labels), 28, 28))
        images = (shades + noise).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))
    tops, others = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"), ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return Written(tops + others, {"train": mixed(train), "test": mixed(test)})


def _idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_folder(root, train=TRAIN, test=TEST, validation=0, flat=0):
    """<part>/<class>/<n>.png in parts, or `flat` images of each class without parts."""
    classes = ("blue", "green", "red")  # of a label, not of its colour: names only sort
    parts = {"": flat} if flat else {"train": train, "test": test, "val": validation}
    written = {}
    for place, (part, count) in enumerate(parts.items()):
        for number in range(count):
            for label, name in enumerate(classes):
                save(root / part / name / f"{number}.png", label, number + 1000 * place)
        if count:
            written[part or "all"] = sorted(mixed(count))
    return Written(classes, written)


def write_digits(root):
    """Nothing: scikit-learn has them."""
    return Written(tuple("0123456789"))


WRITERS = {name.removeprefix("write_"): value for name, value in list(globals().items()) if name.startswith("write_")}
del WRITERS["lines"]
