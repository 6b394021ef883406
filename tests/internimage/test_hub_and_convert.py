import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch

from internimage import Classifier, InternImage, InternImageConfig, internimage_debug
from internimage.checkpoints import CheckpointError, load_checkpoint, official_state_dict
from internimage.convert import main
from internimage.hub import locate, markdown_table, published
from internimage.variants import CONFIGS

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(internimage_debug(), 3)


def test_the_docs_show_the_table_of_published_files():
    assert markdown_table() in DOCS.read_text()


def test_published_files_are_of_known_variants_and_their_names_say_which():
    assert len(published()) == 57
    for name, entry in published().items():
        assert entry.variant.removeprefix("CB-") in CONFIGS
        assert f"internimage_{entry.variant.removeprefix('CB-').lower()}_" in name
        assert entry.variant.startswith("CB-") == ("cbinternimage" in name)
        assert bool(entry.result) == bool(entry.metric)
    assert published()["internimage_t_1k_224"].num_classes == 1000
    assert published()["internimage_g_pretrainto22k_384"].num_classes == 21841


def test_nothing_is_downloaded_unless_the_name_says_hub(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("downloaded unasked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name in ("internimage_t_1k_224", "internimage_t_1k_224.pth", "weights/internimage_t_1k_224.pth"):
        with pytest.raises(CheckpointError, match="To download the published one, say hub:internimage_t_1k_224"):
            locate(name)
    assert locate("nowhere.pth") == Path("nowhere.pth")


def test_hub_names_lead_to_repository_and_file(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name,)) or str(tmp_path)
    )
    for name in ("internimage_h_22kto1k_640", "someone/weights/folder/model.pth", "OpenGVLab/internimage_t_1k_224"):
        assert locate(f"hub:{name}") == tmp_path
    assert asked == [
        ("OpenGVLab/InternImage", "internimage_h_22kto1k_640.pth"),
        ("someone/weights", "folder/model.pth"),
        ("OpenGVLab/internimage_t_1k_224",),
    ]


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(CheckpointError, match="did you mean hub:internimage_t_1k_224"):
        locate("hub:internimage_t_1k_244")


@pytest.mark.parametrize("name", ["internimage_t_1k_224", "OpenGVLab/internimage_t_1k_224", "a/b/c.pth", "a b/c/d"])
def test_offline_is_a_clear_error(monkeypatch, tmp_path, name, model):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"hub:{name} could not be downloaded \(.+\)\. Check the name"):
        load_checkpoint(model, f"hub:{name}")


def test_inspect_describes_a_file(model, tmp_path, capsys):
    torch.save({"model": official_state_dict(model), "epoch": 3, "lr": 0.1}, tmp_path / "weights.pth")
    assert main(["inspect", str(tmp_path / "weights.pth")]) == 0
    out = capsys.readouterr().out
    values = sum(tensor.numel() for tensor in model.state_dict().values())
    for text in (
        "entry:       model",
        "keys:        authors, prefix ''",
        "variant:     an InternImage (channels 16, depths 1-1-2-1)",
        "head:        3 classes",
        f"{len(model.state_dict())}, {values:,} values, float32, int64",
        "other parts: none",
        "not weights: epoch (not weights), lr (not weights)",
    ):
        assert text in out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert_and_export_are_inverse(model, tmp_path, suffix):
    theirs, ours, back = (tmp_path / f"{name}{suffix}" for name in ("theirs", "ours", "back"))
    torch.save({"model": official_state_dict(model)}, tmp_path / "start.pth")
    assert main(["export", str(tmp_path / "start.pth"), str(theirs)]) == 0
    assert main(["convert", str(theirs), str(ours)]) == 0
    assert main(["export", str(ours), str(back)]) == 0
    for path in (theirs, ours, back):
        copy = Classifier(internimage_debug(), 3)
        load_checkpoint(copy, path)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in copy.state_dict().items())
    assert not load_checkpoint(Classifier(internimage_debug(), 3), ours).renamed


def test_export_makes_a_detectors_backbone_of_a_lightning_checkpoint(model, tmp_path):
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    averaged = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"state_dict": averaged, "current_model_state": state, "epoch": 1}, tmp_path / "last.ckpt")
    assert main(["export", "--dense", "--no-ema", str(tmp_path / "last.ckpt"), str(tmp_path / "dense.pth")]) == 0
    dense = torch.load(tmp_path / "dense.pth", weights_only=True)["state_dict"]
    expected = official_state_dict(model, dense=True)
    assert dense.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in dense.items())


def test_convert_reads_options_off_our_keys_and_refuses_to_guess_them_from_the_authors(tmp_path, capsys):
    config = InternImageConfig(
        channels=16, depths=(1, 1, 4, 1), groups=(1, 2, 4, 8), norm="BN", post_norm_blocks=(0, 2), strict=False
    )
    backbone = InternImage(config)
    torch.save(backbone.state_dict(), tmp_path / "ours.pth")
    assert main(["export", str(tmp_path / "ours.pth"), str(tmp_path / "theirs.pth")]) == 0
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert theirs.keys() == official_state_dict(backbone).keys()
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "again.pth")]) == 1
    assert "inner post-norms, whose blocks the authors' keys do not tell" in capsys.readouterr().err


def test_the_command_reports_errors_without_a_traceback(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere.pth")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'nowhere.pth'}: no such file.\n"
