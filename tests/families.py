"""Small models with random weights of the families of transformers and MLPs on which units are checked."""

import torch
import torchvision
from torch import nn

from ttmpd.models.modules import count_parameters
from ttmpd.models.run import first_tensor, predict
from ttmpd.records import Removal, Unit
from ttmpd.surgery.cut import cut
from ttmpd.surgery.masks import mask_of, masked, skipped
from ttmpd.surgery.units.base import DepthUnits

FAMILIES_OF_TEXT = ("bert", "roberta", "distilbert", "gpt2", "llama", "llama, grouped queries")

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "use_cache": False,
}


def text_model(name: str) -> nn.Module:
    import transformers as hf

    configs = {
        "bert": lambda: hf.BertConfig(**TEXT, num_attention_heads=4),
        "roberta": lambda: hf.RobertaConfig(**TEXT, num_attention_heads=4),
        "distilbert": lambda: hf.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=2, n_heads=4),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        ),
        "llama": lambda: hf.LlamaConfig(**TEXT, num_attention_heads=4),
        "llama, grouped queries": lambda: hf.LlamaConfig(**TEXT, num_attention_heads=4, num_key_value_heads=2),
    }
    torch.manual_seed(0)
    return hf.AutoModelForSequenceClassification.from_config(configs[name]()).eval()


def lively(model: nn.Module) -> nn.Module:
    """The model with weights large enough, layer scales included, for every part to show in the answer."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        elif float(parameter.detach().abs().max()) < 0.1:
            nn.init.normal_(parameter)
    return model


def vision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(built(name))


def built(name: str) -> nn.Module:
    import timm
    import transformers as hf

    if name == "hf vit":
        config = hf.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        return hf.AutoModelForImageClassification.from_config(config).eval()
    if name == "torchvision vit":
        return torchvision.models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=5).eval()
    if name == "torchvision swin":
        return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5).eval()
    small = {
        "vit": ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32}),
        "deit": ("deit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32}),
        "beit": ("beit_base_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32}),
        "eva": ("eva02_tiny_patch14_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 28}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "img_size": 32, "window_size": 4},
        ),
        "mixer": ("mixer_s32_224", {"img_size": 64}),
        "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    }
    model, options = small[name]
    return timm.create_model(model, num_classes=5, **options).eval()


def example(model: nn.Module, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name in FAMILIES_OF_TEXT:
        return torch.randint(3, 50, (2, 7), generator=generator)
    side = {"eva": 28, "mixer": 64, "convnext": 32}.get(name, 32)
    return torch.randn(2, 3, side, side, generator=generator)


def family(name: str) -> nn.Module:
    return text_model(name) if name in FAMILIES_OF_TEXT else vision_model(name)


FAMILIES_OF_IMAGES = (
    "vit", "deit", "beit", "eva", "swin", "hf vit", "torchvision vit", "torchvision swin", "mixer", "convnext",
)  # fmt: skip


def check_sublayers(kind: DepthUnits, name: str) -> tuple[Unit, ...]:
    """The units of the kind in a family: masked equals cut to 1e-5, of each and of all, and weights fall as stated."""
    model = family(name)
    batch = example(model, name)
    units = kind.find(model, batch).units
    with torch.no_grad():
        whole = predict(model, batch)
        for chosen in (*((unit,) for unit in units), units):
            student = cut(model, [Removal(unit, "drop") for unit in chosen])
            with masked(model, {unit: mask_of(unit) for unit in chosen}):
                expected = predict(model, batch)
            assert torch.allclose(predict(student, batch), expected, atol=1e-5)
            with skipped(model, chosen):
                assert torch.allclose(predict(model, batch), expected, atol=1e-5)
            gone = count_parameters(model) - count_parameters(student)
            assert gone == sum(unit.n_params for unit in chosen)
            assert not chosen or not torch.equal(expected, whole)
        assert torch.equal(predict(model, batch), whole)
        if units:
            program = torch.export.export(student, (batch,)).module()
            assert torch.allclose(first_tensor(program(batch)), first_tensor(student(batch)), atol=1e-5)
    return units
