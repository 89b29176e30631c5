"""Batches of images for many classifiers, and adapters that are broken, replaced or of another kind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import classifying
from classifying import Classifier
from loca_vision import AdapterStore, LoCAConfig, inject, save_adapter
from refusals import Refusal, Reply
from request_options import Options
from support.serving import alone, build, encoded, photo, settings, shares_of, write_adapter, write_folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_folder(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(written, tmp_path / "adapters")


def asked(classifier, *names, top_k="100"):
    return [
        classifier.asked(name, encoded(photo(seed)), Options([("top_k", top_k)])) for seed, name in enumerate(names, start=10)
    ]


def answered(classifier, name):
    (answer,) = classifier.answers(asked(classifier, name))
    if isinstance(answer, Exception):
        raise answer
    return answer


def write_run(folder, **metrics):
    (folder / "metrics.json").write_text(json.dumps({"config": {}, **metrics}))


def test_each_answer_is_that_of_a_model_with_its_adapter_alone(folder):
    classifier = Classifier(settings(folder))
    names = ["shop-0", "shop-3", "shop-1", "shop-2", "shop-0", "shop-3"]
    for seed, (name, answer) in enumerate(zip(names, classifier.answers(asked(classifier, *names)), strict=True), start=10):
        assert isinstance(answer, Reply) and json.loads(answer.body)["adapter"] == name
        torch.testing.assert_close(shares_of(answer.body), alone(folder, name, photo(seed)), rtol=0, atol=1e-5)
    found = [tuple(shares_of(answer.body).tolist()) for answer in classifier.answers(asked(classifier, *names))]
    assert len(set(found)) == len(names)  # one taken for another would be noticed


def test_neighbours_of_a_broken_adapter_have_their_answers(folder):
    classifier = Classifier(settings(folder))
    first, broken, unknown, last = classifier.answers(asked(classifier, "shop-0", "broken", "shop-9", "shop-1"))
    torch.testing.assert_close(shares_of(first.body), alone(folder, "shop-0", photo(10)), rtol=0, atol=1e-5)
    torch.testing.assert_close(shares_of(last.body), alone(folder, "shop-1", photo(13)), rtol=0, atol=1e-5)
    assert isinstance(broken, Refusal) and broken.status == 422
    assert "broken.safetensors" in broken.sentence and str(folder) not in broken.sentence
    assert isinstance(unknown, Refusal) and unknown.status == 404 and "perhaps" in unknown.sentence


def test_one_that_breaks_between_the_check_and_the_call_fails_alone(folder, monkeypatch):
    classifier = Classifier(settings(folder))
    names, requests = ["shop-0", "shop-1", "shop-2"], None
    requests = asked(classifier, *names)
    held = AdapterStore.held

    def breaks(store, name):
        if name == "shop-1":
            raise ValueError("adapter 'shop-1': just now")
        return held(store, name)

    monkeypatch.setattr(classifier.shelf, "ready", lambda name: held(classifier.shelf.store, name)[classifier.model])
    monkeypatch.setattr(AdapterStore, "held", breaks)
    found = classifier.answers(requests)
    assert [type(one) for one in found] == [Reply, Refusal, Reply] and "just now" in found[1].sentence


def test_a_store_smaller_than_a_batch_answers_all_of_it(folder):
    names, sizes = ["shop-0", "shop-1", "shop-2", "shop-3"], []
    for name in names:
        one = Classifier(settings(folder))
        answered(one, name)
        sizes.append(one.shelf.store.held_bytes)
    classifier = Classifier(settings(folder, capacity=max(sizes)))
    for seed, (name, answer) in enumerate(zip(names, classifier.answers(asked(classifier, *names)), strict=True), start=10):
        torch.testing.assert_close(shares_of(answer.body), alone(folder, name, photo(seed)), rtol=0, atol=1e-5)
    assert classifier.shelf.loads >= 4


def test_a_replaced_adapter_answers_with_its_new_file_and_classes(folder):
    write_run(folder / "shop-1", classes=["cat", "dog", "cow", "pig"])
    classifier = Classifier(settings(folder))
    before = json.loads(answered(classifier, "shop-1").body)
    assert {one["class"] for one in before["classes"]} == {"cat", "dog", "cow", "pig"} and classifier.shelf.loads == 1
    write_adapter(folder / "shop-1", 11, classes=2)
    write_run(folder / "shop-1", classes=["yes", "no"])
    after = json.loads(answered(classifier, "shop-1").body)
    assert {one["class"] for one in after["classes"]} == {"yes", "no"} and classifier.shelf.loads == 2


def test_classes_are_read_anew_when_only_they_change(folder):
    classifier = Classifier(settings(folder))
    assert json.loads(answered(classifier, "shop-1").body)["classes"][0]["class"].isdigit()
    write_run(folder / "shop-1", classes=["cat", "dog", "cow", "pig"])
    assert not json.loads(answered(classifier, "shop-1").body)["classes"][0]["class"].isdigit()


def test_a_broken_new_file_leaves_the_old_adapter_and_its_classes(folder):
    write_run(folder / "shop-1", classes=["cat", "dog", "cow", "pig"])
    classifier = Classifier(settings(folder))
    before = answered(classifier, "shop-1")
    file = folder / "shop-1" / "pytorch_loca_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    write_run(folder / "shop-1", classes=["yes", "no"])
    assert answered(classifier, "shop-1") == before == answered(classifier, "shop-1")


def test_files_replaced_during_a_call_are_not_mixed(folder, monkeypatch):
    """The first call of three sees the files change; what is answered is of one of the states."""
    write_run(folder / "shop-1", classes=["cat", "dog", "cow", "pig"])
    classifier, mixed = Classifier(settings(folder)), classifying.head_logits

    def meanwhile(*arguments):
        monkeypatch.setattr(classifying, "head_logits", mixed)
        write_adapter(folder / "shop-1", 11, classes=4)
        write_run(folder / "shop-1", classes=["a", "b", "c", "d"])
        return mixed(*arguments)

    monkeypatch.setattr(classifying, "head_logits", meanwhile)
    found = {one["class"]: one["probability"] for one in json.loads(answered(classifier, "shop-1").body)["classes"]}
    expected = dict(zip("abcd", alone(folder, "shop-1", photo(10)).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ('{"config": {}, "classes": ["cat", "dog"]}', "its head has 4 classes, and its metrics.json 2"),
        ('{"config": {}, "classes": "cat"}', "expected the names of the classes"),
        ('{"config": {}, "seeds": [1]}', "several seeds"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["count", "type", "seeds", "json", "depth"],
)
def test_wrong_classes_are_refused(folder, metrics, words):
    (folder / "shop-1" / "metrics.json").write_text(metrics)
    with pytest.raises(Refusal, match=words) as caught:
        answered(Classifier(settings(folder)), "shop-1")
    assert caught.value.status == 422 and str(folder) not in caught.value.sentence


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("model: test_vit\nimage_size: 160\nweights: none\n", "size=160.*size=32"),
        ("model: test_vit\nimage_sise: 32\n", "image_sise"),
        ("model: no_such_vit\n", "no_such_vit"),
    ],
)
def test_a_run_of_another_kind_is_refused(folder, config, words):
    (folder / "shop-1" / "config.yaml").write_text(config)
    with pytest.raises(Refusal, match=words):
        answered(Classifier(settings(folder)), "shop-1")


def test_a_run_of_this_kind_is_taken(folder):
    (folder / "shop-1" / "config.yaml").write_text("model: test_vit\nimage_size: 32\nweights: none\n")
    assert answered(Classifier(settings(folder)), "shop-1").status == 200


def test_an_adapter_without_a_head_is_refused(folder):
    model = build(0)
    inject(model, LoCAConfig(n_components=5))
    save_adapter(model, folder / "bare.safetensors")
    with pytest.raises(Refusal, match="'bare'"):
        answered(Classifier(settings(folder)), "bare")


def test_an_adapter_of_another_model_is_refused(folder, vit):
    inject(vit, LoCAConfig(n_components=5))
    save_adapter(vit, folder / "other.safetensors")
    with pytest.raises(Refusal, match="'other'") as caught:
        answered(Classifier(settings(folder)), "other")
    assert caught.value.status == 422


def test_an_adapter_that_cannot_be_read_now_may_be_asked_for_again(folder, monkeypatch):
    def fails(*_):
        raise PermissionError(13, "Permission denied", f"{folder}/shop-0.safetensors")

    monkeypatch.setattr(AdapterStore, "held", fails)
    with pytest.raises(Refusal, match="cannot be read now") as caught:
        answered(Classifier(settings(folder)), "shop-0")
    assert caught.value.status == 503 and caught.value.again and str(folder) not in caught.value.sentence


@pytest.mark.parametrize(
    "name", ["../adapters/shop-0", "shop-0.safetensors", "/etc/passwd", "", ".", "shop-0/", "x" * 5000, "\0"]
)
def test_no_name_leaves_the_folder(folder, name):
    with pytest.raises(Refusal) as caught:
        Classifier(settings(folder)).shelf.check_name(name)
    assert caught.value.status == 404 and len(caught.value.sentence) < 300 and caught.value.sentence.isprintable()


def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path):
    outside = write_adapter(tmp_path / "outside.safetensors", 1)
    (folder / "link.safetensors").symlink_to(outside)
    with pytest.raises(Refusal, match="link that leaves"):
        answered(Classifier(settings(folder)), "link")


def test_top_k_is_the_number_of_classes_that_come_back(folder):
    classifier = Classifier(settings(folder))
    (two,) = classifier.answers(asked(classifier, "shop-3", top_k="2"))
    shares = [one["probability"] for one in json.loads(two.body)["classes"]]
    best = alone(folder, "shop-3", photo(10)).topk(2).values
    torch.testing.assert_close(torch.tensor(shares), best, rtol=0, atol=1e-5)
