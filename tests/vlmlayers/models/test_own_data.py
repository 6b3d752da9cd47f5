"""Data in memory give the features that the same images give as a folder, whoever holds them."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import vlmlayers as vl
from vlmlayers.manifests import Item
from vlmlayers.models.decoding import batches_of, decode
from vlmlayers.models.own_data import own_data

NAMES = ("ant", "bee", "cat")
LABELS = [row % 3 for row in range(9)]
PIXELS = [np.random.default_rng(row).integers(0, 256, (32, 32, 3), np.uint8) for row in range(9)]
MODEL = tiny.model()
QUIET = {"progress": False, "batch_size": 4}


class Pairs(Dataset):
    """A dataset as notebooks have them: no names, no files."""

    def __init__(self, form=Image.fromarray):
        self.form = form

    def __len__(self):
        return 9

    def __getitem__(self, row):
        return self.form(PIXELS[row]), LABELS[row]


class Named(Pairs):
    classes = NAMES

    def __getitem__(self, row):
        return {"image": Image.fromarray(PIXELS[row]), "label": torch.tensor(LABELS[row])}


class Stream(IterableDataset):
    def __iter__(self):
        return ((Image.fromarray(pixels), label) for pixels, label in zip(PIXELS, LABELS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data") / "insects"
    for row, (pixels, label) in enumerate(zip(PIXELS, LABELS)):
        (place / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / NAMES[label] / f"{row}.png")
    return place


@pytest.fixture(scope="module")
def expected():
    """Features by the tower itself, of tensors stacked by hand."""
    from vlmlayers.models import Recorder

    batch = torch.stack([tiny.preprocess(Image.fromarray(pixels)) for pixels in PIXELS])
    with Recorder(MODEL.towers["vision"], ("native", "joint")) as recorder:
        return recorder(batch)


def table(**more):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    held = {"image": [Image.fromarray(pixels) for pixels in PIXELS], "label": LABELS}
    return datasets.Dataset.from_dict(held, features=features)


class Elsewhere(torch.Tensor):
    """Stands in for a tensor on a GPU, which gives no array and is not compared with others."""

    def numpy(self, *, force=False):
        assert force, "can't convert cuda:0 device type tensor to numpy"
        return self.cpu().numpy()

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def equal(self, other):
        raise RuntimeError("Expected all tensors to be on the same device")


def elsewhere(made):
    return made.as_subclass(Elsewhere)


HOLDERS = {
    "images": (lambda: [Image.fromarray(p) for p in PIXELS], {"labels": LABELS}),
    "pairs": (lambda: list(zip(map(Image.fromarray, PIXELS), LABELS)), {}),
    "labels in tensors": (lambda: [(p, torch.tensor([n])) for p, n in zip(PIXELS, LABELS)], {}),
    "an array": (lambda: np.stack(PIXELS), {"labels": np.array(LABELS)}),
    "words": (lambda: PIXELS, {"labels": [NAMES[label] for label in LABELS]}),
    "a dataset": (lambda: Pairs(), {}),
    "tensors of pixels": (lambda: Pairs(lambda p: torch.from_numpy(p).permute(2, 0, 1)), {}),
    "floats": (lambda: Pairs(lambda p: p.astype(np.float32) / 255), {}),
    "prepared tensors": (lambda: Pairs(lambda p: tiny.preprocess(Image.fromarray(p))), {}),
    "pixels elsewhere": (
        lambda: Pairs(lambda p: elsewhere(torch.from_numpy(p).permute(2, 0, 1))),
        {},
    ),
    "with gradients": (
        lambda: Pairs(lambda p: tiny.preprocess(Image.fromarray(p)).requires_grad_()),
        {},
    ),
    "a loader": (lambda: DataLoader(Named(), batch_size=2, shuffle=True), {}),
    "a subset": (lambda: Subset(Named(), range(9)), {}),
    "a stream": (lambda: DataLoader(Stream()), {}),
    "a table": (table, {}),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_every_holder_of_images_gives_the_same_features(kind, expected):
    make, beside = HOLDERS[kind]
    features = vl.extract(MODEL, make(), **beside, **QUIET)
    for space in ("native", "joint"):
        for position, values in expected[space].items():
            np.testing.assert_allclose(features["vision"][position, space], values, atol=1e-5)
    assert features.vision.labels.tolist() == LABELS
    known = kind in ("words", "a loader", "a subset", "a table")
    assert (features.class_names == NAMES) is known
    assert (features.text is not None) is known  # there is nothing to make prompts of


def test_token_ids_may_be_on_the_device_of_the_model(expected):
    words = {"labels": [NAMES[label] for label in LABELS]}
    on_gpu = replace(MODEL, tokenizer=lambda texts: elsewhere(MODEL.tokenizer(texts)))
    here, there = (vl.extract(model, PIXELS, **words, **QUIET) for model in (MODEL, on_gpu))
    assert here.identity == there.identity
    for key in (1, "proj"):
        np.testing.assert_array_equal(here["text"][key], there["text"][key])


def test_images_that_are_prepared_on_a_gpu_come_back_to_be_handed_over():
    asked = {"root": None, "size": 16, "workers": 0}
    data = tiny.DrawnManifest(count=5)
    here, there = (
        list(decode(data, data.items("train"), batches_of(5, 2), preprocess=make, **asked))
        for make in (tiny.preprocess, lambda image: elsewhere(tiny.preprocess(image)))
    )
    for (_, plain, _), (_, moved, _) in zip(here, there):
        assert type(moved) is torch.Tensor and torch.equal(plain, moved)


def test_an_image_folder_is_the_folder(folder):
    held = vl.extract(MODEL, ImageFolder(folder), **QUIET)
    named = vl.extract(MODEL, str(folder), "all", **QUIET)
    assert held.dataset == named.dataset == "insects"
    assert held.class_names == named.class_names == NAMES
    order = [named.vision.ids.index(path) for path in held.vision.ids]
    np.testing.assert_allclose(held["vision"][2], named["vision"][2][order], atol=1e-5)
    np.testing.assert_allclose(held["text"][2], named["text"][2], atol=1e-5)


def test_texts_are_taken_as_they_are():
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    prompts = ["an ant on a leaf", "a bee", "one cat"]
    found = vl.extract(MODEL, images, labels=LABELS, texts=prompts, name="mine", **QUIET)
    assert found.text.ids == tuple(prompts) and found.dataset == "mine"
    assert found.text.labels.tolist() == [0, 1, 2]
    captions = [f"picture {row}" for row in range(9)]
    told = vl.extract(MODEL, images, labels=LABELS, texts=captions, text="captions", **QUIET)
    assert told.text.ids == tuple(captions) and told.text.pairs.tolist() == list(range(9))
    drawn = vl.extract(
        MODEL, images, labels=LABELS, texts=captions, text="captions", items=3, **QUIET
    )
    assert [captions[int(row)] for row in drawn.vision.ids] == list(drawn.text.ids)


def test_a_store_knows_which_image_a_caption_is_of(tmp_path):
    images = [Image.fromarray(pixels) for pixels in PIXELS[:2]]
    options = {"text": "captions", "out": tmp_path / "store", **QUIET}
    vl.extract(MODEL, images, texts=[["one", "two"], ["three"]], **options)
    with pytest.raises(vl.UserError, match="belongs to another extraction"):
        vl.extract(MODEL, images, texts=[["one"], ["two", "three"]], **options)


def test_of_several_columns_of_classes_the_one_named_label_counts():
    held = table()
    domains = datasets.ClassLabel(names=["photo", "sketch"])
    beside = held.add_column("domain", [row % 2 for row in range(len(held))]).cast_column(
        "domain", domains
    )
    beside = beside.select_columns(["image", "domain", "label"])
    assert vl.extract(MODEL, beside, **QUIET).class_names == tuple(NAMES)
    unclear = beside.rename_column("label", "species")
    with pytest.raises(vl.UserError, match="several columns of classes, domain, species; rename"):
        vl.extract(MODEL, unclear, **QUIET)


def test_streamed_data_are_refused_in_one_line():
    with pytest.raises(vl.UserError, match="load them with streaming=False, or give datasets.Data"):
        vl.extract(MODEL, table().to_iterable_dataset(), **QUIET)


def test_classes_with_one_prompt_are_named_where_prompts_are_made(caplog):
    beside = {"labels": LABELS, "class_names": ["Ant", "ant", "bee"], **QUIET}
    vl.extract(MODEL, list(PIXELS), texts=["an ant", "a soldier ant", "a bee"], **beside)
    assert not caplog.text
    vl.extract(MODEL, list(PIXELS), **beside)
    assert "classes with one prompt, which text cannot tell apart: 'Ant', 'ant'" in caplog.text


def test_names_that_are_codes_are_told_where_prompts_are_made(tmp_path, caplog):
    """Folders of ImageNet's parts are named by ids of WordNet, whose prompts mean nothing."""
    said = " classes are named by a code, such as "
    for row, pixels in enumerate(PIXELS):
        place = tmp_path / "w" / "train" / f"n0144076{LABELS[row]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{row}.png")
    head = 'title = "w"\nfolder = "w"\nlayout = "folder"\n'
    (tmp_path / "coded.toml").write_text(head)
    (tmp_path / "named.toml").write_text(f"{head}class_names = {list(NAMES)}\n")
    worded = list(zip(PIXELS, [NAMES[label] for label in LABELS]))
    for data, root in ((tmp_path / "named.toml", tmp_path), (worded, None)):
        vl.extract(MODEL, data, root=root, **QUIET)
        assert said not in caplog.text
    own = list(zip(PIXELS, map(str, LABELS)))
    for data, root, first in ((tmp_path / "coded.toml", tmp_path, "n01440760"), (own, None, "0")):
        vl.extract(MODEL, data, root=root, **QUIET)
        assert f"3 of 3{said}{first!r}" in caplog.text
        caplog.clear()
    joined = [("AnnualCrop", "SeaLake", "Forest")[label] for label in LABELS]
    vl.extract(MODEL, PIXELS, labels=joined, **QUIET)
    assert (
        "2 of 3 classes are named by words that run together, such as 'AnnualCrop'" in caplog.text
    )


