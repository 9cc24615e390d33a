"""Every family of transformers and MLPs through the whole tool: inspect, compress, save, load, export.

    python benchmarks/families.py                 # about 15 minutes on one core; rows are kept as they are finished
    python benchmarks/families.py --family "timm BEiT" "HF BERT, MiniLM"

Random weights, small configurations of four blocks (two for Swin's stages), random inputs: what is shown is that each
step works and answers alike, not what accuracy would be. `compress --speedup 1.3` runs with its defaults but for 64
samples and 40 steps. Columns: units found by kind, the measured speedup and whether the target is met, what the plan
did, and the largest differences between answers, over the largest answer: of the model with half of all members masked
and cut (`masked_gap`), of the student and its exported program (`export_gap`), of the student and its artifact loaded
in a fresh process (`fresh_gap`). Writes results/families.csv.
"""

import argparse
import collections
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import cached, with_earlier, write_csv
from ttmpd.artifact.read import load
from ttmpd.data.tokenization import Tokenization
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import TTMPDError
from ttmpd.models.run import predict
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.inspect import inspect
from ttmpd.records import Removal, WidthUnit
from ttmpd.surgery.cut import cut
from ttmpd.surgery.find import find_units
from ttmpd.surgery.masks import mask_of, masked

SIDE, TOKENS, WORDS, CLASSES = 64, 32, 200, 10
LAYERS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LAYERS |= {"num_labels": CLASSES, "initializer_range": 0.08}
CLASSES_ONLY: dict[str, Any] = {"num_labels": CLASSES}
SMALL = LAYERS | {"vocab_size": WORDS, "pad_token_id": 0}
VIT = {"embed_dim": 128, "depth": 4, "num_heads": 4, "img_size": SIDE, "patch_size": 8}


def text(config: Any) -> nn.Module:
    model = from_config(hf.AutoModelForSequenceClassification, config)
    vars(model)["pretrained_cfg"] = Tokenization("", padding=0, max_length=TOKENS, limit=TOKENS).to_dict()
    return model


def from_config(kind: Any, config: Any) -> nn.Module:
    """A model of transformers with random weights."""
    model: nn.Module = kind.from_config(config)
    return model


def images(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm ViT": lambda: images("vit_tiny_patch16_224", **VIT),
    "timm DeiT": lambda: images("deit_tiny_patch16_224", **VIT),
    "timm BEiT": lambda: images("beit_base_patch16_224", **VIT),
    "timm EVA": lambda: images("eva02_tiny_patch14_224", **VIT),
    "timm Swin": lambda: images(
        "swin_tiny_patch4_window7_224", embed_dim=64, depths=(2, 2), num_heads=(2, 4), img_size=SIDE, window_size=4
    ),
    "timm MLP-Mixer": lambda: timm.models.MlpMixer(CLASSES, SIDE, patch_size=8, num_blocks=4, embed_dim=128),
    "timm ConvNeXt": lambda: images("convnext_atto", depths=(1, 1, 2, 2), dims=(16, 32, 64, 128)),
    "torchvision ViT": lambda: torchvision.models.VisionTransformer(SIDE, 8, 4, 4, 128, 512, num_classes=CLASSES),
    "torchvision Swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 64, [2, 2], [2, 4], [4, 4], num_classes=CLASSES
    ),
    "HF ViT": lambda: from_config(
        hf.AutoModelForImageClassification,
        hf.ViTConfig(**LAYERS, image_size=SIDE, patch_size=8)
    ),
    "HF BERT, MiniLM": lambda: text(hf.BertConfig(**SMALL)),
    "HF RoBERTa": lambda: text(hf.RobertaConfig(**SMALL)),
    "HF DistilBERT": lambda: text(
        hf.DistilBertConfig(**CLASSES_ONLY, vocab_size=WORDS, dim=128, hidden_dim=512, n_layers=4, n_heads=4)
    ),
    "HF GPT-2": lambda: text(
        hf.GPT2Config(
            vocab_size=WORDS, n_embd=128, n_layer=4, n_head=4, pad_token_id=0, use_cache=False, **CLASSES_ONLY
        )
    ),
    "HF Llama, grouped queries": lambda: text(hf.LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False)),
}  # fmt: skip


