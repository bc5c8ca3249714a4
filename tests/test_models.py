"""temp_nce.images.models against torchvision, Lightly and the published DySTreSS network, and its files."""
import os
import re

import pytest
import torch
import torchvision
from torch import nn

from temp_nce.images.models import (CONV_NETS, ENCODERS, HEADS, RESNETS, encoder_cost, load_encoder, make_encoder,
                                    make_head, save_encoder)

SMALL = ["conv3", "conv6", "resnet18"]


def seeded(make, *arguments, seed=0, **options):
    "A module made right after torch.manual_seed."
    torch.manual_seed(seed)
    return make(*arguments, **options)


def images(n=4, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class TestEncoders:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_shape_and_gradients(self, name):
        encoder = seeded(make_encoder, name)
        features = encoder.train()(images(4, 16))
        features.square().sum().backward()
        assert features.shape == (4, encoder.features) and encoder.config == {"encoder": name, "stem": "cifar"}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
        assert any(p.grad.abs().sum() > 0 for p in encoder.parameters())

    @pytest.mark.parametrize("size", [8, 32, 33, 64])
    @pytest.mark.parametrize("name", SMALL)
    def test_any_image_size(self, name, size):
        assert make_encoder(name).eval()(images(2, size)).shape == (2, make_encoder(name).features)

    @pytest.mark.parametrize("name", SMALL)
    def test_the_seed_decides_the_weights(self, name):
        assert same_weights(seeded(make_encoder, name), seeded(make_encoder, name))
        assert not same_weights(seeded(make_encoder, name), seeded(make_encoder, name, seed=1))

    @pytest.mark.parametrize("name", RESNETS)
    def test_imagenet_stem_is_torchvision(self, name):
        ours, theirs = seeded(make_encoder, name, "imagenet"), seeded(getattr(torchvision.models, name))
        theirs.fc = nn.Identity()
        assert torch.equal(ours.eval()(images(2, 64)), theirs.eval()(images(2, 64)))

    @pytest.mark.parametrize("name", RESNETS)
    def test_cifar_stem(self, name):
        encoder, maps = make_encoder(name), []
        hooks = [layer.register_forward_hook(lambda layer, x, y: maps.append(y.shape[-1]))
                 for layer in (encoder.conv1, encoder.layer1, encoder.layer4)]
        encoder.eval()(images(1, 32))
        assert maps == [32, 32, 4] and len(hooks) == 3
        assert (encoder.conv1.weight.shape == (64, 3, 3, 3) and encoder.conv1.bias is None
                and isinstance(encoder.maxpool, nn.Identity))

    def test_dystress_network(self):
        """smallscale/model.py of sadimanna/DySTreSS, written again from its description: the same weights from the
        same seed."""
        torch.manual_seed(3)
        backbone = torchvision.models.resnet18()
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        del backbone.maxpool, backbone.fc
        theirs = nn.Sequential(*backbone.children(), nn.Flatten(), nn.Linear(512, 512, bias=False),
                               nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128))
        torch.manual_seed(3)
        encoder = make_encoder("resnet18", "cifar")
        ours = nn.Sequential(encoder, make_head("dystress", encoder.features))
        assert torch.equal(ours.train()(images()), theirs.train()(images()))
        assert torch.equal(ours.eval()(images()), theirs.eval()(images()))

    @pytest.mark.parametrize("name", SMALL)
    def test_bf16_channels_last(self, name):
        encoder = seeded(make_encoder, name).eval()
        expected = encoder(images())
        encoder = encoder.to(memory_format=torch.channels_last)
        assert torch.allclose(encoder(images().to(memory_format=torch.channels_last)), expected, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16): half = encoder(images())
        assert half.dtype == torch.bfloat16 and torch.cosine_similarity(half.float(), expected).min() > 0.99

    def test_evaluation_is_per_image(self):
        encoder = seeded(make_encoder, "conv6").eval()
        assert torch.allclose(encoder(images(6))[2:3], encoder(images(6)[2:3]), atol=1e-6)

    @pytest.mark.parametrize("name", CONV_NETS)
    def test_count_of_convolutions(self, name):
        assert sum(isinstance(layer, nn.Conv2d) for layer in make_encoder(name)) == int(name[-1])

    def test_cost(self):
        """ResNet-50's 25,557,032 parameters less its classifier, the 1.8 G multiply-adds usually quoted for
        ResNet-18, and no side effects."""
        assert encoder_cost(make_encoder("resnet50", "imagenet"))["parameters"] == 25_557_032 - 2048 * 1000 - 1000
        encoder = make_encoder("resnet18", "imagenet").train()
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        cost = encoder_cost(encoder, 224)
        assert cost["features"] == 512 and cost["multiply_adds"] == pytest.approx(1.814e9, rel=1e-3)
        assert encoder.training and all(torch.equal(before[name], value)
                                        for name, value in encoder.state_dict().items())