def test_columns_that_are_taken_for_no_classes_are_named(caplog):
    words = table().add_column("species", [NAMES[label] for label in LABELS])
    own_data(words)
    assert not caplog.text, "it has a ClassLabel"
    words = words.remove_columns("label")
    own_data(words, labels=words["species"])
    own_data(words.remove_columns("species"))
    assert not caplog.text
    own_data(words)
    assert "the images have no classes: none of the other columns (species) is" in caplog.text


def test_a_store_of_data_in_memory_belongs_to_their_content(tmp_path):
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    first = vl.extract(MODEL, images, labels=LABELS, out=tmp_path / "store", **QUIET)
    again = vl.extract(MODEL, list(PIXELS), labels=LABELS, **QUIET)
    np.testing.assert_array_equal(first["vision"]["1"], again["vision"]["1"])
    vl.extract(
        MODEL, [image.copy() for image in images], labels=LABELS, out=tmp_path / "store", **QUIET
    )
    images[4].putpixel((0, 0), (1, 2, 3))
    with pytest.raises(vl.UserError, match="of other data: .*1 altered, first '4'"):
        vl.extract(MODEL, images, labels=LABELS, out=tmp_path / "store", **QUIET)


def test_a_store_knows_palette_and_orientation_of_the_same_bytes(tmp_path):
    plain = [Image.fromarray(pixels).quantize(8) for pixels in PIXELS]
    vl.extract(MODEL, plain, labels=LABELS, out=tmp_path / "store", **QUIET)
    recoloured, turned = ([image.copy() for image in plain] for _ in range(2))
    recoloured[4].putpalette([255 - value for value in recoloured[4].getpalette()])
    turned[4].getexif()[ExifTags.Base.Orientation] = 3
    for images in (recoloured, turned):
        with pytest.raises(vl.UserError, match="of other data: .*1 altered, first '4'"):
            vl.extract(MODEL, images, labels=LABELS, out=tmp_path / "store", **QUIET)


