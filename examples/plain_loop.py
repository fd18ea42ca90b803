"""A plain training loop: adapt, train, save, reload, merge. Run: python examples/plain_loop.py --steps 20"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratory as lt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default="tests/models/stories260k", help="a folder, or a name on the hub")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(args.base)
tokenizer = AutoTokenizer.from_pretrained(args.base)
batch = tokenizer("Lily asked the owl why the moon follows her home.", return_tensors="pt")

lt.adapt(model, lt.DoRA(rank=4), where="all-linear")
print(lt.summary(model))

optimizer = torch.optim.AdamW(lt.param_groups(model, lr=3e-3, weight_decay=0.01))
losses = []
for _ in range(args.steps):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as folder:
    lt.save(model, folder)
    again = AutoModelForCausalLM.from_pretrained(args.base)
    lt.load(again, folder)
    model.eval()
    with torch.no_grad():
        trained = model(**batch).logits
        reloaded = again(**batch).logits
        print(lt.merge(again))
        merged = again(**batch).logits

assert losses[-1] < losses[0], "training lowers the loss"
assert torch.equal(trained, reloaded), "a reloaded adapter gives the same bits"
assert torch.allclose(trained, merged, rtol=0, atol=1e-4), "the merged model gives the same answers"
