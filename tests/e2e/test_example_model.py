"""The classifier: how much of it is trained, what stands before the classes, whose weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cv_classification.config import InputError, ModelConfig
from cv_classification.model import Classifier, build_model, check_model, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 5
# Each with the parameters of its classifier, its number of stages, and the start of its last one.
FAMILIES = {
    "test_resnet": ("fc.", 5, "layer4."),
    "test_vit": ("head.", 7, ("blocks.5.", "norm.")),
    "test_convnext": ("head.fc.", 5, "stages.3."),
    "test_efficientnet": ("classifier.", 6, ("blocks.4.", "conv_head.", "bn2.")),
    "resnet18": ("fc.", 5, "layer4."),
    "vit_tiny_patch16_224": ("head.", 13, ("blocks.11.", "norm.")),
}
# What some have after the last stage, besides the classifier.
NECKS = {"test_convnext": ("head.norm.",)}
SIZE = 32
Names = str | tuple[str, ...]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of each family, as made for seven classes."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    for name in FAMILIES:
        net: Any = timm.create_model(name, num_classes=7)
        for key, value in net.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 1.5)
        torch.save(net.state_dict(), folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in FAMILIES}


def build(files: dict[str, Path], name: str, **settings: Any) -> Classifier:
    if not name.startswith("vit"):
        settings["image_size"] = SIZE if name != "test_vit" else 160
    return build_model(ModelConfig(name=name, weights=files[name], **settings), CLASSES)


def trainable(model: Classifier) -> set[str]:
    return {name for name, value in model.net.named_parameters() if value.requires_grad}


def starting(model: Classifier, start: Names) -> set[str]:
    return {name for name, _ in model.net.named_parameters() if name.startswith(start)}


def step(model: Classifier) -> None:
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    images = torch.rand(4, 3, model.size, model.size) * 255
    F.cross_entropy(model.train()(images), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


def moved(model: Classifier, before: dict[str, torch.Tensor]) -> set[str]:
    after = model.net.state_dict()
    return {name for name in after if not torch.equal(after[name], before[name])}


def snapshot(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_alone_is_trained(name: str, files: dict[str, Path]) -> None:
    model = build(files, name, tune="head")
    head = starting(model, FAMILIES[name][0])
    assert len(head) == 2
    assert trainable(model) == head
    before = snapshot(model)
    step(model)
    assert moved(model, before) == head  # and no statistics of BatchNorm


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_stages_are_trained(name: str, files: dict[str, Path]) -> None:
    head, stages, last = FAMILIES[name]
    one = build(files, name, tune=1)
    after = starting(one, (head, *NECKS.get(name, ())))
    assert trainable(one) == after | starting(one, last)
    assert trainable(build(files, name, tune=stages)) == starting(one, "")
    two = trainable(build(files, name, tune=2))
    assert trainable(one) < two < starting(one, "")
    with pytest.raises(InputError, match=rf"model\.tune={stages + 1}: it has {stages} stages"):
        build(files, name, tune=stages + 1)


def test_statistics_move_where_weights_do(files: dict[str, Path]) -> None:
    model = build(files, "test_resnet", tune=1)
    statistics = {name for name in model.net.state_dict() if "running" in name}
    before = snapshot(model)
    step(model)
    last = {name for name in statistics if name.startswith("layer4.")}
    assert moved(model, before) & statistics == last != set()
    assert all(not name.startswith(("conv1", "bn1", "layer1")) for name in moved(model, before))
    full = build(files, "test_resnet")
    step(full)
    assert moved(full, before) >= statistics


def test_frozen_layers_stay_as_in_evaluation(files: dict[str, Path]) -> None:
    model = build(files, "test_resnet", tune="head").train()
    assert model.training
    assert not model.net.layer1.training
    assert model.net.fc.training
    assert not model.eval().net.fc.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tune": "head"}, r"^model\.tune='head' works with model\.pretrained=true or model\.wei"),
        ({"tune": 2}, r"^model\.tune=2 works with "),
        ({"tune": "scratch", "pretrained": True}, r"^model\.tune='scratch' works without "),
        ({"tune": "scratch", "weights": Path(__file__)}, r"^model\.tune='scratch' works without "),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_model(ModelConfig(name="resnet18", **settings))


def test_scratch_trains_all() -> None:
    model = build_model(ModelConfig(name="test_resnet", tune="scratch", image_size=SIZE), CLASSES)
    assert trainable(model) == starting(model, "")


def test_a_model_without_stages_says_so(tmp_path: Path) -> None:
    net: Any = timm.create_model("pit_ti_224", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "pit.pt")
    config = ModelConfig(name="pit_ti_224", weights=tmp_path / "pit.pt", tune=1)
    with pytest.raises(InputError, match=r"model\.tune=1: it has 0 stages that timm can tell"):
        build_model(config, CLASSES)
    assert len(trainable(build_model(config.model_copy(update={"tune": "head"}), CLASSES))) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_the_files_but_for_the_classes(name: str, files: dict[str, Path]) -> None:
    model = build(files, name)
    state = torch.load(files[name], weights_only=True)
    head = starting(model, FAMILIES[name][0])
    assert moved(model, state | {key: torch.empty(0) for key in head}) == head
    assert "state_dict" not in model.net.pretrained_cfg
    follows = build_model(
        ModelConfig(name=name, weights=files[name], image_size=model.size), CLASSES, weights=False
    )
    assert len(moved(follows, snapshot(model)) - head) > 5


def test_weights_for_as_many_classes_as_timm_has(files: dict[str, Path]) -> None:
    config = ModelConfig(name="test_resnet", weights=files["test_resnet"], image_size=SIZE)
    assert build_model(config, 1000).net.fc.out_features == 1000


def test_weights_that_are_not_its_own_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(files["test_resnet"], weights_only=True)
    lacking = {name: value for name, value in state.items() if not name.startswith("layer3.")}
    ours = {"model": {f"net.{name}": value for name, value in lacking.items()}}
    vit = torch.load(files["test_vit"], weights_only=True)
    for index, content in enumerate((lacking, ours, vit)):
        path = tmp_path / f"{index}.pt"
        torch.save(content, path)
        config = ModelConfig(name="test_resnet", weights=path, image_size=SIZE)
        with pytest.raises(InputError, match=r"cannot be built so: .*Missing key") as refused:
            build_model(config, CLASSES)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [*FAMILIES, "mobilenetv3_small_050"])
def test_a_head_of_its_own(name: str) -> None:
    config: dict[str, Any] = {"name": name, "image_size": 160}
    head = {"hidden": 12, "activation": "gelu", "dropout": 0.25}
    model = build_model(ModelConfig(**config, head=head), CLASSES)
    plain = build_model(ModelConfig(**config), CLASSES)
    place = plain.net.pretrained_cfg["classifier"]
    old, layers = plain.net.get_submodule(place), list(model.net.get_submodule(place))
    assert [layers[0].in_features, layers[0].out_features] == [old.in_features, 12]
    assert isinstance(layers[1], nn.GELU) or "GELU" in type(layers[1]).__name__
    assert layers[2].p == 0.25
    assert [layers[3].in_features, layers[3].out_features] == [12, CLASSES]
    # All before the classifier computes what it did.
    model.net.load_state_dict(plain.net.state_dict(), strict=False)
    features: list[torch.Tensor] = []
    for module in (old, layers[0]):
        module.register_forward_hook(lambda module, given, out: features.append(given[0]))
    images = torch.randint(256, (2, 3, model.size, model.size), dtype=torch.uint8)
    with torch.inference_mode():
        assert plain.eval()(images).shape == model.eval()(images).shape == (2, CLASSES)
    torch.testing.assert_close(*features)
    assert model.net.get_classifier() is model.net.get_submodule(place)


def test_a_head_of_its_own_is_what_is_tuned(files: dict[str, Path]) -> None:
    head = {"hidden": 12, "dropout": 0.5}
    model = build(files, "test_convnext", tune="head", head=head)
    expected = {f"head.fc.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")}
    assert trainable(model) == expected
    before = snapshot(model)
    step(model)
    assert moved(model, before) == expected


def test_dropout_alone_comes_before_the_classes() -> None:
    config = ModelConfig(name="test_resnet", image_size=SIZE, head={"dropout": 0.5})
    fc = build_model(config, CLASSES).net.fc
    assert [type(layer) for layer in fc] == [nn.Dropout, nn.Linear]
    assert fc[1].out_features == CLASSES


def test_a_head_that_cannot_be_replaced_is_refused() -> None:
    config = ModelConfig(name="resnetv2_18", image_size=SIZE, head={"hidden": 4})
    with pytest.raises(InputError, match=r"model\.head replaces a single linear classifier"):
        build_model(config, CLASSES)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_trial_run_leaves_no_trace(name: str) -> None:
    torch.manual_seed(3)
    model = build_model(ModelConfig(name=name, image_size=160), CLASSES)
    after = torch.rand(3)
    torch.manual_seed(3)
    net: Any = timm.create_model(name, num_classes=CLASSES)
    assert moved(model, net.state_dict()) == set()
    assert model.net.state_dict().keys() == net.state_dict().keys()  # timm's own head
    assert torch.equal(after, torch.rand(3))


def test_loaded_weights_are_those_that_predict() -> None:
    """LeViT keeps attention biases that evaluation computed; the trial run is one."""
    first, second = (build_model(ModelConfig(name="levit_128s"), CLASSES) for _ in range(2))
    for value in first.net.parameters():
        nn.init.normal_(value, std=0.1)
    images = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    load_weights(second, first.train().state_dict(), Path("best.pt"))
    assert not second.training
    load_weights(first.train(), first.state_dict(), Path("best.pt"))
    assert first.training
    with torch.inference_mode():
        assert torch.equal(first.eval()(images), second(images))