BYTES = bytes(range(192))
SHOWN = Image.frombytes("P", (16, 12), BYTES)
CLEAR = SHOWN.copy()
CLEAR.info["transparency"] = 3


def tiff(white):
    """Return an open TIFF of 16 bits in which white is 0 or the largest value."""
    pixels = Image.fromarray(np.frombuffer(BYTES, np.uint16).reshape(8, 12))
    pixels.save(file := io.BytesIO(), "TIFF", tiffinfo={262: white})
    return Image.open(file)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Image.frombytes("L", (16, 12), BYTES), Image.frombytes("L", (12, 16), BYTES)),
        (Image.frombytes("RGB", (8, 8), BYTES), Image.frombytes("HSV", (8, 8), BYTES)),
        (SHOWN, CLEAR),
        (tiff(0), tiff(1)),
        (
            np.frombuffer(BYTES, np.uint8).reshape(8, 24),
            np.frombuffer(BYTES, np.uint8).reshape(24, 8),
        ),
        (np.zeros((6, 8), np.float32), np.zeros((6, 8), np.int32)),
    ],
)
def test_the_same_bytes_of_another_image_are_told_apart(one, other):
    first, again, second = (own_data([image]) for image in (one, one, other))
    assert first.identity(first.listed) == again.identity(again.listed)
    assert first.identity(first.listed).hash != second.identity(second.listed).hash