def built(family: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and 64 random inputs."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():  # layer scales of nearly zero would hide what blocks do
        if parameter.dim() == 1 and float(parameter.detach().abs().max()) < 0.1:
            nn.init.normal_(parameter, std=0.3)
    of_text = family.startswith("HF") and family != "HF ViT"
    inputs = torch.randint(3, WORDS, (64, TOKENS)) if of_text else torch.randn(64, 3, SIDE, SIDE)
    return model, inputs


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest answer."""
    found, wanted = found.detach(), wanted.detach()
    return float(f"{float((found - wanted).abs().max() / wanted.abs().max()):.2g}")


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return predict(model.eval(), inputs[:4])


def masked_gap(model: nn.Module, inputs: Tensor) -> float:
    units = [unit for unit in find_units(model, inputs[:2], ["head", "neuron"]).units if isinstance(unit, WidthUnit)]
    kept = {unit: tuple(range(unit.n_members // 2)) for unit in units}
    with masked(model, {unit: mask_of(unit, members) for unit, members in kept.items()}):
        wanted = answers(model, inputs)
    return gap(answers(cut(model, [Removal(unit, "narrow", kept[unit]) for unit in units]), inputs), wanted)


def fresh_gap(family: str, student: nn.Module, inputs: Tensor, folder: Path) -> float:
    subprocess.run([sys.executable, __file__, "--answer", str(folder), "--family", family], check=True)
    return gap(load_file(folder / "answers.safetensors")["logits"], answers(student, inputs))


def export_gap(student: nn.Module, inputs: Tensor) -> float | str:
    """The difference, or what torch.export says."""
    try:
        program = torch.export.export(student, (inputs[:4],)).module()
    except Exception as error:  # torch.export has errors of many kinds
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    found = program(inputs[:4])
    return gap(getattr(found, "logits", found), answers(student, inputs))


def row(family: str) -> dict[str, Any]:
    model, inputs = built(family)
    start = time.perf_counter()
    found = inspect(model, inputs, batch_size=32, timed=False)
    kinds = collections.Counter(unit.kind for unit in found.units)
    result = compress(model, inputs, speedup=1.3, num_samples=64, batch_size=32, distill=OneTime(steps=40))
    done = collections.Counter(f"{r.unit.kind} {r.action}" for r in result.plan.removals)
    assert result.report.latency is not None
    speedup = result.report.latency.speedup
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "out")
        return {
            "family": family, "blocks": kinds["block"], "attentions": kinds["attention"], "mlps": kinds["mlp"],
            "heads": kinds["head"], "neurons": kinds["neuron"],
            "refused": len(found.refused), "speedup": round(speedup.median, 2), "met": result.met,
            "done": ", ".join(f"{n} {what}" for what, n in sorted(done.items())),
            "masked_gap": masked_gap(model, inputs), "export_gap": export_gap(result.model, inputs),
            "fresh_gap": fresh_gap(family, result.model, inputs, Path(folder) / "out"),
            "seconds": round(time.perf_counter() - start, 1), "seed": 0,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), nargs="+", default=list(FAMILIES))
    parser.add_argument("--answer", type=Path, help="load the artifact and write its answers beside it")
    args = parser.parse_args()
    if args.answer:
        model, inputs = built(args.family[0])
        save_file({"logits": answers(load(args.answer, model=model), inputs)}, args.answer / "answers.safetensors")
        return
    rows = []
    for family in args.family:
        try:
            rows.append(cached(f"families/{family.replace(' ', '_')}", functools.partial(row, family), stamped=True))
        except TTMPDError as error:
            rows.append({"family": family, "error": str(error)})
        print(rows[-1], flush=True)
    print(write_csv("families.csv", with_earlier("families.csv", rows, ("family",))))


if __name__ == "__main__":
    main()