class TestHeads:
    @pytest.mark.parametrize("name", ["lightly", "dystress"])
    @pytest.mark.parametrize("sizes", [(512, 512, 128), (256, 64, 32)])
    def test_lightly(self, name, sizes):
        SimCLRProjectionHead = pytest.importorskip("lightly.models.modules").SimCLRProjectionHead
        theirs = seeded(SimCLRProjectionHead, *sizes)
        ours = seeded(make_head, name, sizes[0], sizes[2], hidden_features=sizes[1])
        x = torch.randn(16, sizes[0])
        assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.eval()(x), theirs.eval()(x))  # from the same seed
        other = make_head(name, sizes[0], sizes[2], hidden_features=sizes[1])
        other.load_state_dict(theirs.layers.state_dict())
        assert torch.equal(other.eval()(x), theirs(x))  # and from the same state

    def test_output_bn(self):
        x = torch.randn(64, 20)
        for name in ("lightly", "linear"):
            plain, normal = (seeded(make_head, name, 20, 6, output_bn=False),
                             seeded(make_head, name, 20, 6, output_bn=True))
            assert isinstance(plain[-1], nn.Linear) and plain[-1].bias is not None and normal[-2].bias is None
            assert normal(x).mean(0).abs().max() < 1e-5 < plain(x).mean(0).abs().max()
            assert torch.allclose(normal(x).std(0, unbiased=False), torch.ones(6), atol=1e-3)
        assert isinstance(make_head("lightly", 20)[-1], nn.BatchNorm1d) and isinstance(make_head("linear", 20)[-1],
                                                                                       nn.Linear)

    @pytest.mark.parametrize("name", HEADS)
    def test_width_and_seed(self, name):
        head = seeded(make_head, name, 24, 10)
        assert (head.eval()(torch.randn(3, 24)).shape == (3, head.out_features) and head.out_features
                == (24 if name == "none" else 10))
        assert same_weights(head, seeded(make_head, name, 24, 10))


class TestFiles:
    @pytest.mark.parametrize("name, stem", [("conv3", "cifar"), ("conv6", "cifar"), ("resnet18", "cifar"),
                                            ("resnet18", "imagenet")])
    def test_round_trip(self, name, stem, tmp_path):
        encoder = make_encoder(name, stem).train()
        encoder(images(8))  # moves the running statistics
        loaded = load_encoder(save_encoder(encoder, tmp_path / "new" / "encoder.pt"))
        assert loaded.config == encoder.config and loaded.features == encoder.features and not loaded.training
        assert list(loaded.state_dict()) == list(encoder.state_dict()) and same_weights(loaded, encoder)
        assert (torch.equal(loaded(images()), encoder.eval()(images())) and os.listdir(tmp_path / "new")
                == ["encoder.pt"])
        loaded.train()(images()).sum().backward()
        assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())

    def test_loading_leaves_the_random_state(self, tmp_path):
        path = save_encoder(make_encoder("conv3"), tmp_path / "encoder.pt")
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        load_encoder(path)
        assert torch.equal(torch.rand(3), expected)

    def test_a_training_checkpoint_with_the_two_keys_loads(self, tmp_path):
        encoder = make_encoder("resnet18", "imagenet")
        torch.save({"encoder": encoder.state_dict(), "config": {"encoder": "resnet18", "stem": "imagenet",
                                                                "temperature": "free", "epochs": 3},
                    "optimiser": {"lr": 0.1}, "epoch": 2}, tmp_path / "checkpoint.pt")
        assert same_weights(load_encoder(tmp_path / "checkpoint.pt"), encoder)

    def test_a_compiled_encoder_is_saved_under_its_own_names(self, tmp_path):
        encoder = make_encoder("conv3")
        assert same_weights(load_encoder(save_encoder(torch.compile(encoder), tmp_path / "encoder.pt")), encoder)

    def test_a_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        path, first = tmp_path / "encoder.pt", make_encoder("conv3")
        save_encoder(first, path)

        def cut_off(value, file):
            file.write_bytes(b"half")
            raise OSError("no space left on device")
        monkeypatch.setattr(torch, "save", cut_off)
        with pytest.raises(OSError, match="no space"): save_encoder(make_encoder("conv6"), path)
        assert os.listdir(tmp_path) == ["encoder.pt"] and same_weights(load_encoder(path), first)

    @pytest.mark.parametrize("cut", [0, 100, 5000])
    def test_a_truncated_file_is_named(self, cut, tmp_path):
        path = save_encoder(make_encoder("conv3"), tmp_path / "encoder.pt")
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=re.escape(str(path))): load_encoder(path)

    def test_no_foreign_code_runs(self, tmp_path):
        class Trap:
            def __reduce__(self): return os.mkdir, (str(tmp_path / "sprung"),)
        torch.save({"encoder": {}, "config": {"encoder": "conv3"}, "more": Trap()}, tmp_path / "trap.pt")
        with pytest.raises(ValueError, match="trap.pt"): load_encoder(tmp_path / "trap.pt")
        assert os.listdir(tmp_path) == ["trap.pt"]

    @pytest.mark.parametrize("content, message", [
        ({"conv1.weight": torch.ones(1)}, "holds no encoder"), (torch.ones(3), "holds no encoder"),
        ({"encoder": {}, "config": 3}, "holds no encoder"),
        ({"encoder": {}, "config": {"stem": "cifar"}}, "holds no encoder"),
        ({"encoder": {}, "config": {"encoder": "conv3"}}, "do not fit"),
        ({"encoder": 7, "config": {"encoder": "conv3"}}, "holds no encoder"),
        ({"encoder": {}, "config": {"encoder": "vgg"}}, "config: name: 'vgg' came")])
    def test_other_contents_are_named(self, content, message, tmp_path):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message): load_encoder(tmp_path / "other.pt")

    def test_the_wrong_stem_does_not_fit(self, tmp_path):
        torch.save({"encoder": make_encoder("resnet18", "imagenet").state_dict(), "config": {"encoder": "resnet18"}},
                   tmp_path / "stem.pt")
        with pytest.raises(ValueError, match="stem.pt holds weights that do not fit .*'stem': 'cifar'"):
            load_encoder(tmp_path / "stem.pt")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere.pt"): load_encoder(tmp_path / "nowhere.pt")

    def test_only_an_encoder_with_a_config_is_saved(self, tmp_path):
        with pytest.raises(TypeError, match="encoder: Linear has no config"):
            save_encoder(nn.Linear(2, 2), tmp_path / "encoder.pt")
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call, message", [
    (lambda: make_encoder("resnet20"), "name: 'resnet20' came; give one of conv3, conv6, resnet18, resnet34, "
     "resnet50"),
    (lambda: make_encoder("resnet18", "small"), "stem: 'small' came; give one of cifar, imagenet"),
    (lambda: make_encoder("conv6", "imagenet"), "stem of conv6: 'imagenet' came; give one of cifar"),
    (lambda: make_head("mlp", 512), "name: 'mlp' came; give one of lightly, dystress, linear, none"),
    (lambda: make_head("linear", 0), "in_features: 0"), (lambda: make_head("linear", 8, -1), "out_features: -1"),
    (lambda: make_head("lightly", 8, hidden_features=-2), "hidden_features: -2"),
    (lambda: make_encoder(None), "name: None"), (lambda: make_encoder("resnet18", ["cifar"]), "stem: ['cifar']")])