def test_a_file_in_a_list_is_known_by_its_size_and_its_time(tmp_path):
    file = tmp_path / "a.png"

    def mark(pixels, seconds):
        Image.fromarray(pixels).save(file)
        os.utime(file, (seconds, seconds))
        held = own_data([file])
        return held.identity(held.listed)

    first = mark(PIXELS[0], 1)
    assert mark(PIXELS[0], 1) == first
    assert first not in (mark(PIXELS[0], 2), mark(PIXELS[0][:9], 1))


def test_prepared_tensors_may_be_of_half_precision_and_have_gradients():
    """As another network makes them; the pixels are what counts."""
    prepared = [tiny.preprocess(Image.fromarray(pixels)) for pixels in PIXELS]
    plain = vl.extract(MODEL, prepared, **QUIET)
    graded = vl.extract(MODEL, [x.clone().requires_grad_() for x in prepared], **QUIET)
    np.testing.assert_array_equal(graded.vision["proj"], plain.vision["proj"])
    assert graded.identity == plain.identity
    halves = [x.bfloat16() for x in prepared]
    widened = vl.extract(MODEL, [x.float() for x in halves], **QUIET)
    half = vl.extract(MODEL, halves, **QUIET)
    np.testing.assert_array_equal(half.vision["proj"], widened.vision["proj"])


def test_tensors_of_pixels_that_no_mean_was_taken_off_are_told(caplog):
    """`ToTensor` alone, the commonest transform, makes floating tensors that look prepared."""
    pixels = [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in PIXELS]
    vl.extract(MODEL, [tiny.preprocess(Image.fromarray(one)) for one in PIXELS], **QUIET)
    assert "ToTensor" not in caplog.text
    vl.extract(MODEL, pixels, name="unprepared", **QUIET)
    assert "unprepared: no value of the tensors is below 0, as ToTensor leaves" in caplog.text
    caplog.clear()
    as_they_are = replace(MODEL, preprocess=lambda image: torch.zeros(3, 32, 32))
    vl.extract(as_they_are, pixels, **QUIET)
    assert "ToTensor" not in caplog.text, "this model takes no mean off"


@pytest.mark.parametrize("holder", ["torch", "hugging face"])
def test_images_that_are_others_each_time_are_told(holder, caplog):
    """A transform of a training augments; its dataset is what is at hand in a notebook."""
    drawn = np.random.default_rng(0)

    def flip(pixels):
        return Image.fromarray(pixels[:, ::-1] if drawn.random() < 0.5 else pixels)

    def of(change):
        if holder == "torch":
            return Pairs(change)
        images = [Image.fromarray(one) for one in PIXELS]
        table = datasets.Dataset.from_dict({"image": images, "label": LABELS})
        return table.cast_column("image", datasets.Image()).with_transform(
            lambda rows: {"image": [change(np.asarray(one)) for one in rows["image"]]}
        )

    assert [one.label for one in own_data(of(Image.fromarray)).listed] == LABELS
    assert not caplog.messages
    if holder == "hugging face":
        with pytest.raises(vl.UserError, match="leaves no column 'image'; give data.with_format"):
            own_data(of(Image.fromarray).with_transform(lambda rows: {"pixels": rows["image"]}))
    own_data(of(flip))
    assert "is another one each time it is read, as a transform that augments" in caplog.text


@pytest.mark.parametrize(
    ("mean", "deviation", "told"),
    [
        ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758), False),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
    ],
)
def test_tensors_that_were_prepared_for_another_model_are_told(mean, deviation, told, caplog):
    """Values between its black and its white are what a preparation makes."""

    def prepared(pixels, mean, deviation):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]

    def of_clip(image):
        return prepared(to_tensor(image), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)

    own = replace(MODEL, preprocess=of_clip)
    pixels = [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in PIXELS]
    vl.extract(own, [prepared(one, mean, deviation) for one in pixels], name="ready", **QUIET)
    assert ("they were prepared with another mean or deviation" in caplog.text) is told


