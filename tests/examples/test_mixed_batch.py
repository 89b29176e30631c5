"""The benchmark of batches that mix adapters, on a tiny model."""

import json

import pytest

import mixed_batch

TINY = ["--model", "test_vit", "--batch_size", "3", "--n_components", "100", "--rank", "2", "--different", "1", "3"]
ONCE = ["--rounds", "1", "--threads", "1"]


def test_batches_and_a_store(tmp_path, capsys):
    file = tmp_path / "mixed-batch.json"
    assert mixed_batch.main([*TINY, *ONCE, "--store", "3", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    names = [f"{kind}, {count} different" for count in (1, 3) for kind in ("LoCA", "LoRA r=2, peft")]
    assert list(found["figures"]) == ["base", *names]
    head = 4 * (64 * 10 + 10)
    assert found["figures"]["LoCA, 3 different"]["file bytes"] > 8 * 12 * 100 + head
    assert found["store"]["adapters"] == 3 and found["store"]["bytes held"] == 3 * (8 * 12 * 100 + head)
    assert "LoRA r=2, peft, 3 different" in capsys.readouterr().out


def test_what_is_not_right_is_not_timed(monkeypatch):
    monkeypatch.setattr(mixed_batch, "set_adapters", lambda model, names: None)
    with pytest.raises(RuntimeError, match="sample 0 of the mixed batch is not what a0 answers alone"):
        mixed_batch.main([*TINY, *ONCE])


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--different", "0"], "different=(0,)"), (["--workload", "unet"], "expected vit")]
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert mixed_batch.main(arguments) == 2
    assert said in capsys.readouterr().err