def test_refuses(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)): call()


class TestTimm:
    "Networks of timm by name."
    VIT = "timm:vit_tiny_patch16_224(patch_size=3, embed_dim=48, depth=2, num_heads=3)"

    @pytest.mark.parametrize("name, size, features", [
        (VIT, 18, 48), ("timm:convnext_atto(patch_size=1, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))", 18, 32),
        ("timm:mobilenetv3_small_050", 32, 1024)])
    def test_features_seed_and_file(self, name, size, features, tmp_path):
        pytest.importorskip("timm")
        encoder, state = seeded(make_encoder, name, size=size), torch.get_rng_state()
        assert same_weights(encoder, seeded(make_encoder, name, size=size))
        assert encoder.training and encoder.config == {"encoder": name, "stem": "cifar", "size": size}
        loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder.pt"))
        assert torch.equal(torch.get_rng_state(), state) and loaded.config == encoder.config
        x = images(3, size)
        assert torch.equal(loaded(x), encoder.eval()(x)) and loaded(x).shape == (3, features) == (3, loaded.features)

    @pytest.mark.parametrize("name, size, said", [
        ("timm:", 32, "encoder: 'timm:' came"), ("timm:vit_tiny_patch16", 32, "encoder.*such as vit_tiny_patch16_"),
        ("timm:resnet18(3)", 32, "argument=literal"),
        ("timm:resnet18(**{'layers': (1, 1, 1, 1)})", 32, "argument=literal"),
        ("timm:resnet18(layers=__import__('os'))", 32, "argument=literal"),
        ("timm:0.5", 32, "argument=literal"),
        ("timm:resnet18.a1_in1k", 32, "argument=literal"),
        ("timm:resnet18(pretrained=True)", 32, "leave pretrained out"),
        ("timm:resnet18(checkpoint_path='x')", 32, "leave checkpoint_path out"),
        ("timm:vit_tiny_patch16_224(img_size=9)", 32, "leave img_size out"),
        ("timm:convnext_atto", 18, "cannot take images of 18 × 18"), ("timm:resnet18(wide=3)", 32, "encoder.*wide"),
        ("timm:vit_tiny_patch16_224(proj_drop_rate=0.1)", 32, "drops at random"),
        ("timm:resnet18(drop_path_rate=0.1)", 32, "drops at random")])
    def test_what_cannot_be_had_is_said_in_one_line(self, name, size, said):
        pytest.importorskip("timm")
        with pytest.raises(ValueError, match=said) as error: make_encoder(name, size=size)
        assert str(error.value).startswith("encoder: ") and "\n" not in str(error.value)

    def test_without_timm(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
        with pytest.raises(ValueError, match="encoder: .*timm is not installed; pip install timm, the extra `timm`"):
            make_encoder("timm:resnet26")
        assert make_encoder("conv3").features == 256

    def test_the_stem_is_its_own(self):
        with pytest.raises(ValueError, match="stem of timm:resnet18"): make_encoder("timm:resnet18", "imagenet", 32)