PART = torch.utils.data.SubsetRandomSampler([0, 2, 4])
IN_ORDER = torch.utils.data.SequentialSampler(PIXELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2, "sampler": PART}, "a SubsetRandomSampler .3 of 9 images.*Subset"),
        ({"batch_sampler": torch.utils.data.BatchSampler(PART, 2, False)}, "a SubsetRandomSampler"),
        ({"batch_sampler": [[0, 1], [1, 2]]}, "a list of its own.*Subset"),
        (
            {"batch_sampler": torch.utils.data.BatchSampler(IN_ORDER, 4, True)},
            "all but the last 1 of 9 images .drop_last",
        ),
        ({"batch_size": 2, "drop_last": True}, "all but the last 1 of 9 images .drop_last"),
        (
            {"sampler": torch.utils.data.RandomSampler(PIXELS, replacement=True)},
            "with replacement, by a RandomSampler",
        ),
        (
            {"sampler": torch.utils.data.WeightedRandomSampler([1.0] * 9, 9)},
            "with replacement, by a WeightedRandomSampler",
        ),
    ],
)  # fmt: skip
def test_a_loader_of_other_rows_than_its_dataset_is_refused(options, message):
    with pytest.raises(vl.UserError, match=f"the DataLoader draws .*{message}"):
        vl.extract(MODEL, DataLoader(Pairs(), **options), **QUIET)


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_loader_that_makes_its_batches_itself_is_refused(batch_size):
    loader = DataLoader(Pairs(), batch_size=batch_size, collate_fn=lambda batch: batch)
    with pytest.raises(vl.UserError, match="a collate_fn of its own, .*; give its dataset"):
        vl.extract(MODEL, loader, **QUIET)


def test_a_loader_of_whole_batches_alone_is_refused_where_its_stream_has_no_length():
    with pytest.raises(vl.UserError, match="whole batches alone"):
        vl.extract(MODEL, DataLoader(Stream(), batch_size=2, drop_last=True), **QUIET)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2, "shuffle": True},
        {"batch_size": 3, "drop_last": True},
        {"batch_size": None},
        {"batch_sampler": torch.utils.data.BatchSampler(IN_ORDER, 2, False)},
    ],
)
def test_a_loader_of_each_row_once_is_its_dataset(options):
    assert vl.extract(MODEL, DataLoader(Pairs(), **options), **QUIET).vision.labels.tolist() == (
        LABELS
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"root": "/data"}, "root is for datasets on disk"),
        ({"present_only": True}, "present_only is for datasets on disk"),
        ({"class_names": NAMES}, "class_names are of labels, and the images have none"),
        ({"template": "a {}"}, "template makes prompts of class names, and own data has none"),
        ({"texts": ["one"], "tower": "vision"}, "texts are for the text tower"),
        ({"texts": ["a"] * 9, "text": "captions", "tower": "vision"}, "text says what texts are"),
        ({"template": "a {}", "tower": "vision"}, "template makes prompts; tower='vision'"),
        ({"pooling": {"text": "mean"}, "tower": "vision"}, "pooling is of another tower"),
        ({"decoding": "reduced", "tower": "text"}, "decoding is of images"),
        ({"skip_unreadable": True, "tower": "text"}, "skip_unreadable is of images"),
        ({"workers": 2, "tower": "text"}, "workers decode images"),
        ({"items": [Item("there.png", 0, "a")]}, "own data has no item 'there.png'"),
    ],
)
def test_what_does_nothing_beside_images_in_memory_is_refused(given, message):
    with pytest.raises(vl.UserError, match=message):
        vl.extract(MODEL, list(PIXELS), **given, **QUIET)


def test_streaming_says_that_images_without_names_have_no_texts():
    with pytest.raises(vl.UserError, match="own data has no names of classes"):
        vl.models.stream(MODEL, Pairs(), "train", **QUIET)


def test_workers_decode_data_in_memory(expected):
    features = vl.extract(MODEL, Pairs(), workers=1, **QUIET)
    np.testing.assert_allclose(features["vision"][3], expected["native"]["3"], atol=1e-5)


def opened(size=None):
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()[:size]))


def closed():
    with opened() as image:
        return image


