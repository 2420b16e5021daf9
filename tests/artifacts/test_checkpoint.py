import pickle

import pytest
import torch

from pmm.artifacts.checkpoint import FORMAT, KEYS, load, load_model, restore_model, save, versions
from pmm.utils.build_info import build_version
from pmm.utils.errors import UserError


def test_a_trained_checkpoint_holds_everything_and_rebuilds_itself(trained):
    state = load(trained)
    assert tuple(state) == KEYS
    assert state["epoch"] > 0
    assert state["config"]["model"]["num_classes"] == 9
    assert state["optimizer"] is None  # best.pth is for evaluation
    assert load(trained.with_name("last.pth"))["optimizer"]["state"]
    model = load_model(trained)
    assert not model.training
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 128, 64)).shape == (2, 384)


def test_it_names_the_kernels_it_was_trained_with(trained, tmp_path, built_with):
    assert load(trained)["versions"]["pmm kernels"] == build_version()
    built_with(compiler="g++ 12.2.0", cuda="13.0", architectures=["9.0"], sources="0123456789ab")
    assert versions()["pmm kernels"] == "0123456789ab, g++ 12.2.0, CUDA 13.0"
    # one that was written before it was recorded
    state = load(trained)
    del state["versions"]["pmm kernels"]
    save(tmp_path / "old.pth", state)
    assert load(tmp_path / "old.pth")["versions"]["torch"]


class Evil:
    def __reduce__(self):
        return (print, ("this code was executed",))


def test_code_in_a_file_is_refused_and_never_run(tmp_path, capsys, trained):
    state = torch.load(trained, weights_only=True)
    torch.save({**state, "best": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "pickle.pth"):
        with pytest.raises(UserError, match=r"refused, the file holds more than plain tensors") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_other_files_are_told_apart(tmp_path, trained):
    content = trained.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("cut.pth", "empty.pth", "text.pth"):
        with pytest.raises(UserError, match=f"{name}: truncated, or not a checkpoint|{name}: refused") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"not a PMM checkpoint \(it holds: state_dict, epoch\)"):
        load(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"not a PMM checkpoint \(it holds: list\)"):
        load(tmp_path / "list.pth")
    torch.save({"format": "pmm-checkpoint-9"}, tmp_path / "new.pth")
    with pytest.raises(UserError, match=f"this version reads '{FORMAT}'"):
        load(tmp_path / "new.pth")
    torch.save({"format": FORMAT, "model": {}}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="incomplete checkpoint, without config"):
        load(tmp_path / "part.pth")
    with pytest.raises(UserError, match="does not exist; expected a checkpoint"):
        load(tmp_path / "missing.pth")


def test_weights_must_fit_key_for_key(trained):
    state = load(trained)
    del state["model"]["stages.0.bn.weight"]
    with pytest.raises(UserError, match=r"the weights do not fit .*stages.0.bn.weight"):
        restore_model(state, "ckpt.pth")
    state = load(trained)
    state["config"]["model"]["colour"] = "red"
    with pytest.raises(UserError, match=r"unknown field config\.model\.colour; known: method, "):
        restore_model(state, "ckpt.pth")


def test_save_insists_on_every_key(tmp_path):
    with pytest.raises(ValueError, match="missing or unknown"):
        save(tmp_path / "x.pth", {"format": FORMAT})
    assert not (tmp_path / "x.pth").exists()
