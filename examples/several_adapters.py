"""Two adapters on one model: switch, mix, switch off, detach. Run: python examples/several_adapters.py --steps 10"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratory as lt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default="tests/models/stories260k", help="a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(args.base)
tokenizer = AutoTokenizer.from_pretrained(args.base)
texts = {"pirate": "The captain hid the gold under the old tree.", "garden": "Tom gave water to the small red flowers."}
batches = {name: tokenizer(text, return_tensors="pt") for name, text in texts.items()}


def loss_on(name: str) -> torch.Tensor:
    return model(**batches[name], labels=batches[name]["input_ids"]).loss


with torch.no_grad():
    base = {name: loss_on(name).item() for name in texts}

for name, method in {"pirate": lt.LoRA(rank=4), "garden": lt.DoRA(rank=2)}.items():
    lt.adapt(model, method, where="attention", name=name)  # the new adapter is the active one
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=3e-3))
    for _ in range(args.steps):
        loss_on(name).backward()
        optimizer.step()
        optimizer.zero_grad()

with torch.no_grad():
    for name in texts:
        lt.use(model, name)
        print(f"{name}: {base[name]:.3f} -> {loss_on(name).item():.3f} with its own adapter")
        assert loss_on(name).item() < base[name], "each adapter helps on its own text"
    lt.use(model, "pirate", "garden", mix=[0.5, 0.5])
    print("half of each:", {name: round(loss_on(name).item(), 3) for name in texts})
    with lt.disabled(model):
        assert all(loss_on(name).item() == base[name] for name in texts), "the base is untouched"

lt.detach(model)
with torch.no_grad():
    assert all(loss_on(name).item() == base[name] for name in texts), "detaching restores the base bit for bit"