@pytest.mark.parametrize(
    "beside",
    [
        lambda image, several: (image, several[0]),
        lambda image, several: (image, several),
        lambda image, several: {"image": image, "label": 0, "caption": several},
    ],
)
def test_captions_beside_images_are_read_as_those_that_are_given(beside):
    captions = [[f"a {NAMES[label]}"] + ["two"] * (row % 3) for row, label in enumerate(LABELS)]
    pairs = [beside(image, several) for image, several in zip(PIXELS, captions)]
    firsts = isinstance(pairs[0], tuple) and isinstance(pairs[0][1], str)
    given = [several[:1] if firsts else several for several in captions]
    found = vl.extract(MODEL, pairs, text="captions", **QUIET)
    expected = vl.extract(MODEL, PIXELS, texts=given, text="captions", **QUIET)
    np.testing.assert_array_equal(found.text.pairs, expected.text.pairs)
    np.testing.assert_array_equal(found.text[3], expected.text[3])
    assert found.class_names == ("class 0",)  # captions are no classes


@pytest.mark.parametrize(
    ("data", "beside", "message"),
    [
        (PIXELS, {"labels": [0, 1]}, "9 images, but 2 labels; one for each is needed"),
        (PIXELS, {"labels": [0.5] * 9}, "label 0.5 of image 0 is not a class"),
        ((PIXELS, LABELS), {}, "label a ndarray .* is not a class: .*; a list of them goes by lab"),
        (PIXELS, {"labels": np.eye(9)}, r"label a ndarray of shape \(9,\) of image 0 is no"),
        (PIXELS, {"labels": LABELS, "class_names": ["a"]}, "label 1 of image 1, but there are 1"),
        (PIXELS, {"labels": ["antt"] * 9, "class_names": NAMES}, "unknown class 'antt' .*'ant'"),
        (PIXELS, {"texts": ["one", "two"]}, "2 texts, but own data has 1 class; give one per"),
        ([np.zeros((4, 4, 7), np.uint8)], {}, r"image 0 is a ndarray of shape \(4, 4, 7\)"),
        ([], {}, "the data hold no images"),
        (pd.DataFrame({"path": ["a.png"]}), {}, "a table in memory is no dataset; write it with"),
        (5, {}, "data takes a dataset's name, path or Manifest, .*not a value of type int"),
        ({"train": PIXELS}, {}, r"give one of them, such as data\['train'\]: train"),
        ([np.zeros((0, 8, 3), np.uint8)], {}, "image 0 has 8 x 0 pixels; it is empty"),
        ([np.zeros((8, 8), bool)], {}, r"image 0 is a ndarray of bool of shape \(8, 8\); an image"),
        ([closed()], {}, "image 0 cannot be decoded: its file was closed before"),
        ([opened(-400)], {}, "image 0 cannot be decoded: image file is truncated"),
        (PIXELS, {"text": "captions"}, "own data has no captions; give texts=, one or several per"),
        ("faces", {"labels": LABELS}, "a dataset says its labels itself"),
        ([torch.zeros(3, 8, 8)], {}, r"takes \(3, 32, 32\); these have shape \(3, 8, 8\)"),
        (["faces", "signs"], {}, "faces is a dataset, not an image; give one dataset at a time"),
        (["/not/there.png"], {}, "image /not/there.png cannot be read"),
        ([{"picture": 1}], {}, "sample 0 has keys picture but no 'image'"),
        (PIXELS, {"labels": dict(enumerate(LABELS[::-1]))}, "labels takes a sequence in order or"),
        (PIXELS, {"labels": set(range(9))}, "labels takes a sequence in order .* type set"),
        (PIXELS, {"labels": LABELS, "class_names": set(NAMES)}, "class_names takes strings in the"),
        (PIXELS, {"text": "captions", "texts": frozenset("abcdefghi")}, "texts takes a sequence"),
        (PIXELS, {"text": "captions", "texts": [1] * 9}, "a int is no caption of image 0; give a"),
        (PIXELS, {"text": "captions", "texts": [["a"]] * 8 + [[None]]}, "a NoneType is no caption"),
        (PIXELS[0], {}, r"a ndarray of shape \(32, 32, 3\) is one image, not several; give a list"),
        (torch.zeros(3, 32, 32), {}, r"a Tensor of shape \(3, 32, 32\) is one image, not several"),
        ([torch.zeros(3, 32, 32), torch.zeros(3, 32, 8)], {}, r"row 0 is .*, row 1 .*; prepare"),
    ],
)  # fmt: skip
def test_data_that_are_none_are_said_in_a_line(data, beside, message):
    with pytest.raises(vl.UserError, match=message):
        vl.extract(MODEL, data, **beside, **QUIET)


