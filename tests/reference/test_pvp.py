"""PVP's module, visual prompt tuning, against its official code: shallow and deep, with the head, and some SGD steps.

Every tensor of the file belongs to the prompted transformer. The two stages of PVP (the prompts trained on one task, then with a new
head on another) have no public code and no numbers here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import loratory as lt
from tests.reference.vectors import Vectors

BLOCK = {  # the official block's names -> those of transformers
    "attention_norm": "layernorm_before",
    "attn.query": "attention.q_proj",
    "attn.key": "attention.k_proj",
    "attn.value": "attention.v_proj",
    "attn.out": "attention.o_proj",
    "ffn_norm": "layernorm_after",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}
PROMPTS = ("transformer.prompt_embeddings", "transformer.deep_prompt_embeddings")


def ours(name: str) -> str:
    """The name of an official parameter in ViTForImageClassification."""
    name = name.replace("transformer.encoder.encoder_norm", "vit.layernorm")
    name = name.replace("embeddings.patch_embeddings.", "embeddings.patch_embeddings.projection.")
    name = name.replace("transformer.encoder.layer.", "vit.layers.").replace("transformer.", "vit.")
    for official, own in BLOCK.items():
        name = name.replace(f".{official}.", f".{own}.")
    return f"classifier{name.removeprefix('head')}" if name.startswith("head.") else name


def prompted(v: Vectors, variant: str) -> tuple[Any, dict[str, Tensor]]:
    """The model with its prompts, and the trained tensors by their official names."""
    from transformers import ViTConfig, ViTForImageClassification

    s = v.settings
    config = ViTConfig(
        image_size=s["image"],
        patch_size=s["patch"],
        hidden_size=s["dim"],
        intermediate_size=s["mlp"],
        num_attention_heads=s["heads"],
        num_hidden_layers=s["layers"],
        num_labels=s["classes"],
        layer_norm_eps=s["layer_norm_eps"],
        hidden_act=s["activation"],
        hidden_dropout_prob=s["dropout"],
        attention_probs_dropout_prob=s["dropout"],
    )
    model = ViTForImageClassification(config).double()
    start = f"{variant}.init."
    given = {name.removeprefix(start): v.given(name) for name in v.tensors if name.startswith(start)}
    model.load_state_dict({ours(name): tensor for name, tensor in given.items() if name not in PROMPTS})
    lt.adapt(
        model,
        lt.VPT(tokens=s["num_tokens"], deep=variant == "deep", dropout=s["dropout"]),
        also_train="classifier",
        seed=s["seed"],
    )
    trained = {name.rpartition("/")[2]: p for name, p in lt.trained(model).items()}
    (P,) = (p for name, p in trained.items() if not name.startswith("classifier"))
    bound, generator = s["prompt_init_bound"], torch.Generator().manual_seed(s["seed"])
    torch.testing.assert_close(P.detach(), torch.empty_like(P).uniform_(-bound, bound, generator=generator))
    with torch.no_grad():
        P.copy_(torch.cat([given[name] for name in PROMPTS if name in given]))
    return model.train(), trained


def official(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors, or what stands beside them, as the official code has them."""
    found = {f"head.{leaf}": trained[f"classifier.{leaf}"] for leaf in ("weight", "bias")}
    (P,) = (p for name, p in trained.items() if not name.startswith("classifier"))
    return found | {PROMPTS[0]: P[:1]} | ({PROMPTS[1]: P[1:]} if len(P) > 1 else {})


def test_every_tensor():
    v = Vectors("pvp")
    x, labels, s = v.given("x"), v.given("labels"), v.settings
    for variant in ("shallow", "deep"):
        model, trained = prompted(v, variant)
        logits = model(x).logits
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        v.compare(f"{variant}.logits", logits)
        v.compare(f"{variant}.loss", loss)
        for name, gradient in official({n: p.grad for n, p in trained.items()}).items():
            v.compare(f"{variant}.grad.{name}", gradient)
        about = {key: value for key, value in s["optimizer"].items() if key not in ("name", "params")}
        optimizer = torch.optim.SGD(lt.param_groups(model, lr=about.pop("lr")), **about)
        for _ in range(s["steps"]):
            optimizer.zero_grad()
            F.cross_entropy(model(x).logits, labels).backward()
            optimizer.step()
        v.compare(f"{variant}.after.logits", model(x).logits)
        for name, p in official(trained).items():
            v.compare(f"{variant}.after.{name}", p)
    v.finish()