def test_images_that_a_preparation_leaves_of_different_sizes_are_named_in_workers_too():
    def grown(image):
        return tiny.preprocess(image.resize((32, 32 + int(np.asarray(image)[0, 0, 0]) % 2)))

    model = replace(MODEL, preprocess=grown)
    for workers in (0, 1):
        with pytest.raises(vl.UserError, match=r"row 0 is .*, row 3 .*; prepare all to one size"):
            vl.extract(model, PIXELS, workers=workers, **QUIET)


@pytest.mark.parametrize("streamed", [False, True])
def test_texts_that_fill_the_context_are_said(streamed, caplog):
    texts = ["ant", "a bee or so", "x" * 40, *["cat"] * 6]
    model = tiny.model()

    def tokens(several):  # one letter more than those of `tiny`, so that the longest are cut off
        ids = torch.zeros(len(several), 12, dtype=torch.long)
        for row, text in enumerate(several):
            letters = [1, *(3 + ord(letter) % 57 for letter in text[:10]), 63]
            ids[row, : len(letters)] = torch.tensor(letters)
        return ids

    model.tokenizer = tokens
    run = vl.models.stream if streamed else vl.extract
    if streamed:
        data = tiny.DrawnManifest(count=6, names=("cat", "x" * 30, "dog"), template="{}")
        run(model, data, "train", progress=False)
    else:
        run(model, PIXELS, text="captions", texts=texts, **QUIET)
    few = "1 text fills" if streamed else "2 texts fill"
    assert f"{few} all 12 tokens that the text tower takes; what goes beyond" in caplog.text


def test_two_sets_without_a_name_are_not_compared_by_their_ranges(caplog):
    for pixels in (np.stack(PIXELS) / 255, np.stack(PIXELS) * 257.0):
        vl.extract(MODEL, pixels, **QUIET)
    assert "scaled by its own" not in caplog.text
    vl.extract(MODEL, [PIXELS[0] / 255, PIXELS[1] * 257.0], **QUIET)
    assert "own data: each image is scaled by its own brightest pixel" in caplog.text
    gappy = PIXELS[0] / 255
    gappy[0, 0] = np.nan
    for _ in range(2):
        vl.extract(MODEL, [gappy], **QUIET)
    assert caplog.text.count("pixels of 0 are no numbers") == 2


def test_features_are_read_by_position_as_array_and_as_table(tmp_path):
    found = vl.extract(MODEL, list(PIXELS), labels=[NAMES[label] for label in LABELS], **QUIET)
    vision = found["vision"]
    np.testing.assert_array_equal(vision[2], vision.array("2"))
    np.testing.assert_array_equal(vision["proj", "joint"], vision.array("proj", "joint"))
    stacked = found.to_numpy()["vision"]
    assert stacked.shape == (4, 9, 48)  # embed and three blocks
    np.testing.assert_array_equal(stacked[3], vision["3"])
    frame = found.to_frame(2)
    assert list(frame)[:5] == ["tower", "position", "id", "label", "class_name"]
    rows = frame[frame["tower"] == "vision"]
    assert rows["class_name"].tolist() == [NAMES[label] for label in LABELS]
    np.testing.assert_array_equal(rows.loc[:, "x0":"x47"].to_numpy(), vision[2])
    assert found.to_frame().groupby(["tower", "position"]).ngroups == 12
    found = replace(found, random_weights=True)  # which every output has to go on saying
    saved = vl.LayerFeatures.load(found.save(tmp_path / "store"))
    for tower in ("vision", "text"):
        for position in saved[tower].positions("joint"):
            values = saved[tower][position, "joint"]
            np.testing.assert_array_equal(values, found[tower][position, "joint"])
    told = [
        [{k: v for k, v in vars(one).items() if isinstance(v, (str, int, tuple))}
         for one in (features, *features.towers)] for features in (saved, found)
    ]  # fmt: skip
    assert told[0] == told[1]
    with pytest.raises(vl.UserError, match="exists and is not a feature store"):
        found.save(tmp_path)


def test_features_are_saved_again_where_they_lie_and_others_are_refused(tmp_path):
    arrays = {1: np.arange(6.0).reshape(3, 2) / 7, 2: np.ones((3, 2))}
    found = vl.LayerFeatures.from_arrays(arrays, labels=[0, 1, 1])
    files = {path: path.read_bytes() for path in found.save(tmp_path / "s").rglob("*.*")}
    for again in (found, vl.LayerFeatures.load(tmp_path / "s")):
        again.save(tmp_path / "s")
    for other, labels in (
        ({**arrays, 2: np.zeros((3, 2))}, [0, 1, 1]),
        ({1: arrays[1]}, [0, 1, 1]),
        (arrays, [0, 1, 0]),
    ):
        with pytest.raises(vl.UserError, match="feature store .*s .*; choose another folder, or"):
            vl.LayerFeatures.from_arrays(other, labels=labels).save(tmp_path / "s")
    with pytest.raises(vl.UserError, match="holds other features"):
        replace(found, dataset="another").save(tmp_path / "s")
    assert files == {path: path.read_bytes() for path in (tmp_path / "s").rglob("*.*")}


@pytest.mark.parametrize("rows", [[0, 1, 2], range(8, -1, -1)])
def test_some_of_the_images_or_in_another_order_do_not_pass_for_the_extraction(rows, tmp_path):
    beside = {"labels": LABELS, "class_names": NAMES, **QUIET}
    whole = vl.extract(MODEL, PIXELS, **beside)
    whole.save(tmp_path / "whole")
    assert (
        vl.extract(MODEL, PIXELS, out=tmp_path / "whole", **beside).vision.ids == whole.vision.ids
    )
    some = whole.take_images(rows)
    vl.LayerFeatures.load(some.save(tmp_path / "some")).save(tmp_path / "some")  # it is itself
    with pytest.raises(vl.UserError, match="some belongs to another extraction: rows"):
        vl.extract(MODEL, PIXELS, out=tmp_path / "some", **beside)
    with pytest.raises(vl.UserError, match="no items of own data cannot be stored"):
        whole.take_images([]).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_captions_are_saved_with_their_pairs(tmp_path):
    told = [f"picture {row}" for row in range(9)]
    found = vl.extract(MODEL, list(PIXELS), texts=told, text="captions", **QUIET)
    saved = vl.LayerFeatures.load(found.save(tmp_path / "store"))
    assert saved.text.pairs.tolist() == list(range(9)) and saved.text.ids == tuple(told)


def test_names_of_the_datas_own_labels_are_not_given_to_others(caplog):
    """As to the coarse labels of CIFAR-100, whose names are of the fine ones."""
    coarse = [label // 2 for label in LABELS]
    for data in (Named(), table()):
        assert own_data(data, labels=LABELS).names == NAMES
        assert own_data(data, labels=[NAMES[label] for label in LABELS]).names == NAMES
        found = vl.extract(MODEL, data, labels=coarse, **QUIET)
        assert found.class_names == ("class 0", "class 1") and found.text is None
        assert "no text features; give class_names=" in caplog.text
        assert own_data(data, coarse, ("insect", "mammal")).names == ("insect", "mammal")


def test_a_class_of_several_names_goes_by_the_first():
    """As those of torchvision's ImageNet and Imagenette."""
    data = Named()
    data.classes = [("ant", "pismire"), ("bee",), ("cat", "true cat")]
    found = vl.extract(MODEL, data, **QUIET)
    assert found.class_names == NAMES
    assert found.text.ids[0] == vl.extract(MODEL, Named(), **QUIET).text.ids[0]


def test_a_column_of_captions_may_have_gaps_or_hold_tokens():
    given = [None, *(f"an insect {row}" for row in range(1, 9))]
    found = own_data(table().add_column("caption", given))
    assert [item.captions for item in found.listed[:2]] == [(), ("an insect 1",)]
    tokens = own_data(table().add_column("text", [[row, 1] for row in range(9)]))
    assert tokens.names == NAMES and not any(item.captions for item in tokens.listed)


def test_texts_that_are_cut_are_told_where_the_end_mark_pads(caplog):
    """As SigLIP's tokenizer pads; of 10 letters and 11, the latter leave no room for padding."""
    model = tiny.model("clipa")

    def tokens(several):
        ids = torch.full((len(several), 12), 63)
        for row, text in enumerate(several):
            letters = [3 + ord(letter) % 57 for letter in text[:11]]
            ids[row, : len(letters)] = torch.tensor(letters)
        return ids

    model.tokenizer = tokens
    data = tiny.DrawnManifest(count=6, names=("cat", "x" * 30, "y" * 10), template="{}")
    vl.extract(model, data, "train", **QUIET)
    assert "1 text fills all 12 tokens" in caplog.text
